"""One frame for all fake venues: bars that are known beforehand, asked for over real HTTP.

A venue's file has its wire format alone: which paths it knows, how it reads bounds and limits, and
what a row looks like. What goes wrong (silence, short pages, another clock, refusals) is set here
and holds for every venue.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from aiohttp import web

from marketdata_tests.steps import serving

MINUTE = 60_000
"""Milliseconds. All moments of the fake venues are milliseconds since 1970."""
DAY = 1440 * MINUTE


class FakeBar(NamedTuple):
    """The truth about one bar, volumes in base and in quote currency."""

    t: int
    o: Decimal
    h: Decimal
    l: Decimal  # noqa: E741
    c: Decimal
    v: Decimal
    quote: Decimal
    trades: int
    closed: bool
    width: int


HOUR = 60 * MINUTE
DAILY = {"1d", "1D", "1Dutc", "1day", "D", "1440", "86400", "ONE_DAY", "1DAY", "24h", "days"}
"""What venues call the timeframe of a day; all but these and seconds are minutes here."""


def width_of(interval: str) -> int:
    """Return the milliseconds of a bar by the venue's name of its timeframe."""
    if interval in ("1s", "seconds"):
        return 1000
    if interval == "4hour":
        return 4 * HOUR
    return DAY if interval in DAILY else MINUTE


def true_bar(t: int, *, now: int | None = None, width: int = MINUTE) -> FakeBar:
    """Return the bar that opens at `t`; while it is open at `now`, half of its volume is traded."""
    k = t // width
    o, c = Decimal(20000) + Decimal(k % 97) / 2, Decimal(20000) + Decimal((k + 1) % 97) / 2
    h, low = max(o, c) + Decimal("1.25"), min(o, c) - Decimal("1.75")
    is_closed = now is None or t + width <= now
    v = Decimal(2 * (k % 53) + 2) / 1000 / (1 if is_closed else 2)
    return FakeBar(t, o, h, low, c, v, v * c, k % 7 + 1, is_closed, width)


class Refusal(Exception):
    """An answer that is no success, as the venue writes it."""

    def __init__(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, dict(headers or {})


@dataclass
class FakeVenue:
    """A venue's wire format, and what is true of it now."""

    now: int
    """The venue's clock."""
    listed: int = 1_577_836_800_000
    """No market has a bar that opens before."""
    silent: frozenset[int] = frozenset()
    """Minutes without a trade, of which no bar is sent."""
    serves_from: int = 0
    """The oldest bar that it still serves."""
    horizon: str = "empty"
    """How it answers for older ones: `empty`, `later` (the oldest bars that it has), `refused`."""
    page: int | None = None
    """Bars an answer holds at most, where that is fewer than documented."""
    reverse: bool = False
    """Rows come in the other order."""
    overlap: int = 0
    """Bars beyond either bound of a request that come as well."""
    is_gone: bool = False
    """The market is no longer listed, and requests for it are refused."""
    fault: Callable[[int], Refusal | None] = lambda _: None
    """By the number of the request for bars: what comes instead."""
    strangers: frozenset[int] = frozenset()
    """The numbers of the requests for bars that are answered with another market's."""
    is_stuck: bool = False
    """Every request for bars is answered as the first one was."""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    bar_requests: int = 0
    first_answer: list[FakeBar] | None = None

    name: ClassVar[str]
    """ccxt's id."""
    spot: ClassVar[str | None] = "BTC/USDT"
    linear: ClassVar[str | None] = None
    """The symbol of its perpetual; None: it has none here."""
    max_page: ClassVar[int]
    """Bars an answer holds at most, by its documentation."""
    has_start: ClassVar[bool] = True
    """A request says from when on bars are wanted."""
    counts_rows: ClassVar[bool] = False
    """It counts rows from the start of a request on, without a horizon."""
    too_old: ClassVar[tuple[int, Any]] = (400, {"message": "too long ago"})
    """Status and body of its refusal of old bars, where its documentation has one."""
    unknown_market: ClassVar[tuple[int, Any]] = (400, {"message": "no such market"})

    def answer(self, path: str, query: dict[str, Any]) -> Any:
        """Return what the venue answers; None for a path that it does not have."""
        raise NotImplementedError

    def bars(
        self,
        first: int,
        last: int,
        limit: int,
        *,
        keep: str = "oldest",
        interval: str = "1m",
    ) -> list[FakeBar]:
        """Return the bars with `first <= t <= last`, oldest first; of too many, those at one end.

        The one that is open now is among them. Daily bars are served without a horizon.
        """
        width = width_of(interval)
        number, self.bar_requests = self.bar_requests, self.bar_requests + 1
        if refusal := self.fault(number):
            raise refusal
        if self.is_gone:
            raise Refusal(*self.unknown_market)
        first, last = first - self.overlap * width, last + self.overlap * width
        first = -(-first // width) * width
        serves_from = self.serves_from if width == MINUTE else 0
        if first < serves_from:
            if self.horizon == "refused":
                raise Refusal(*self.too_old)
            if self.horizon == "later":
                first, last, keep = serves_from, max(last, self.now), "oldest"
        start = -(-max(first, serves_from, self.listed // width * width) // width) * width
        end = min(last, self.now) // width * width
        size = min(limit, self.max_page, self.page or self.max_page) + 2 * self.overlap
        times: Iterable[int] = range(start, end + 1, width)
        if keep == "newest":
            times = reversed(range(start, end + 1, width))
        traded = (t for t in times if t not in self.silent)
        found = [true_bar(t, now=self.now, width=width) for t in islice(traded, size)]
        return self._mislead(found if keep == "oldest" else found[::-1], number)

    def _mislead(self, bars: list[FakeBar], number: int) -> list[FakeBar]:
        """Return what is sent instead of these bars."""
        if number in self.strangers:
            bars = [_times(bar, 3) for bar in bars]
        if self.is_stuck:
            self.first_answer = bars = self.first_answer or bars
        return bars

    def rows(self, bars: list[FakeBar], *, newest_first: bool = False) -> list[FakeBar]:
        """Return bars in the order in which the venue sends them."""
        return bars[::-1] if newest_first != self.reverse else bars


def _times(bar: FakeBar, factor: int) -> FakeBar:
    """Return a bar of another market, whose prices are so many times higher."""
    prices = {name: getattr(bar, name) * factor for name in ("o", "h", "l", "c", "quote")}
    return bar._replace(**prices)


@contextmanager
def serving_venue(venue: FakeVenue, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve a venue on loopback; yield its base URL."""

    async def handle(request: web.Request) -> web.Response:
        query: dict[str, Any] = dict(request.query)
        if request.can_read_body:
            query |= json.loads(await request.read() or b"{}")
        venue.requests.append((request.path, query))
        headers = {"Date": datetime.fromtimestamp(venue.now / 1000, UTC).strftime(HTTP_DATE)}
        try:
            body, status = venue.answer(request.path, query), 200
        except Refusal as refusal:
            body, status = refusal.body, refusal.status
            headers |= refusal.headers
        if body is None:
            body, status = {"error": "no such path"}, 404
        text = body if isinstance(body, str) else json.dumps(body)
        kind = "text/html" if isinstance(body, str) else "application/json"
        return web.Response(text=text, status=status, headers=headers, content_type=kind)

    with serving(handle, tls) as url:
        yield url


HTTP_DATE = "%a, %d %b %Y %H:%M:%S GMT"


def text(number: Decimal) -> str:
    """Return a number as venues write it: no exponent, no trailing zeros."""
    return format(number.normalize(), "f")
