"""Gaps: each gap gets the cause that the evidence proves, and each market and day sums exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from marketdata_assets.flows.prove.audit import Auditor

from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.fetch.plan import BackfillPlanner
from marketdata_assets.flows.operate.backfill import BacklogFinder
from marketdata_assets.flows.prove.gaps import Explained, GapExplainer, words_of
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.ledger.ledger import Account, Entry, Gap, State
from marketdata_assets.model.intervals import without
from marketdata_assets.model.table import raw
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.quality.gap_causes import (
    CAUSES,
    DELISTED,
    HALTED,
    MISSING,
    NO_TRADE,
    Facts,
    Habit,
    Native,
    Neighbour,
    Silence,
    ask_again_at,
    classify,
)
from marketdata_assets.quality.halts import Halt, known_halts, registry
from marketdata_assets.quality.split import REJECTED_SCHEMA
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_tests.conftest import IMPATIENT, Universe
from marketdata_tests.samples import BTC, dump, frame, row
from marketdata_tests.steps import at, lake_files, partitions, run_ingest, window

M1, M15, H1 = TIMEFRAMES["1m"], TIMEFRAMES["15m"], TIMEFRAMES["1h"]
HALT = window("2023-03-24T12:40", "2023-03-24T14:00")
NEVER, OFTEN = (Habit(44640, 0, 0),), (Habit(44640, 8000, 6000),)
KNOWN = (Halt("binance", HALT, "suspended", "somebody"),)


def evidence(hole: Window = HALT, **known: Any) -> Facts:
    """Return the evidence of a gap that two answers confirm, in a market without other gaps."""
    return Facts(
        **{"hole": hole, "timeframe": M1, "told": True, "answers": 2, "habits": NEVER, **known}
    )


def shared_gaps(*others: tuple[Habit, ...], hole: Window = HALT) -> tuple[Silence, ...]:
    return (Silence(hole, others),)


def native(volume: str, ours: str, start: str = "2023-03-24T12:30", timeframe: Any = M15) -> Native:
    return Native(timeframe, at(start), Decimal(volume), Decimal(ours), 5)


def minutes(start: str, count: int) -> Window:
    return Window(at(start), at(start) + count * timedelta(minutes=1))


def neighbors(volume: str) -> dict[str, Neighbour]:
    sides = {"before": HALT.start - M1.width, "after": HALT.end}
    return {side: Neighbour(moment, Decimal(1), Decimal(volume)) for side, moment in sides.items()}


SHORT = minutes("2023-03-24T12:40", 1)
CASES: dict[str, tuple[Facts, list[tuple[str, bool]]]] = {
    "there is no other evidence": (evidence(), [("", False)]),
    "all markets have the gap": (evidence(silences=shared_gaps(NEVER)), [(HALTED, True)]),
    "all have the gap, but no answer confirms it": (
        evidence(silences=shared_gaps(NEVER), told=False),
        [("", False)],
    ),
    "all have the gap for a minute, as they often have": (
        evidence(SHORT, habits=OFTEN, silences=shared_gaps(OFTEN, hole=SHORT)),
        [(NO_TRADE, True)],
    ),
    "another market is not fetched yet": (
        evidence(silences=shared_gaps(NEVER), pending=True),
        [("", False)],
    ),
    "only the registry has the halt": (
        evidence(halts=KNOWN, others={"binance:ETH-USDT": 80}),
        [("", False)],
    ),
    "one market alone for 80 minutes": (evidence(silences=shared_gaps()), [(HALTED, True)]),
    "one market alone for a minute": (
        evidence(SHORT, silences=shared_gaps(hole=SHORT)),
        [("", False)],
    ),
    "one market alone for ten minutes": (
        evidence(w := minutes("2023-03-24T12:40", 10), silences=shared_gaps(hole=w)),
        [("", False)],
    ),
    "one market alone for ten minutes, in the registry": (
        evidence(w, silences=shared_gaps(hole=w), halts=KNOWN),
        [(HALTED, True)],
    ),
    "one market alone for ten minutes, while another venue traded": (
        evidence(w, silences=shared_gaps(hole=w), elsewhere="kraken:BTC-USD"),
        [(HALTED, True)],
    ),
    "one market alone for a minute, in the registry": (
        evidence(SHORT, silences=shared_gaps(hole=SHORT), halts=KNOWN),
        [("", False)],
    ),
    "the native bar has more": (evidence(SHORT, natives=(native("7", "6"),)), [(MISSING, True)]),
    "the native bar has more, all have the gap": (
        evidence(SHORT, natives=(native("7", "6"),), silences=shared_gaps(NEVER, hole=SHORT)),
        [(MISSING, True)],
    ),
    "the native bar has more, others are not fetched yet": (
        evidence(SHORT, natives=(native("7", "6"),), pending=True),
        [(MISSING, True)],
    ),
    "the native bar has more, and no answer confirms the gap": (
        evidence(SHORT, natives=(native("7", "6"),), told=False),
        [(MISSING, False)],
    ),
    "the native bar equals the sum of ours": (
        evidence(SHORT, natives=(native("6", "6.000"),)),
        [(NO_TRADE, True)],
    ),
    "ours hold more than the native bar": (
        evidence(SHORT, natives=(native("6", "7"),)),
        [("", False)],
    ),
    "all have the gap, and the native bar agrees": (
        evidence(silences=shared_gaps(NEVER), natives=(native("6", "6"),)),
        [(HALTED, True)],
    ),
    "the native bar covers the first five minutes only": (
        evidence(natives=(native("7", "6"),)),
        [(MISSING, True), ("", False)],
    ),
    "the venue omits empty minutes": (evidence(SHORT, habits=OFTEN), [(NO_TRADE, True)]),
    "the venue omits empty minutes, but never had so long a gap": (
        evidence(habits=OFTEN),
        [("", False)],
    ),
    "the venue sends empty minutes as bars": (
        evidence(SHORT, habits=OFTEN, zeros=9000),
        [("", False)],
    ),
    "three other minutes are missing": (
        evidence(SHORT, habits=(Habit(44640, 3, 3),)),
        [(NO_TRADE, True)],
    ),
    "two other minutes are missing": (evidence(SHORT, habits=(Habit(44640, 2, 2),)), [("", False)]),
    "both neighbors hold no trade": (evidence(**neighbors("0")), [(NO_TRADE, True)]),
    "both neighbors hold trades": (evidence(**neighbors("1")), [("", False)]),
    "no bar to the end and not listed": (
        evidence(trailing=True, listed=False, told=False, others={"binance:ETH-USDT": 1}),
        [(DELISTED, True)],
    ),
    "only one answer shows it": (
        evidence(
            trailing=True, listed=False, told=False, answers=1, others={"binance:ETH-USDT": 1}
        ),
        [(DELISTED, False)],
    ),
    "no other market continues": (
        evidence(trailing=True, listed=False, told=False),
        [(DELISTED, False)],
    ),
    "no bar to the end and listed": (
        evidence(trailing=True, listed=True, told=False),
        [("", False)],
    ),
    "no bar to the end, the list was not fetched": (
        evidence(trailing=True, told=False),
        [("", False)],
    ),
    "a coarser table where base bars are missing": (
        evidence(minutes("2023-03-24T13:00", 60), timeframe=H1, finer=((HALT, HALTED),)),
        [(HALTED, True)],
    ),
    "a coarser table where some base bars are stored": (
        evidence(minutes("2023-03-24T12:00", 60), timeframe=H1, finer=((HALT, HALTED),)),
        [("", False)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_cause_is_what_the_evidence_proves(name: str) -> None:
    found, expected = CASES[name]
    parts = classify(found)
    assert [(part.cause, part.final) for part in parts] == expected
    assert all(part.words for part in parts)


def test_a_gap_is_split_where_the_other_markets_return() -> None:
    """A market with less trading has no bar for five minutes more, which is no halt any more."""
    longer = Window(HALT.start, HALT.end + 5 * M1.width)
    parts = classify(evidence(longer, habits=OFTEN, silences=shared_gaps(NEVER)))
    assert [(part.window, part.cause) for part in parts] == [
        (HALT, HALTED),
        (Window(HALT.end, longer.end), NO_TRADE),
    ]


def test_consecutive_empty_minutes_are_more_likely_than_independent_ones() -> None:
    """20 empty minutes of Kraken's BTC/USDT are no halt, although 0.32^20 is one in 10^10.

    A third of all minutes is empty there.
    """
    kraken = Habit(30240, 9796, 5255)
    assert (9796 / 30240) ** 20 < 1e-9 < kraken.chance(20) < 1e-6
    assert Habit(44640, 0, 0).chance(1) == pytest.approx(1 / 44642)


@given(st.data())
def test_the_parts_of_a_gap_cover_it_exactly(data: st.DataObject) -> None:
    def draw_window(last_start: int = 90) -> Window:
        first = data.draw(st.integers(0, last_start))
        return Window(
            HALT.start + first * M1.width,
            HALT.start + (first + data.draw(st.integers(1, 60))) * M1.width,
        )

    hole = draw_window(30)
    found = evidence(
        hole,
        told=data.draw(st.booleans()),
        habits=data.draw(st.sampled_from([NEVER, OFTEN])),
        pending=data.draw(st.sampled_from([False, False, True])),
        silences=tuple(
            Silence(w, (NEVER,) * data.draw(st.integers(0, 2)))
            for w in without(hole, [draw_window(), draw_window()])
        ),
        natives=tuple(
            Native(
                tf,
                tf.floor(draw_window().start),
                Decimal(data.draw(st.integers(0, 1))),
                Decimal(1),
                1,
            )
            for tf in data.draw(st.lists(st.sampled_from([M15, H1]), max_size=4))
        ),
        trailing=data.draw(st.booleans()),
        listed=False,
    )
    parts = classify(found)
    assert parts[0].window.start == hole.start
    assert parts[-1].window.end == hole.end
    assert all(a.window.end == b.window.start for a, b in pairwise(parts))
    assert all(part.window and part.cause in ("", *CAUSES) for part in parts)


def test_the_halts_of_the_registry_end_after_they_begin() -> None:
    assert all(halt.window and halt.what and halt.told_by for halt in registry())
    assert [halt.window for halt in known_halts("binance", HALT)] == [HALT]
    assert known_halts("kraken", HALT) == []


def test_the_pause_between_fetches_grows_to_a_month() -> None:
    first = moment = at("2024-01-01")
    hours = []
    for _ in range(8):
        moment = ask_again_at(first, moment)
        hours.append((moment - first) // timedelta(hours=1))
    assert hours == [1, 4, 16, 64, 256, 976, 1696, 2416]


# --------------------------------------------------------------------------------- sums
def gap(first: int, end: int, since: datetime, reason: str = "no_bars", cause: str = "") -> Gap:
    return Gap(
        Window(since + first * M1.width, since + end * M1.width), end - first, reason, 2, "", cause
    )


@examples(max_examples=25)
@given(st.data())
def test_the_parts_sum_in_any_window(universe: Universe, data: st.DataObject) -> None:
    """Bars, gaps of every kind and missing fetches: each part equals a count by the minute."""
    settings = universe(
        "http://127.0.0.1:9", since="2024-01-30T22:00", until="2024-02-01T02:00", now="2024-03-01"
    )
    kinds = [
        ("present", "", ""),
        ("no_bars", NO_TRADE, NO_TRADE),
        ("no_bars", HALTED, HALTED),
        ("unanswered", DELISTED, DELISTED),
    ]
    kinds += [
        ("no_bars", "", MISSING),
        ("unanswered", MISSING, MISSING),
        ("quarantined", "", "quarantined"),
    ]
    truth: dict[datetime, str] = {}
    with open_context(settings) as context:
        context.ledger.set_listed(
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
            size, digest = context.storage.lake.write(
                raw(M1), partition, frame(bars) if bars else frame([row(listed)]).clear()
            )
            state = State(
                wanted.start, moment, None, False, len(bars), size, digest, None, 1, 0, None
            )
            context.ledger.commit(
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


def explain(settings: Settings, ask: bool = False) -> list[Explained]:
    with open_context(settings, policy=IMPATIENT) as context:
        context.bind(GapExplainer).explain(partitions(settings), ask)
        every = Window(settings.since, settings.now())
        return context.bind(GapExplainer).list_gaps(settings.markets, every)


def summarize(found: list[Explained]) -> list[tuple[str, str, str, int, str]]:
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
            for finding in context.bind(Auditor).audit_raw(done[0])
            if finding.check == "gaps"
        ]
    assert [row["cause"] for row in before[0].table] == ["unexplained"]
    found = explain(settings)
    assert summarize(found) == [
        (s, tf, t, n, HALTED)
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
    assert check_days(settings) == 6
    with open_context(settings) as context:
        (halted,) = context.bind(CoverageReporter).report(
            settings.markets[:1], window("2023-03-24T12:30", "2023-03-24T12:50")
        )
        assert (halted.expected, halted.present, halted.halted) == (20, 10, 10)
        after = context.bind(Auditor).audit_gaps(done[0])
        assert [row["cause"] for row in after.table] == [HALTED]
        assert "by chance once in" in str(after.table[0]["evidence"])
        assert (
            context.bind(BackfillPlanner).plan(partitions(settings))[0].reason
            == "rollups are not up to date"
        )
    exchange.log()
    # a year later the gap is still explained
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
    assert [(one.gap.bars, one.kind) for one in usd if one.gap.bars > 1] == [(277, HALTED)]
    assert {one.kind for one in usd} == {HALTED, NO_TRADE}
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
    assert maintenance == [("17:00", 277, HALTED), ("21:37", 5, NO_TRADE)]
    assert {one.kind for one in usdt[:-1]} == {HALTED, NO_TRADE}
    halted = next(one for one in usdt if one.kind == HALTED).as_dict()["proof"]
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
                source="archive",
            )
    found = explain(settings)
    assert ("BTC/USD", "1m", "22:01", 12, HALTED) in summarize(found)
    usdt = [one for one in found if one.market.symbol == "BTC/USDT"]
    assert [one.gap.bars for one in usdt if one.kind == HALTED] == [12]
    assert {one.kind for one in found} <= {HALTED, NO_TRADE}
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
    assert [(one.kind, words_of(one.gap)) for one in explain(settings)] == [
        ("unexplained", "other markets of the venue have to be fetched first")
    ]
    for timeframe in ("15m", "1h"):
        run_ingest(settings, timeframe=timeframe)
    (lost,) = explain(settings)
    assert summarize([lost]) == [("SOL/USDT", "1m", "16:39", 1, MISSING)]
    assert lost.gap.next_ask is None
    quarter, hour = lost.as_dict()["proof"]["native"]
    assert quarter == (
        "the venue's 15m bar of 2023-02-14T16:30:00Z has volume 94072.85, "
        "ours in it 89305.35, 1 bars lack"
    )
    assert hour.startswith("the venue's 1h bar of 2023-02-14T16:00:00Z has volume ")
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
                context.ledger.forget_asks(partitions(now))
            run_ingest(now)
            assert bool([entry for entry in exchange.log() if "klines" in entry["path"]]) is wanted
    (one,) = explain(now)
    assert (one.kind, one.gap.answers >= 10, one.gap.first_asked) == (
        "unexplained",
        True,
        at("2023-02-15T02:00"),
    )
    assert one.gap.next_ask == at("2023-02-15T02:00") + timedelta(hours=256)
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
    assert [one.kind for one in explain(settings)] == [HALTED, HALTED]
    with open_context(settings) as context:
        with pytest.raises(
            BadInput,
            match=r"begins at 2023-03-24T12:41:00Z; the nearest is --start 2023-03-24T12:40:00Z",
        ):
            context.bind(GapExplainer).reopen(BTC, at("2023-03-24T12:41"))
        assert [one.gap.bars for one in context.bind(GapExplainer).reopen(BTC, HALT.start)] == [80]
    assert [one.kind for one in explain(settings)] == ["unexplained", HALTED]
    with open_context(settings) as context:
        assert [task.bars for task in context.bind(BackfillPlanner).plan(partitions(settings))] == [
            80,
            0,
        ]
    exchange.log()
    run_ingest(settings)
    assert {entry["query"]["symbol"] for entry in exchange.log() if "klines" in entry["path"]} == {
        "BTCUSDT"
    }
    (again, _) = explain(settings)
    assert (again.kind, again.gap.answers) == (HALTED, 4)


def test_a_market_that_leaves_its_venue_is_delisted(
    replay: Callable[..., Any], universe: Universe
) -> None:
    """ETH leaves the list: the bars from then on are one gap, and the other market continues.

    The cause is final when two answers confirm it.
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
        found = explain(later, ask=True)
        assert [("final" if one.gap.next_ask is None else "not final") for one in found] == kinds
        assert [(one.market.symbol, one.kind, one.gap.window) for one in found] == [
            ("ETH/USDT", DELISTED, window("2024-02-02", f"2024-02-0{day}"))
        ]
    with open_context(later) as context:
        btc, eth = context.bind(CoverageReporter).report(later.markets)
    assert (btc.present, eth.present, eth.delisted, eth.missing_at_source) == (
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
