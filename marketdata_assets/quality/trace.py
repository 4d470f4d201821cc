"""Trace: from a rolled-up bar that differs from the venue's own to the base bars that cause it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from typing import Any

import polars as pl

from marketdata_assets.model.bar import DIFFERENCE_SUFFIX, PRICES, format_number
from marketdata_assets.model.intervals import (
    coalesce_windows,
    count_bars,
    find_gaps,
    group_consecutive,
    opens_inside,
)
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.parity import DIFFERENCES, NATIVE, VALUE_COLUMNS, ParityOutcome
from marketdata_assets.quality.parity_evidence import Absence, DifferenceCause, ParityEvidence
from marketdata_assets.quality.trace_text import format_amounts, format_list, format_window

SUMS = ("volume", "quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume")
_LAST_DIGITS = Decimal("1e-6")
"""This share of a number may be rounding, when one bar's columns are compared in proportion."""

Bar = Mapping[str, Any]


def trace_difference(row: Bar, evidence: ParityEvidence) -> DifferenceCause:
    """Return the cause of one row of `compare_bars` whose outcome is one of DIFFERENCES."""
    return _DifferingBar(row, evidence, evidence.timeframe).find_cause()


class _DifferingBar:
    """One bar that differs, and the base bars that it is made of."""

    def __init__(self, row: Bar, evidence: ParityEvidence, timeframe: Timeframe) -> None:
        self.row, self.evidence, self.timeframe, self.base = row, evidence, timeframe, evidence.base
        self.window = Window(row["open_time"], timeframe.shift(row["open_time"], 1))
        opens = evidence.bars["open_time"]
        first, last = opens.search_sorted(self.window.start), opens.search_sorted(self.window.end)
        self.frame = evidence.bars.slice(first, last - first)
        self.missing = find_gaps(self.frame["open_time"], self.base, self.window)

    @cached_property
    def bars(self) -> Sequence[Bar]:
        """The base bars, in order."""
        return self.frame.to_dicts()

    def find_cause(self) -> DifferenceCause:
        if self.row["outcome"] == ParityOutcome.ONLY_NATIVE:
            return DifferenceCause(
                f"no {self.base.name} bar of it is stored: {self._describe_missing(self.missing)}",
                tuple(self.missing),
            )
        if self.row["outcome"] == ParityOutcome.ONLY_OURS:
            reason = _reasons([self.window], self.evidence.native_absences)
            return DifferenceCause(
                f"the venue has no {self.timeframe.name} bar of its own here: "
                f"{reason or 'nothing shows why'}",
                self._windows(self.bars),
            )
        return self._cause_by_finer() or self._cause_by_base()

    # --------------------------------------------------------------------------------- by the venue
    def _cause_by_finer(self) -> DifferenceCause | None:
        """The causes of the venue's own finer bars that differ inside; None where none do."""
        finer = self.evidence.finer
        if finer is None or finer.timeframe.width >= self.timeframe.width:
            return None
        inside = finer.bars.filter(opens_inside(self.window))
        unequal = inside.filter(pl.col("outcome").is_in(DIFFERENCES)).to_dicts()
        if not unequal and inside.height == self.window.count(finer.timeframe):
            cause = self._cause_by_base()
            return cause._replace(
                message=f"the venue's own {finer.timeframe.name} bars equal ours, so its "
                f"{self.timeframe.name} bar is at odds with them; {cause.message}"
            )
        rows = [row for row in unequal if self._can_be_behind(row, finer.timeframe)]
        if not rows:
            return None
        causes = [_DifferingBar(row, self.evidence, finer.timeframe).find_cause() for row in rows]
        parts = [
            f"{finer.timeframe.name} {format_time(row['open_time'])}: {cause.message}"
            for row, cause in zip(rows, causes, strict=True)
        ]
        message = "; ".join(
            [
                format_list(parts, "bars", separator="; "),
                *self._unexplained_by_finer(finer.timeframe, inside),
            ]
        )
        return DifferenceCause(message, _windows_of(causes))

    def _can_be_behind(self, row: Bar, finer: Timeframe) -> bool:
        """Whether a finer bar can cause this one's difference.

        It can where it is on one side only, or where both differ in one column. An open only counts
        at the beginning of this bar, a close at its end.
        """
        if row["outcome"] != ParityOutcome.DIFFERS:
            return True
        common = {*row["columns"].split()} & {*self.row["columns"].split()}
        common -= {"open"} if row["open_time"] > self.window.start else set()
        common -= {"close"} if finer.shift(row["open_time"], 1) < self.window.end else set()
        return bool(common)

    def _unexplained_by_finer(self, finer: Timeframe, inside: pl.DataFrame) -> list[str]:
        """What the finer bars' differences do not add up to."""
        rest = {
            name: amount - (inside[name + DIFFERENCE_SUFFIX].sum() or 0)
            for name, amount in self._differences(SUMS).items()
        }
        odd = {name: amount for name, amount in rest.items() if amount}
        if not odd:
            return []
        return [
            f"and its own {self.timeframe.name} bar is at odds with its {finer.name} bars by "
            f"{format_amounts(odd)}"
        ]

    # --------------------------------------------------------------------------------- by the base
    def _cause_by_base(self) -> DifferenceCause:
        names = self.row["columns"].split()
        sums = self._cause_of_sums(names)
        prices = [
            self._cause_of_edge(name) if name in ("open", "close") else self._cause_of_extreme(name)
            for name in names
            if name in PRICES
        ]
        found = [cause for cause in (sums, *prices, self._cause_by_correction()) if cause]
        windows = _windows_of(found)
        lost = [window for window in self.missing if any(window & behind for behind in windows)]
        is_counted = sums is not None and sums.windows
        note = f"though its {self.timeframe.name} bar counts it" if is_counted else ""
        messages = [self._describe_missing(lost, note)] if lost else []
        return DifferenceCause("; ".join([*messages, *(cause.message for cause in found)]), windows)

    def _cause_of_sums(self, names: Sequence[str]) -> DifferenceCause | None:
        """Volumes and trades: the one bar that makes the difference, else the missing bars."""
        given = self._differences(SUMS)
        amounts = {name: amount for name, amount in given.items() if name in names}
        if not amounts:
            return None
        if one := self._cause_of_single_bar(amounts, given):
            return one
        less = {name: -amount for name, amount in amounts.items() if amount < 0}
        more = {name: amount for name, amount in amounts.items() if amount >= 0}
        parts = [
            f"{word} by {format_amounts(part)}"
            for word, part in (("less", less), ("more", more))
            if part
        ]
        difference = f"ours is {' and '.join(parts)}"
        if less and self.missing:
            return DifferenceCause(difference, tuple(self.missing))
        none = "" if self.missing else f"no {self.base.name} bar is missing, and "
        return DifferenceCause(f"{none}no single one explains that {difference}")

    def _cause_of_single_bar(
        self, amounts: Mapping[str, Any], given: Mapping[str, Any]
    ) -> DifferenceCause | None:
        """The one base bar that is the difference, twice it, or off by one share in all columns."""
        whole = [bar for bar in self.bars if all(bar[name] is not None for name in given)]
        tests: tuple[tuple[Callable[[Bar], bool], str], ...] = (
            (
                lambda bar: all(bar[name] == amount for name, amount in given.items()),
                "is the difference, to the digit: the venue's own bar is without it",
            ),
            (
                lambda bar: all(bar[name] == 2 * amount for name, amount in amounts.items()),
                "is counted twice as high as in the venue's own bar",
            ),
        )
        for is_cause, words in tests:
            found = [bar for bar in whole if is_cause(bar)]
            if len(found) == 1:
                message = f"{format_time(found[0]['open_time'])} {words}: {format_amounts(amounts)}"
                return DifferenceCause(message, self._windows(found))
        shares = [bar for bar in whole if _is_proportional(bar, amounts)]
        if len(shares) != 1 or len(amounts) == 1:
            return None
        (bar,), (name, amount) = shares, next(iter(amounts.items()))
        return DifferenceCause(
            f"{format_time(bar['open_time'])} differs by one share in every column: {name} "
            f"{format_number(bar[name])}, by the venue's own bar "
            f"{format_number(bar[name] - amount)}",
            self._windows([bar]),
        )

    def _cause_of_extreme(self, name: str) -> DifferenceCause:
        """A high or low: the base bars beyond the venue's own, or that none reaches it."""
        mine, theirs, sign = self.row[name], self.row[name + NATIVE], 1 if name == "high" else -1
        if sign * (mine - theirs) < 0:
            message = (
                f"{name}: no {self.base.name} bar reaches the venue's own {format_number(theirs)}, "
                f"ours ends at {format_number(mine)}"
            )
            return DifferenceCause(message, tuple(self.missing))
        beyond = [bar for bar in self.bars if sign * (bar[name] - theirs) > 0]
        which = format_list(
            [
                f"{format_time(bar['open_time'])} reaches {format_number(bar[name])}"
                f"{_idle_note(bar)}"
                for bar in beyond
            ],
            "bars",
        )
        message = f"{name}: {which}, beyond the venue's own {format_number(theirs)}"
        return DifferenceCause(message, self._windows(beyond))

    def _cause_of_edge(self, name: str) -> DifferenceCause:
        """Open and close: the first or last base bar, and whether it is missing."""
        theirs = self.row[name + NATIVE]
        if name == "open":
            bar, edge, verb = self.bars[0], self.window.start, "opens"
        else:
            bar, edge, verb = self.bars[-1], self.base.shift(self.window.end, -1), "closes"
        message = (
            f"{name}: {format_time(bar['open_time'])} {verb} at {format_number(bar[name])}"
            f"{_idle_note(bar)}, the venue's own bar at {format_number(theirs)}"
        )
        traded = next((other for other in self.bars if other["volume"]), bar)
        if name == "open" and traded is not bar and traded["open"] == theirs:
            idle = [other for other in self.bars if other["open_time"] < traded["open_time"]]
            message += f", with its first trade, of {format_time(traded['open_time'])}"
            return DifferenceCause(message, self._windows(idle))
        lost = tuple(window for window in self.missing if window.start <= edge < window.end)
        return DifferenceCause(message, lost or self._windows([bar]))

    def _cause_by_correction(self) -> DifferenceCause | None:
        """Base bars that were corrected, and if the venue's own bar still counts the old ones."""
        old = self.evidence.revisions.filter(opens_inside(self.window)).to_dicts()
        if not old:
            return None
        now, given = {bar["open_time"]: bar for bar in self.bars}, self._differences(SUMS)
        changed = [
            was
            for was in old
            if was["open_time"] in now
            and any(was[name] != now[was["open_time"]][name] for name in VALUE_COLUMNS)
        ]
        if not changed:
            return None
        exact = [
            was
            for was in changed
            if given
            and all(
                _change(was, now[was["open_time"]], name) == amount
                for name, amount in given.items()
            )
        ]
        moments: list[datetime] = [was["open_time"] for was in exact[:1] or changed]
        which = format_list([format_time(moment) for moment in dict.fromkeys(moments)], "bars")
        still = ": the venue's own bar still counts the earlier values" if exact else ""
        windows = tuple(group_consecutive(moments, self.base))
        return DifferenceCause(f"corrected since: {which}{still}", windows)

    # --------------------------------------------------------------------------------- parts
    def _differences(self, names: Iterable[str]) -> dict[str, Any]:
        """Ours less the venue's own, of the columns that both give."""
        found = {name: self.row[name + DIFFERENCE_SUFFIX] for name in names}
        return {name: amount for name, amount in found.items() if amount is not None}

    def _windows(self, bars: Sequence[Bar]) -> tuple[Window, ...]:
        return tuple(group_consecutive([bar["open_time"] for bar in bars], self.base))

    def _describe_missing(self, missing: Sequence[Window], note: str = "") -> str:
        """Which base bars are missing, and why."""
        which = format_list([format_window(window, self.base) for window in missing], "windows")
        reason = _reasons(missing, self.evidence.absences) or "not fetched yet"
        verb = "is" if count_bars(missing, self.base) == 1 else "are"
        return f"{which} {verb} missing ({', '.join(filter(None, [reason, note]))})"


def _windows_of(causes: Iterable[DifferenceCause]) -> tuple[Window, ...]:
    return tuple(coalesce_windows(window for cause in causes for window in cause.windows))


def _reasons(windows: Sequence[Window], absences: Sequence[Absence]) -> str:
    touching = (a.reason for a in absences if any(a.window & window for window in windows))
    return ", ".join(dict.fromkeys(touching))


def _is_proportional(bar: Bar, amounts: Mapping[str, Any]) -> bool:
    """Whether one factor on this bar explains the difference of every column.

    Trades are whole numbers, so they may be one off.
    """
    name, amount = next(iter(amounts.items()))
    if not bar[name] or amount > bar[name]:
        return False
    share = Decimal(amount) / Decimal(bar[name])
    return all(
        abs(other - share * bar[column]) <= (1 if column == "trades" else abs(other) * _LAST_DIGITS)
        for column, other in amounts.items()
    )


def _idle_note(bar: Bar) -> str:
    """Some venues fill minutes without trades with the close before."""
    return "" if bar["volume"] else " without a trade"


def _change(was: Bar, bar: Bar, name: str) -> Any:
    return None if was[name] is None or bar[name] is None else bar[name] - was[name]
