"""Half-open windows of UTC time, the timeframes, and how months cut them into partitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import Market

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
_LAST_YEAR = 9998  # the end of a later month is no moment any more


@dataclass(frozen=True, slots=True)
class Timeframe:
    """One row of the table below. `every` is polars' truncation, `origin` any moment at which a bar opens."""

    name: str
    width: timedelta
    parent: str | None
    every: str
    origin: datetime = EPOCH

    @property
    def minutes(self) -> int:
        """How many 1m bars one full bar holds."""
        return self.width // MINUTE

    def floor(self, moment: datetime) -> datetime:
        """The open time of the bar that holds `moment`."""
        return self.origin + (moment - self.origin) // self.width * self.width

    def ceil(self, moment: datetime) -> datetime:
        """The first open time at or after `moment`."""
        return self.origin - (self.origin - moment) // self.width * self.width


_MONDAY = datetime(1970, 1, 5, tzinfo=UTC)
TIMEFRAMES: dict[str, Timeframe] = {
    row.name: row
    for row in (
        Timeframe("1m", timedelta(minutes=1), None, "1m"),
        Timeframe("5m", timedelta(minutes=5), "1m", "5m"),
        Timeframe("15m", timedelta(minutes=15), "5m", "15m"),
        Timeframe("30m", timedelta(minutes=30), "15m", "30m"),
        Timeframe("1h", timedelta(hours=1), "30m", "1h"),
        Timeframe("4h", timedelta(hours=4), "1h", "4h"),
        Timeframe("12h", timedelta(hours=12), "4h", "12h"),
        Timeframe("1d", timedelta(days=1), "12h", "1d"),
        Timeframe("1w", timedelta(weeks=1), "1d", "1w", _MONDAY),
    )
}


def timeframe(name: str) -> Timeframe:
    """The row of that name; raises BadInput for a name that is not in the table."""
    try:
        return TIMEFRAMES[name]
    except KeyError:
        raise BadInput(f"timeframe {name!r} is not one of {' '.join(TIMEFRAMES)}") from None


def parse_time(text: str) -> datetime:
    """An ISO date or time, UTC where it names no zone; raises BadInput."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise BadInput(f"{text!r} is not a date such as 2024-03-01 or a time such as 2024-03-01T12:00:00Z") from None


def iso(moment: datetime) -> str:
    """`2024-03-01T00:00:00Z`, with the fraction of a second only where there is one."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


def to_ms(moment: datetime) -> int:
    """Milliseconds since 1970 UTC."""
    return (moment - EPOCH) // timedelta(milliseconds=1)


def from_ms(ms: int) -> datetime:
    """The UTC moment of milliseconds since 1970."""
    return EPOCH + timedelta(milliseconds=ms)


@dataclass(frozen=True, order=True, slots=True)
class Window:
    """`[start, end)` in UTC; empty when end <= start."""

    start: datetime
    end: datetime

    def __and__(self, other: Window) -> Window:
        return Window(max(self.start, other.start), min(self.end, other.end))

    def __bool__(self) -> bool:
        return self.start < self.end

    def count(self, tf: Timeframe) -> int:
        """How many bars of the timeframe open inside."""
        return max(0, (tf.ceil(self.end) - tf.ceil(self.start)) // tf.width)

    def pages(self, tf: Timeframe, size: int) -> Iterator[Window]:
        """Consecutive windows of at most `size` bars that cover this one."""
        start = self.start
        while start < self.end:
            end = min(self.end, start + size * tf.width)
            yield Window(start, end)
            start = end

    def __str__(self) -> str:
        return f"[{iso(self.start)}, {iso(self.end)})"


def month_of(moment: datetime) -> Window:
    """The calendar month that holds `moment`."""
    start = datetime(moment.year, moment.month, 1, tzinfo=UTC)
    return Window(start, datetime(moment.year + moment.month // 12, moment.month % 12 + 1, 1, tzinfo=UTC))


@dataclass(frozen=True, order=True, slots=True)
class Partition:
    """One market for one calendar month. Dagster key: `binance:BTC-USDT|2024-03-01`."""

    market: Market
    month: Window

    @property
    def month_key(self) -> str:
        """`2024-03-01`"""
        return self.month.start.date().isoformat()

    @property
    def key(self) -> str:
        """Dagster's partition key (it sorts dimensions by name: market, month)."""
        return f"{self.market.key}|{self.month_key}"

    @classmethod
    def parse(cls, key: str) -> Partition:
        """The partition of a Dagster key; raises BadInput."""
        name, _, month = key.partition("|")
        market, start = Market.parse(name), parse_time(month)
        if start.date().replace(day=1).isoformat() != month or start.year > _LAST_YEAR:
            raise BadInput(f"partition {key!r}: {month} is not the first day of a month, written like 2024-03-01")
        return cls(market, month_of(start))

    def opens(self, tf: Timeframe) -> Window:
        """The open times of the bars that belong here: a bar belongs to the month of its last minute.

        A 1w bar therefore lies in the month of its Sunday and looks back, never ahead.
        """
        back = tf.width - MINUTE
        return Window(tf.ceil(self.month.start - back), tf.ceil(self.month.end - back))


def partitions_of(market: Market, span: Window) -> list[Partition]:
    """The partitions whose months touch the span, oldest first; none for an empty one."""
    found = []
    month = month_of(span.start)
    while span and month.start < span.end:
        found.append(Partition(market, month))
        month = month_of(month.end)
    return found
