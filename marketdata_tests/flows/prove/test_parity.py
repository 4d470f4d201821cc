"""Parity: rolled-up bars are compared with native bars, and differences are traced to minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from marketdata_assets.context import open_context
from marketdata_assets.flows.derive.rollup import RollupBuilder
from marketdata_assets.flows.prove.rollup_checks import RollupAuditor
from marketdata_assets.flows.read.sql import open_sql_views
from marketdata_assets.model.bar import BAR_SCHEMA
from marketdata_assets.model.finding import Finding
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import history_table, parity_table, raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.quality.parity import compare_bars
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.views import run_query
from marketdata_assets.transforms.rollup import roll_up
from marketdata_assets.venues.registry import facts_of
from marketdata_tests.conftest import Universe, needs_shared
from marketdata_tests.samples import BTC, JANUARY, MINUTE, START, dump, frame, real_bars, row
from marketdata_tests.steps import SkippingClock, at, partitions, run_ingest, window

HOUR = TIMEFRAMES["1h"]
KRAKEN = facts_of("kraken").tolerances
ONE = TIMEFRAMES["1m"]
Replay = Callable[..., Any]


# --------------------------------------------------------------------------------- one month
def audit(settings: Settings, timeframes: Sequence[str] = ("1h",)) -> dict[str, list[Finding]]:
    """Roll up and audit all partitions; return the findings of `matches_native` by timeframe."""
    found: dict[str, list[Finding]] = {name: [] for name in timeframes}
    with open_context(settings, policy=SkippingClock().policy()) as context:
        for derived in context.bind(RollupBuilder).build(partitions(settings)):
            findings = context.bind(RollupAuditor).audit(derived)
            for name in timeframes:
                (finding,) = [f for f in findings[TIMEFRAMES[name]] if f.check == "matches_native"]
                found[name].append(finding)
    return found


def stored_outcomes(
    settings: Settings, timeframe: str = "1h", partition: Partition | None = None
) -> pl.DataFrame:
    """Return the outcomes in the lake."""
    with open_context(settings) as context:
        found = context.storage.lake.read(
            parity_table(TIMEFRAMES[timeframe]), partition or partitions(settings)[0]
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
    found = audit(settings, names)
    assert {name: finding.numbers for name, (finding,) in found.items()} == {
        name: {"compared": bars, "different": 0, "within_tolerance": 0}
        for name, bars in zip(names, (288, 72, 3), strict=True)
    }
    for name, bars in zip(names, (288, 72, 3), strict=True):
        outcomes = stored_outcomes(settings, name)
        assert outcomes["outcome"].to_list() == ["equal"] * bars
        # all nine columns were compared
        assert outcomes.select(pl.col("^.*_apart$")).sum_horizontal().to_list() == [0] * bars
        assert (
            outcomes.select(pl.exclude("open_time", "outcome", "columns", "cause", "minutes"))
            .null_count()
            .sum_horizontal()
            .item()
            == 0
        )


def test_bars_of_other_lengths_equal_binances_own(
    replay: Replay, universe: Universe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three days, weeks from Monday on and calendar months, each from native hours."""
    exchange, names = replay("2024-02-29T23:59:59Z"), ("2h", "6h", "8h", "3d", "1w", "1M")
    monkeypatch.setenv("MARKETDATA_TIMEFRAMES", f"[{', '.join(names)}]")
    settings = universe(
        f"{exchange.url}/binance",
        since="2024-01-01",
        until="2024-02-29",
        now="2024-03-02",
        extra=f"base: 1h\nreference: [{', '.join(names)}]",
    )
    for name in ("1h", *names):
        run_ingest(settings, timeframe=name)
    found = audit(settings, names)
    counts = {
        name: [finding.numbers["compared"] for finding in findings]
        for name, findings in found.items()
    }
    # of January and of February until its 28th
    assert counts == {
        "2h": [372, 336],
        "6h": [124, 112],
        "8h": [93, 84],
        "3d": [9, 10],
        "1w": [4, 4],
        "1M": [1, 0],
    }
    assert all(finding.passed for findings in found.values() for finding in findings)


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
"""Minutes of 2024-01-10, each with its change, the differing columns of its hour, and the cause."""
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
"""Changes at minutes of 2024-01-10 that only the native bars have."""


@needs_shared
@pytest.mark.parametrize(
    ("first", "plants"),
    [("1h", IN_MINUTES), ("1m", IN_HOURS)],
    ids=["in the minutes", "in the hours"],
)
def test_a_planted_change_is_traced_to_its_minute(
    replay: Replay, universe: Universe, first: str, plants: dict[str, Plant]
) -> None:
    """The exchange changes its bars between the fetch of 1h bars and the fetch of 1m bars."""
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
    (finding,) = audit(settings)["1h"]
    assert finding.numbers == {"compared": 24, "different": len(plants), "within_tolerance": 0}
    assert not finding.passed
    for shown, outcome, (minute, change, columns, message) in zip(
        finding.rows, unequal(stored_outcomes(settings)), plants.values(), strict=True
    ):
        assert shown["open_time"] == f"2024-01-10T{minute[:2]}:00:00Z"
        assert (outcome["open_time"], outcome["outcome"], outcome["columns"]) == (
            at(f"2024-01-10T{minute[:2]}:00"),
            "differs",
            columns,
        )
        assert (outcome["cause"], outcome["minutes"]) == (shown["cause"], shown["minutes"])
        nowhere = first == "1m" and "high" in change
        assert outcome["minutes"] == ("" if nowhere else f"2024-01-10T{minute}:00Z")
        assert (message if nowhere else f"{minute}:00Z{message}") in outcome["cause"]


@needs_shared
def test_a_venue_that_contradicts_its_own_finer_bars_is_named(
    replay: Replay, universe: Universe
) -> None:
    """The 1h bar is restated after the fetch of the 1m and 15m bars, so the 15m bars equal ours."""
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
    (quarter,), (hour,) = audit(settings, ("15m", "1h")).values()
    assert quarter.passed
    (shown,) = hour.rows
    assert str(shown["cause"]).startswith(
        "the venue's own 15m bars equal ours, so its 1h bar is at odds with them; "
        "high: no 1m bar reaches"
    )


@needs_shared
def test_a_row_that_every_answer_omits_is_found(replay: Replay, universe: Universe) -> None:
    """The gap in the 1m answers is confirmed, and parity shows the volume that is missing."""
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
    (finding,) = audit(settings)["1h"]
    assert finding.numbers["different"] == 1
    (outcome,) = unequal(stored_outcomes(settings))
    lost = exchange.truth(
        "binance", "BTCUSDT", "1m", "2024-01-10T00:01:00Z", "2024-01-10T00:02:00Z"
    )[0]
    assert (outcome["minutes"], outcome["volume_apart"], outcome["trades_apart"]) == (
        "2024-01-10T00:01:00Z",
        -Decimal(lost["v"]),
        -lost["n"],
    )


@needs_shared
@pytest.mark.parametrize("reference", ["[1h]", "[15m, 1h]"])
def test_a_minute_that_is_missing_at_binance_is_found(
    replay: Replay, universe: Universe, reference: str
) -> None:
    """SOL 2023-02-14 16:39 is missing in the 1m bars and counted in the 15m and 1h bars."""
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
    names = [tf.name for tf in settings.venues["binance"].fetched_timeframes]
    for name in names:
        run_ingest(settings, timeframe=name)
    for findings in audit(settings, names[1:]).values():
        (shown,) = findings[0].rows
        assert shown["minutes"] == "2023-02-14T16:39:00Z"
        assert (
            "2023-02-14T16:39:00Z is missing "
            "(missing at source: the venue has no 1m there, though its " in str(shown["cause"])
        )
        assert (
            "ours is less by volume 4767.5, quote_volume 103695.3454, trades 162, "
            "taker_buy_volume 1938.45" in str(shown["cause"])
        )
    (outcome,) = unequal(stored_outcomes(settings))
    assert outcome["volume_apart"] == Decimal("-4767.5")
    with (
        open_context(settings) as context,
        open_sql_views(
            context.settings,
            context.ledger,
            context.storage,
            keys=None,
            window=window("2023-02-01", "2023-03-01"),
        ) as sql,
    ):
        found = run_query(
            sql, "SELECT market, open_time, minutes FROM parity.ohlcv_1h WHERE outcome <> 'equal'"
        )
        assert found.rows() == [
            ("binance:SOL-USDT", at("2023-02-14T16:00:00Z"), "2023-02-14T16:39:00Z")
        ]
        counted = run_query(sql, "SELECT count(*), count(DISTINCT outcome) FROM parity.ohlcv_1h")
        assert counted.rows() == [(48, 2)]


# --------------------------------------------------------------------------------- tolerances
def kraken(symbol: str, timeframe: str, span: str) -> pl.DataFrame:
    """Read real bars of Kraken's archives: six columns and the number of trades."""
    rows = dump("kraken", symbol, timeframe, span)
    opens = (
        pl.from_epoch("time")
        .dt.replace_time_zone("UTC")
        .cast(BAR_SCHEMA["open_time"])
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
        for n, t in BAR_SCHEMA.items()
        if n != "open_time"
    ]
    return rows.select(opens, *values)


@needs_shared
def test_krakens_tolerance_covers_most_of_its_bars() -> None:
    """Prices are equal and counts of trades differ by at most one.

    The volumes of all days and of all but a few shorter bars are within the tolerance.
    """
    found: dict[str, list[pl.DataFrame]] = {}
    span = window("2023-03-01", "2023-03-21")
    for symbol in ("XBTUSD", "XBTUSDT"):
        ours = roll_up(
            kraken(symbol, "1m", "2023-03-01_2023-03-21"),
            ONE,
            [TIMEFRAMES[n] for n in ("5m", "15m", "1h", "12h", "1d")],
            whole=span,
        )
        for timeframe, bars in ours.items():
            native = kraken(symbol, timeframe.name, "2023-01-01_2023-03-31")
            found.setdefault(timeframe.name, []).append(
                compare_bars("kraken", bars, native, span=span)
            )
    outcomes = {name: pl.concat(frames) for name, frames in found.items()}
    assert {
        name: dict(frame["outcome"].value_counts().iter_rows()) for name, frame in outcomes.items()
    } == {
        "5m": {"equal": 9993, "within_tolerance": 1145, "differs": 223},
        "15m": {"equal": 2668, "within_tolerance": 1088, "differs": 84},
        "1h": {"equal": 327, "within_tolerance": 618, "differs": 15},
        "12h": {"equal": 1, "within_tolerance": 78, "differs": 1},
        "1d": {"within_tolerance": 40},
    }
    together = pl.concat(outcomes.values())
    assert together.filter(pl.col("outcome") == "differs")["columns"].unique().to_list() == [
        "volume"
    ]
    assert together["trades_apart"].abs().max() == KRAKEN["trades"].absolute == 1
    days = (
        outcomes["1d"]
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
    outcomes = compare_bars(
        "binance",
        roll_up(hours, HOUR, [TIMEFRAMES["4h"]], whole=whole)[TIMEFRAMES["4h"]],
        native,
        span=whole,
    )
    assert dict(outcomes["outcome"].value_counts().iter_rows()) == {
        "equal": 196,
        "within_tolerance": 163,
    }
    assert set(" ".join(outcomes["columns"].unique()).split()) == {
        "quote_volume",
        "taker_buy_quote_volume",
    }
    stricter = compare_bars(
        "kraken",
        roll_up(hours, HOUR, [TIMEFRAMES["4h"]], whole=whole)[TIMEFRAMES["4h"]],
        native,
        span=whole,
    )
    # the tolerance of another venue does not apply
    assert dict(stricter["outcome"].value_counts().iter_rows()) == {"equal": 196, "differs": 163}


@needs_shared
def test_kraken_is_compared_where_its_api_has_minutes(replay: Replay, universe: Universe) -> None:
    """The API has twelve hours of minutes, so earlier hours are not judged.

    It fills minutes without a trade with the close before.
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
    (five,), (hour,) = audit(settings, ("5m", "1h")).values()
    assert five.numbers == {"compared": 144, "different": 36, "within_tolerance": 2}
    assert hour.numbers == {"compared": 12, "different": 1, "within_tolerance": 3}
    causes = {str(shown["open_time"]): (shown["cause"], shown["minutes"]) for shown in five.rows}
    message, idle = causes["2023-03-16T18:25:00Z"]
    assert idle == "2023-03-16T18:25:00Z/2023-03-16T18:28:00Z"
    assert message == (
        "open: 2023-03-16T18:25:00Z opens at 24712.6 without a trade, "
        "the venue's own bar at 24708.9, with its first trade, of 2023-03-16T18:28:00Z"
    )


@needs_shared
def test_a_real_halt_is_no_difference(replay: Replay, universe: Universe) -> None:
    """2023-03-24: neither side has bars in the halt, and the hours around it are equal."""
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
    numbers = {name: finding.numbers for name, (finding,) in audit(settings, ("15m", "1h")).items()}
    assert {name: (found["compared"], found["different"]) for name, found in numbers.items()} == {
        "15m": (91, 0),
        "1h": (23, 0),
    }


# --------------------------------------------------------------------------------- by hand
def hours(*changes: dict[str, Any]) -> pl.DataFrame:
    return frame(row(START + i * HOUR.width, **change) for i, change in enumerate(changes))


def judge_outcomes(
    ours: pl.DataFrame, native: pl.DataFrame, venue: str = "binance"
) -> list[tuple[str, str]]:
    return compare_bars(venue, ours, native, span=JANUARY.month).select("outcome", "columns").rows()


def test_a_column_that_is_null_on_one_side_is_not_compared() -> None:
    assert judge_outcomes(
        hours({"trades": None}, {}), hours({}, {"trades": None, "quote_volume": None})
    ) == [("equal", ""), ("equal", "")]


def test_every_digit_counts_without_a_tolerance() -> None:
    digit = Decimal("10.000000000001")
    assert judge_outcomes(hours({}, {"close": digit}), hours({"volume": digit}, {})) == [
        ("differs", "volume"),
        ("differs", "close"),
    ]


def test_a_tolerance_includes_its_limit() -> None:
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
    assert judge_outcomes(ours, native, "kraken") == found
    assert [outcome for outcome, _ in judge_outcomes(ours, native, "coinbaseexchange")] == [
        "differs"
    ] * 4


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


def test_bars_on_one_side_have_an_outcome_and_bars_outside_the_span_have_none() -> None:
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
def complete_day(sandbox: Any, universe: Universe) -> Settings:
    """Store correct 1m and 1h bars of the sandbox's BTC/USDT of 2024-01-02."""
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


def alter(
    settings: Settings, timeframe: str, change: Callable[[pl.DataFrame], pl.DataFrame]
) -> None:
    """Change the stored raw bars without an entry in the ledger."""
    with open_context(settings) as context:
        bars = context.storage.lake.read(raw_table(TIMEFRAMES[timeframe]), JANUARY)
        assert bars is not None
        context.storage.lake.write(raw_table(TIMEFRAMES[timeframe]), JANUARY, change(bars))


SPAN = window("2024-01-02T05:00", "2024-01-02T06:00")


def remove_span(bars: pl.DataFrame) -> pl.DataFrame:
    return bars.filter(~pl.col("open_time").is_between(SPAN.start, SPAN.end, closed="left"))


def test_a_bar_of_the_venue_without_ours_is_only_native(complete_day: Settings) -> None:
    alter(complete_day, "1m", remove_span)
    (finding,) = audit(complete_day)["1h"]
    (shown,) = finding.rows
    assert (shown["outcome"], shown["minutes"]) == (
        "only_native",
        "2024-01-02T05:00:00Z/2024-01-02T06:00:00Z",
    )
    assert shown["cause"] == (
        "no 1m bar of it is stored: "
        "2024-01-02T05:00:00Z/2024-01-02T06:00:00Z are missing (not fetched yet)"
    )


def test_our_bar_without_one_of_the_venue_is_only_ours(complete_day: Settings) -> None:
    alter(complete_day, "1h", remove_span)
    (finding,) = audit(complete_day)["1h"]
    (shown,) = finding.rows
    assert (shown["outcome"], shown["minutes"]) == (
        "only_ours",
        "2024-01-02T05:00:00Z/2024-01-02T06:00:00Z",
    )


def test_a_missing_first_and_last_minute_are_both_named(complete_day: Settings) -> None:
    """Without its first and last minute, open and close of an hour come from other minutes."""
    removed = [SPAN.start, SPAN.end - MINUTE]
    alter(complete_day, "1m", lambda bars: bars.filter(~pl.col("open_time").is_in(removed)))
    (finding,) = audit(complete_day)["1h"]
    (shown,) = finding.rows
    assert shown["minutes"] == "2024-01-02T05:00:00Z 2024-01-02T05:59:00Z"
    assert str(shown["cause"]).startswith(
        "2024-01-02T05:00:00Z, 2024-01-02T05:59:00Z are missing "
        "(not fetched yet, though its 1h bar counts it)"
    )
    assert "open: 2024-01-02T05:01:00Z opens at" in str(shown["cause"])


def test_a_correction_that_the_native_bar_does_not_include_is_named(complete_day: Settings) -> None:
    """The 1m bar has a new revision; the 1h bar counts the old one, which the history keeps."""
    moment = SPAN.start + 7 * MINUTE
    old: list[pl.DataFrame] = []

    def correct(bars: pl.DataFrame) -> pl.DataFrame:
        old.append(bars.filter(pl.col("open_time") == moment))
        more = (
            pl.when(pl.col("open_time") == moment)
            .then(pl.col("volume") + 3)
            .otherwise(pl.col("volume"))
        )
        return bars.with_columns(more.cast(BAR_SCHEMA["volume"]).alias("volume"))

    alter(complete_day, "1m", correct)
    with open_context(complete_day) as context:
        table = history_table(ONE)
        provenance = {"known_at": SPAN.start, "replaced_at": SPAN.end, "source": "rest"}
        revision = old[0].with_columns(
            pl.lit(value).alias(name) for name, value in provenance.items()
        )
        context.storage.lake.write(table, JANUARY, revision.select(table.typed_columns))
    (finding,) = audit(complete_day)["1h"]
    (shown,) = finding.rows
    assert shown["minutes"] == "2024-01-02T05:07:00Z"
    assert (
        "corrected since: 2024-01-02T05:07:00Z: the venue's own bar still counts the earlier values"
        in str(shown["cause"])
    )


def test_without_stored_native_bars_nothing_is_judged(sandbox: Any, universe: Universe) -> None:
    settings = universe(
        sandbox[1],
        since="2024-01-02",
        until="2024-01-03",
        extra="reference: [1h]",
        now="2024-01-10T00:00:00Z",
    )
    run_ingest(settings)
    (finding,) = audit(settings)["1h"]
    assert finding.passed
    assert finding.numbers["compared"] == 0
    assert "no bars of the venue's own are stored" in finding.message
    with open_context(settings) as context:
        assert context.storage.lake.list_sizes(parity_table(HOUR)) == {}


def test_only_the_span_that_both_sides_fetched_is_judged(
    sandbox: Any, universe: Universe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native bars are 90 minutes behind: later bars are not judged and not missing."""
    settings = universe(
        sandbox[1], since="2024-01-02", extra="reference: [1h]", now="2024-01-05T10:30:00Z"
    )
    run_ingest(settings, timeframe="1h")
    later = universe(
        sandbox[1], since="2024-01-02", extra="reference: [1h]", now="2024-01-05T12:00:00Z"
    )
    run_ingest(later)
    (finding,) = audit(later)["1h"]
    assert finding.numbers == {"compared": 3 * 24 + 10, "different": 0, "within_tolerance": 0}
    assert stored_outcomes(later)["open_time"][-1] == at("2024-01-05T09:00")


def test_the_same_bars_give_the_same_object(complete_day: Settings) -> None:
    audit(complete_day)
    with open_context(complete_day) as context:
        before = context.storage.lake.list_sizes(parity_table(HOUR))
        uris = context.storage.lake.find_uris(parity_table(HOUR), [JANUARY])
    file = Path(uris[JANUARY])
    content = file.read_bytes()
    audit(complete_day)
    assert file.read_bytes() == content
    assert list(before) == [(BTC.key, "2024-01-01")]


def test_only_a_limited_number_of_differences_is_traced(
    complete_day: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marketdata_assets.flows.prove.parity.MAX_TRACED", 2)
    alter(complete_day, "1h", lambda bars: bars.with_columns(trades=pl.col("trades") + 1))
    (finding,) = audit(complete_day)["1h"]
    assert finding.numbers["different"] == 24
    outcome = stored_outcomes(complete_day)
    assert (
        outcome["cause"].str.starts_with("no 1m bar is missing, and no single one explains").sum()
        == 2
    )
    assert (outcome["cause"] == "not traced: more than 2 bars differ").sum() == 22


def test_a_native_bar_that_is_not_the_sum_of_its_finer_bars_is_named(
    sandbox: Any, universe: Universe
) -> None:
    """The venue's 15m bar has 2 more than ours, and its 1h bar has 7 more."""
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
        alter(
            settings,
            name,
            lambda bars, added=added: bars.with_columns(
                added.cast(BAR_SCHEMA["volume"]).alias("volume")
            ),
        )  # type: ignore[misc]
    (shown,) = audit(settings, ("15m", "1h"))["1h"][0].rows
    assert shown["cause"] == (
        "15m 2024-01-02T05:15:00Z: no 1m bar is missing, "
        "and no single one explains that ours is less by volume 2; "
        "and its own 1h bar is at odds with its 15m bars by volume -5"
    )


def test_a_week_is_traced_into_the_month_in_which_it_begins(
    sandbox: Any, universe: Universe
) -> None:
    """The week of December 3 begins on November 27: the missing minute is in November's object.

    The sandbox has no bars from 2023-11-27 17:04 to 17:08; by the native days none is missing.
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
    with open_context(settings) as context:
        bars = context.storage.lake.read(raw_table(ONE), november)
        assert bars is not None
        context.storage.lake.write(
            raw_table(ONE), november, bars.filter(pl.col("open_time") != at("2023-11-29T03:00"))
        )
    found = audit(settings, ("1d", "1w"))
    assert [[row["minutes"] for row in finding.rows] for finding in found["1d"]] == [
        ["2023-11-29T03:00:00Z"],
        [],
    ]
    assert [finding.numbers["compared"] for finding in found["1w"]] == [1, 2]
    (outcome,) = unequal(stored_outcomes(settings, "1w", december))
    assert (outcome["open_time"], outcome["minutes"]) == (at("2023-11-27"), "2023-11-29T03:00:00Z")


@needs_shared
def test_a_minute_that_a_rule_rejects_is_named_with_the_rules(
    replay: Replay, universe: Universe
) -> None:
    """The exchange sends a broken 1m bar in every answer."""
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
    shown = audit(settings)["1h"][0].rows[0]
    assert shown["minutes"] == "2024-01-10T00:01:00Z"
    assert "2024-01-10T00:01:00Z is missing (refused by a rule: " in str(shown["cause"])
