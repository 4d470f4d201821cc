"""The timeframes: one row of TIMEFRAMES each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from marketdata_assets.errors import BadInput

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
_MONDAY = datetime(1970, 1, 5, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Timeframe:
    """The width of a bar and the grid of its open times.

    `parent` is the timeframe that its bars are rolled up from, `every` the argument of polars'
    `dt.truncate`, and `origin` any moment at which a bar opens.
    """

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
        """Return the open time of the bar that holds `moment`."""
        return self.origin + (moment - self.origin) // self.width * self.width

    def ceil(self, moment: datetime) -> datetime:
        """Return the first open time at or after `moment`."""
        return self.origin - (self.origin - moment) // self.width * self.width


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


def parse_timeframe(name: str) -> Timeframe:
    """Return the timeframe of that name. Raises BadInput for any other text."""
    try:
        return TIMEFRAMES[name]
    except KeyError:
        raise BadInput(f"timeframe {name!r} is not one of {' '.join(TIMEFRAMES)}") from None
