"""The causes of a gap that the evidence shows, part by part, and whether each of them is final."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import NamedTuple

from marketdata_assets.model.gap import LONGEST_PAUSE, GapCause
from marketdata_assets.model.intervals import (
    align_inside,
    coalesce_windows,
    fold_neighbors,
    subtract_window,
)
from marketdata_assets.model.window import Window
from marketdata_assets.quality.evidence import (
    EmptyBarRates,
    GapEvidence,
    NativeBar,
    highest_chance,
)

MAX_CHANCE = 1e-6
"""Silence of all markets that is less likely than this by chance is a halt."""
MAX_CHANCE_OF_PAUSE = 1e-9
"""A pause that is less likely than this is not explained by a market's habit of having no trades.
"""
REPORT_MARGIN = timedelta(hours=1)
"""How far beyond its reported window a halt may reach: reports are approximate."""
MIN_EMPTY_BARS = 3
"""So many other open times without a bar show that the venue sends no bar without trades."""
MAX_MESSAGE = 200
"""Characters after which no message of a further part is added."""
FIRST_PAUSE = timedelta(hours=1)


def next_request_at(first_requested: datetime, now: datetime) -> datetime:
    """Return when a gap that has just been requested is requested again.

    The requests follow 1, 4, 16, 64 h after the first one, and so on, at most 30 days apart.
    """
    pause = min(max(FIRST_PAUSE, 3 * (now - first_requested)), LONGEST_PAUSE)
    return (now + pause).replace(microsecond=0)


class GapPart(NamedTuple):
    """Part of a gap: its cause (None: not known), whether that is final, and why."""

    window: Window
    cause: GapCause | None
    is_final: bool
    message: str


def classify_gap(evidence: GapEvidence) -> list[GapPart]:
    """Cut a gap into parts by their causes, in order; together they are the gap.

    The first kind of evidence that shows the cause of a part decides it.
    """
    found: list[GapPart] = []
    rest = [evidence.window]
    for find in _FINDERS_AT_ONCE if evidence.is_fetch_pending else _FINDERS:
        parts = [part for window in rest for part in find(evidence, window)]
        cuts = [part.window for part in parts]
        rest = [left for window in rest for left in subtract_window(window, cuts)]
        found += parts
    unknown = _unknown_message(evidence)
    found += [GapPart(window, None, is_final=False, message=unknown) for window in rest]
    return fold_neighbors(sorted(found, key=lambda part: part.window), _join_parts)


def _find_unserved(evidence: GapEvidence, window: Window) -> list[GapPart]:
    """The venue serves only later bars, as its answers or its documentation show."""
    if evidence.horizon is None:
        return []
    is_final = evidence.answers > 1 and not evidence.has_archive
    message = f"beyond what the venue serves: {evidence.horizon}"
    if evidence.has_archive:
        message += "; its files may hold the bars"
    return [GapPart(window, GapCause.MISSING_AT_SOURCE, is_final=is_final, message=message)]


def _find_missing_at_source(evidence: GapEvidence, window: Window) -> list[GapPart]:
    """The venue's own coarser bar holds trades that our bars do not."""
    larger = [native for native in evidence.native_bars if native.volume > native.stored_volume]
    return [
        GapPart(
            part,
            GapCause.MISSING_AT_SOURCE,
            is_final=evidence.is_confirmed_absent,
            message=str(native),
        )
        for part, native in _parts_by_native(window, larger)
    ]


def _find_no_trade_by_native(evidence: GapEvidence, window: Window) -> list[GapPart]:
    """The venue's own coarser bar is the sum of our bars: the others hold no trade."""
    equal = [native for native in evidence.native_bars if native.volume == native.stored_volume]
    return [
        GapPart(
            part,
            GapCause.NO_TRADE,
            is_final=evidence.is_confirmed_absent,
            message=str(native),
        )
        for part, native in _parts_by_native(window, equal)
    ]


def _parts_by_native(
    window: Window, natives: Iterable[NativeBar]
) -> list[tuple[Window, NativeBar]]:
    """Cut a window by the bars that cover it; the finest bar, which locates best, comes first."""
    found: list[tuple[Window, NativeBar]] = []
    for native in sorted(natives, key=lambda bar: bar.timeframe.width):
        covered = [part for part, _ in found]
        found += [(rest, native) for rest in subtract_window(window & native.window, covered)]
    return found


def _find_by_finer_gaps(evidence: GapEvidence, window: Window) -> list[GapPart]:
    """No base bar is there either, and the cause of that is known."""
    if not evidence.is_confirmed_absent:
        return []
    parts = [
        (align_inside(gap.window, evidence.timeframe) & window, gap) for gap in evidence.finer_gaps
    ]
    return [
        GapPart(
            part,
            gap.cause,
            is_final=True,
            message=f"no base bar of {gap.window} is there either: {gap.cause}",
        )
        for part, gap in parts
        if part.count(evidence.timeframe)
    ]


def _find_halts(evidence: GapEvidence, window: Window) -> list[GapPart]:
    """The market is silent, which is no coincidence, and so says a second witness: every other
    market of the venue, or somebody who reported the halt.
    """
    if not evidence.is_confirmed_absent:
        return []
    parts = [
        (part, silent.others)
        for silent in evidence.silent_windows
        for part in _witnessed_parts(evidence, silent.window & window, silent.others)
    ]
    return [
        GapPart(part, GapCause.HALTED, is_final=True, message=message)
        for part, others in parts
        if part and (message := _halt_message(evidence, part, others))
    ]


def _witnessed_parts(
    evidence: GapEvidence, window: Window, others: tuple[EmptyBarRates, ...]
) -> list[Window]:
    """Return the parts of a silent window that a second witness confirms."""
    if others:
        return [window]
    reports = [
        Window(halt.window.start - REPORT_MARGIN, halt.window.end + REPORT_MARGIN)
        for halt in evidence.halts
    ]
    return [window & report for report in coalesce_windows(reports)]


def _halt_message(
    evidence: GapEvidence, window: Window, others: tuple[EmptyBarRates, ...]
) -> str | None:
    """Return why a silent window is a halt; None where the evidence is too weak."""
    bars = window.count(evidence.timeframe)
    chance = highest_chance(evidence.empty_bar_rates, bars)
    for rates in others:
        chance *= highest_chance(rates, bars)
    reported = [halt for halt in evidence.halts if halt.window & window]
    if chance >= MAX_CHANCE:
        return None
    who = (
        f"none of the venue's {len(others) + 1} markets has a bar"
        if others
        else "the venue's one market here has no bar"
    )
    odds = f"by chance once in {1 / chance:.0e} times" if chance > 1e-300 else "never by chance"
    parts = [f"{who}, {odds}"]
    parts += [f"known as: {halt.description} ({halt.reported_by})" for halt in reported]
    if not others and evidence.traded_elsewhere:
        parts.append(f"{evidence.traded_elsewhere} traded")
    return "; ".join(parts)


def _find_omitted_bars(evidence: GapEvidence, window: Window) -> list[GapPart]:
    """The venue sends no bar without trades, and this market has such pauses often enough."""
    bars, widest = window.count(evidence.timeframe), evidence.empty_bar_rates[0]
    sends_empty_bars = 10 * evidence.bars_without_volume > widest.empty
    if not evidence.is_confirmed_absent or widest.empty < MIN_EMPTY_BARS or sends_empty_bars:
        return []
    chance = highest_chance(evidence.empty_bar_rates, bars)
    if chance < MAX_CHANCE_OF_PAUSE:
        return []
    message = (
        f"the venue sends no bar without trades: {widest.empty} of the month's {widest.bars} other "
        f"bars are not there either, and {evidence.bars_without_volume} are there without volume; "
        f"{bars} in a row: {chance:.0e} at any bar"
    )
    return [GapPart(window, GapCause.NO_TRADE, is_final=True, message=message)]


def _find_quiet_neighbors(evidence: GapEvidence, window: Window) -> list[GapPart]:
    """The bars on both sides hold no trade."""
    sides = evidence.before, evidence.after
    if not evidence.is_confirmed_absent or any(bar is None or bar.volume for bar in sides):
        return []
    message = "the bars on both sides hold no trade"
    return [GapPart(window, GapCause.NO_TRADE, is_final=True, message=message)]


def _find_delisting(evidence: GapEvidence, window: Window) -> list[GapPart]:
    """The market ended: no bar since, it is listed no more, and other markets continue."""
    if not evidence.is_trailing or evidence.is_listed is not False:
        return []
    continuing = [name for name, bars in evidence.other_markets.items() if bars]
    is_final = evidence.answers >= (2 if continuing else 3)
    message = "no bar has come since, and the venue no longer lists the market"
    if continuing:
        message += f"; {continuing[0]} continues"
    return [GapPart(window, GapCause.DELISTED, is_final=is_final, message=message)]


_Finder = Callable[[GapEvidence, Window], list[GapPart]]
_FINDERS_AT_ONCE: tuple[_Finder, ...] = (_find_unserved, _find_missing_at_source)
"""What other markets and timeframes, which may still have to be fetched, cannot change."""
_FINDERS: tuple[_Finder, ...] = (
    *_FINDERS_AT_ONCE,
    _find_by_finer_gaps,
    _find_halts,
    _find_no_trade_by_native,
    _find_omitted_bars,
    _find_quiet_neighbors,
    _find_delisting,
)


def _unknown_message(evidence: GapEvidence) -> str:
    if evidence.is_fetch_pending:
        return "other markets of the venue have to be fetched first"
    if not evidence.is_confirmed_absent:
        return "the venue has not answered for it"
    with_bars = sum(bars > 0 for bars in evidence.other_markets.values())
    others = (
        f"{with_bars} of {len(evidence.other_markets)} other markets of the venue have bars"
        if evidence.other_markets
        else "it is the venue's only market here"
    )
    return f"the venue has no bar; {others}, and nothing else shows why"


def _join_parts(last: GapPart, part: GapPart) -> GapPart | None:
    """Return adjacent parts of one cause as one; None for any others."""
    if (last.window.end, last.cause, last.is_final) != (
        part.window.start,
        part.cause,
        part.is_final,
    ):
        return None
    is_long = part.message in last.message or len(last.message) > MAX_MESSAGE
    message = last.message if is_long else f"{last.message}; {part.message}"
    window = Window(last.window.start, part.window.end)
    return part._replace(window=window, message=message)
