"""The first bar of a market: what lies before it was not listed, or is not served any more."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

import polars as pl

from marketdata_assets.errors import BadInput, MarketDataError, VenueRefused
from marketdata_assets.flows.fetch.answers import Answers, FetchSpan
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.gap import Gap, GapCause, GapReason, GapStatus
from marketdata_assets.model.market import Market
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, format_time, from_ms, month_of
from marketdata_assets.quality.gap_causes import next_request_at
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.base import BarsPage
from marketdata_assets.sources.clients import VenueClient
from marketdata_assets.venues.registry import facts_of

DAILY = TIMEFRAMES["1d"]
DAYS_TRIED = 2
"""Of how many days with coarse bars finer ones are requested, to show that they are not served."""
COARSE = (DAILY, TIMEFRAMES["4h"], TIMEFRAMES["1h"])
DAYS_BEFORE = 30
"""How many days before a market's first known bar are requested in coarse bars."""


@dataclass(slots=True)
class FirstBarSearch:
    """Where a market begins, as far as its venue shows it.

    That a market was not listed is a claim about bars that nobody has seen. It needs witnesses of
    several kinds: the venue's oldest bar, a page of bars before it, and coarser bars before it. The
    gap before the first bar names them and is asked about again at growing distance; a stored bar,
    or a witness that says otherwise, withdraws the claim wherever it was made.
    """

    settings: Settings
    ledger: Ledger
    client: VenueClient
    span: FetchSpan
    first_bar: datetime | None = None
    """On the grid of the base; None where it is not known."""
    is_asked: bool = False
    """The venue was asked about it in this run."""
    probes: list[BarsPage] = field(default_factory=list)
    """Its answers, for the fetch log."""

    @property
    def market(self) -> Market:
        """The market of the span."""
        return self.span.market

    @property
    def base(self) -> Timeframe:
        """The timeframe whose first bar is meant."""
        return self.settings.venues[self.market.venue].base

    @property
    def start(self) -> datetime:
        """The first open time of the span at which the market may have a bar."""
        wanted = self.span.wanted
        if self.first_bar is None:
            return wanted.start
        return min(max(wanted.start, self.span.timeframe.floor(self.first_bar)), wanted.end)

    @property
    def is_reopened(self) -> bool:
        """Whether a person wants the bars before the first one to be requested one by one."""
        now = self.settings.now()
        return any(g.status == GapStatus.REOPENED and g.is_due(now) for g in self._claims())

    async def find(self) -> None:
        """Find the first bar: as it is known, or by asking the venue, where that is due."""
        claimed, evidence = self.ledger.markets.claim(self.market)
        start, now, stored = self.span.wanted.start, self.settings.now(), self.span.stored
        is_due = any(gap.cause and gap.is_due(now) for gap in self._claims())
        if (claimed and claimed <= start) or (stored.height and stored["open_time"][0] <= start):
            return  # it claims nothing about this span
        if claimed and evidence and not is_due:
            self.first_bar = claimed
            return
        try:
            oldest = await self.client.source.first_open(self.market, self.base)
            known = [moment for moment in (oldest, claimed) if moment]
            if not known:
                return
            first = min(known)
            if first <= start:
                self._set_first_bar(first, "")
            elif await self._is_silent_before(first):
                self.confirm(first, "no bar lies in the page before it, and no coarser one")
            elif claimed:
                withdraw_not_listed(self.settings, self.ledger, self.market)
        except VenueRefused:  # it serves no bars from then any more
            self.first_bar = claimed if evidence else None

    def confirm(self, first: datetime, evidence: str) -> None:
        """Remember a first bar that witnesses confirm."""
        words = f"the first bar of {self.base.name} is that of {format_time(first)}: {evidence}"
        self._set_first_bar(first, words)
        self.first_bar, self.is_asked = first, True

    def _set_first_bar(self, first: datetime, evidence: str) -> None:
        if first != self.ledger.markets.claim(self.market)[0]:
            withdraw_not_listed(self.settings, self.ledger, self.market)
        self.ledger.markets.set_first_bar(self.market, first, evidence)

    def gaps_before(self, start: datetime) -> list[Gap]:
        """Return the gap of the span before `start`, where the market was not listed yet.

        Only the last one is asked about again, on behalf of all before it.
        """
        window = Window(self.span.wanted.start, start)
        if not window:
            return []
        known = [gap for gap in self._claims() if gap.window & window]
        if not self.is_asked and [(g.window, g.cause) for g in known] == [
            (window, GapCause.NOT_LISTED)
        ]:
            return known
        now, end = self.settings.now().replace(microsecond=0), self.span.wanted.end
        first = min((g.first_requested for g in known if g.first_requested), default=now)
        is_last = start < end or end < month_of(window.start).end or start == self.first_bar
        is_asked_again = is_last and self.span.timeframe == self.base
        _, evidence = self.ledger.markets.claim(self.market)
        gap = Gap(
            window,
            window.count(self.span.timeframe),
            reason=GapReason.NOT_LISTED,
            answers=1 + max((gap.answers for gap in known), default=0),
            evidence=evidence,
            cause=GapCause.NOT_LISTED,
            status=GapStatus.EXPLAINED,
            proof={"words": f"not listed yet; {evidence}"},
            first_requested=first,
            last_requested=now,
            next_request=next_request_at(first, now) if is_asked_again else None,
        )
        return [gap]

    async def has_coarse_bars_before(self, first: datetime) -> bool | None:
        """Return whether a coarse bar lies before the day of a first bar; None when unknown."""
        try:
            return bool(await self.coarse_opens_before(first))
        except VenueRefused:
            return False
        except MarketDataError:
            return None

    async def coarse_opens_before(self, first: datetime) -> list[datetime]:
        """Return the last open times of coarse bars before the day of a first bar, latest first.

        They are of the coarsest of COARSE that the venue has. Raises MarketDataError.
        """
        day = DAILY.floor(first)
        window = Window(day - timedelta(days=DAYS_BEFORE), day)
        for timeframe in COARSE:
            try:
                opens = await self._opens(timeframe, window)
            except BadInput:
                continue  # the venue has no such bars
            return list(reversed(opens))[:DAYS_TRIED]
        raise BadInput(f"{self.market.venue} has no coarse bars")

    def is_stored_before(self, first: datetime) -> bool:
        """Return whether bars are stored that open before `first`."""
        opens = self.span.stored["open_time"]
        return bool(opens.len() and opens[0] < first) or _has_month_before(
            self.ledger, self.span, first
        )

    async def _is_silent_before(self, first: datetime) -> bool:
        """Return whether all witnesses say that no bar lies before a first one."""
        if self.is_stored_before(self.span.timeframe.floor(first)):
            return False
        size = max(1, self.client.traits(self.market).page_size - 1)
        if await self._opens(self.base, Window(self.base.shift(first, -size), first)):
            return False
        return not await self.has_coarse_bars_before(first)

    async def _opens(self, timeframe: Timeframe, window: Window) -> list[datetime]:
        """Return the open times inside the window of one answer, sorted."""
        page = await self.client.source.fetch(self.market, timeframe, window)
        if timeframe == self.span.timeframe:
            self.probes.append(page)
        opens = [from_ms(ms) for ms in page.rows["open_time"].drop_nulls().sort().to_list()]
        return [moment for moment in opens if window.start <= moment < window.end]

    def _claims(self) -> list[Gap]:
        return [gap for gap in self.span.gaps if gap.reason == GapReason.NOT_LISTED]


async def settle_beginning(listing: FirstBarSearch, answers: Answers) -> None:
    """Decide what the silence before the first delivered bar means.

    What lies before the newest bars that the venue is known to serve is not served. For bars of the
    base: two answers that hold nothing before the market's first bar show that it was not listed
    then; coarser bars from before it show that the venue only does not serve finer ones any more.
    Nothing is decided where bars are stored before, or the answers do not suffice.
    """
    first = answers.first_delivered()
    market, timeframe = answers.span.market, answers.span.timeframe
    newest = facts_of(market.venue).endpoint(market.symbol).newest_bars_only
    if newest:
        oldest = timeframe.shift(timeframe.floor(answers.closed_before), -newest)
        answers.set_served_from(
            min(oldest, first or oldest), f"the venue serves the newest {newest} bars only"
        )
    if timeframe != listing.base or first is None:
        return
    if first <= max(answers.window.start, answers.served_from):
        return
    if listing.is_stored_before(first) or answers.count_empty_before(first) < 2:
        return
    earlier = [await listing.has_coarse_bars_before(first) for _ in range(2)]
    if earlier == [False, False]:
        listing.confirm(first, "two answers hold no bar before it, and two no coarser bar")
        answers.start_at(first)
    elif earlier == [True, True] and not await _serves_before(listing, answers, first):
        answers.set_served_from(
            first,
            f"the venue has coarser bars before {format_time(first)}, and none of {timeframe.name}",
        )


async def _serves_before(listing: FirstBarSearch, answers: Answers, first: datetime) -> bool:
    """Return whether the venue sends bars from before the first one that it delivered: of the last
    days with coarse bars, one page each.
    """
    client, market, timeframe = listing.client, answers.span.market, answers.span.timeframe
    size = client.traits(market).page_size
    for opened in await listing.coarse_opens_before(first):
        window = Window(timeframe.ceil(opened), timeframe.shift(timeframe.ceil(opened), size))
        try:
            page = await client.source.fetch(market, timeframe, window & Window(opened, first))
        except MarketDataError:
            continue
        if page.rows.height:
            return True
    return False


def withdraw_not_listed(settings: Settings, ledger: Ledger, market: Market) -> None:
    """Forget a market's first bar, and have the next runs look at what was not listed for it."""
    ledger.markets.withdraw_first_bar(market)
    tables = [raw_table(tf) for tf in settings.venues[market.venue].fetched_timeframes]
    ledger.gaps.withdraw(tables, market, GapCause.NOT_LISTED, now=settings.now())


def withdraw_contradicted(
    settings: Settings, ledger: Ledger, market: Market, opens: pl.Series, timeframe: Timeframe
) -> None:
    """Withdraw the claims that stored bars with these open times (sorted) contradict: that the
    market was not listed yet, or was listed no more.
    """
    if opens.is_empty():
        return
    first = ledger.markets.first_bar(market)
    if first and opens[0] < timeframe.floor(first):
        withdraw_not_listed(settings, ledger, market)
        ledger.markets.set_first_bar(market, opens[0], "")
    table = raw_table(timeframe)
    last = ledger.gaps.last_before(table, market, opens[-1])
    if last and last.cause == GapCause.DELISTED:
        ledger.gaps.withdraw([table], market, GapCause.DELISTED, now=settings.now())


def has_older_bars(ledger: Ledger, span: FetchSpan) -> bool:
    """Return whether bars of an earlier month than a span's are stored."""
    return _has_month_before(ledger, span, span.wanted.start)


def _has_month_before(ledger: Ledger, span: FetchSpan, moment: datetime) -> bool:
    months = ledger.partitions.of_market(raw_table(span.timeframe), span.market)
    return any(state.rows and month < f"{moment:%Y-%m}" for month, state in months.items())
