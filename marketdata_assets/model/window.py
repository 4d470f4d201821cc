"""Half-open windows of UTC time, and how moments are read and written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from marketdata_assets.errors import BadInput
from marketdata_assets.model.timeframe import EPOCH, Timeframe


def parse_time(text: str) -> datetime:
    """Read an ISO date or time; it is UTC where it names no zone. Raises BadInput."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise BadInput(
            f"{text!r} is not a date such as 2024-03-01 or a time such as 2024-03-01T12:00:00Z"
        ) from None


def format_time(moment: datetime) -> str:
    """Write `2024-03-01T00:00:00Z`, with microseconds only where they are not zero."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


def to_ms(moment: datetime) -> int:
    """Return the milliseconds since 1970 UTC, rounded down."""
    return (moment - EPOCH) // timedelta(milliseconds=1)


def to_us(moment: datetime) -> int:
    """Return the microseconds since 1970 UTC."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def from_ms(ms: int) -> datetime:
    """Return the UTC moment of milliseconds since 1970."""
    return EPOCH + timedelta(milliseconds=ms)


@dataclass(frozen=True, order=True, slots=True)
class Window:
    """`[start, end)` in UTC; empty, and false, when end <= start."""

    start: datetime
    end: datetime

    def __and__(self, other: Window) -> Window:
        return Window(max(self.start, other.start), min(self.end, other.end))

    def __bool__(self) -> bool:
        return self.start < self.end

    def count(self, timeframe: Timeframe) -> int:
        """Return how many bars of the timeframe open inside."""
        return max(0, timeframe.count(self.start, self.end))

    def pages(self, timeframe: Timeframe, size: int) -> Iterator[Window]:
        """Yield consecutive windows of at most `size` bars that cover this one."""
        start = self.start
        while start < self.end:
            end = min(self.end, timeframe.shift(start, size))
            yield Window(start, end)
            start = end

    def __str__(self) -> str:
        return f"[{format_time(self.start)}, {format_time(self.end)})"


def month_of(moment: datetime) -> Window:
    """Return the calendar month that holds `moment`."""
    start = datetime(moment.year, moment.month, 1, tzinfo=UTC)
    end = datetime(moment.year + moment.month // 12, moment.month % 12 + 1, 1, tzinfo=UTC)
    return Window(start, end)
