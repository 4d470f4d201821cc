"""Gaps: each gap gets the cause that the evidence proves, and each market and day sums exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.flows.fetch.plan import BackfillPlanner
from marketdata_assets.flows.operate.backfill import BacklogFinder
from marketdata_assets.flows.prove.gaps import GapExplainer, ListedGap
from marketdata_assets.flows.prove.raw_checks import RawAuditor
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.ledger.records import IngestRecord, PartitionState, RowAccount
from marketdata_assets.model.gap import UNEXPLAINED, Gap, GapCause, GapReason, GapStatus
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.quality.split import REJECTED_SCHEMA
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_tests.conftest import IMPATIENT, Universe
from marketdata_tests.samples import BTC, dump, frame, row
from marketdata_tests.steps import at, lake_files, partitions, run_ingest, window

M1, M15, H1 = TIMEFRAMES["1m"], TIMEFRAMES["15m"], TIMEFRAMES["1h"]
HALT = window("2023-03-24T12:40", "2023-03-24T14:00")


# --------------------------------------------------------------------------------- sums
def gap(window: Window, reason: GapReason, cause: GapCause | None) -> Gap:
    """Return a gap of 1m bars; a known cause is final."""
    status = GapStatus.FINAL if cause else GapStatus.OPEN
    return Gap(window, window.count(M1), reason, 2, "", cause, status)


@examples(max_examples=25)
@given(st.data())
def test_the_parts_sum_in_any_window(universe: Universe, data: st.DataObject) -> None:
    """Bars, gaps of every kind and missing fetches: each part equals a count by the minute."""
    settings = universe(
        "http://127.0.0.1:9", since="2024-01-30T22:00", until="2024-02-01T02:00", now="2024-03-01"
    )
    kinds: list[tuple[GapReason | None, GapCause | None, str]] = [
        (None, None, "present"),
        (GapReason.NO_BARS, GapCause.NO_TRADE, "no_trade"),
        (GapReason.NO_BARS, GapCause.HALTED, "halted"),
        (GapReason.UNANSWERED, GapCause.DELISTED, "delisted"),
        (GapReason.NO_BARS, None, "unexplained"),
        (GapReason.NOT_SERVED, GapCause.MISSING_AT_SOURCE, "missing_at_source"),
        (GapReason.UNANSWERED, GapCause.MISSING_AT_SOURCE, "missing_at_source"),
        (GapReason.QUARANTINED, None, "quarantined"),
    ]
    truth: dict[datetime, str] = {}
    with open_context(settings) as context:
        context.ledger.markets.set_first_bar(
            BTC,
            listed := at("2024-01-30T22:00") + data.draw(st.integers(0, 200)) * M1.width,
            "test",
        )
        for partition in partitions(settings):
            wanted = partition.open_times(M1) & settings.span(BTC)
            moment, bars, gaps = max(wanted.start, listed), [], []
            through = Window(moment, wanted.end).start + data.draw(st.integers(0, 2000)) * M1.width
            while moment < min(through, wanted.end):
                reason, cause, part = data.draw(st.sampled_from(kinds))
                stretch = Window(
                    moment, min(moment + data.draw(st.integers(1, 300)) * M1.width, wanted.end)
                )
                opens = [stretch.start + i * M1.width for i in range(stretch.count(M1))]
                truth |= dict.fromkeys(opens, part)
                if reason is None:
                    bars += [row(t) for t in opens]
                else:
                    gaps.append(gap(stretch, reason, cause))
                moment = stretch.end
            size, digest = context.storage.lake.write(
                raw_table(M1), partition, frame(bars) if bars else frame([row(listed)]).clear()
            )
            state = PartitionState(
                start=wanted.start,
                through=moment,
                newest=None,
                is_complete=False,
                rows=len(bars),
                bytes=size,
                digest=digest,
                rollup_source_digest=None,
                attempts=1,
                failures=0,
                error=None,
            )
            context.ledger.partitions.commit(
                IngestRecord(
                    raw_table(M1),
                    partition,
                    state,
                    account=RowAccount(),
                    gaps=gaps,
                    fetches=[],
                    rejected=pl.DataFrame(schema=REJECTED_SCHEMA),
                    answers=[],
                    now=settings.now(),
                )
            )
        span = settings.span(BTC)
        first, last = sorted(data.draw(st.tuples(st.integers(0, 1680), st.integers(0, 1680))))
        for report_span in (
            None,
            Window(span.start + first * M1.width, span.start + last * M1.width),
        ):
            (found,) = context.bind(CoverageReporter).report([BTC], report_span)
            every = [span.start + i * M1.width for i in range(span.count(M1))]
            inside = [
                t for t in every if report_span is None or report_span.start <= t < report_span.end
            ]
            parts = found.as_dict()
            assert parts.pop("market") == BTC.key
            assert parts.pop("expected") == len(inside) == sum(parts.values())  # type: ignore[arg-type]
            expected = ["not_listed" if t < listed else truth.get(t, "not_fetched") for t in inside]
            assert parts == {name: expected.count(name) for name in parts}


# --------------------------------------------------------------------------------- real days
def at_time(settings: Settings, now: str) -> Settings:
    assert settings.clock
    return settings.model_copy(
        update={"clock": settings.clock.model_copy(update={"start": at(now)})}
    )


def explain(settings: Settings, send_requests: bool = False) -> list[ListedGap]:
    with open_context(settings, policy=IMPATIENT) as context:
        context.bind(GapExplainer).explain(partitions(settings), send_requests)
        every = Window(settings.since, settings.now())
        return context.bind(GapExplainer).list_gaps(settings.markets, every)


def summarize(found: list[ListedGap]) -> list[tuple[str, str, str, int, str]]:
    return [
        (
            one.market.symbol,
            one.table.timeframe.name,
            f"{one.gap.window.start:%H:%M}",
            one.gap.bars,
            one.gap.kind,
        )
        for one in found
    ]


def check_days(settings: Settings) -> int:
    """Check that the parts of each day of each market sum; return the number of days."""
    days = 0
    with open_context(settings) as context:
        for market in settings.markets:
            day = settings.span(market).start
            while day < settings.span(market).end:
                (found,) = context.bind(CoverageReporter).report(
                    [market], Window(day, day + timedelta(days=1))
                )
                numbers = [value for value in found.as_dict().values() if isinstance(value, int)]
                assert numbers[0] == 1440 == sum(numbers[1:])
                day, days = day + timedelta(days=1), days + 1
    return days


def test_a_halt_of_a_venue_is_found_in_both_markets(
    replay: Callable[..., Any], universe: Universe, either_database: None
) -> None:
    """2023-03-24: 80 minutes are missing in both markets and in the native bars.

    The check on the asset shows the cause.
    """
    exchange = replay("2023-03-26T00:02:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        "[BTC/USDT, ETH/USDT]",
        since="2023-03-23",
        until="2023-03-26",
        now="2023-03-26",
        extra="reference: [15m]",
    )
    run_ingest(settings, timeframe="15m")
    with open_context(settings) as context:
        done = list(context.bind(Ingester).ingest(M1, partitions(settings)))
        before = [
            finding
            for finding in context.bind(RawAuditor).audit(done[0])
            if finding.check == "gaps"
        ]
    assert [row["cause"] for row in before[0].rows] == [UNEXPLAINED]
    found = explain(settings)
    assert summarize(found) == [
        (s, tf, t, n, GapCause.HALTED)
        for s in ("BTC/USDT", "ETH/USDT")
        for tf, t, n in (("1m", "12:40", 80), ("15m", "12:45", 5))
    ]
    proof = found[0].as_dict()["proof"]
    assert proof["before"]["open_time"] == "2023-03-24T12:39:00Z"
    assert proof["before"]["volume"] == "0"
    assert proof["after"]["open_time"] == "2023-03-24T14:00:00Z"
    assert proof["venue"] == {"binance:ETH-USDT": 0}
    assert proof["known_halts"][0]["what"] == "trading was suspended"
    assert all(
        request["outcome"] == "answered" and request["rows"] for request in proof["requests"]
    )
    soon = settings.now() + timedelta(hours=1)
    assert all(
        one.gap.next_request == soon and one.gap.first_requested == settings.now() for one in found
    )
    assert check_days(settings) == 6
    with open_context(settings) as context:
        (halted,) = context.bind(CoverageReporter).report(
            settings.markets[:1], window("2023-03-24T12:30", "2023-03-24T12:50")
        )
        assert (halted.expected, halted.present, halted.halted) == (20, 10, 10)
        after = context.bind(RawAuditor).audit_gaps(done[0])
        assert [row["cause"] for row in after.rows] == [GapCause.HALTED]
        assert "by chance once in" in str(after.rows[0]["evidence"])
        assert (
            context.bind(BackfillPlanner).plan(partitions(settings))[0].reason
            == "rollups are not up to date"
        )
    exchange.log()
    # answers of another moment make the cause final: a year later no request is sent
    later = at_time(settings, "2023-03-26T01:00:00Z")
    run_ingest(later, timeframe="15m")
    run_ingest(later)
    assert len([entry for entry in exchange.log() if "klines" in entry["path"]]) <= 8
    assert {(one.gap.kind, one.gap.next_request) for one in explain(later)} == {
        (GapCause.HALTED, None)
    }
    assert all(one.complete for one in run_ingest(at_time(settings, "2024-03-26T00:00:00Z")))
    assert exchange.log() == []


def test_maintenance_is_a_halt_and_minutes_without_trades_are_not(
    replay: Callable[..., Any], universe: Universe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coinbase 2023-03-04: 277 minutes without either market are a halt; Binance traded then.

    BTC/USDT has no bar for five minutes more, and these are no halt.
    """
    exchange = replay("2023-03-06T00:02:30Z", coinbase_rate=0)
    universe("http://127.0.0.1:9")
    span = "since: 2023-03-04, until: 2023-03-06"
    monkeypatch.setenv(
        "MARKETDATA_VENUES",
        f"{{binance: {{symbols: [BTC/USDT], {span}, base_url: '{exchange.url}/binance'}},"
        f" coinbaseexchange: {{symbols: [BTC/USD, BTC/USDT], {span},"
        f" base_url: '{exchange.url}/coinbase'}}}}",
    )
    monkeypatch.setenv("MARKETDATA_NOW", "2023-03-06T00:02:30Z")
    settings = load_settings()
    assert all(done.error is None for done in run_ingest(settings))
    found = explain(settings)
    usd = [one for one in found if one.market.symbol == "BTC/USD"]
    assert [(one.gap.bars, one.gap.kind) for one in usd if one.gap.bars > 1] == [
        (277, GapCause.HALTED)
    ]
    assert {one.gap.kind for one in usd} == {GapCause.HALTED, GapCause.NO_TRADE}
    usdt = [
        one
        for one in found
        if one.market.symbol == "BTC/USDT" and one.market.venue == "coinbaseexchange"
    ]
    maintenance = [
        (f"{one.gap.window.start:%H:%M}", one.gap.bars, one.gap.kind)
        for one in usdt
        if HALT_DAY & one.gap.window
    ]
    assert maintenance == [("17:00", 277, GapCause.HALTED), ("21:37", 5, GapCause.NO_TRADE)]
    assert {one.gap.kind for one in usdt[:-1]} == {GapCause.HALTED, GapCause.NO_TRADE}
    halted = next(one for one in usdt if one.gap.kind == GapCause.HALTED).as_dict()["proof"]
    assert halted["elsewhere"] == {"binance:BTC-USDT": 277}
    assert halted["venue"] == {"coinbaseexchange:BTC-USD": 0}
    assert check_days(settings) == 6


HALT_DAY = window("2023-03-04T17:00", "2023-03-04T21:40")


def test_empty_minutes_of_an_archive_are_no_trade(universe: Universe) -> None:
    """Kraken's files around March 16, 2023: empty minutes of one market are no trade.

    12 minutes without both markets are a halt.
    """
    settings = universe(
        "http://127.0.0.1:9",
        "[BTC/USD, BTC/USDT]",
        since="2023-03-15",
        until="2023-03-18",
        now="2023-04-01",
        venue="kraken",
    )
    nothing = pl.DataFrame(schema=REJECTED_SCHEMA)
    with open_context(settings) as context:
        for partition, name in zip(partitions(settings), ("XBTUSD", "XBTUSDT"), strict=True):
            context.bind(PartitionStore).ingest_frame(
                M1,
                partition,
                read_archive(name, settings.span(partition.market)),
                rejected=nothing,
                sources=["archive"],
            )
    found = explain(settings)
    assert ("BTC/USD", "1m", "22:01", 12, GapCause.HALTED) in summarize(found)
    usdt = [one for one in found if one.market.symbol == "BTC/USDT"]
    assert [one.gap.bars for one in usdt if one.gap.kind == GapCause.HALTED] == [12]
    assert {one.gap.kind for one in found} <= {GapCause.HALTED, GapCause.NO_TRADE}
    assert len(usdt) > 500
    assert check_days(settings) == 6


def read_archive(name: str, span: Window) -> pl.DataFrame:
    """Read Kraken's file and add a first and a last bar, so that the file covers the span."""
    rows = dump("kraken", name, "1m", "2023-03-01_2023-03-21").with_columns(
        pl.from_epoch("time", time_unit="s").dt.replace_time_zone("UTC")
    )
    rows = rows.filter(pl.col("time").is_between(span.start, span.end, closed="left"))
    prices = {
        p: pl.col(p).cast(pl.Decimal(38, 12)) for p in ("open", "high", "low", "close", "volume")
    }
    bars = frame([row(span.start), row(span.end - M1.width)])
    given = rows.select(pl.col("time").cast(bars.schema["open_time"]).alias("open_time"), **prices)
    edges = bars.join(given, on="open_time", how="anti")
    return pl.concat([given, edges], how="diagonal").select(bars.columns).sort("open_time")


def test_a_minute_that_the_native_bars_hold_is_missing_at_source(
    replay: Callable[..., Any], universe: Universe, either_database: None
) -> None:
    """SOL 2023-02-14 16:39: the native 15m and 1h bars hold trades that no 1m bar has."""
    exchange = replay("2023-02-15T00:02:30Z")
    base_url = f"{exchange.url}/binance"
    settings = universe(
        base_url,
        "[SOL/USDT]",
        since="2023-02-14",
        until="2023-02-15",
        now="2023-02-15",
        extra="reference: [15m, 1h]",
    )
    run_ingest(settings)
    assert [(one.gap.kind, one.gap.explanation) for one in explain(settings)] == [
        (UNEXPLAINED, "other markets of the venue have to be fetched first")
    ]
    for timeframe in ("15m", "1h"):
        run_ingest(settings, timeframe=timeframe)
    (lost,) = explain(settings)
    assert summarize([lost]) == [("SOL/USDT", "1m", "16:39", 1, GapCause.MISSING_AT_SOURCE)]
    assert lost.gap.next_request == settings.now() + timedelta(hours=1)
    quarter, hour = lost.as_dict()["proof"]["native"]
    assert quarter == (
        "the venue's 15m bar of 2023-02-14T16:30:00Z has volume 94072.85, "
        "ours in it 89305.35, 1 bars are missing"
    )
    assert hour.startswith("the venue's 1h bar of 2023-02-14T16:00:00Z has volume ")
    later = at_time(settings, "2023-02-15T01:00:00Z")
    run_ingest(later)
    assert [one.gap.next_request for one in explain(later)] == [None]
    exchange.log()
    run_ingest(at_time(settings, "2023-06-01T00:00:00Z"))
    assert exchange.log() == []


# --------------------------------------------------------------------------------- later fetches
def test_a_gap_is_fetched_again_after_growing_pauses(
    replay: Callable[..., Any], universe: Universe
) -> None:
    """Without more evidence the gap stays open: it is fetched after 1, 4, 16 and 64 hours.

    It is not fetched a minute earlier.
    """
    exchange = replay("2023-02-15T00:02:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        "[SOL/USDT]",
        since="2023-02-14",
        until="2023-02-15",
        now="2023-02-15T02:00:00Z",
    )
    run_ingest(settings)
    for hours in (1, 4, 16, 64):
        for moment, wanted in (
            (timedelta(hours=hours, minutes=-1), False),
            (timedelta(hours=hours), True),
        ):
            now = at_time(settings, (at("2023-02-15T02:00") + moment).isoformat())
            explain(now)
            exchange.log()
            with open_context(now) as context:
                assert (context.bind(BackfillPlanner).plan(partitions(now))[0].bars == 1) is wanted
                assert (
                    bool(
                        [
                            b
                            for b in context.bind(BacklogFinder).plan_backfill(9, (), {}).blocks
                            if "rollups" not in str(b)
                        ]
                    )
                    is wanted
                )
                context.ledger.attempts.clear(partitions(now))
            run_ingest(now)
            assert bool([entry for entry in exchange.log() if "klines" in entry["path"]]) is wanted
    (one,) = explain(now)
    assert (one.gap.kind, one.gap.answers >= 10, one.gap.first_requested) == (
        UNEXPLAINED,
        True,
        at("2023-02-15T02:00"),
    )
    assert one.gap.next_request == at("2023-02-15T02:00") + timedelta(hours=256)
    assert len(one.as_dict()["proof"]["requests"]) == 6


def test_a_reopened_gap_is_fetched_and_then_explained(
    replay: Callable[..., Any], universe: Universe, either_database: None
) -> None:
    """The next run finds the cause again; a wrong start is refused and names the nearest gap."""
    exchange = replay("2023-03-26T00:02:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        "[BTC/USDT, ETH/USDT]",
        since="2023-03-24",
        until="2023-03-25",
        now="2023-03-26",
    )
    run_ingest(settings)
    assert [one.gap.kind for one in explain(settings)] == [GapCause.HALTED, GapCause.HALTED]
    with open_context(settings) as context:
        with pytest.raises(
            BadInput,
            match=r"begins at 2023-03-24T12:41:00Z; the nearest is --start 2023-03-24T12:40:00Z",
        ):
            context.bind(GapExplainer).reopen(BTC, at("2023-03-24T12:41"))
        opened = context.bind(GapExplainer).reopen(BTC, HALT.start)
        assert [one.gap.bars for one in opened] == [80]
    assert [one.gap.kind for one in explain(settings)] == [UNEXPLAINED, GapCause.HALTED]
    with open_context(settings) as context:
        planned = context.bind(BackfillPlanner).plan(partitions(settings))
        assert [task.bars for task in planned] == [80, 0]
    exchange.log()
    run_ingest(settings)
    assert {entry["query"]["symbol"] for entry in exchange.log() if "klines" in entry["path"]} == {
        "BTCUSDT"
    }
    (again, _) = explain(settings)
    assert (again.gap.kind, again.gap.answers) == (GapCause.HALTED, 4)


def test_a_market_that_leaves_its_venue_is_delisted(
    replay: Callable[..., Any], universe: Universe
) -> None:
    """ETH leaves the list: the bars from then on are one gap, and the other market continues.

    The cause is final when answers of two moments confirm it.
    """
    exchange = replay("2024-02-02T00:00:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        "[BTC/USDT, ETH/USDT]",
        since="2024-02-01",
        now="2024-02-02T00:00:00Z",
    )
    run_ingest(settings)
    exchange.admin(op="delist", venue="binance", symbol="ETHUSDT")
    for day, kinds in ((3, ["not final"]), (4, ["final"]), (5, ["final"])):
        exchange.admin(op="now", now=f"2024-02-0{day}T00:00:30Z")
        later = at_time(settings, f"2024-02-0{day}T00:00:00Z")
        assert all(done.error is None for done in run_ingest(later))
        found = explain(later, send_requests=True)
        assert [
            ("final" if one.gap.next_request is None else "not final") for one in found
        ] == kinds
        assert [(one.market.symbol, one.gap.kind, one.gap.window) for one in found] == [
            ("ETH/USDT", GapCause.DELISTED, window("2024-02-02", f"2024-02-0{day}"))
        ]
    with open_context(later) as context:
        btc, eth = context.bind(CoverageReporter).report(later.markets)
    assert (btc.present, eth.present, eth.delisted, eth.unexplained) == (
        4 * 1440,
        1440,
        3 * 1440,
        0,
    )
    assert check_days(later) == 8


def test_a_symbol_that_never_existed_is_bad_input(
    replay: Callable[..., Any], universe: Universe
) -> None:
    exchange = replay("2024-02-02T00:00:30Z")
    settings = universe(
        f"{exchange.url}/binance", "[BTC/USDTT]", since="2024-02-01", now="2024-02-02T00:00:00Z"
    )
    (done,) = run_ingest(settings)
    assert isinstance(done.error, BadInput)


# --------------------------------------------------------------------------------- commands
def test_the_command_lists_and_reopens_gaps(replay: Callable[..., Any], universe: Universe) -> None:
    from typer.testing import CliRunner

    from marketdata_assets.cli.main import app

    exchange = replay("2023-03-26T00:02:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        "[BTC/USDT, ETH/USDT]",
        since="2023-03-24",
        until="2023-03-25",
        now="2023-03-26",
    )
    run_ingest(settings)
    before, run = lake_files(settings), CliRunner().invoke
    rows = json.loads(run(app, ["gaps", "--format", "json", "--cause", "halted"]).stdout)
    assert [(r["market"], r["table"], r["from"], r["until"], r["bars"]) for r in rows] == [
        (f"binance:{name}", "raw/ohlcv_1m", "2023-03-24T12:40:00Z", "2023-03-24T14:00:00Z", 80)
        for name in ("BTC-USDT", "ETH-USDT")
    ]
    assert (rows[0]["asked"], rows[0]["next_ask"], rows[0]["proof"]["venue"]) == (
        2,
        "2023-03-26T01:00:00Z",
        {"binance:ETH-USDT": 0},
    )
    assert (
        json.loads(run(app, ["gaps", "--format", "json", "--end", "2023-03-24T12:40"]).stdout) == []
    )
    assert (
        "2 gaps, 160 bars"
        in run(app, ["gaps", "-m", "binance:BTC-USDT", "-m", "binance:ETH-USDT"]).stdout
    )
    (day,) = json.loads(
        run(
            app,
            [
                "coverage",
                "-m",
                "binance:BTC-USDT",
                "--start",
                "2023-03-24T13:00",
                "--end",
                "2023-03-24T15:00",
                "--format",
                "json",
            ],
        ).stdout
    )
    assert (day["expected"], day["halted"], day["present"]) == (120, 60, 60)
    for wrong, message in (
        (["gaps", "--cause", "bored"], "--cause bored is not one of"),
        (["gaps", "--reopen", "--start", "2023-03-24T12:40"], "--reopen needs one --market"),
        (
            ["gaps", "--reopen", "-m", "binance:ETH-USDT", "--start", "2023-03-25"],
            "the nearest is --start 2023-03-24T12:40:00Z",
        ),
    ):
        assert message in str(run(app, wrong).exception)
    (opened,) = json.loads(
        run(
            app,
            [
                "gaps",
                "--reopen",
                "-m",
                "binance:ETH-USDT",
                "--start",
                "2023-03-24T12:40",
                "--format",
                "json",
            ],
        ).stdout
    )
    assert opened["market"] == "binance:ETH-USDT"
    assert lake_files(settings) == before
