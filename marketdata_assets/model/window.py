"""Half-open windows of UTC time, and how moments are read and written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from marketdata_assets.errors import BadInput
from marketdata_assets.model.timeframe import EPOCH, Timeframe


def parse_time(text: str) -> datetime:
    """An ISO date or time, UTC where it names no zone; raises BadInput."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise BadInput(
            f"{text!r} is not a date such as 2024-03-01 or a time such as 2024-03-01T12:00:00Z"
        ) from None


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
    return Window(
        start, datetime(moment.year + moment.month // 12, moment.month % 12 + 1, 1, tzinfo=UTC)
    )
