"""One ccxt exchange of a venue: made, told which markets to list, and asked about them."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import aiohttp

from marketdata_assets.errors import BadInput
from marketdata_assets.model.instrument import Instrument
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import from_ms
from marketdata_assets.settings.parts import Venue
from marketdata_assets.sources.ccxt_transport import (
    StrictAnswers,
    StrictAnswersAsText,
    replace_host,
)
from marketdata_assets.venues.facts import (
    BarsEndpoint,
    MarketType,
    VenueFacts,
    VolumeUnit,
    market_type,
)
from marketdata_assets.venues.registry import facts_of


def create_exchange(
    venue: Venue,
    session: aiohttp.ClientSession,
    deadline: float,
    types: Collection[MarketType] = (),
) -> Any:
    """Return ccxt's asynchronous client for the symbols of a venue; `deadline` is in seconds.

    It lists the markets of these types, by default of those that the symbols have.
    """
    import ccxt.async_support as ccxt  # costs seconds: only a process that fetches pays

    facts = facts_of(venue.name)
    types = types or {market_type(symbol) for symbol in venue.symbols}
    has_klines = all(facts.endpoint(symbol).klines_method for symbol in venue.symbols)
    strict = StrictAnswers if has_klines else StrictAnswersAsText
    exchange_class = type(f"Strict{venue.name}", (strict, getattr(ccxt, venue.name)), {})
    exchange = exchange_class(
        {
            "session": session,
            "enableRateLimit": False,  # the limiter is ours, shared by all processes
            "timeout": int(deadline * 1000),
            "number": str,
        }
    )
    exchange.has["fetchCurrencies"] = False  # requests that say nothing of bars
    if facts.markets_option:
        exchange.options["fetchMarkets"] = {
            **_as_options(exchange.options.get("fetchMarkets")),
            **facts.markets_option(types),
        }
    unwanted = {name for kind, name in facts.market_lists.items() if kind not in types}
    for name in unwanted - {facts.market_lists.get(kind) for kind in types}:
        setattr(exchange, name, _list_nothing)
    for name, repair in facts.repairs.items():
        setattr(exchange, name, _repaired(getattr(exchange, name), repair))
    if venue.base_url:
        exchange.urls["api"] = replace_host(
            exchange.urls["api"], venue.base_url, exchange.urls.get("hostname", "")
        )
    return exchange


def find_market(exchange: Any, market: Market) -> dict[str, Any]:
    """Return ccxt's description of a market.

    Raises BadInput with the nearest symbol of the same type.
    """
    found = exchange.markets.get(market.symbol)
    if found is None:
        kind = market_type(market.symbol)
        symbols = [symbol for symbol in exchange.symbols if market_type(symbol) is kind]
        near = difflib.get_close_matches(market.symbol, symbols, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"{market.venue} has no symbol {market.symbol}{hint}")
    return dict(found)


def check_timeframe(exchange: Any, timeframe: Timeframe, facts: VenueFacts) -> None:
    """Raise BadInput where a venue has no such bars, or bars of that name which are others."""
    known = [name for name in TIMEFRAMES if name in (exchange.timeframes or TIMEFRAMES)]
    usable = " ".join(name for name in known if name not in facts.odd_timeframes)
    if reason := facts.odd_timeframes.get(timeframe.name):
        raise BadInput(
            f"{facts.venue}: its {timeframe.name} bars are not fetched: {reason}; it has {usable}"
        )
    if timeframe.name not in known:
        raise BadInput(f"{facts.venue} has no {timeframe.name} bars; it has {usable}")


def stated_page_size(exchange: Any, market: Market) -> int | None:
    """Return how many bars a request returns, as ccxt states it; None where it does not."""
    if market.symbol not in exchange.markets:
        return None
    limit = exchange.feature_value(market.symbol, "fetchOHLCV", "limit")
    return int(limit) if limit else None


def listed_at(exchange: Any, market: Market) -> datetime | None:
    """Return since when the venue says that it lists a market; None where it does not say."""
    return _moment(find_market(exchange, market).get("created"))


def read_instrument(found: Mapping[str, Any], precision_mode: int) -> Instrument:
    """Return one of ccxt's descriptions of a market."""
    created, expiry = (_moment(found.get(name)) for name in ("created", "expiry"))
    if found.get("swap"):
        expiry = None  # Deribit's perpetuals end in the year 3000
    precision = found.get("precision") or {}
    size = found.get("contractSize")
    return Instrument(
        symbol=found["symbol"],
        id=str(found["id"]),
        type=market_type(found["symbol"]).value,
        base=found["base"],
        quote=found["quote"],
        settle=found.get("settle"),
        contract_size=None if size is None else str(size),
        tick=_step(precision.get("price"), precision_mode),
        lot=_step(precision.get("amount"), precision_mode),
        created=created,
        expiry=expiry,
        active=found.get("active"),
    )


def read_volumes(tickers: Mapping[str, Any]) -> dict[str, Decimal]:
    """Return the quote volumes of ccxt's tickers, by symbol; the price times the base volume where
    that is all there is.
    """
    volumes: dict[str, Decimal] = {}
    for symbol, ticker in tickers.items():
        quote, base = ticker.get("quoteVolume"), ticker.get("baseVolume")
        price = ticker.get("vwap") or ticker.get("last") or ticker.get("close")
        if quote is not None:
            volumes[symbol] = Decimal(str(quote))
        elif base is not None and price is not None:
            volumes[symbol] = Decimal(str(base)) * Decimal(str(price))
    return volumes


def _moment(ms: Any) -> datetime | None:
    return from_ms(int(ms)) if ms and int(ms) > 0 else None


def _step(precision: Any, mode: int) -> str | None:
    """Return the step of a number; None where the venue counts significant digits."""
    from ccxt.base.decimal_to_precision import DECIMAL_PLACES, TICK_SIZE

    if precision is None or mode not in (TICK_SIZE, DECIMAL_PLACES):
        return None
    number = Decimal(str(precision))
    step = number if mode == TICK_SIZE else Decimal(1).scaleb(-int(number))
    return format(step.normalize(), "f")


def contract_size(exchange: Any, market: Market, endpoint: BarsEndpoint) -> Decimal:
    """Return how much base currency one unit of a market's volume is.

    Raises BadInput where that is not known: nothing is stored whose unit is a guess.
    """
    unit = endpoint.volume_unit
    if unit is VolumeUnit.BASE:
        return Decimal(1)
    found = find_market(exchange, market)
    if unit is VolumeUnit.CONTRACTS and market_type(market.symbol) is MarketType.LINEAR:
        try:
            size = Decimal(str(found.get("contractSize")))
        except InvalidOperation:
            size = Decimal(0)
        if size.is_finite() and size > 0:
            return size
        raise BadInput(
            f"{market.venue} does not say how much {found['base']} a contract of {market.symbol} "
            "is, so its volumes cannot be stored; remove the symbol"
        )
    raise BadInput(
        f"it is not known whether {market.venue} counts the volume of {market.symbol} in "
        f"{found['base']} or in contracts, so nothing of it is stored; remove the symbol, or add "
        f"the fact to marketdata_assets/venues/{market.venue}.py"
    )


async def _list_nothing(*_: Any) -> list[Any]:
    return []


def _repaired(
    request: Callable[..., Awaitable[Any]], repair: Callable[[Any], Any]
) -> Callable[..., Awaitable[Any]]:
    async def repaired(*arguments: Any) -> Any:
        return repair(await request(*arguments))

    return repaired


def _as_options(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
