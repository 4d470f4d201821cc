"""What a source is, and the facts that travel up from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import polars as pl

from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request as it went: what the fetch log keeps. `asked_at` is our clock, in seconds since
    1970.
    """

    kind: str
    asked_at: float
    seconds: float
    outcome: str
    status: int | None = None
    rows: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """One believed answer.

    `rows` has the columns of `model.bar.COLUMN_NAMES`, as sent: `open_time` in integer milliseconds,
    numbers as text, null for what the venue does not give. `asked` is the half-open window of open
    times that was asked for.
    """

    rows: pl.DataFrame
    asked: Window
    later: datetime | None = None
    """The first bar the venue offered instead, where it has none so early."""
    requests: tuple[Request, ...] = field(default=())
    waited: float = 0.0


class Source(Protocol):
    """A venue as one object. All methods send real requests; all errors are from `errors`."""

    @property
    def page_size(self) -> int:
        """How many bars one request may ask for."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a bar that it always gives: null in one of them is broken."""
        ...

    @property
    def skips_gaps(self) -> bool:
        """True when one request may span more than a page, because the venue counts rows and not
        time.
        """
        ...

    async def fetch(self, market: Market, timeframe: Timeframe, window: Window) -> Fetched:
        """One request for the bars that open inside `window` (end exclusive, every bar in it
        closed).
        """
        ...

    async def now(self) -> datetime:
        """The venue's own clock, UTC."""
        ...

    async def first_open(self, market: Market, timeframe: Timeframe) -> datetime | None:
        """The open time of the first bar the venue ever had; None where it cannot tell."""
        ...

    async def lists(self, market: Market) -> bool:
        """Whether the venue's list of markets has this one, as one that trades; asked anew each
        time.
        """
        ...

    async def close(self) -> None:
        """Give up all connections."""
        ...
