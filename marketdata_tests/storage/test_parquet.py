"""How an object's decimals become 64 bits wide, digit for digit."""

from __future__ import annotations

from decimal import Decimal, localcontext

import polars as pl
import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from marketdata_assets.model.bar import DECIMAL
from marketdata_assets.storage.narrow import narrow_decimals

UNITS = st.integers(-(10**38) + 1, 10**38 - 1)
NUMBERS = st.builds(
    lambda units, digits, zeros: units % 10**digits * (-1) ** (units % 2) * 10**zeros % 10**38,
    UNITS,
    st.integers(1, 38),
    st.integers(0, 20),
)
"""Multiples of 10**-12 with few or many digits, and with zeros behind them."""


def narrowest(units: list[int]) -> tuple[int, int]:
    """Return precision and scale by the digits of the numbers as texts."""
    zeros = min((len(str(u)) - len(str(u).rstrip("0")) for u in units if u), default=12)
    scale = 12 - min(zeros, 12)
    digits = max((len(str(abs(u))) for u in units), default=0) - (12 - scale)
    return (18, scale) if digits <= 18 else (38, 12)


@settings(max_examples=300)
@given(st.lists(st.one_of(NUMBERS, UNITS, st.none()), max_size=80))
@example([10**18 - 1, -(10**18) + 1])
@example([10**18])
@example([10**30 - 10**12, -(10**30) + 10**12])
@example([10**30])
@example([2**64, 2**64 + 10**12, 2**127 // 10**20 * 10**12])
@example([*[10**12] * 79, 1])  # the digits of the last one are in no sample
def test_decimals_take_the_smallest_scale_that_holds_every_digit(units: list[int | None]) -> None:
    with localcontext(prec=60):
        values = [None if u is None else Decimal(u).scaleb(-12) for u in units]
        column = pl.Series("volume", values, dtype=DECIMAL)
        found = narrow_decimals(column)
        precision, scale = narrowest([u for u in units if u is not None])
        width = 64 if precision == 18 else 128
        assert (found.type.precision, found.type.scale) == (precision, scale)
        assert (found.type.bit_width, found.null_count) == (width, units.count(None))
        assert found.cast(pa.decimal128(38, 12)).to_pylist() == values


def test_a_slice_is_narrowed_as_a_column_of_its_own() -> None:
    column = pl.Series("close", [Decimal("0.1"), None, Decimal(7), None], dtype=DECIMAL)
    found = narrow_decimals(column.slice(1, 2))
    assert (found.type.scale, found.to_pylist()) == (0, [None, Decimal(7)])
