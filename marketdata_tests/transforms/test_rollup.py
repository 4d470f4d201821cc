"""Rollups equal plain sums of Python decimals, and on real bars what the exchange publishes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES, ROLLUP_SCHEMA, empty_bars
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.transforms.rollup import roll_up
from marketdata_tests.conftest import needs_shared
from marketdata_tests.samples import (
    START,
    Row,
    at,
    dump,
    frame,
    minutes,
    random_rows,
    real_bars,
    row,
    start_python,
)

M1, H1, W1 = TIMEFRAMES["1m"], TIMEFRAMES["1h"], TIMEFRAMES["1w"]
COARSER = [tf for tf in TIMEFRAMES.values() if tf != M1 and tf.is_made_of(M1)]
FOREVER = Window(at("2000-01-01"), at("2100-01-01"))
VOLUMES = ("volume", "quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume")


# --------------------------------------------------------------------------------- the same by plai
def bucket(moment: datetime, tf: Timeframe) -> datetime:
    """The open time of the coarse bar, by the calendar's own fields."""
    day = moment.replace(hour=0, minute=0, second=0)
    if tf.name == "1w":
        return day - timedelta(days=moment.weekday())
    if tf.name == "1M":
        return day.replace(day=1)
    if tf.name == "3d":
        return day - (day - at("1970-01-01")) % timedelta(days=3)
    return day + (moment - day) // tf.width * tf.width


def aggregate(
    rows: Sequence[Row], base: Timeframe, tf: Timeframe, whole: Window
) -> list[tuple[Any, ...]]:
    """The bars of one timeframe, each from its own rows alone."""
    found = []
    for opened, group in groupby(rows, key=lambda r: bucket(r["open_time"], tf)):
        part = list(group)
        closed = bucket(opened + tf.width, tf)
        if opened < whole.start or closed > whole.end:
            continue
        with localcontext(prec=60):
            sums = {
                name: None if any(r[name] is None for r in part) else sum(r[name] for r in part)
                for name in VOLUMES
            }
        prices = (
            part[0]["open"],
            max(r["high"] for r in part),
            min(r["low"] for r in part),
            part[-1]["close"],
        )
        counts = ((closed - opened) // base.width, len(part))
        found.append(
            (opened, *prices, *sums.values(), vwap(sums["quote_volume"], sums["volume"]), *counts)
        )
    return found


def vwap(quote: Decimal | None, volume: Decimal) -> Decimal | None:
    """quote / volume at 12 decimals."""
    if quote is None or volume == 0:
        return None
    with localcontext(prec=80):
        return (quote / volume).quantize(Decimal(1).scaleb(-12), ROUND_HALF_EVEN)


def holed(
    seed: int, base: Timeframe, start: datetime, count: int, gap_share: float, nulls: float
) -> list[Row]:
    """Random bars on the grid of `base`, with holes; volumes may be zero, prices have up to 18
    digits.
    """
    dice = Random(seed)
    opens = [start + i * base.width for i in range(count) if dice.random() >= gap_share]
    rows = random_rows(seed, opens, 18, nulls=nulls)
    for r in rows:
        # the average stays among the prices, as the rules demand, and at times there is no trade at
        # all
        r["volume"] = Decimal(0) if dice.random() < 0.2 else r["volume"]
        r["quote_volume"] = r["quote_volume"] and r["volume"] * dice.randrange(1, 10**4)
    return rows


FRAMES = st.builds(
    lambda seed, name, offset, count, gap_share, nulls: (
        holed(
            seed, TIMEFRAMES[name], START + offset * TIMEFRAMES[name].width, count, gap_share, nulls
        ),
        TIMEFRAMES[name],
    ),
    st.integers(0, 10**6),
    st.sampled_from(["1s", "1m", "1m", "15m", "1h", "4h", "1d"]),
    st.integers(-400, 400),
    st.integers(0, 400),
    st.sampled_from([0.0, 0.02, 0.5, 0.95]),
    st.sampled_from([0.0, 0.01, 0.5]),
)
EDGES = st.tuples(st.integers(-500, 500), st.integers(0, 900))


@settings(max_examples=60)
@given(FRAMES, EDGES)
def test_rollups_equal_plain_python(found: tuple[list[Row], Timeframe], edges: tuple[int, int]):
    rows, base = found
    start = START + edges[0] * base.width + timedelta(seconds=edges[0] % 2)
    whole = Window(start, start + edges[1] * base.width)
    coarser = [tf for tf in COARSER if tf != base and tf.is_made_of(base)]
    for window in (FOREVER, whole):
        for tf, found in roll_up(frame(rows), base, coarser, whole=window).items():
            assert found.rows() == aggregate(rows, base, tf, window), tf.name
            assert found.schema == pl.Schema(ROLLUP_SCHEMA)


@settings(max_examples=25)
@given(FRAMES)
def test_step_by_step_equals_in_one_go(found: tuple[list[Row], Timeframe]):
    """1m -> 3m -> ... -> 1M gives what 1m -> 1M alone gives, whatever the order asked for."""
    rows, base = found
    coarser = [tf for tf in reversed(COARSER) if tf != base and tf.is_made_of(base)]
    together = roll_up(frame(rows), base, coarser, whole=FOREVER)
    assert list(together) == coarser
    for tf in coarser:
        assert roll_up(frame(rows), base, [tf], whole=FOREVER)[tf].equals(together[tf])


QUARTER = """
import os, sys
import polars as pl
from marketdata_assets.model.bar import BAR_SCHEMA
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.transforms.rollup import roll_up
assert pl.thread_pool_size() == int(os.environ["POLARS_MAX_THREADS"])
whole = Window(parse_time("2024-01-01"), parse_time("2024-04-01"))
opens = pl.datetime_range(whole.start, whole.end, "1m", closed="left", time_zone="UTC", eager=True)
i = pl.int_range(pl.len())
columns = [
    (i * (7919 + n) % 10007 + 1).cast(dtype).alias(name)
    for n, (name, dtype) in enumerate(BAR_SCHEMA.items())
    if n
]
bars = pl.select(opens.alias("open_time")).with_columns(columns).filter(i % 997 > 40)
for frame in roll_up(bars, TIMEFRAMES["1m"], list(TIMEFRAMES.values())[1:], whole=whole).values():
    frame.write_parquet(f"{sys.argv[1]}/{frame.height}")
bars.write_parquet(f"{sys.argv[1]}/bars")
"""


@pytest.mark.server
def test_rollups_of_many_bars_are_the_same_for_any_number_of_threads(tmp_path: Path):
    """A quarter of minutes, more than polars hands to one thread, beside DuckDB's own sums."""
    running = []
    for threads in (1, 2, 8):
        (tmp_path / str(threads)).mkdir()
        running.append(
            start_python(
                QUARTER,
                str(tmp_path / str(threads)),
                env={**os.environ, "POLARS_MAX_THREADS": str(threads)},
            )
        )
    assert [(process.communicate(), process.returncode) for process in running] == [
        (("", ""), 0)
    ] * 3
    for hours in (1, 4, 24):
        by_threads = [
            pl.read_parquet(tmp_path / str(threads) / str(91 * 24 // hours))
            for threads in (1, 2, 8)
        ]
        assert by_threads[0].equals(by_threads[1])
        assert by_threads[0].equals(by_threads[2])
        found = duckdb.sql(
            "SELECT first(open ORDER BY open_time), max(high), min(low),"
            " last(close ORDER BY open_time), sum(volume), sum(quote_volume),"
            " sum(trades)::BIGINT, sum(taker_buy_volume), sum(taker_buy_quote_volume), count(*)"
            f" FROM read_parquet('{tmp_path}/8/bars')"
            f" GROUP BY epoch(open_time)::BIGINT // {hours * 3600}"
            f" ORDER BY epoch(open_time)::BIGINT // {hours * 3600}"
        ).fetchall()
        assert by_threads[0].select(*COLUMN_NAMES[1:], "bars_present").rows() == found


# --------------------------------------------------------------------------------- by hand
def test_an_hour_by_hand():
    """Three bars of one hour, none in the next, one in the hour after that."""
    rows = [
        row(
            at("2024-01-01T05:00"),
            open=Decimal("1.5"),
            high=Decimal(3),
            low=Decimal(1),
            close=Decimal(2),
            volume=Decimal("0.1"),
        ),
        row(
            at("2024-01-01T05:01"),
            open=Decimal(2),
            high=Decimal(9),
            low=Decimal(2),
            close=Decimal(8),
            volume=Decimal("0.2"),
        ),
        row(
            at("2024-01-01T05:59"),
            open=Decimal(8),
            high=Decimal(8),
            low=Decimal("0.5"),
            close=Decimal("0.7"),
            volume=Decimal("0.3"),
        ),
        row(at("2024-01-01T07:30")),
    ]
    first, second = roll_up(frame(rows), M1, [H1], whole=FOREVER)[H1].rows(named=True)
    assert first["open_time"] == at("2024-01-01T05:00")
    assert [first[n] for n in ("open", "high", "low", "close")] == [
        Decimal("1.5"),
        Decimal(9),
        Decimal("0.5"),
        Decimal("0.7"),
    ]
    assert [first[n] for n in VOLUMES] == [Decimal("0.6"), 3090, 21, 18, 1860]
    assert (first["vwap"], first["bars_expected"], first["bars_present"]) == (Decimal(5150), 60, 3)
    assert second["open_time"] == at("2024-01-01T07:00")
    assert (second["vwap"], second["bars_present"]) == (Decimal(103), 1)


def test_weeks_run_from_monday_to_sunday():
    days = [
        row(at(f"2024-01-{day:02}")) for day in (7, 8, 14, 15)
    ]  # Sunday, Monday, Sunday, Monday
    weeks = roll_up(frame(days), TIMEFRAMES["1d"], [W1], whole=FOREVER)[W1]
    assert weeks.select("open_time", "bars_expected", "bars_present").rows() == [
        (at("2024-01-01"), 7, 1),
        (at("2024-01-08"), 7, 2),
        (at("2024-01-15"), 7, 1),
    ]


@pytest.mark.parametrize(
    "name", ["quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume"]
)
def test_one_missing_value_makes_the_sum_unknown_and_no_other(name: str):
    rows = [row(moment) for moment in minutes(120)]
    rows[30][name] = None
    first, second = roll_up(frame(rows), M1, [H1], whole=FOREVER)[H1].rows(named=True)
    assert [n for n in COLUMN_NAMES if first[n] is None] == [name]
    assert (first["vwap"] is None) == (name == "quote_volume")
    assert second[name] is not None
    assert second["vwap"] is not None


def test_a_bucket_without_trades_has_no_vwap():
    no_trade = dict.fromkeys(
        ("volume", "quote_volume", "taker_buy_volume", "taker_buy_quote_volume"), Decimal(0)
    )
    found = roll_up(
        frame(row(moment, **no_trade) for moment in minutes(60)), M1, [H1], whole=FOREVER
    )[H1]
    assert (found["volume"][0], found["vwap"][0]) == (0, None)


def test_the_average_is_rounded_half_to_even():
    tick = Decimal(1).scaleb(-12)
    for units, rounded in ((1, 0), (3, 2), (5, 2), (7, 4)):
        rows = [row(START, volume=Decimal(2), quote_volume=units * tick)]
        assert roll_up(frame(rows), M1, [H1], whole=FOREVER)[H1]["vwap"][0] == rounded * tick


@pytest.mark.parametrize(
    ("start", "end", "hours"),
    [
        ("2024-01-01T00:00", "2024-01-01T03:00", [0, 1, 2]),
        ("2024-01-01T00:01", "2024-01-01T03:00", [1, 2]),
        ("2024-01-01T00:00", "2024-01-01T02:59:59", [0, 1]),
        ("2024-01-01T00:00:01", "2024-01-01T00:59:59", []),
        ("2024-01-01T01:00", "2024-01-01T01:00", []),
    ],
)
def test_a_bucket_that_was_not_wholly_asked_for_is_no_bar(start: str, end: str, hours: list[int]):
    """All 180 minutes are there, but who knows whether they are all there are."""
    bars = frame(row(moment) for moment in minutes(180))
    found = roll_up(bars, M1, [H1], whole=Window(at(start), at(end)))[H1]
    assert found["open_time"].dt.hour().to_list() == hours


def test_nothing_comes_of_nothing():
    found = roll_up(empty_bars(), M1, COARSER, whole=FOREVER)
    assert list(found) == COARSER
    assert all(f.is_empty() and f.schema == pl.Schema(ROLLUP_SCHEMA) for f in found.values())


# --------------------------------------------------------------------------------- what the exchang
SPANS = {
    "2023-02-01_2023-04-30": ("2023-02-01", "2023-05-01"),
    "2024-01-01_2024-02-29": ("2024-01-01", "2024-03-01"),
}


def roll_up_real_bars(
    symbol: str, base: str, span: str, start: str, end: str, names: Sequence[str]
) -> dict[Timeframe, pl.DataFrame]:
    """Real bars of one file, rolled up."""
    return roll_up(
        real_bars(symbol, base, span),
        TIMEFRAMES[base],
        [TIMEFRAMES[n] for n in names],
        whole=Window(at(start), at(end)),
    )


@needs_shared
@pytest.mark.parametrize(
    ("symbol", "span", "names"),
    [
        ("BTCUSDT", "2023-02-01_2023-04-30", ["15m", "1h"]),
        ("ETHUSDT", "2023-02-01_2023-04-30", ["15m", "1h", "1d"]),
        ("BTCUSDT", "2024-01-01_2024-02-29", ["15m", "1h", "1d"]),
        ("ETHUSDT", "2024-01-01_2024-02-29", ["15m", "1h", "1d"]),
    ],
)
def test_rollups_equal_the_native_bars_in_all_nine_columns(
    symbol: str, span: str, names: list[str]
):
    """Every native bar of the dumps, in order and digit for digit, and not one bar more: 2023-03-24
    with its halt as well.
    """
    found = roll_up_real_bars(symbol, "1m", span, *SPANS[span], names)
    for name in names:
        native = real_bars(symbol, name, span)
        assert native.height > 50
        assert found[TIMEFRAMES[name]].select(COLUMN_NAMES).equals(native), name


@needs_shared
def test_the_halt_of_2023_03_24():
    """No bar from 12:40 to 13:59: no bar is made up, and the hour before knows what it lacks."""
    found = roll_up_real_bars(
        "BTCUSDT", "1m", "2023-02-01_2023-04-30", "2023-02-01", "2023-05-01", ["1h"]
    )[H1]
    day = found.filter(pl.col("open_time").dt.date() == at("2023-03-24").date())
    assert [hour for hour in range(24) if hour not in day["open_time"].dt.hour()] == [13]
    assert day.filter(pl.col("open_time").dt.hour().is_between(11, 14))[
        "bars_present"
    ].to_list() == [60, 40, 60]
    assert day.filter(pl.col("open_time").dt.hour() == 12).select(
        "volume", "quote_volume", "trades", "vwap"
    ).row(0) == (0, 0, 0, None)


@needs_shared
def test_the_only_known_difference_is_a_minute_that_the_dump_lacks():
    """SOL 2023-02-14 16:39 is in the native 15m and 1h bars and not in the 1m dump."""
    span = "2023-02-01_2023-02-28"
    assert at("2023-02-14T16:39") not in real_bars("SOLUSDT", "1m", span)["open_time"]
    found = roll_up_real_bars("SOLUSDT", "1m", span, "2023-02-01", "2023-03-01", ["15m", "1h"])
    for name, opened, present in (("15m", "2023-02-14T16:30", 14), ("1h", "2023-02-14T16:00", 59)):
        native, ours = real_bars("SOLUSDT", name, span), found[TIMEFRAMES[name]]
        assert ours["open_time"].equals(native["open_time"])
        other = ours.join(native, on=COLUMN_NAMES, how="anti")
        assert other["open_time"].to_list() == [at(opened)]
        assert other["bars_present"].to_list() == [present]
        assert ours.filter(pl.col("bars_present") < pl.col("bars_expected")).height == 1
        same = native.filter(pl.col("open_time") == at(opened))
        assert [n for n in COLUMN_NAMES if other[n][0] != same[n][0]] == list(VOLUMES)
        assert all(other[n][0] < same[n][0] for n in VOLUMES)


@needs_shared
def test_hours_that_the_exchange_published_roll_up_to_its_four_hours():
    """In 2020 Binance summed quote volumes as floats: our exact sums differ in the last digits."""
    found = roll_up_real_bars(
        "BTCUSDT", "1h", "2020-02-01_2020-03-31", "2020-02-01", "2020-04-01", ["4h"]
    )[TIMEFRAMES["4h"]]
    native = real_bars("BTCUSDT", "4h", "2020-02-01_2020-03-31")
    summed_as_floats = ("quote_volume", "taker_buy_quote_volume")
    assert found.select(COLUMN_NAMES).drop(summed_as_floats).equals(native.drop(summed_as_floats))
    for name in summed_as_floats:
        assert 0 < (found[name] - native[name]).abs().max() <= Decimal("0.00000005")


@needs_shared
@pytest.mark.parametrize("symbol", ["BTCUSDT", "ETHUSDT"])
def test_rollups_equal_the_bars_of_the_api(symbol: str):
    """The API's own 5m to 1w bars are floats.

    Its last week reaches beyond the minutes we have, so it is no bar of ours.
    """
    span = "2024-01-01_2024-02-29"
    five, names = list(COLUMN_NAMES[:6]), ["5m", "15m", "1h", "4h", "1d", "1w", "1M"]
    found = roll_up_real_bars(symbol, "1m", span, *SPANS[span], names)
    for name in names:
        native = dump("binance_spot_native_ohlcv", symbol, name, span)
        opens = (
            pl.from_epoch("open_time", time_unit="ms")
            .dt.replace_time_zone("UTC")
            .cast(BAR_SCHEMA["open_time"])
        )
        native = native.select(opens, *five[1:])
        ours = found[TIMEFRAMES[name]].select(
            "open_time", *(pl.col(n).cast(pl.Float64) for n in five[1:])
        )
        beyond = native[ours.height :]["open_time"].to_list()
        assert beyond == ([at("2024-02-26")] if name == "1w" else [])
        assert ours.equals(native[: ours.height]), name
