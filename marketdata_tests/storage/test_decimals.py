"""How decimals are stored at one of a few types, digit for digit."""

from __future__ import annotations

from decimal import Decimal, localcontext

import polars as pl
import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from marketdata_assets.model.bar import DECIMAL
from marketdata_assets.storage.column_types import DECIMAL_TYPES, NARROW, DecimalType
from marketdata_assets.storage.decimals import store_decimals

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
    digits = max((len(str(abs(u))) for u in units), default=0) - 4
    if zeros < 4:
        return (38, 12)
    return (18, 8) if digits <= 18 else (38, 8)


@settings(max_examples=300)
@given(st.lists(st.one_of(NUMBERS, UNITS, st.none()), max_size=80), st.sampled_from(DECIMAL_TYPES))
@example([10**22 - 10**4, -(10**22) + 10**4], NARROW)
@example([10**22], NARROW)
@example([-(10**22)], NARROW)
@example([10**30], NARROW)
@example([2**64 * 10**4, 2**64, 2**127 // 10**20 * 10**12], NARROW)
@example([*[10**12] * 79, 1], NARROW)
def test_decimals_take_the_first_type_that_holds_every_digit(
    units: list[int | None], at_least: DecimalType
) -> None:
    with localcontext(prec=60):
        values = [None if u is None else Decimal(u).scaleb(-12) for u in units]
        column = pl.Series("volume", values, dtype=DECIMAL)
        found = store_decimals(column, at_least)
        expected = max(at_least, narrowest([u for u in units if u is not None]))
        assert (found.type.precision, found.type.scale) == expected
        width = 64 if expected == NARROW else 128
        assert (found.type.bit_width, found.null_count) == (width, units.count(None))
        assert found.cast(pa.decimal128(38, 12)).to_pylist() == values


def test_a_slice_is_stored_as_a_column_of_its_own() -> None:
    column = pl.Series("close", [Decimal("0.1"), None, Decimal(7), None], dtype=DECIMAL)
    found = store_decimals(column.slice(1, 2), NARROW)
    assert found.to_pylist() == [None, Decimal(7)]
