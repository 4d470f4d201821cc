"""Parity: each rolled-up bar beside the venue's own, its outcome stored, each difference traced to the
minutes behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from marketdata_assets.context import open_toolbox
from marketdata_assets.flows.derive.rollup import derive
from marketdata_assets.flows.prove.audit import Finding, audit_rollup
from marketdata_assets.flows.read.sql import connected
from marketdata_assets.model.bar import SCHEMA
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import history, parity, raw
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.quality.parity import compare_bars
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.views import answer
from marketdata_assets.transforms.rollup import roll_up
from marketdata_assets.venues.registry import facts_of
from marketdata_tests.conftest import Universe, needs_shared
from marketdata_tests.samples import BTC, JANUARY, MINUTE, START, dump, frame, real_bars, row
from marketdata_tests.steps import SkippingClock, at, partitions, run_ingest, window

HOUR = TIMEFRAMES["1h"]
KRAKEN = facts_of("kraken").tolerances
ONE = TIMEFRAMES["1m"]
Replay = Callable[..., Any]


# --------------------------------------------------------------------------------- one month, by wa
def audited(settings: Settings, timeframes: Sequence[str] = ("1h",)) -> dict[str, list[Finding]]:
    """Roll up and audit all partitions; the findings of `matches_native`, by timeframe."""
    found: dict[str, list[Finding]] = {name: [] for name in timeframes}
    with open_toolbox(settings, policy=SkippingClock().policy()) as toolbox:
        for derived in derive(toolbox, partitions(settings)):
            for name in timeframes:
                (finding,) = [
                    f
                    for f in audit_rollup(toolbox, derived, TIMEFRAMES[name])
                    if f.check == "matches_native"
                ]
                found[name].append(finding)
    return found


def stored(
    settings: Settings, timeframe: str = "1h", partition: Partition | None = None
) -> pl.DataFrame:
    """The outcomes in the lake."""
    with open_toolbox(settings) as toolbox:
        found = toolbox.lake.read(
            parity(TIMEFRAMES[timeframe]), partition or partitions(settings)[0]
        )
    assert found is not None
    return found


def unequal(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return frame.filter(pl.col("outcome") != "equal").to_dicts()


@pytest.mark.parametrize("rollups", ["duckdb", "parquet"])
def test_binance_equals_its_own_bars_in_nine_columns(
    replay: Replay, universe: Universe, rollups: str
) -> None:
    exchange = replay("2024-01-11T00:00:30Z")
    names = ("15m", "1h", "1d")
    settings = universe(
        f"{exchange.url}/binance",
        since="2024-01-08",
        until="2024-01-11",
        now="2024-02-02",
        extra="reference: [15m, 1h, 1d]",
        rollups=rollups,
    )
    for name in ("1m", *names):
        run_ingest(settings, timeframe=name)
    found = audited(settings, names)
    assert {name: finding.numbers for name, (finding,) in found.items()} == {
        name: {"compared": bars, "different": 0, "within_tolerance": 0}
        for name, bars in zip(names, (288, 72, 3), strict=True)
    }
    for name, bars in zip(names, (288, 72, 3), strict=True):
        outcomes = stored(settings, name)
        assert outcomes["outcome"].to_list() == ["equal"] * bars
        assert (
            outcomes.select(pl.col("^.*_apart$")).sum_horizontal().to_list() == [0] * bars
        )  # all nine were compared
        assert (
            outcomes.select(pl.exclude("open_time", "outcome", "columns", "cause", "minutes"))
            .null_count()
            .sum_horizontal()
            .item()
            == 0
        )


SUMS = "volume quote_volume trades taker_buy_volume taker_buy_quote_volume"
Plant = tuple[str, dict[str, Any], str, str]
IN_MINUTES: dict[str, Plant] = {
    "a bar dropped": (
        "01:34",
        {"delete": True},
        SUMS,
        " is missing (missing at source: the venue has no 1m there, though its ",
    ),
    "volume doubled": (
        "02:34",
        {"volume_factor": 2},
        SUMS,
        " is counted twice as high as in the venue's own bar: volume ",
    ),
    "volume off by a factor": (
        "03:34",
        {"volume_factor": 1.25},
        SUMS,
        " differs by one share in every column: volume ",
    ),
    "a spike upwards": (
        "04:34",
        {"high": 99999},
        "high",
        " reaches 99999, beyond the venue's own 46",
    ),
    "a spike downwards": ("05:34", {"low": 1}, "low", " reaches 1, beyond the venue's own 4"),
    "the first minute dropped": (
        "06:00",
        {"delete": True},
        f"open {SUMS}",
        " is missing (missing at source: the venue has no 1m there, ",
    ),
    "another close": (
        "08:59",
        {"close": 46001},
        "high close",
        " closes at 46001, the venue's own bar at 4",
    ),
}
"""What is planted at a minute of 2024-01-10: the change, the columns of its hour that differ, and how
the cause is told.
"""
IN_HOURS: dict[str, Plant] = {
    "volume restated": (
        "01:34",
        {"volume_factor": 1.5},
        SUMS,
        " differs by one share in every column: volume ",
    ),
    "a minute lost": (
        "02:34",
        {"delete": True},
        SUMS,
        " is the difference, to the digit: the venue's own bar is without it: volume ",
    ),
    "an extreme that no minute reaches": (
        "03:34",
        {"high": 99999},
        "high",
        "high: no 1m bar reaches the venue's own 99999, ours ends at 4",
    ),
}
"""The same, planted in the native bars alone."""


@needs_shared
@pytest.mark.parametrize(
    ("first", "plants"),
    [("1h", IN_MINUTES), ("1m", IN_HOURS)],
    ids=["in the minutes", "in the hours"],
)
def test_what_is_planted_is_traced_to_its_minute(
    replay: Replay, universe: Universe, first: str, plants: dict[str, Plant]
) -> None:
    """The exchange changes 1m bars for good after it gave the 1h bars, or the other way round."""
    exchange = replay("2024-01-11T00:00:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        since="2024-01-10",
        until="2024-01-11",
        now="2024-02-02",
        extra="reference: [1h]",
    )
    run_ingest(settings, timeframe=first)
    for minute, change, _, _ in plants.values():
        exchange.admin(
            op="restate", venue="binance", symbol="BTCUSDT", t=f"2024-01-10T{minute}:00Z", **change
        )
    run_ingest(settings, timeframe="1m" if first == "1h" else "1h")
    (finding,) = audited(settings)["1h"]
    assert finding.numbers == {"compared": 24, "different": len(plants), "within_tolerance": 0}
    assert not finding.passed
    for shown, kept, (minute, change, columns, says) in zip(
        finding.table, unequal(stored(settings)), plants.values(), strict=True
    ):
        assert shown["open_time"] == f"2024-01-10T{minute[:2]}:00:00Z"
        assert (kept["open_time"], kept["outcome"], kept["columns"]) == (
            at(f"2024-01-10T{minute[:2]}:00"),
            "differs",
            columns,
        )
        assert (kept["cause"], kept["minutes"]) == (shown["cause"], shown["minutes"])
        nowhere = first == "1m" and "high" in change
        assert kept["minutes"] == ("" if nowhere else f"2024-01-10T{minute}:00Z")
        assert (says if nowhere else f"{minute}:00Z{says}") in kept["cause"]


@needs_shared
def test_the_venue_at_odds_with_its_own_finer_bars(replay: Replay, universe: Universe) -> None:
    """The 1h bar is restated; the 15m ones, fetched before as the 1m ones were, still equal ours."""
    exchange = replay("2024-01-11T00:00:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        since="2024-01-10",
        until="2024-01-11",
        now="2024-02-02",
        extra="reference: [15m, 1h]",
    )
    run_ingest(settings)
    run_ingest(settings, timeframe="15m")
    exchange.admin(
        op="restate", venue="binance", symbol="BTCUSDT", t="2024-01-10T07:34:00Z", high=99999
    )
    run_ingest(settings, timeframe="1h")
    (quarter,), (hour,) = audited(settings, ("15m", "1h")).values()
    assert quarter.passed
    (shown,) = hour.table
    assert str(shown["cause"]).startswith(
        "the venue's own 15m bars equal ours, so its 1h bar is at odds with them; high: no 1m bar reaches"
    )


@needs_shared
def test_a_row_dropped_from_every_answer(replay: Replay, universe: Universe) -> None:
    """The fault drop_rows on all 1m answers: what the first page lacks is believed, and parity says
    what it held.
    """
    exchange = replay("2024-01-11T00:00:30Z")
    exchange.admin(
        fault="drop_rows", rate=1, match="klines", interval="1m", params={"n": 1, "index": 1}
    )
    settings = universe(
        f"{exchange.url}/binance",
        since="2024-01-10",
        until="2024-01-11",
        now="2024-02-02",
        extra="reference: [1h]",
    )
    run_ingest(settings, timeframe="1h")
    run_ingest(settings)
    (finding,) = audited(settings)["1h"]
    assert finding.numbers["different"] == 1
    (kept,) = unequal(stored(settings))
    lost = exchange.truth(
        "binance", "BTCUSDT", "1m", "2024-01-10T00:01:00Z", "2024-01-10T00:02:00Z"
    )[0]
    assert (kept["minutes"], kept["volume_apart"], kept["trades_apart"]) == (
        "2024-01-10T00:01:00Z",
        -Decimal(lost["v"]),
        -lost["n"],
    )


@needs_shared
@pytest.mark.parametrize("reference", ["[1h]", "[15m, 1h]"])
def test_the_minute_that_binance_lacks_itself(
    replay: Replay, universe: Universe, reference: str
) -> None:
    """SOL 2023-02-14 16:39: not in the 1m bars, counted in the 15m and 1h ones."""
    exchange = replay("2023-02-16T00:00:30Z")
    extra = f"reference: {reference}"
    settings = universe(
        f"{exchange.url}/binance",
        "[SOL/USDT]",
        since="2023-02-14",
        until="2023-02-16",
        now="2023-03-02",
        extra=extra,
    )
    names = [tf.name for tf in settings.venues["binance"].fetched]
    for name in names:
        run_ingest(settings, timeframe=name)
    for findings in audited(settings, names[1:]).values():
        (shown,) = findings[0].table
        assert shown["minutes"] == "2023-02-14T16:39:00Z"
        assert (
            "2023-02-14T16:39:00Z is missing (missing at source: the venue has no 1m there, though its "
            in str(shown["cause"])
        )
        assert (
            "ours is less by volume 4767.5, quote_volume 103695.3454, trades 162, "
            "taker_buy_volume 1938.45" in str(shown["cause"])
        )
    (kept,) = unequal(stored(settings))
    assert kept["volume_apart"] == Decimal("-4767.5")
    with (
        open_toolbox(settings) as toolbox,
        connected(toolbox, None, window("2023-02-01", "2023-03-01")) as sql,
    ):
        found = answer(
            sql, "SELECT market, open_time, minutes FROM parity.ohlcv_1h WHERE outcome <> 'equal'"
        )
        assert found.rows() == [
            ("binance:SOL-USDT", at("2023-02-14T16:00:00Z"), "2023-02-14T16:39:00Z")
        ]
        counted = answer(sql, "SELECT count(*), count(DISTINCT outcome) FROM parity.ohlcv_1h")
        assert counted.rows() == [(48, 2)]


# --------------------------------------------------------------------------------- what venues need
def kraken(symbol: str, timeframe: str, span: str) -> pl.DataFrame:
    """Real bars of Kraken's archives: six columns and the number of trades."""
    rows = dump("kraken", symbol, timeframe, span)
    opens = (
        pl.from_epoch("time")
        .dt.replace_time_zone("UTC")
        .cast(SCHEMA["open_time"])
        .alias("open_time")
    )
    given = {
        "open": "open",
        "high": "high",
        "low": "low",
        "close": "close",
        "volume": "volume",
        "trades": "count",
    }
    values = [
        (pl.col(given[n]).cast(t) if n in given else pl.lit(None, t)).alias(n)
        for n, t in SCHEMA.items()
        if n != "open_time"
    ]
    return rows.select(opens, *values)


@needs_shared
def test_what_krakens_tolerance_covers() -> None:
    """Every price is equal and every count of trades within one; of volumes all days, and all but a
    few hours.
    """
    found: dict[str, list[pl.DataFrame]] = {}
    whole = window("2023-03-01", "2023-03-21")
    for symbol in ("XBTUSD", "XBTUSDT"):
        ours = roll_up(
            kraken(symbol, "1m", "2023-03-01_2023-03-21"),
            ONE,
            [TIMEFRAMES[n] for n in ("5m", "15m", "1h", "12h", "1d")],
            whole=whole,
        )
        for timeframe, bars in ours.items():
            native = kraken(symbol, timeframe.name, "2023-01-01_2023-03-31")
            found.setdefault(timeframe.name, []).append(
                compare_bars("kraken", bars, native, span=whole)
            )
    judged = {name: pl.concat(frames) for name, frames in found.items()}
    assert {
        name: dict(frame["outcome"].value_counts().iter_rows()) for name, frame in judged.items()
    } == {
        "5m": {"equal": 9993, "within_tolerance": 1145, "differs": 223},
        "15m": {"equal": 2668, "within_tolerance": 1088, "differs": 84},
        "1h": {"equal": 327, "within_tolerance": 618, "differs": 15},
        "12h": {"equal": 1, "within_tolerance": 78, "differs": 1},
        "1d": {"within_tolerance": 40},
    }
    together = pl.concat(judged.values())
    assert together.filter(pl.col("outcome") == "differs")["columns"].unique().to_list() == [
        "volume"
    ]
    assert together["trades_apart"].abs().max() == KRAKEN["trades"].absolute == 1
    days = (
        judged["1d"]
        .select(pl.col("volume_apart").abs().cast(float) / pl.col("volume_native").cast(float))
        .to_series()
        .max()
    )
    assert 0.0146 < days < KRAKEN["volume"].relative  # type: ignore[operator]


@needs_shared
def test_what_binances_tolerance_covers() -> None:
    """The 4h bars of 2020 differ from their hours in the last digits of quote volumes, all of them
    within the table, none wider.
    """
    span = "2020-02-01_2020-03-31"
    hours, native = (real_bars("BTCUSDT", name, span) for name in ("1h", "4h"))
    whole = window("2020-02-01", "2020-04-01")
    judged = compare_bars(
        "binance",
        roll_up(hours, HOUR, [TIMEFRAMES["4h"]], whole=whole)[TIMEFRAMES["4h"]],
        native,
        span=whole,
    )
    assert dict(judged["outcome"].value_counts().iter_rows()) == {
        "equal": 196,
        "within_tolerance": 163,
    }
    assert set(" ".join(judged["columns"].unique()).split()) == {
        "quote_volume",
        "taker_buy_quote_volume",
    }
    stricter = compare_bars(
        "kraken",
        roll_up(hours, HOUR, [TIMEFRAMES["4h"]], whole=whole)[TIMEFRAMES["4h"]],
        native,
        span=whole,
    )
    assert dict(stricter["outcome"].value_counts().iter_rows()) == {
        "equal": 196,
        "differs": 163,
    }  # another venue's table does not help


@needs_shared
def test_kraken_by_its_api(replay: Replay, universe: Universe) -> None:
    """Twelve hours of minutes is all it gives: earlier hours are not judged. Minutes without a trade
    are filled with the close before.
    """
    exchange = replay("2023-03-17T06:00:30Z", kraken_burst=1000, kraken_rate=1000)
    extra = "reference: [5m, 1h]"
    settings = universe(
        f"{exchange.url}/kraken",
        "[BTC/USDT]",
        "2023-03-16",
        "2023-03-18",
        "2023-03-18",
        venue="kraken",
        extra=extra,
    )
    for name in ("1m", "5m", "1h"):
        run_ingest(settings, timeframe=name)
    (five,), (hour,) = audited(settings, ("5m", "1h")).values()
    assert five.numbers == {"compared": 144, "different": 36, "within_tolerance": 2}
    assert hour.numbers == {"compared": 12, "different": 1, "within_tolerance": 3}
    causes = {str(shown["open_time"]): (shown["cause"], shown["minutes"]) for shown in five.table}
    says, idle = causes["2023-03-16T18:25:00Z"]
    assert idle == "2023-03-16T18:25:00Z/2023-03-16T18:28:00Z"
    assert says == (
        "open: 2023-03-16T18:25:00Z opens at 24712.6 without a trade, the venue's own bar at 24708.9, with its first trade, "
        "of 2023-03-16T18:28:00Z"
    )


@needs_shared
def test_the_real_halt(replay: Replay, universe: Universe) -> None:
    """2023-03-24: neither side has bars of the halt, and the hours around it are equal."""
    exchange = replay("2023-03-25T00:00:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        since="2023-03-24",
        until="2023-03-25",
        now="2023-03-26",
        extra="reference: [15m, 1h]",
    )
    for name in ("1m", "15m", "1h"):
        run_ingest(settings, timeframe=name)
    numbers = {
        name: finding.numbers for name, (finding,) in audited(settings, ("15m", "1h")).items()
    }
    assert {name: (found["compared"], found["different"]) for name, found in numbers.items()} == {
        "15m": (91, 0),
        "1h": (23, 0),
    }


# --------------------------------------------------------------------------------- by hand
def hours(*changes: dict[str, Any]) -> pl.DataFrame:
    return frame(row(START + i * HOUR.width, **change) for i, change in enumerate(changes))


def judged(
    ours: pl.DataFrame, native: pl.DataFrame, venue: str = "binance"
) -> list[tuple[str, str]]:
    return compare_bars(venue, ours, native, span=JANUARY.month).select("outcome", "columns").rows()


def test_what_is_not_given_is_not_compared() -> None:
    assert judged(
        hours({"trades": None}, {}), hours({}, {"trades": None, "quote_volume": None})
    ) == [("equal", ""), ("equal", "")]


def test_digit_for_digit_where_no_tolerance_is_written_down() -> None:
    digit = Decimal("10.000000000001")
    assert judged(hours({}, {"close": digit}), hours({"volume": digit}, {})) == [
        ("differs", "volume"),
        ("differs", "close"),
    ]


def test_the_edge_of_a_tolerance() -> None:
    native = hours({}, {}, {}, {})
    ours = hours(
        {"volume": Decimal("10.15")},
        {"volume": Decimal("9.85")},
        {"volume": Decimal("10.150001")},
        {"volume": 10, "trades": 8},
    )
    found = [
        ("within_tolerance", "volume"),
        ("within_tolerance", "volume"),
        ("differs", "volume"),
        ("within_tolerance", "trades"),
    ]
    assert judged(ours, native, "kraken") == found
    assert [outcome for outcome, _ in judged(ours, native, "coinbaseexchange")] == ["differs"] * 4


def test_columns_name_what_makes_the_outcome() -> None:
    """Where a bar differs, what lies within the tolerance is not named, but kept."""
    (one,) = compare_bars(
        "kraken", hours({"volume": 11, "trades": 8}), hours({}), span=JANUARY.month
    ).to_dicts()
    assert (one["outcome"], one["columns"], one["volume_apart"], one["trades_apart"]) == (
        "differs",
        "volume",
        1,
        1,
    )


def test_bars_on_one_side_and_outside_the_span() -> None:
    ours, native = (
        hours({}, {}, {}),
        hours({}, {}, {}, {}).filter(pl.col("open_time") != START + HOUR.width),
    )
    span = Window(START, START + 4 * HOUR.width)
    assert compare_bars("binance", ours, native, span=span)["outcome"].to_list() == [
        "equal",
        "only_ours",
        "equal",
        "only_native",
    ]
    assert compare_bars("binance", ours, native, span=Window(START, START + HOUR.width))[
        "outcome"
    ].to_list() == ["equal"]
    assert compare_bars("binance", ours, native, span=Window(START, START)).is_empty()


@pytest.fixture
def whole_day(sandbox: Any, universe: Universe) -> Settings:
    """2024-01-02 of the sandbox's BTC/USDT: 1m and 1h bars as they should be."""
    settings = universe(
        sandbox[1],
        since="2024-01-02",
        until="2024-01-03",
        extra="reference: [1h]",
        now="2024-01-10T00:00:00Z",
    )
    run_ingest(settings)
    run_ingest(settings, timeframe="1h")
    return settings


def altered(
    settings: Settings, timeframe: str, change: Callable[[pl.DataFrame], pl.DataFrame]
) -> None:
    """The stored raw bars, changed behind the ledger's back."""
    with open_toolbox(settings) as toolbox:
        bars = toolbox.lake.read(raw(TIMEFRAMES[timeframe]), JANUARY)
        assert bars is not None
        toolbox.lake.write(raw(TIMEFRAMES[timeframe]), JANUARY, change(bars))


SPAN = window("2024-01-02T05:00", "2024-01-02T06:00")


def without(bars: pl.DataFrame) -> pl.DataFrame:
    return bars.filter(~pl.col("open_time").is_between(SPAN.start, SPAN.end, closed="left"))


def test_a_bar_that_only_the_venue_has(whole_day: Settings) -> None:
    altered(whole_day, "1m", without)
    (finding,) = audited(whole_day)["1h"]
    (shown,) = finding.table
    assert (shown["outcome"], shown["minutes"]) == (
        "only_native",
        "2024-01-02T05:00:00Z/2024-01-02T06:00:00Z",
    )
    assert (
        shown["cause"]
        == "no 1m bar of it is stored: 2024-01-02T05:00:00Z/2024-01-02T06:00:00Z are missing (not fetched yet)"
    )


def test_a_bar_that_only_we_have(whole_day: Settings) -> None:
    altered(whole_day, "1h", without)
    (finding,) = audited(whole_day)["1h"]
    (shown,) = finding.table
    assert (shown["outcome"], shown["minutes"]) == (
        "only_ours",
        "2024-01-02T05:00:00Z/2024-01-02T06:00:00Z",
    )


def test_the_first_and_last_minute(whole_day: Settings) -> None:
    """Open and close come from other minutes when the first or last is missing, and all missing
    minutes are named.
    """
    gone = [SPAN.start, SPAN.end - MINUTE]
    altered(whole_day, "1m", lambda bars: bars.filter(~pl.col("open_time").is_in(gone)))
    (finding,) = audited(whole_day)["1h"]
    (shown,) = finding.table
    assert shown["minutes"] == "2024-01-02T05:00:00Z 2024-01-02T05:59:00Z"
    assert str(shown["cause"]).startswith(
        "2024-01-02T05:00:00Z, 2024-01-02T05:59:00Z are missing (not fetched yet, though its 1h bar counts it)"
    )
    assert "open: 2024-01-02T05:01:00Z opens at" in str(shown["cause"])


def test_a_correction_that_the_native_bar_does_not_know(whole_day: Settings) -> None:
    """The 1m bar has a new revision; the 1h bar still counts the old one, which history keeps."""
    moment = SPAN.start + 7 * MINUTE
    old: list[pl.DataFrame] = []

    def correct(bars: pl.DataFrame) -> pl.DataFrame:
        old.append(bars.filter(pl.col("open_time") == moment))
        more = (
            pl.when(pl.col("open_time") == moment)
            .then(pl.col("volume") + 3)
            .otherwise(pl.col("volume"))
        )
        return bars.with_columns(more.cast(SCHEMA["volume"]).alias("volume"))

    altered(whole_day, "1m", correct)
    with open_toolbox(whole_day) as toolbox:
        table = history(ONE)
        told = {"known_at": SPAN.start, "replaced_at": SPAN.end, "source": "rest"}
        revision = old[0].with_columns(pl.lit(value).alias(name) for name, value in told.items())
        toolbox.lake.write(table, JANUARY, revision.select(table.typed))
    (finding,) = audited(whole_day)["1h"]
    (shown,) = finding.table
    assert shown["minutes"] == "2024-01-02T05:07:00Z"
    assert (
        "corrected since: 2024-01-02T05:07:00Z: the venue's own bar still counts the earlier values"
        in str(shown["cause"])
    )


def test_where_the_venues_bars_are_not_stored_nothing_is_judged(
    sandbox: Any, universe: Universe
) -> None:
    settings = universe(
        sandbox[1],
        since="2024-01-02",
        until="2024-01-03",
        extra="reference: [1h]",
        now="2024-01-10T00:00:00Z",
    )
    run_ingest(settings)
    (finding,) = audited(settings)["1h"]
    assert finding.passed
    assert finding.numbers["compared"] == 0
    assert "no bars of the venue's own are stored" in finding.says
    with open_toolbox(settings) as toolbox:
        assert toolbox.lake.sizes(parity(HOUR)) == {}


def test_only_what_both_sides_were_asked_for_is_judged(
    sandbox: Any, universe: Universe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native bars are an hour and a half behind: the bars after them are not judged, and no bar is
    missed.
    """
    settings = universe(
        sandbox[1], since="2024-01-02", extra="reference: [1h]", now="2024-01-05T10:30:00Z"
    )
    run_ingest(settings, timeframe="1h")
    later = universe(
        sandbox[1], since="2024-01-02", extra="reference: [1h]", now="2024-01-05T12:00:00Z"
    )
    run_ingest(later)
    (finding,) = audited(later)["1h"]
    assert finding.numbers == {"compared": 3 * 24 + 10, "different": 0, "within_tolerance": 0}
    assert stored(later)["open_time"][-1] == at("2024-01-05T09:00")


def test_the_same_bars_give_the_same_object(whole_day: Settings) -> None:
    audited(whole_day)
    with open_toolbox(whole_day) as toolbox:
        before = toolbox.lake.sizes(parity(HOUR))
        (file,) = (Path(uri) for uri in toolbox.lake.uris(parity(HOUR), [JANUARY]))
    content = file.read_bytes()
    audited(whole_day)
    assert file.read_bytes() == content
    assert list(before) == [(BTC.key, "2024-01-01")]


def test_more_differences_than_are_traced(
    whole_day: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marketdata_assets.flows.prove.parity.TRACED", 2)
    altered(whole_day, "1h", lambda bars: bars.with_columns(trades=pl.col("trades") + 1))
    (finding,) = audited(whole_day)["1h"]
    assert finding.numbers["different"] == 24
    kept = stored(whole_day)
    assert (
        kept["cause"].str.starts_with("no 1m bar is missing, and no single one explains").sum() == 2
    )
    assert (kept["cause"] == "not traced: more than 2 bars differ").sum() == 22


def test_what_the_finer_bars_do_not_add_up_to(sandbox: Any, universe: Universe) -> None:
    """The venue's 15m bar says 2 more than ours, its 1h bar 7 more."""
    settings = universe(
        sandbox[1],
        since="2024-01-02",
        until="2024-01-03",
        extra="reference: [15m, 1h]",
        now="2024-01-10T00:00:00Z",
    )
    for name in ("1m", "15m", "1h"):
        run_ingest(settings, timeframe=name)
    for name, moment, more in (("15m", SPAN.start + 15 * MINUTE, 2), ("1h", SPAN.start, 7)):
        added = (
            pl.when(pl.col("open_time") == moment)
            .then(pl.col("volume") + more)
            .otherwise(pl.col("volume"))
        )
        altered(
            settings,
            name,
            lambda bars, added=added: bars.with_columns(
                added.cast(SCHEMA["volume"]).alias("volume")
            ),
        )  # type: ignore[misc]
    (shown,) = audited(settings, ("15m", "1h"))["1h"][0].table
    assert shown["cause"] == (
        "15m 2024-01-02T05:15:00Z: no 1m bar is missing, and no single one explains that ours is less by volume 2; "
        "and its own 1h bar is at odds with its 15m bars by volume -5"
    )


def test_a_week_that_began_in_the_month_before(sandbox: Any, universe: Universe) -> None:
    """The week of December 3 begins on November 27: the minute that is missing lies in November's
    object.

    The sandbox itself has no bars of 2023-11-27 17:04 to 17:08; the native days say that nothing is
    lacking there.
    """
    settings = universe(
        sandbox[1],
        since="2023-11-20",
        until="2023-12-11",
        extra="reference: [1d, 1w]",
        now="2024-01-10T00:00:00Z",
    )
    for name in ("1m", "1d", "1w"):
        run_ingest(settings, timeframe=name)
    november, december = partitions(settings)
    with open_toolbox(settings) as toolbox:
        bars = toolbox.lake.read(raw(ONE), november)
        assert bars is not None
        toolbox.lake.write(
            raw(ONE), november, bars.filter(pl.col("open_time") != at("2023-11-29T03:00"))
        )
    found = audited(settings, ("1d", "1w"))
    assert [[row["minutes"] for row in finding.table] for finding in found["1d"]] == [
        ["2023-11-29T03:00:00Z"],
        [],
    ]
    assert [finding.numbers["compared"] for finding in found["1w"]] == [1, 2]
    (kept,) = unequal(stored(settings, "1w", december))
    assert (kept["open_time"], kept["minutes"]) == (at("2023-11-27"), "2023-11-29T03:00:00Z")


@needs_shared
def test_a_minute_that_a_rule_refused(replay: Replay, universe: Universe) -> None:
    """The exchange sends a broken 1m bar in every answer; the cause names the rules."""
    exchange = replay("2024-01-11T00:00:30Z")
    exchange.admin(fault="bad_ohlc", rate=1, match="klines", interval="1m", params={"index": 1})
    settings = universe(
        f"{exchange.url}/binance",
        since="2024-01-10",
        until="2024-01-11",
        now="2024-02-02",
        extra="reference: [1h]",
    )
    run_ingest(settings, timeframe="1h")
    run_ingest(settings)
    shown = audited(settings)["1h"][0].table[0]
    assert shown["minutes"] == "2024-01-10T00:01:00Z"
    assert "2024-01-10T00:01:00Z is missing (refused by a rule: " in str(shown["cause"])
