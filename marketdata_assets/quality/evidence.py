"""All that can be known about one gap, before anybody decides what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from marketdata_assets.model.bar import format_number
from marketdata_assets.model.gap import GapCause
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.venues.facts import Halt


class Neighbor(NamedTuple):
    """The bar next to a gap."""

    open_time: datetime
    close: Decimal
    volume: Decimal


class NativeBar(NamedTuple):
    """A coarser bar of the venue over part of a gap, and the stored base bars inside it.

    `stored_volume` is the sum of their volumes, `missing_bars` how many are not stored.
    """

    timeframe: Timeframe
    open_time: datetime
    volume: Decimal
    stored_volume: Decimal
    missing_bars: int

    @property
    def window(self) -> Window:
        """The open times that it covers."""
        return Window(self.open_time, self.timeframe.shift(self.open_time, 1))

    def __str__(self) -> str:
        volumes = (
            f"volume {format_number(self.volume)}, ours in it {format_number(self.stored_volume)}"
        )
        return (
            f"the venue's {self.timeframe.name} bar of {format_time(self.open_time)} has "
            f"{volumes}, {self.missing_bars} bars are missing"
        )


class EmptyBarRate(NamedTuple):
    """How often a market has no bar in a span, the gap in question apart.

    `empty` of `bars` open times have none, in `stretches` of consecutive ones.
    """

    bars: int
    empty: int
    stretches: int

    def chance(self, length: int) -> float:
        """Return how likely a stretch of `length` empty bars begins at any one open time.

        Empty bars follow each other more often than independent ones would.
        """
        begins = (self.empty + 1) / (self.bars + 2)
        continues = min(1.0, (self.empty - self.stretches + 0.5) / (self.empty + 1))
        return float(begins * continues ** (length - 1))


EmptyBarRates = tuple[EmptyBarRate, ...]
"""One market's rates in spans of different length around a gap, the widest first."""


def highest_chance(rates: EmptyBarRates, length: int) -> float:
    """Return the chance in the span in which the market has the most empty bars."""
    return max(rate.chance(length) for rate in rates)


class SilentWindow(NamedTuple):
    """Part of a gap in which no other known market of the venue has a bar; one rate for each."""

    window: Window
    others: tuple[EmptyBarRates, ...]


class FinerGap(NamedTuple):
    """A gap of the base timeframe, with its cause."""

    window: Window
    cause: GapCause


@dataclass(frozen=True, slots=True, kw_only=True)
class GapEvidence:
    """All that is known about one gap of a market."""

    window: Window
    timeframe: Timeframe
    is_confirmed_absent: bool
    """Two answers delivered the bars on both sides of it and none between."""
    horizon: str | None = None
    """Where the venue serves bars only from a later moment on: what showed that."""
    has_archive: bool = False
    """Files of the venue may hold what its API does not serve."""
    answers: int
    """Answers, or runs, that ended in the gap's reason."""
    empty_bar_rates: EmptyBarRates
    silent_windows: tuple[SilentWindow, ...] = ()
    """Disjoint."""
    finer_gaps: tuple[FinerGap, ...] = ()
    """For a gap of a coarser table: why base bars are missing in it."""
    native_bars: tuple[NativeBar, ...] = ()
    """Of timeframes whose bars equal the sums of ours wherever ours are complete."""
    other_markets: Mapping[str, int] = field(default_factory=dict)
    """By key of each other market of the venue: how many of the gap's bars it has."""
    is_fetch_pending: bool = False
    """Some of the other markets are not fetched yet."""
    traded_elsewhere: str | None = None
    """The key of another venue's market of that asset which traded meanwhile."""
    halts: tuple[Halt, ...] = ()
    """The reported halts that share a moment with it."""
    before: Neighbor | None = None
    after: Neighbor | None = None
    bars_without_volume: int = 0
    """Stored bars of the partition whose volume is zero."""
    is_trailing: bool = False
    """No bar of the market is stored after it."""
    is_listed: bool | None = None
    """Whether the venue still lists the market; None: the list was not requested."""
