"""The first bar of a market: what lies before it was not listed, or is not served any more."""

from __future__ import annotations

from datetime import datetime, timedelta

from marketdata_assets.errors import BadInput, MarketDataError, VenueRefused
from marketdata_assets.flows.fetch.answers import Answers, FetchSpan
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, format_time, from_ms
from marketdata_assets.sources.clients import VenueClient
from marketdata_assets.venues.registry import facts_of

DAILY = TIMEFRAMES["1d"]
DAYS_TRIED = 2
"""Of how many days with coarse bars finer ones are requested, to show that they are not served."""
COARSE = (DAILY, TIMEFRAMES["4h"], TIMEFRAMES["1h"])
DAYS_BEFORE = 30
"""How many days before a market's first known bar are requested in coarse bars."""


async def find_first_bar(
    ledger: Ledger, client: VenueClient, span: FetchSpan, *, base: Timeframe
) -> datetime | None:
    """Return the market's first bar on the span's grid, once two answers agree on it."""
    first_bar, stored = ledger.markets.first_bar(span.market), span.stored
    if first_bar is None and (stored.is_empty() or stored["open_time"][0] > span.wanted.start):
        try:
            one, two = [await client.source.first_open(span.market, base) for _ in range(2)]
        except VenueRefused:  # it serves no bars from then any more
            return None
        if one is not None and one == two:
            ledger.markets.set_first_bar(
                span.market, one, f"first bar of {base.name}, in two answers"
            )
            first_bar = one
    return span.timeframe.floor(first_bar) if first_bar else None


async def settle_beginning(
    ledger: Ledger, client: VenueClient, answers: Answers, *, base: Timeframe
) -> None:
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
    if timeframe != base or first is None:
        return
    if first <= max(answers.window.start, answers.served_from):
        return
    if _is_stored_before(ledger, answers, first) or answers.count_empty_before(first) < 2:
        return
    earlier = [await _has_coarse_bars_before(client, answers, first) for _ in range(2)]
    if earlier == [False, False]:
        evidence = "two answers hold no bar before it, and two no coarser bar"
        ledger.markets.set_first_bar(market, first, evidence)
        answers.start_at(first)
    elif earlier == [True, True] and not await _serves_before(client, answers, first):
        answers.set_served_from(
            first,
            f"the venue has coarser bars before {format_time(first)}, and none of {timeframe.name}",
        )


async def _serves_before(client: VenueClient, answers: Answers, first: datetime) -> bool:
    """Return whether the venue sends bars from before the first one that it delivered: of the last
    days with coarse bars, one page each.
    """
    market, timeframe = answers.span.market, answers.span.timeframe
    size = client.traits(market).page_size
    for opened in await _coarse_opens_before(client, answers, first):
        window = Window(timeframe.ceil(opened), timeframe.shift(timeframe.ceil(opened), size))
        try:
            page = await client.source.fetch(market, timeframe, window & Window(opened, first))
        except MarketDataError:
            continue
        if page.rows.height:
            return True
    return False


def _is_stored_before(ledger: Ledger, answers: Answers, first: datetime) -> bool:
    opens = answers.span.stored["open_time"]
    if opens.len() and opens[0] < first:
        return True
    return _has_month_before(ledger, answers.span, first)


def has_older_bars(ledger: Ledger, span: FetchSpan) -> bool:
    """Return whether bars of an earlier month than a span's are stored."""
    return _has_month_before(ledger, span, span.wanted.start)


def _has_month_before(ledger: Ledger, span: FetchSpan, moment: datetime) -> bool:
    months = ledger.partitions.of_market(raw_table(span.timeframe), span.market)
    return any(state.rows and month < f"{moment:%Y-%m}" for month, state in months.items())


async def _has_coarse_bars_before(
    client: VenueClient, answers: Answers, first: datetime
) -> bool | None:
    """Return whether a coarse bar lies before the day of the first bar; None when unknown."""
    try:
        return bool(await _coarse_opens_before(client, answers, first))
    except VenueRefused:
        return False
    except MarketDataError:
        return None


async def _coarse_opens_before(
    client: VenueClient, answers: Answers, first: datetime
) -> list[datetime]:
    """Return the last open times of coarse bars before the day of the first bar, latest first.

    They are of the coarsest of COARSE that the venue has. Raises MarketDataError.
    """
    day = DAILY.floor(first)
    window = Window(day - timedelta(days=DAYS_BEFORE), day)
    for timeframe in COARSE:
        try:
            page = await client.source.fetch(answers.span.market, timeframe, window)
        except BadInput:
            continue  # the venue has no such bars
        opens = page.rows["open_time"].drop_nulls().sort(descending=True)
        return [from_ms(ms) for ms in opens[:DAYS_TRIED].to_list()]
    raise BadInput(f"{answers.span.market.venue} has no coarse bars")
