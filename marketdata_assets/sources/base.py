"""What a source of bars is, and what it returns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple, Protocol

import polars as pl

from marketdata_assets.model.instrument import Instrument
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.venues.facts import MarketType


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request as the fetch log keeps it. `sent_at` is our clock, in seconds since 1970."""

    kind: str
    """`bars`, `time` or `markets`."""
    sent_at: float
    seconds: float
    """How long it took."""
    outcome: str
    """`answered`, or the name of the error's class in lower case."""
    status: int | None = None
    """The HTTP status; None where no answer came."""
    rows: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class BarsPage:
    """The bars of one request, after the answer's form was checked.

    `rows` has the columns of `model.bar.COLUMN_NAMES`, as sent: `open_time` in integer
    milliseconds, numbers as text, null for what the venue does not give. `window` holds the open
    times that were requested, end exclusive.
    """

    rows: pl.DataFrame
    window: Window
    first_available: datetime | None = None
    """The first bar that the venue sent instead, where it has none so early."""
    requests: tuple[Request, ...] = field(default=())
    """All requests that it took, failed ones included, in order."""
    wait_seconds: float = 0.0
    """Seconds spent waiting for the venue's limits."""


class MarketTraits(NamedTuple):
    """How the venue serves the bars of one market."""

    page_size: int
    """The number of bars that one request can return."""
    columns: tuple[str, ...]
    """The columns of a bar that the venue always gives: null in one of them breaks a rule."""
    skips_gaps: bool
    """Whether the venue counts rows and not time: a request may span more than a page."""


class Source(Protocol):
    """A venue as one object. Every method sends real requests; all errors are from `errors`."""

    def traits(self, market: Market) -> MarketTraits:
        """Return how the market's bars are served, as far as is known; sends no request."""
        ...

    @property
    def weight_limit(self) -> int | None:
        """The request weight that the venue allows in a minute; None: it counts no weights."""
        ...

    @property
    def used_weight(self) -> int:
        """The weight of this minute, by the venue's own count in its last answer."""
        ...

    async def fetch(self, market: Market, timeframe: Timeframe, window: Window) -> BarsPage:
        """Send one request for the bars that open inside `window`.

        The window's end is exclusive, and every bar in it must be closed.
        """
        ...

    async def now(self, market: Market) -> datetime:
        """Return the venue's own clock, UTC: every bar that ends at or before it is closed.

        Where the venue tells no time, the market's newest bar shows how late it is at the least.
        """
        ...

    async def first_open(self, market: Market, timeframe: Timeframe) -> datetime | None:
        """Return the open time of the market's first bar; None where the venue does not say."""
        ...

    async def is_listed(self, market: Market) -> bool:
        """Return whether the venue lists the market as active; requests the list each time."""
        ...

    async def instruments(self, types: Collection[MarketType]) -> list[Instrument]:
        """Return the venue's whole list of markets of these types; others may be among them."""
        ...

    async def traded_volumes(self, kind: MarketType) -> dict[str, Decimal]:
        """Return what was traded in the last 24 hours, in quote currency, by symbol.

        Markets of which the venue does not say it are absent. Raises BadInput where it says it of
        none in one request.
        """
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...
