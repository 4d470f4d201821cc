"""The timeframes: one row of TIMEFRAMES each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar

from marketdata_assets.errors import BadInput

if TYPE_CHECKING:  # a command that only names a timeframe does not load it
    import polars as pl

Moments = TypeVar("Moments", "pl.Expr", "pl.Series")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
_MONDAY = datetime(1970, 1, 5, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Timeframe:
    """The width of a bar and the grid of its open times.

    `every` is the argument of polars' `dt.truncate` and `dt.offset_by`, and `origin` any moment at
    which a bar opens. A bar of `months` is a calendar month: its `width` is that of the longest.
    """

    name: str
    width: timedelta
    every: str
    origin: datetime = EPOCH
    months: int = 0

    @property
    def label(self) -> str:
        """Its name in tables, files and SQL, which do not tell 1M from 1m: `1mo`."""
        return self.every if self.months else self.name

    @property
    def shortest(self) -> timedelta:
        """The width of its shortest bar."""
        return timedelta(days=28) if self.months else self.width

    def floor(self, moment: datetime) -> datetime:
        """Return the open time of the bar that holds `moment`."""
        if self.months:
            return _month(_month_number(moment))
        return self.origin + (moment - self.origin) // self.width * self.width

    def ceil(self, moment: datetime) -> datetime:
        """Return the first open time at or after `moment`."""
        if self.months:
            floor = self.floor(moment)
            return floor if floor == moment else self.shift(floor, 1)
        return self.origin - (self.origin - moment) // self.width * self.width

    def shift(self, open_time: datetime, bars: int) -> datetime:
        """Return the open time so many bars later: 1 is the moment at which the bar closes."""
        if self.months:
            return _month(_month_number(open_time) + bars * self.months)
        return open_time + bars * self.width

    def count(self, start: datetime, end: datetime) -> int:
        """Return how many bars open in `[start, end)`, less than 0 where the end lies before."""
        first, last = self.ceil(start), self.ceil(end)
        if self.months:
            return _month_number(last) - _month_number(first)
        return (last - first) // self.width

    def is_made_of(self, finer: Timeframe) -> bool:
        """Return whether each of its bars consists of whole finer bars."""
        if self.months:
            return not timedelta(days=1) % finer.width
        is_multiple = not finer.months and not self.width % finer.width
        return is_multiple and not (self.origin - finer.origin) % finer.width

    def closes(self, opens: Moments) -> Moments:
        """Return the moments at which the bars close that open at these moments."""
        return opens.dt.offset_by(self.every) if self.months else opens + self.width

    def floors(self, moments: Moments) -> Moments:
        """Return the open times of the bars that hold these moments."""
        return moments.dt.truncate(self.every)


def _month_number(moment: datetime) -> int:
    return moment.year * 12 + moment.month - 1


def _month(number: int) -> datetime:
    return datetime(number // 12, number % 12 + 1, 1, tzinfo=UTC)


TIMEFRAMES: dict[str, Timeframe] = {
    row.name: row
    for row in (
        Timeframe("1s", timedelta(seconds=1), "1s"),
        *(Timeframe(f"{n}m", timedelta(minutes=n), f"{n}m") for n in (1, 3, 5, 15, 30)),
        *(Timeframe(f"{n}h", timedelta(hours=n), f"{n}h") for n in (1, 2, 4, 6, 8, 12)),
        Timeframe("1d", timedelta(days=1), "1d"),
        # Binance's and Polars' count from 1970
        Timeframe("3d", timedelta(days=3), "3d"),
        Timeframe("1w", timedelta(weeks=1), "1w", _MONDAY),
        Timeframe("1M", timedelta(days=31), "1mo", months=1),
    )
}
"""By name, finest first."""

TIMEFRAME_OF_LABEL = {timeframe.label: timeframe for timeframe in TIMEFRAMES.values()}
"""By name in tables."""
DEFAULT_ROLLUPS = tuple(
    TIMEFRAMES[name] for name in ("1m", "5m", "15m", "30m", "1h", "4h", "12h", "1d", "1w")
)
"""What is rolled up where the universe does not say."""


def parse_timeframe(name: str) -> Timeframe:
    """Return the timeframe of that name. Raises BadInput for any other text."""
    try:
        return TIMEFRAMES[name]
    except KeyError:
        raise BadInput(f"timeframe {name!r} is not one of {' '.join(TIMEFRAMES)}") from None
