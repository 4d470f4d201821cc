"""The cause of a gap is what its evidence shows and nothing else; its parts are the whole gap."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketdata_assets.model.gap import GapCause
from marketdata_assets.model.intervals import subtract_window
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.quality.evidence import (
    EmptyBarRate,
    EmptyBarRates,
    FinerGap,
    GapEvidence,
    NativeBar,
    Neighbor,
    SilentWindow,
)
from marketdata_assets.quality.gap_causes import classify_gap, next_request_at
from marketdata_assets.venues.facts import Halt
from marketdata_tests.steps import at, window

M1, M15, H1 = TIMEFRAMES["1m"], TIMEFRAMES["15m"], TIMEFRAMES["1h"]
GAP = window("2023-03-24T12:40", "2023-03-24T14:00")
NEVER, OFTEN = (EmptyBarRate(44640, 0, 0),), (EmptyBarRate(44640, 8000, 6000),)
REPORTED = (Halt(GAP, "suspended", "somebody"),)
NO_TRADE, HALTED, DELISTED, MISSING = (
    GapCause.NO_TRADE,
    GapCause.HALTED,
    GapCause.DELISTED,
    GapCause.MISSING_AT_SOURCE,
)


def evidence(gap: Window = GAP, **known: Any) -> GapEvidence:
    """A gap, twice confirmed, of a market that is never silent; nothing else is known about it."""
    usual = {
        "timeframe": M1,
        "is_confirmed_absent": True,
        "answers": 2,
        "empty_bar_rates": NEVER,
    }
    return GapEvidence(window=gap, **{**usual, **known})


def silent(*others: EmptyBarRates, gap: Window = GAP) -> tuple[SilentWindow, ...]:
    return (SilentWindow(gap, others),)


def native(volume: str, ours: str) -> tuple[NativeBar, ...]:
    """One 15m bar over the first five minutes of the gap."""
    start = at("2023-03-24T12:30")
    return (NativeBar(M15, start, Decimal(volume), stored_volume=Decimal(ours), missing_bars=5),)


def minutes(start: str, count: int) -> Window:
    return Window(at(start), at(start) + count * timedelta(minutes=1))


def neighbors(volume: str) -> dict[str, Neighbor]:
    sides = {"before": GAP.start - M1.width, "after": GAP.end}
    return {side: Neighbor(moment, Decimal(1), Decimal(volume)) for side, moment in sides.items()}


SHORT, TEN = minutes("2023-03-24T12:40", 1), minutes("2023-03-24T12:40", 10)
ELSE = {"binance:ETH-USDT": 80}
ENDED = {"is_trailing": True, "is_listed": False, "is_confirmed_absent": False}
CASES: dict[str, tuple[GapEvidence, list[tuple[GapCause | None, bool]]]] = {
    "nothing is known": (evidence(), [(None, False)]),
    "all markets are silent": (evidence(silent_windows=silent(NEVER)), [(HALTED, True)]),
    "all are silent, but that is not confirmed": (
        evidence(silent_windows=silent(NEVER), is_confirmed_absent=False),
        [(None, False)],
    ),
    "all are silent for a minute, as they often are": (
        evidence(SHORT, empty_bar_rates=OFTEN, silent_windows=silent(OFTEN, gap=SHORT)),
        [(NO_TRADE, True)],
    ),
    "another market is not fetched yet": (
        evidence(silent_windows=silent(NEVER), is_fetch_pending=True),
        [(None, False)],
    ),
    "the report alone": (evidence(halts=REPORTED, other_markets=ELSE), [(None, False)]),
    "one market for 80 minutes": (evidence(silent_windows=silent()), [(None, False)]),
    "not served any more": (
        evidence(is_confirmed_absent=False, horizon="the venue refused what is older"),
        [(MISSING, True)],
    ),
    "not served any more, but there are files": (
        evidence(is_confirmed_absent=False, horizon="the newest 720 bars only", has_archive=True),
        [(MISSING, False)],
    ),
    "not served any more, others are not fetched yet": (
        evidence(is_confirmed_absent=False, horizon="it was refused", is_fetch_pending=True),
        [(MISSING, True)],
    ),
    "one market for a minute": (
        evidence(SHORT, silent_windows=silent(gap=SHORT)),
        [(None, False)],
    ),
    "one market for ten minutes": (evidence(TEN, silent_windows=silent(gap=TEN)), [(None, False)]),
    "one market for ten minutes, reported": (
        evidence(TEN, silent_windows=silent(gap=TEN), halts=REPORTED),
        [(HALTED, True)],
    ),
    "one market for ten minutes, and another venue traded": (
        evidence(TEN, silent_windows=silent(gap=TEN), traded_elsewhere="kraken:BTC-USD"),
        [(None, False)],
    ),
    "one market for a minute, reported": (
        evidence(SHORT, silent_windows=silent(gap=SHORT), halts=REPORTED),
        [(None, False)],
    ),
    "the native bar has more": (
        evidence(SHORT, native_bars=native("7", "6")),
        [(MISSING, True)],
    ),
    "the native bar has more, all are silent": (
        evidence(SHORT, native_bars=native("7", "6"), silent_windows=silent(NEVER, gap=SHORT)),
        [(MISSING, True)],
    ),
    "the native bar has more, others are not fetched yet": (
        evidence(SHORT, native_bars=native("7", "6"), is_fetch_pending=True),
        [(MISSING, True)],
    ),
    "the native bar has more, and the gap is not confirmed": (
        evidence(SHORT, native_bars=native("7", "6"), is_confirmed_absent=False),
        [(MISSING, False)],
    ),
    "the native bar is what ours add up to": (
        evidence(SHORT, native_bars=native("6", "6.000")),
        [(NO_TRADE, True)],
    ),
    "ours hold more than the native bar": (
        evidence(SHORT, native_bars=native("6", "7")),
        [(None, False)],
    ),
    "all are silent, and the native bar agrees": (
        evidence(silent_windows=silent(NEVER), native_bars=native("6", "6")),
        [(HALTED, True)],
    ),
    "the native bar covers the first five minutes only": (
        evidence(native_bars=native("7", "6")),
        [(MISSING, True), (None, False)],
    ),
    "the venue omits empty minutes": (evidence(SHORT, empty_bar_rates=OFTEN), [(NO_TRADE, True)]),
    "it does, and was never silent so long": (evidence(empty_bar_rates=OFTEN), [(None, False)]),
    "it sends empty minutes as bars": (
        evidence(SHORT, empty_bar_rates=OFTEN, bars_without_volume=9000),
        [(None, False)],
    ),
    "three other bars are missing": (
        evidence(SHORT, empty_bar_rates=(EmptyBarRate(44640, 3, 3),)),
        [(NO_TRADE, True)],
    ),
    "two other bars are missing": (
        evidence(SHORT, empty_bar_rates=(EmptyBarRate(44640, 2, 2),)),
        [(None, False)],
    ),
    "both neighbors hold no trade": (evidence(**neighbors("0")), [(NO_TRADE, True)]),
    "both neighbors hold trades": (evidence(**neighbors("1")), [(None, False)]),
    "silent to the end and not listed": (
        evidence(**ENDED, other_markets=ELSE),
        [(DELISTED, True)],
    ),
    "seen so only once": (
        evidence(**ENDED, answers=1, other_markets=ELSE),
        [(DELISTED, False)],
    ),
    "no other market continues": (evidence(**ENDED), [(DELISTED, False)]),
    "silent to the end and listed": (evidence(**{**ENDED, "is_listed": True}), [(None, False)]),
    "silent to the end, list not requested": (
        evidence(**{**ENDED, "is_listed": None}),
        [(None, False)],
    ),
    "a coarser table where base bars are missing": (
        evidence(
            minutes("2023-03-24T13:00", 60), timeframe=H1, finer_gaps=(FinerGap(GAP, HALTED),)
        ),
        [(HALTED, True)],
    ),
    "a coarser table where some base bars are there": (
        evidence(
            minutes("2023-03-24T12:00", 60), timeframe=H1, finer_gaps=(FinerGap(GAP, HALTED),)
        ),
        [(None, False)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_cause_is_what_the_evidence_shows(name: str) -> None:
    known, expected = CASES[name]
    parts = classify_gap(known)
    assert [(part.cause, part.is_final) for part in parts] == expected
    assert all(part.message for part in parts)


def test_a_gap_is_cut_where_the_others_come_back() -> None:
    """The market that trades less stays silent five minutes longer: that is no halt any more."""
    longer = Window(GAP.start, GAP.end + 5 * M1.width)
    parts = classify_gap(evidence(longer, empty_bar_rates=OFTEN, silent_windows=silent(NEVER)))
    assert [(part.window, part.cause) for part in parts] == [
        (GAP, HALTED),
        (Window(GAP.end, longer.end), NO_TRADE),
    ]


def test_consecutive_empty_bars_are_less_rare_than_independent_ones() -> None:
    """20 minutes on Kraken's BTC/USDT, where a third of all minutes is empty: no halt, though
    0.32^20 is one in 10^10.
    """
    kraken = EmptyBarRate(30240, 9796, 5255)
    assert (9796 / 30240) ** 20 < 1e-9 < kraken.chance(20) < 1e-6
    assert EmptyBarRate(44640, 0, 0).chance(1) == pytest.approx(1 / 44642)


@given(st.data())
def test_parts_are_the_gap_and_nothing_else(data: st.DataObject) -> None:
    def some(most: int = 90) -> Window:
        first = data.draw(st.integers(0, most))
        length = data.draw(st.integers(1, 60))
        return Window(GAP.start + first * M1.width, GAP.start + (first + length) * M1.width)

    gap = some(30)
    known = evidence(
        gap,
        is_confirmed_absent=data.draw(st.booleans()),
        empty_bar_rates=data.draw(st.sampled_from([NEVER, OFTEN])),
        is_fetch_pending=data.draw(st.sampled_from([False, False, True])),
        silent_windows=tuple(
            SilentWindow(w, (NEVER,) * data.draw(st.integers(0, 2)))
            for w in subtract_window(gap, [some(), some()])
        ),
        native_bars=tuple(
            NativeBar(
                tf,
                tf.floor(some().start),
                Decimal(data.draw(st.integers(0, 1))),
                stored_volume=Decimal(1),
                missing_bars=1,
            )
            for tf in data.draw(st.lists(st.sampled_from([M15, H1]), max_size=4))
        ),
        is_trailing=data.draw(st.booleans()),
        is_listed=False,
    )
    parts = classify_gap(known)
    assert parts[0].window.start == gap.start
    assert parts[-1].window.end == gap.end
    assert all(a.window.end == b.window.start for a, b in pairwise(parts))
    assert all(part.window and part.cause in (None, *GapCause) for part in parts)


def test_the_distance_of_requests_grows_to_a_month() -> None:
    first = requested = at("2024-01-01")
    hours = []
    for _ in range(8):
        requested = next_request_at(first, requested)
        hours.append((requested - first) // timedelta(hours=1))
    assert hours == [1, 4, 16, 64, 256, 976, 1696, 2416]
