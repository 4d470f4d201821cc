"""Gaps: every hole gets the cause that the facts prove and no other, and every market and day sums to
the minute.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from marketdata_assets.context import open_toolbox
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.ingest import ingest, take_in
from marketdata_assets.flows.fetch.plan import plan
from marketdata_assets.flows.operate.backfill import missed
from marketdata_assets.flows.prove import gaps as flow
from marketdata_assets.flows.prove.audit import audit_gaps, audit_raw
from marketdata_assets.flows.prove.gaps import Explained, explain, reopen, words_of
from marketdata_assets.flows.read.coverage import coverage
from marketdata_assets.ledger.ledger import Account, Entry, Gap, State
from marketdata_assets.model.gap import GapCause
from marketdata_assets.model.table import raw
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.quality.split import REJECTED_SCHEMA
from marketdata_assets.settings.universe import Settings, load_settings
from marketdata_tests.conftest import IMPATIENT, Universe
from marketdata_tests.samples import BTC, dump, frame, row
from marketdata_tests.steps import at, lake_files, partitions, run_ingest, window

M1, M15, H1 = TIMEFRAMES["1m"], TIMEFRAMES["15m"], TIMEFRAMES["1h"]
HOLE = window("2023-03-24T12:40", "2023-03-24T14:00")


# --------------------------------------------------------------------------------- the sum
def gap(first: int, end: int, since: datetime, reason: str = "no_bars", cause: str = "") -> Gap:
    return Gap(
        Window(since + first * M1.width, since + end * M1.width), end - first, reason, 2, "", cause
    )


@examples(max_examples=25)
@given(st.data())
def test_the_sum_holds_in_any_window(universe: Universe, data: st.DataObject) -> None:
    """Bars, gaps of every kind and what was never asked for, at random: each part is what counting
    minute by minute gives.
    """
    settings = universe(
        "http://127.0.0.1:9", since="2024-01-30T22:00", until="2024-02-01T02:00", now="2024-03-01"
    )
    kinds = [
        ("present", "", ""),
        ("no_bars", GapCause.NO_TRADE, GapCause.NO_TRADE),
        ("no_bars", GapCause.HALTED, GapCause.HALTED),
        ("unanswered", GapCause.DELISTED, GapCause.DELISTED),
    ]
    kinds += [
        ("no_bars", "", GapCause.MISSING_AT_SOURCE),
        ("unanswered", GapCause.MISSING_AT_SOURCE, GapCause.MISSING_AT_SOURCE),
        ("quarantined", "", "quarantined"),
    ]
    truth: dict[datetime, str] = {}
    with open_toolbox(settings) as toolbox:
        toolbox.ledger.set_listed(
            BTC,
            listed := at("2024-01-30T22:00") + data.draw(st.integers(0, 200)) * M1.width,
            "test",
        )
        for partition in partitions(settings):
            wanted = partition.opens(M1) & settings.span(BTC)
            moment, bars, gaps = max(wanted.start, listed), [], []
            through = Window(moment, wanted.end).start + data.draw(st.integers(0, 2000)) * M1.width
            while moment < min(through, wanted.end):
                reason, cause, part = data.draw(st.sampled_from(kinds))
                stretch = Window(
                    moment, min(moment + data.draw(st.integers(1, 300)) * M1.width, wanted.end)
                )
                opens = [stretch.start + i * M1.width for i in range(stretch.count(M1))]
                truth |= dict.fromkeys(opens, part or "present")
                if reason == "present":
                    bars += [row(t) for t in opens]
                else:
                    gaps.append(gap(0, len(opens), stretch.start, reason, cause))
                moment = stretch.end
            size, digest = toolbox.lake.write(
                raw(M1), partition, frame(bars) if bars else frame([row(listed)]).clear()
            )
            state = State(
                wanted.start, moment, None, False, len(bars), size, digest, None, 1, 0, None
            )
            toolbox.ledger.commit(
                Entry(
                    raw(M1),
                    partition,
                    state,
                    Account(),
                    gaps,
                    [],
                    pl.DataFrame(schema=REJECTED_SCHEMA),
                    [],
                    settings.now(),
                )
            )
        span = settings.span(BTC)
        first, last = sorted(data.draw(st.tuples(st.integers(0, 1680), st.integers(0, 1680))))
        for asked in (None, Window(span.start + first * M1.width, span.start + last * M1.width)):
            (found,) = coverage(toolbox, [BTC], asked)
            every = [span.start + i * M1.width for i in range(span.count(M1))]
            inside = [t for t in every if asked is None or asked.start <= t < asked.end]
            parts = found.as_dict()
            assert parts.pop("market") == BTC.key
            assert parts.pop("expected") == len(inside) == sum(parts.values())  # type: ignore[arg-type]
            expected = ["not_listed" if t < listed else truth.get(t, "not_fetched") for t in inside]
            assert parts == {name: expected.count(name) for name in parts}


# --------------------------------------------------------------------------------- real days
def at_time(settings: Settings, now: str) -> Settings:
    assert settings.clock
    return dataclasses.replace(settings, clock=dataclasses.replace(settings.clock, start=at(now)))


def explained(settings: Settings, ask: bool = False) -> list[Explained]:
    with open_toolbox(settings, policy=IMPATIENT) as toolbox:
        explain(toolbox, partitions(settings), ask)
        every = Window(settings.since, settings.now())
        return flow.gaps(toolbox, settings.markets, every)


def told(found: list[Explained]) -> list[tuple[str, str, str, int, str]]:
    return [
        (
            one.market.symbol,
            one.table.timeframe.name,
            f"{one.gap.window.start:%H:%M}",
            one.gap.bars,
            one.kind,
        )
        for one in found
    ]


def days_sum(settings: Settings) -> int:
    """Every day of every market: the parts are what is expected. How many days there were."""
    days = 0
    with open_toolbox(settings) as toolbox:
        for market in settings.markets:
            day = settings.span(market).start
            while day < settings.span(market).end:
                (found,) = coverage(toolbox, [market], Window(day, day + timedelta(days=1)))
                numbers = [value for value in found.as_dict().values() if isinstance(value, int)]
                assert numbers[0] == 1440 == sum(numbers[1:])
                day, days = day + timedelta(days=1), days + 1
    return days


def test_the_halt_of_a_venue(
    replay: Callable[..., Any], universe: Universe, either_database: None
) -> None:
    """2023-03-24: both markets lack 80 minutes, and the native bars with them; the check on the asset
    says so.
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
    with open_toolbox(settings) as toolbox:
        done = list(ingest(toolbox, M1, partitions(settings)))
        before = [finding for finding in audit_raw(toolbox, done[0]) if finding.check == "gaps"]
    assert [row["cause"] for row in before[0].table] == ["unexplained"]
    found = explained(settings)
    assert told(found) == [
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
    assert all(one.gap.next_ask is None and one.gap.first_asked == settings.now() for one in found)
    assert days_sum(settings) == 6
    with open_toolbox(settings) as toolbox:
        (halted,) = coverage(
            toolbox, settings.markets[:1], window("2023-03-24T12:30", "2023-03-24T12:50")
        )
        assert (halted.expected, halted.present, halted.halted) == (20, 10, 10)
        after = audit_gaps(toolbox, done[0])
        assert [row["cause"] for row in after.table] == [GapCause.HALTED]
        assert "by chance once in" in str(after.table[0]["evidence"])
        assert plan(toolbox, partitions(settings))[0].reason == "rollups are not up to date"
    exchange.log()
    assert all(
        one.complete for one in run_ingest(at_time(settings, "2024-03-26T00:00:00Z"))
    )  # a year later, still explained
    assert exchange.log() == []


def test_maintenance_and_minutes_without_trades(
    replay: Callable[..., Any], universe: Universe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coinbase 2023-03-04: 277 minutes without either market are a halt, and the five more of BTC/USDT
    are not; Binance traded on.
    """
    exchange = replay("2023-03-06T00:02:30Z", coinbase_rate=0)
    universe("http://127.0.0.1:9")
    span = "since: 2023-03-04, until: 2023-03-06"
    monkeypatch.setenv(
        "MARKETDATA_VENUES",
        f"{{binance: {{symbols: [BTC/USDT], {span}, base_url: '{exchange.url}/binance'}},"
        f" coinbaseexchange: {{symbols: [BTC/USD, BTC/USDT], {span}, base_url: '{exchange.url}/coinbase'}}}}",
    )
    monkeypatch.setenv("MARKETDATA_NOW", "2023-03-06T00:02:30Z")
    settings = load_settings()
    assert all(done.error is None for done in run_ingest(settings))
    found = explained(settings)
    usd = [one for one in found if one.market.symbol == "BTC/USD"]
    assert [(one.gap.bars, one.kind) for one in usd if one.gap.bars > 1] == [(277, GapCause.HALTED)]
    assert {one.kind for one in usd} == {GapCause.HALTED, GapCause.NO_TRADE}
    usdt = [
        one
        for one in found
        if one.market.symbol == "BTC/USDT" and one.market.venue == "coinbaseexchange"
    ]
    maintenance = [
        (f"{one.gap.window.start:%H:%M}", one.gap.bars, one.kind)
        for one in usdt
        if HALT_DAY & one.gap.window
    ]
    assert maintenance == [("17:00", 277, GapCause.HALTED), ("21:37", 5, GapCause.NO_TRADE)]
    assert {one.kind for one in usdt[:-1]} == {GapCause.HALTED, GapCause.NO_TRADE}
    halted = next(one for one in usdt if one.kind == GapCause.HALTED).as_dict()["proof"]
    assert halted["elsewhere"] == {"binance:BTC-USDT": 277}
    assert halted["venue"] == {"coinbaseexchange:BTC-USD": 0}
    assert days_sum(settings) == 6


HALT_DAY = window("2023-03-04T17:00", "2023-03-04T21:40")


def test_what_the_archive_leaves_out(universe: Universe) -> None:
    """Kraken's own files, 16 March 2023: empty minutes of two markets are no trade; 12 minutes without
    both are a halt.
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
    with open_toolbox(settings) as toolbox:
        for partition, name in zip(partitions(settings), ("XBTUSD", "XBTUSDT"), strict=True):
            take_in(
                toolbox,
                M1,
                partition,
                archived(name, settings.span(partition.market)),
                nothing,
                "archive",
            )
    found = explained(settings)
    assert ("BTC/USD", "1m", "22:01", 12, GapCause.HALTED) in told(found)
    usdt = [one for one in found if one.market.symbol == "BTC/USDT"]
    assert [one.gap.bars for one in usdt if one.kind == GapCause.HALTED] == [12]
    assert {one.kind for one in found} <= {GapCause.HALTED, GapCause.NO_TRADE}
    assert len(usdt) > 500
    assert days_sum(settings) == 6


def archived(name: str, span: Window) -> pl.DataFrame:
    """Kraken's file, with a bar in the first and the last minute, so that nothing lies outside of what
    it tells.
    """
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


def test_a_minute_that_the_venue_lost(
    replay: Callable[..., Any], universe: Universe, either_database: None
) -> None:
    """SOL 2023-02-14 16:39: the native 15m and 1h bars hold trades that no 1m bar has, once they are
    fetched.
    """
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
    assert [(one.kind, words_of(one.gap)) for one in explained(settings)] == [
        ("unexplained", "other markets of the venue have to be fetched first")
    ]
    for timeframe in ("15m", "1h"):
        run_ingest(settings, timeframe=timeframe)
    (lost,) = explained(settings)
    assert told([lost]) == [("SOL/USDT", "1m", "16:39", 1, GapCause.MISSING_AT_SOURCE)]
    assert lost.gap.next_ask is None
    quarter, hour = lost.as_dict()["proof"]["native"]
    assert (
        quarter
        == "the venue's 15m bar of 2023-02-14T16:30:00Z has volume 94072.85, ours in it 89305.35, 1 bars are missing"
    )
    assert hour.startswith("the venue's 1h bar of 2023-02-14T16:00:00Z has volume ")
    exchange.log()
    run_ingest(at_time(settings, "2023-06-01T00:00:00Z"))
    assert exchange.log() == []


# --------------------------------------------------------------------------------- asking again
def test_a_gap_is_asked_for_again_at_growing_distance(
    replay: Callable[..., Any], universe: Universe
) -> None:
    """Without a second witness SOL's minute stays open: after 1, 4 and 16 hours, and not a minute
    before.
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
            explained(now)
            exchange.log()
            with open_toolbox(now) as toolbox:
                assert (plan(toolbox, partitions(now))[0].bars == 1) is wanted
                assert (
                    bool([b for b in missed(toolbox, 9, (), {}).blocks if "rollups" not in str(b)])
                    is wanted
                )
                toolbox.ledger.forget_asks(partitions(now))
            run_ingest(now)
            assert bool([entry for entry in exchange.log() if "klines" in entry["path"]]) is wanted
    (one,) = explained(now)
    assert (one.kind, one.gap.answers >= 10, one.gap.first_asked) == (
        "unexplained",
        True,
        at("2023-02-15T02:00"),
    )
    assert one.gap.next_ask == at("2023-02-15T02:00") + timedelta(hours=256)
    assert len(one.as_dict()["proof"]["requests"]) == 6


def test_reopened(replay: Callable[..., Any], universe: Universe, either_database: None) -> None:
    """The cause is forgotten, the next run asks and nothing before it explains; another moment is
    refused, with the nearest gap.
    """
    exchange = replay("2023-03-26T00:02:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        "[BTC/USDT, ETH/USDT]",
        since="2023-03-24",
        until="2023-03-25",
        now="2023-03-26",
    )
    run_ingest(settings)
    assert [one.kind for one in explained(settings)] == [GapCause.HALTED, GapCause.HALTED]
    with open_toolbox(settings) as toolbox:
        with pytest.raises(
            BadInput,
            match=r"begins at 2023-03-24T12:41:00Z; the nearest is --start 2023-03-24T12:40:00Z",
        ):
            reopen(toolbox, BTC, at("2023-03-24T12:41"))
        assert [one.gap.bars for one in reopen(toolbox, BTC, HOLE.start)] == [80]
    assert [one.kind for one in explained(settings)] == ["unexplained", GapCause.HALTED]
    with open_toolbox(settings) as toolbox:
        assert [task.bars for task in plan(toolbox, partitions(settings))] == [80, 0]
    exchange.log()
    run_ingest(settings)
    assert {entry["query"]["symbol"] for entry in exchange.log() if "klines" in entry["path"]} == {
        "BTCUSDT"
    }
    (again, _) = explained(settings)
    assert (again.kind, again.gap.answers) == (GapCause.HALTED, 4)


def test_a_market_that_left_its_venue(replay: Callable[..., Any], universe: Universe) -> None:
    """ETH is taken off the list: its silence is one gap, delisted when told twice; the other market
    goes on.
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
    for day, kinds in ((4, ["not final"]), (4, ["final"]), (5, ["final"])):
        exchange.admin(op="now", now=f"2024-02-0{day}T00:00:30Z")
        later = at_time(settings, f"2024-02-0{day}T00:00:00Z")
        assert all(done.error is None for done in run_ingest(later))
        found = explained(later, ask=True)
        assert [("final" if one.gap.next_ask is None else "not final") for one in found] == kinds
        assert [(one.market.symbol, one.kind, one.gap.window) for one in found] == [
            ("ETH/USDT", GapCause.DELISTED, window("2024-02-02", f"2024-02-0{day}"))
        ]
    with open_toolbox(later) as toolbox:
        btc, eth = coverage(toolbox, later.markets)
    assert (btc.present, eth.present, eth.delisted, eth.missing_at_source) == (
        4 * 1440,
        1440,
        3 * 1440,
        0,
    )
    assert days_sum(later) == 8


def test_a_symbol_that_was_never_there_is_a_mistake(
    replay: Callable[..., Any], universe: Universe
) -> None:
    exchange = replay("2024-02-02T00:00:30Z")
    settings = universe(
        f"{exchange.url}/binance", "[BTC/USDTT]", since="2024-02-01", now="2024-02-02T00:00:00Z"
    )
    (done,) = run_ingest(settings)
    assert isinstance(done.error, BadInput)


# --------------------------------------------------------------------------------- the command
def test_the_command(replay: Callable[..., Any], universe: Universe) -> None:
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
        None,
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
    for wrong, says in (
        (["gaps", "--cause", "bored"], "--cause bored is not one of"),
        (["gaps", "--reopen", "--start", "2023-03-24T12:40"], "--reopen needs one --market"),
        (
            ["gaps", "--reopen", "-m", "binance:ETH-USDT", "--start", "2023-03-25"],
            "the nearest is --start 2023-03-24T12:40:00Z",
        ),
    ):
        assert says in str(run(app, wrong).exception)
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
