"""Causes: what the facts about a hole say it is, part by part, and whether two kinds of evidence agree
on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import NamedTuple

from marketdata_assets.model.bar import format_number
from marketdata_assets.model.intervals import without
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.halts import Halt

NO_TRADE, HALTED, DELISTED, MISSING = "no_trade", "halted", "delisted", "missing_at_source"
CAUSES = (NO_TRADE, HALTED, DELISTED, MISSING)

CHANCE = 1e-6
"""Markets that are all silent by chance more rarely than this are halted."""
CHANCE_ALONE = 1e-9
"""The same where there is only one market and nothing else to witness it; and how rare a pause of a
market may be.
"""
HABIT = 3
"""So many other minutes without a bar make it a habit of the venue to send none for a minute without
trades.
"""
ENOUGH = 200
"""Characters after which no more words of the same kind are added."""
FIRST_PAUSE, LONGEST_PAUSE = timedelta(hours=1), timedelta(days=30)


def ask_again_at(first: datetime, now: datetime) -> datetime:
    """When a gap that was asked for first at `first` and just now is asked for again: 1, 4, 16, 64 h
    after `first`, ...
    """
    pause = min(max(FIRST_PAUSE, 3 * (now - first)), LONGEST_PAUSE)
    return (now + pause).replace(microsecond=0)


class Neighbour(NamedTuple):
    """The bar beside a hole."""

    open_time: datetime
    close: Decimal
    volume: Decimal


class Native(NamedTuple):
    """A coarser bar of the venue that covers part of a hole, beside the sum of our bars in it;
    `lacking`: how many are not there.
    """

    timeframe: Timeframe
    open_time: datetime
    volume: Decimal
    ours: Decimal
    lacking: int

    @property
    def window(self) -> Window:
        """What it covers."""
        return Window(self.open_time, self.open_time + self.timeframe.width)

    def __str__(self) -> str:
        amounts = f"volume {format_number(self.volume)}, ours in it {format_number(self.ours)}"
        return f"the venue's {self.timeframe.name} bar of {format_time(self.open_time)} has {amounts}, {self.lacking} bars lack"


class Habit(NamedTuple):
    """How often a market has no bar, apart from the hole in question: `empty` of `minutes` bars, in
    `runs` stretches.
    """

    minutes: int
    empty: int
    runs: int

    def chance(self, bars: int) -> float:
        """How likely a stretch of so many empty bars begins at any one bar: empty ones come in a row
        more often than by lot.
        """
        begins = (self.empty + 1) / (self.minutes + 2)
        goes_on = min(1.0, (self.empty - self.runs + 0.5) / (self.empty + 1))
        return float(begins * goes_on ** (bars - 1))


Habits = tuple[Habit, ...]
"""A market's habit around a hole, as seen over more than one span."""


def chance_of(habits: Habits, bars: int) -> float:
    """The likelihood by the span in which the market was the most silent."""
    return max(habit.chance(bars) for habit in habits)


class Silence(NamedTuple):
    """A stretch of a hole in which every other market of the venue that we know lacks its bars too,
    with their habits.
    """

    window: Window
    others: tuple[Habits, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known about one hole of a market.

    `told`: answers delivered bars on both sides of it and none between, twice. `silences` are
    disjoint, `natives` the coarser bars whose timeframe adds up where nothing lacks. `others` says
    of each other market of the venue how many of the hole's bars it has; `pending`: some are not
    fetched yet. `elsewhere` names another venue's market of the same asset that traded meanwhile.
    `zeros` counts stored bars without volume. `finer` says, of a coarser table's hole, why base
    bars lack in it. `trailing`: no bar of the market is stored after it; `listed`: whether the
    venue's list still has the market (None: not asked).
    """

    hole: Window
    timeframe: Timeframe
    told: bool
    answers: int
    habits: Habits
    silences: tuple[Silence, ...] = ()
    finer: tuple[tuple[Window, str], ...] = ()
    natives: tuple[Native, ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)
    pending: bool = False
    elsewhere: str | None = None
    halts: tuple[Halt, ...] = ()
    before: Neighbour | None = None
    after: Neighbour | None = None
    zeros: int = 0
    trailing: bool = False
    listed: bool | None = None


class Part(NamedTuple):
    """Part of a hole: its cause (empty: not told apart), whether that is final, and why, in words."""

    window: Window
    cause: str
    final: bool
    words: str


def classify(facts: Facts) -> list[Part]:
    """Cut a hole into parts by their causes, in order; together they are the hole. The first judge
    that knows a part has it.
    """
    found: list[Part] = []
    rest = [facts.hole]
    for judge in (
        (_missing,)
        if facts.pending
        else (_missing, _as_finer, _halted, _native_is_empty, _omitted, _quiet, _delisted)
    ):
        judged = [part for window in rest for part in judge(facts, window)]
        rest = [
            left for window in rest for left in without(window, [part.window for part in judged])
        ]
        found += judged
    return _joined(sorted([*found, *(Part(window, "", False, _unknown(facts)) for window in rest)]))


Judge = Callable[[Facts, Window], list[Part]]


def _missing(facts: Facts, window: Window) -> list[Part]:
    """The venue's own coarser bar holds trades that our bars lack."""
    more = [native for native in facts.natives if native.volume > native.ours]
    return _by_native(window, more, MISSING, facts.told)


def _native_is_empty(facts: Facts, window: Window) -> list[Part]:
    """The venue's own coarser bar is what our bars add up to: nothing was traded where there are
    none.
    """
    return _by_native(
        window, [native for native in facts.natives if native.volume == native.ours], NO_TRADE, True
    )


def _by_native(window: Window, natives: Iterable[Native], cause: str, final: bool) -> list[Part]:
    found: list[Part] = []
    for native in sorted(
        natives, key=lambda n: n.timeframe.width
    ):  # the finest tells most closely where
        for rest in without(window & native.window, [part.window for part in found]):
            found.append(Part(rest, cause, final, str(native)))
    return found


def _as_finer(facts: Facts, window: Window) -> list[Part]:
    """No base bar is there either, and it is known why."""
    width, found = facts.timeframe.width, []
    for span, cause in facts.finer:
        first, last = facts.timeframe.ceil(span.start), facts.timeframe.floor(span.end)
        if facts.told and (part := Window(first, last) & window) and part.end - part.start >= width:
            found.append(Part(part, cause, True, f"no base bar of {span} is there either: {cause}"))
    return found


def _halted(facts: Facts, window: Window) -> list[Part]:
    """All markets of the venue are silent at once, and that is no coincidence."""
    if not facts.told:
        return []
    parts = [(silence.window & window, silence.others) for silence in facts.silences]
    return [
        Part(part, HALTED, True, words)
        for part, others in parts
        if part and (words := _halt(facts, part, others))
    ]


def _halt(facts: Facts, window: Window, others: tuple[Habits, ...]) -> str | None:
    bars = window.count(facts.timeframe)
    chance = chance_of(facts.habits, bars)
    for habits in others:
        chance *= chance_of(habits, bars)
    known = [halt for halt in facts.halts if halt.window & window]
    who = (
        f"none of the venue's {len(others) + 1} markets has a bar"
        if others
        else "the venue's one market here has no bar"
    )
    words = [
        f"{who}, by chance once in {1 / chance:.0e} times"
        if chance > 1e-300
        else f"{who}, never by chance"
    ]
    words += [f"known as: {halt.what} ({halt.told_by})" for halt in known]
    if not others and facts.elsewhere:
        words.append(f"{facts.elsewhere} traded")
    enough = chance < CHANCE and (others or known or facts.elsewhere or chance < CHANCE_ALONE)
    return "; ".join(words) if enough else None


def _omitted(facts: Facts, window: Window) -> list[Part]:
    """The venue sends no bar for a minute without trades, and this market has such minutes as often as
    that.
    """
    bars, widest = window.count(facts.timeframe), facts.habits[0]
    if not facts.told or widest.empty < HABIT or 10 * facts.zeros > widest.empty:
        return []
    chance = chance_of(facts.habits, bars)
    if chance < CHANCE_ALONE:
        return []
    usual = f"{widest.empty} of the month's {widest.minutes} other bars are not there either, and {facts.zeros} are there without volume"
    return [
        Part(
            window,
            NO_TRADE,
            True,
            f"the venue sends no bar without trades: {usual}; {bars} in a row: {chance:.0e} at any bar",
        )
    ]


def _quiet(facts: Facts, window: Window) -> list[Part]:
    """The bars on both sides hold no trade."""
    sides = facts.before, facts.after
    if facts.told and all(side is not None and side.volume == 0 for side in sides):
        return [Part(window, NO_TRADE, True, "the bars on both sides hold no trade")]
    return []


def _delisted(facts: Facts, window: Window) -> list[Part]:
    """The market ended: no bar since, the venue's list has it no more, and other markets go on."""
    if not facts.trailing or facts.listed is not False:
        return []
    going_on = [name for name, bars in facts.others.items() if bars]
    final = facts.answers >= (2 if going_on else 3)
    words = "no bar has come since, and the venue lists the market no more"
    return [Part(window, DELISTED, final, words + (f"; {going_on[0]} goes on" if going_on else ""))]


def _unknown(facts: Facts) -> str:
    if facts.pending:
        return "other markets of the venue have to be fetched first"
    if not facts.told:
        return "the venue has not answered for it"
    there = sum(bars > 0 for bars in facts.others.values())
    others = (
        f"{there} of {len(facts.others)} other markets of the venue have bars"
        if facts.others
        else "it is the venue's only market here"
    )
    return f"the venue has no bar; {others}, and nothing else tells why"


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbouring parts of the same cause as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and (last.window.end, last.cause, last.final) == (
            part.window.start,
            part.cause,
            part.final,
        ):
            words = (
                last.words
                if part.words in last.words or len(last.words) > ENOUGH
                else f"{last.words}; {part.words}"
            )
            joined[-1] = Part(
                Window(last.window.start, part.window.end), part.cause, part.final, words
            )
        else:
            joined.append(part)
    return joined
