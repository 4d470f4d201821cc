"""Venues on loopback that speak their own wire formats, one file each."""

from __future__ import annotations

from marketdata_tests.fake_venues.binance import Binance, Binanceus
from marketdata_tests.fake_venues.bitfinex import Bitfinex
from marketdata_tests.fake_venues.bitget import Bitget
from marketdata_tests.fake_venues.bithumb import Bithumb
from marketdata_tests.fake_venues.bitstamp import Bitstamp
from marketdata_tests.fake_venues.bybit import Bybit
from marketdata_tests.fake_venues.coinbase import Coinbase, Coinbaseexchange
from marketdata_tests.fake_venues.cryptocom import Cryptocom
from marketdata_tests.fake_venues.deribit import Deribit
from marketdata_tests.fake_venues.frame import FakeVenue
from marketdata_tests.fake_venues.gate import Gate
from marketdata_tests.fake_venues.gemini import Gemini
from marketdata_tests.fake_venues.htx import Htx
from marketdata_tests.fake_venues.hyperliquid import Hyperliquid
from marketdata_tests.fake_venues.kraken import Kraken
from marketdata_tests.fake_venues.krakenfutures import Krakenfutures
from marketdata_tests.fake_venues.kucoin import Kucoin
from marketdata_tests.fake_venues.mexc import Mexc
from marketdata_tests.fake_venues.okx import Okx
from marketdata_tests.fake_venues.phemex import Phemex
from marketdata_tests.fake_venues.upbit import Upbit

VENUES: dict[str, type[FakeVenue]] = {
    venue.name: venue
    for venue in (
        *(Binance, Binanceus, Bitfinex, Bitget, Bithumb, Bitstamp, Bybit, Coinbase),
        *(Coinbaseexchange, Cryptocom, Deribit, Gate, Gemini, Htx, Hyperliquid, Kraken),
        *(Krakenfutures, Kucoin, Mexc, Okx, Phemex, Upbit),
    )
}
"""By ccxt's id."""
