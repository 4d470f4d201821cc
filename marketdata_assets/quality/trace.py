"""Trace: from a rolled-up bar that differs from the venue's own to the base bars that cause it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.model.bar import DIFFERENCE_SUFFIX, PRICES, format_number
from marketdata_assets.model.intervals import holes, runs
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.parity import DIFFERS, ONLY_NATIVE, ONLY_OURS, UNEQUAL, VALUES

SUMS = ("volume", "quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume")
NAMED = 5
"""How many minutes or windows a cause names in words; `minutes` holds all of them."""
_LAST_DIGITS = Decimal("1e-6")
"""So large a share of a number may be rounding, when one bar's columns are compared in proportion.
"""

Bar = Mapping[str, Any]


class Absence(NamedTuple):
    """A window without bars, and why."""

    window: Window
    why: str


class Cause(NamedTuple):
    """What a difference comes from, in words, and the windows of base bars behind it."""

    says: str
    minutes: tuple[Window, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the base bars (`bars`: model.bar.BAR_SCHEMA, sorted) that bars of `timeframe` are
    made of.

    `absent` says why base bars are not there, `native_absent` why the venue's own bars are not.
    `replaced` are earlier revisions of base bars (model.bar.HISTORY_COLUMNS). `finer` is what
    `judge` found of the finest timeframe between.
    """

    base: Timeframe
    timeframe: Timeframe
    bars: pl.DataFrame
    absent: Sequence[Absence]
    native_absent: Sequence[Absence]
    replaced: pl.DataFrame
    finer: tuple[Timeframe, pl.DataFrame] | None


def trace(row: Bar, evidence: Evidence) -> Cause:
    """The cause of one row of `judge` that is a difference."""
    return _Bucket(row, evidence, evidence.timeframe).cause()


class _Bucket:
    """One bar that differs, and what it is made of."""

    def __init__(self, row: Bar, evidence: Evidence, timeframe: Timeframe) -> None:
        self.row, self.evidence, self.timeframe, self.base = row, evidence, timeframe, evidence.base
        self.window = Window(row["open_time"], row["open_time"] + timeframe.width)
        opens = evidence.bars["open_time"]
        first, last = opens.search_sorted(self.window.start), opens.search_sorted(self.window.end)
        self.frame = evidence.bars.slice(first, last - first)
        self.missing = holes(self.frame["open_time"], self.base, self.window)

    def cause(self) -> Cause:
        if self.row["outcome"] == ONLY_NATIVE:
            return Cause(
                f"no {self.base.name} bar of it is stored: {self._why(self.missing)}",
                tuple(self.missing),
            )
        if self.row["outcome"] == ONLY_OURS:
            why = _reasons([self.window], self.evidence.native_absent) or "nothing says why"
            there = runs(self.frame["open_time"].to_list(), self.base)
            return Cause(
                f"the venue has no {self.timeframe.name} bar of its own here: {why}", tuple(there)
            )
        return self._by_finer() or self._by_base()

    # --------------------------------------------------------------------------------- by the venue
    def _by_finer(self) -> Cause | None:
        """The causes of the venue's own finer bars that differ inside; None where they say nothing."""
        if self.evidence.finer is None or self.evidence.finer[0].width >= self.timeframe.width:
            return None
        finer, judged = self.evidence.finer
        inside = judged.filter(
            pl.col("open_time").is_between(self.window.start, self.window.end, closed="left")
        )
        unequal = inside.filter(pl.col("outcome").is_in(UNEQUAL)).to_dicts()
        if not unequal and inside.height * finer.width == self.timeframe.width:
            by_base = self._by_base()
            odd = f"the venue's own {finer.name} bars equal ours, so its {self.timeframe.name} bar is at odds with them"
            return Cause(f"{odd}; {by_base.says}", by_base.minutes)
        rows = [row for row in unequal if self._shows(row, finer)]
        if not rows:
            return None
        causes = [_Bucket(row, self.evidence, finer).cause() for row in rows]
        parts = [
            f"{finer.name} {format_time(row['open_time'])}: {cause.says}"
            for row, cause in zip(rows, causes, strict=True)
        ]
        minutes = _joined(window for cause in causes for window in cause.minutes)
        return Cause(
            "; ".join(
                [*parts[:NAMED], *_more(len(parts) - NAMED, "bars"), *self._left(finer, inside)]
            ),
            minutes,
        )

    def _shows(self, row: Bar, finer: Timeframe) -> bool:
        """Whether a finer bar can be behind this one: it is alone, or differs in one of its columns
        (open and close: at its edge).
        """
        if row["outcome"] != DIFFERS:
            return True
        common = {*row["columns"].split()} & {*self.row["columns"].split()}
        common -= {"open"} if row["open_time"] > self.window.start else set()
        common -= {"close"} if row["open_time"] + finer.width < self.window.end else set()
        return bool(common)

    def _left(self, finer: Timeframe, inside: pl.DataFrame) -> list[str]:
        """What the finer bars' differences do not add up to."""
        rest = {
            name: amount - (inside[name + DIFFERENCE_SUFFIX].sum() or 0)
            for name, amount in self._apart(SUMS).items()
        }
        odd = {name: amount for name, amount in rest.items() if amount}
        return (
            [
                f"and its own {self.timeframe.name} bar is at odds with its {finer.name} bars by {_amounts(odd)}"
            ]
            if odd
            else []
        )

    # --------------------------------------------------------------------------------- by the base
    def _by_base(self) -> Cause:
        bars, names = self.frame.to_dicts(), self.row["columns"].split()
        parts = [self._sums(bars, names)]
        parts += [
            self._edge(name, bars) if name in ("open", "close") else self._extreme(name, bars)
            for name in names
            if name in PRICES
        ]
        found = [part for part in (*parts, self._corrected()) if part is not None]
        minutes = _joined(window for cause in found for window in cause.minutes)
        lost = [window for window in self.missing if any(window & behind for behind in minutes)]
        seen = (
            f"though its {self.timeframe.name} bar counts it"
            if parts[0] is not None and parts[0].minutes and lost
            else ""
        )
        return Cause(
            "; ".join(
                [*([self._why(lost, seen)] if lost else []), *(cause.says for cause in found)]
            ),
            minutes,
        )

    def _sums(self, bars: Sequence[Bar], names: Sequence[str]) -> Cause | None:
        """Volumes and trades: the one bar that makes the difference, else the bars that are
        missing.
        """
        given = self._apart(SUMS)
        amounts = {name: amount for name, amount in given.items() if name in names}
        one = self._one(bars, amounts, given) if amounts else None
        if one is not None or not amounts:
            return one
        lacking, more = (
            {name: abs(d) for name, d in amounts.items() if (d < 0) == less}
            for less in (True, False)
        )
        if lacking and self.missing:
            also = f", and too much: {_amounts(more)}" if more else ""
            return Cause(f"lacking {_amounts(lacking)}{also}", tuple(self.missing))
        words = [
            f"{word} by {_amounts(part)}"
            for word, part in (("less", lacking), ("more", more))
            if part
        ]
        none = "" if self.missing else f"no {self.base.name} bar is missing, and "
        return Cause(f"{none}no single one explains that ours is {' and '.join(words)}")

    def _one(
        self, bars: Sequence[Bar], amounts: Mapping[str, Any], given: Mapping[str, Any]
    ) -> Cause | None:
        """The only bar whose values are the difference, are twice the difference, or are off by one
        share in every column.
        """
        told = [bar for bar in bars if all(bar[name] is not None for name in given)]
        single = [bar for bar in told if all(bar[name] == amount for name, amount in given.items())]
        double = [
            bar for bar in told if all(bar[name] == 2 * amount for name, amount in amounts.items())
        ]
        share = [bar for bar in told if _in_proportion(bar, amounts)]
        for found, words in (
            (single, "is the difference, to the digit: the venue's own bar is without it"),
            (double, "is counted twice as high as in the venue's own bar"),
        ):
            if len(found) == 1:
                return Cause(
                    f"{format_time(found[0]['open_time'])} {words}: {_amounts(amounts)}",
                    self._windows(found),
                )
        if len(share) == 1 and len(amounts) > 1:
            bar, (name, amount) = share[0], next(iter(amounts.items()))
            says = f"{format_time(bar['open_time'])} differs by one share in every column: {name} {format_number(bar[name])}, by the venue's own bar"
            return Cause(f"{says} {format_number(bar[name] - amount)}", self._windows([bar]))
        return None

    def _extreme(self, name: str, bars: Sequence[Bar]) -> Cause:
        """A high or low: the bars that reach beyond the venue's own, or that none does."""
        mine, theirs, sign = self.row[name], self.row[name + "_native"], 1 if name == "high" else -1
        if sign * (mine - theirs) < 0:
            says = f"{name}: no {self.base.name} bar reaches the venue's own {format_number(theirs)}, ours ends at {format_number(mine)}"
            return Cause(says, tuple(self.missing))
        beyond = [bar for bar in bars if sign * (bar[name] - theirs) > 0]
        which = _some(
            [
                f"{format_time(bar['open_time'])} reaches {format_number(bar[name])}{_idle(bar)}"
                for bar in beyond
            ],
            "bars",
        )
        return Cause(
            f"{name}: {which}, beyond the venue's own {format_number(theirs)}",
            self._windows(beyond),
        )

    def _edge(self, name: str, bars: Sequence[Bar]) -> Cause:
        """Open and close: the first or last base bar, and whether it is missing."""
        theirs = self.row[name + "_native"]
        bar, end = (
            (bars[0], self.window.start)
            if name == "open"
            else (bars[-1], self.window.end - self.base.width)
        )
        verb = "opens" if name == "open" else "closes"
        says = f"{name}: {format_time(bar['open_time'])} {verb} at {format_number(bar[name])}{_idle(bar)}, the venue's own bar at {format_number(theirs)}"
        lost = tuple(window for window in self.missing if window.start <= end < window.end)
        traded = next((other for other in bars if other["volume"]), bar)
        if name == "open" and traded is not bar and traded["open"] == theirs:
            idle = [other for other in bars if other["open_time"] < traded["open_time"]]
            return Cause(
                f"{says}, with its first trade, of {format_time(traded['open_time'])}",
                self._windows(idle),
            )
        return Cause(says, lost or self._windows([bar]))

    def _corrected(self) -> Cause | None:
        """Base bars that were corrected, and whether the venue's own bar still has what they said
        before.
        """
        old = self.evidence.replaced.filter(
            pl.col("open_time").is_between(self.window.start, self.window.end, closed="left")
        )
        now, given = (
            {bar["open_time"]: bar for bar in self.frame.to_dicts()} if old.height else {},
            self._apart(SUMS),
        )
        pairs = [(was, now[was["open_time"]]) for was in old.to_dicts() if was["open_time"] in now]
        changed = [
            (was, bar) for was, bar in pairs if any(was[name] != bar[name] for name in VALUES)
        ]
        exact = [
            was
            for was, bar in changed
            if given and all(_change(was, bar, name) == amount for name, amount in given.items())
        ]
        if not changed:
            return None
        moments = [was["open_time"] for was in exact[:1] or (was for was, _ in changed)]
        which = _some([format_time(moment) for moment in dict.fromkeys(moments)], "bars")
        still = ": the venue's own bar still counts what it said before" if exact else ""
        return Cause(f"corrected since: {which}{still}", tuple(runs(moments, self.base)))

    # --------------------------------------------------------------------------------- what all of
    def _apart(self, names: Iterable[str]) -> dict[str, Any]:
        """Ours less the venue's own, of the columns that both give."""
        return {
            name: self.row[name + DIFFERENCE_SUFFIX]
            for name in names
            if self.row[name + DIFFERENCE_SUFFIX] is not None
        }

    def _windows(self, bars: Sequence[Bar]) -> tuple[Window, ...]:
        return tuple(runs([bar["open_time"] for bar in bars], self.base))

    def _why(self, missing: Sequence[Window], seen: str = "") -> str:
        """Which base bars are missing, and what the ledger says of them."""
        which = _some([_named(window, self.base) for window in missing], "windows")
        why = _reasons(missing, self.evidence.absent) or "not fetched yet"
        count = sum(window.count(self.base) for window in missing)
        return f"{which} {'is' if count == 1 else 'are'} missing ({', '.join(filter(None, [why, seen]))})"


def minutes_text(cause: Cause, base: Timeframe) -> str:
    """The windows of a cause as text: the open time of a single base bar, `start/end` of more, with
    spaces between.
    """
    return " ".join(_named(window, base) for window in cause.minutes)


def _named(window: Window, base: Timeframe) -> str:
    return (
        format_time(window.start)
        if window.count(base) == 1
        else f"{format_time(window.start)}/{format_time(window.end)}"
    )


def _joined(windows: Iterable[Window]) -> tuple[Window, ...]:
    """In order, each moment once."""
    found: list[Window] = []
    for window in sorted(set(windows)):
        if found and window.start <= found[-1].end:
            found[-1] = Window(found[-1].start, max(found[-1].end, window.end))
        else:
            found.append(window)
    return tuple(found)


def _reasons(windows: Sequence[Window], absences: Sequence[Absence]) -> str:
    return ", ".join(
        dict.fromkeys(
            absence.why
            for absence in absences
            if any(absence.window & window for window in windows)
        )
    )


def _in_proportion(bar: Bar, amounts: Mapping[str, Any]) -> bool:
    """Whether one factor on this bar explains the difference of every column; trades are whole, so
    they may be one off.
    """
    name, amount = next(iter(amounts.items()))
    if not bar[name] or amount > bar[name]:
        return False
    share = Decimal(amount) / Decimal(bar[name])
    return all(
        abs(other - share * bar[column]) <= (1 if column == "trades" else abs(other) * _LAST_DIGITS)
        for column, other in amounts.items()
    )


def _idle(bar: Bar) -> str:
    """Some venues fill minutes without trades with the close before."""
    return "" if bar["volume"] else " without a trade"


def _change(was: Bar, bar: Bar, name: str) -> Any:
    return None if was[name] is None or bar[name] is None else bar[name] - was[name]


def _amounts(amounts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {format_number(amount)}" for name, amount in amounts.items())


def _some(parts: Sequence[str], what: str) -> str:
    return ", ".join([*parts[:NAMED], *_more(len(parts) - NAMED, what)])


def _more(count: int, what: str) -> list[str]:
    return [f"and {count} more {what}"] if count > 0 else []
