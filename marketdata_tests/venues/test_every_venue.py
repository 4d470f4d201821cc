"""Every ccxt class with `fetchOHLCV`: what its facts say, and the request that we make it send."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import aiohttp
import ccxt.async_support as ccxt
import pytest

from marketdata_assets.errors import BadInput, MarketDataError
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.parts import Venue
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.ccxt_exchange import contract_size, create_exchange
from marketdata_assets.sources.ccxt_rest import CcxtSource
from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VolumeUnit
from marketdata_assets.venues.registry import VENUES, facts_of

START = datetime(2024, 6, 1, 9, tzinfo=UTC)
BARS = 60
NEEDS_MORE = {
    "cex": "an argument that ccxt demands and nobody documents",
    "luno": "a key",
    "modetrade": "a key",
    "woofipro": "a key",
}
"""Venues that answer no request for bars which only names market, timeframe and span."""
DAYS = {"bitbank"}
"""Venues whose request names the day, in the path."""
MARKET: dict[str, Any] = {
    "id": "BTCUSDT",
    "lowercaseId": "btcusdt",
    "symbol": "BTC/USDT",
    "base": "BTC",
    "quote": "USDT",
    "baseId": "BTC",
    "quoteId": "USDT",
    "settle": None,
    "settleId": None,
    "type": "spot",
    "spot": True,
    **dict.fromkeys(("margin", "swap", "future", "option", "contract"), False),
    "active": True,
    "linear": None,
    "inverse": None,
    "contractSize": None,
    "precision": {"price": "0.01", "amount": "0.001"},
    "limits": {},
    "info": {},
    "numericId": 1,
}
IDS = {"nado": {"id": "1"}}
"""Where a market's id has another form."""
LINEAR: dict[str, Any] = MARKET | {
    "symbol": "BTC/USDT:USDT",
    "settle": "USDT",
    "settleId": "USDT",
    "type": "swap",
    "spot": False,
    "swap": True,
    "contract": True,
    "linear": True,
    "inverse": False,
    "contractSize": "0.01",
}


def classes() -> list[str]:
    return [name for name in ccxt.exchanges if getattr(ccxt, name)().has["fetchOHLCV"] is True]


NAMES = classes()


def venue(name: str, symbol: str) -> Venue:
    entry = {"symbols": [symbol], "since": "2024-01-01"}
    return Settings.model_validate({"venues": {name: entry}}).venues[name]


class _Sent(Exception):
    """Stands for the network: the request was made."""


def request_of(name: str) -> str:
    """Return URL and body of the last request that a fetch of BARS minutes makes."""
    symbol = "BTC/USDT:USDT" if name == "binanceusdm" else "BTC/USDT"
    sent: list[str] = []

    async def fetch(url: str, method: str = "GET", headers: Any = None, body: Any = None) -> Any:
        sent.append(f"{url} {body}")
        raise _Sent

    async def send() -> None:
        source = CcxtSource(venue(name, symbol))
        async with aiohttp.ClientSession() as session:
            exchange = create_exchange(venue(name, symbol), session, 1)
            exchange.set_markets([MARKET | IDS.get(name, {}), LINEAR])
            exchange.fetch = fetch
            source._exchange = exchange
            window = Window(START, TIMEFRAMES["1m"].shift(START, BARS))
            timeframe = TIMEFRAMES["1m" if "1m" in exchange.timeframes else "15m"]
            try:
                await source.fetch(Market(name, symbol), timeframe, window)
            except (_Sent, MarketDataError):
                pass
            finally:
                exchange.session = None
                source._exchange = None

    asyncio.run(send())
    return sent[-1] if sent else ""


def moments(text: str) -> list[float]:
    """Return the moments in a request, in minutes after START."""
    start = START.timestamp()
    numbers = [int(n) / (1000 if len(n) > 10 else 1) for n in re.findall(r"\d{10,13}", text)]
    written = re.findall(r"2024-\d\d-\d\d[T ]\d\d:\d\d", re.sub(r"%3A|%20", _unescape, text))
    numbers += [datetime.fromisoformat(w).replace(tzinfo=UTC).timestamp() for w in written]
    return [(number - start) / 60 for number in numbers]


def _unescape(found: re.Match[str]) -> str:
    return {"%3A": ":", "%20": " "}[found[0]]


def test_there_are_about_a_hundred():
    assert len(NAMES) > 80
    assert set(VENUES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_request_names_the_span_that_we_want(name: str):
    """From the start on (or one bar before), or until the end with just as many bars; where ccxt
    sends neither, the facts say so.
    """
    endpoint = facts_of(name).endpoint("BTC/USDT")
    if endpoint.klines_method:
        endpoint = BarsEndpoint()
    text = request_of(name)
    if name in NEEDS_MORE:
        assert text == "" or not moments(text)
        return
    assert text
    if name in DAYS:
        assert "20240601" in text
        return
    found = moments(text)
    begins = [minute for minute in found if -1.01 <= minute <= 0.01]
    ends = [minute for minute in found if BARS - 1.01 <= minute <= BARS + 1.01]
    if endpoint.has_start:
        assert begins or (ends and str(BARS) in text), text
    else:
        assert not found, text


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_of_it_suffices(name: str):
    facts, exchange = facts_of(name), getattr(ccxt, name)()
    usable = [
        tf for tf in TIMEFRAMES if tf in exchange.timeframes and tf not in facts.odd_timeframes
    ]
    assert usable
    assert set(facts.odd_timeframes) <= set(TIMEFRAMES)
    assert exchange.has["fetchTime"] in (True, False, None)
    spot = facts.endpoint("BTC/USDT")
    assert spot.volume_unit is VolumeUnit.BASE
    assert spot.page_size is None or spot.page_size > 2
    for limit in spot.limits or ():
        assert limit <= (spot.page_size or limit)
    for symbol in ("BTC/USDT:USDT", "BTC/USD:BTC", "BTC/USD:BTC-240329-60000-C"):
        endpoint = facts.endpoint(symbol)
        if endpoint.volume_unit is VolumeUnit.CONTRACTS:
            assert symbol == "BTC/USDT:USDT"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in VENUES])
def test_a_contract_whose_unit_nobody_knows_is_refused(name: str):
    endpoint = facts_of(name).endpoint("BTC/USDT:USDT")
    exchange = getattr(ccxt, name)({"number": str})
    exchange.set_markets([LINEAR])
    if endpoint.volume_unit is VolumeUnit.BASE:  # it shares the facts of another venue
        assert contract_size(exchange, Market(name, "BTC/USDT:USDT"), endpoint) == Decimal(1)
        return
    if endpoint.volume_unit is VolumeUnit.CONTRACTS:
        found = contract_size(exchange, Market(name, "BTC/USDT:USDT"), endpoint)
        assert found == Decimal("0.01")
        return
    with pytest.raises(BadInput, match=f"it is not known whether {name} counts the volume"):
        contract_size(exchange, Market(name, "BTC/USDT:USDT"), endpoint)


@pytest.mark.parametrize("name", VENUES)
def test_facts_name_types_that_ccxt_knows(name: str):
    assert set(facts_of(name).endpoints) <= set(MarketType)
