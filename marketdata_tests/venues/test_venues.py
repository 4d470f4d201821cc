"""One file of facts a venue: complete, registered, and what the rest of the package reads."""

from __future__ import annotations

import importlib
import pkgutil
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise

import ccxt
import pytest

from marketdata_assets import venues
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.window import Window
from marketdata_assets.venues.facts import BarsEndpoint, MarketType, VenueFacts, market_type
from marketdata_assets.venues.registry import ARCHIVE_FORMATS, VENUES, facts_of
from marketdata_tests.steps import window

FILES = {
    module.name: importlib.import_module(f"{venues.__name__}.{module.name}")
    for module in pkgutil.iter_modules(venues.__path__)
    if module.name not in ("facts", "registry")
}


@pytest.mark.parametrize("name", FILES)
def test_a_venues_file_is_registered_under_its_ccxt_id(name: str):
    facts = FILES[name].FACTS
    assert facts.venue == name
    assert name in ccxt.exchanges
    assert facts_of(name) is VENUES[name] is facts


def test_nothing_else_is_registered():
    assert set(VENUES) == set(FILES)


def test_a_venue_without_a_file_has_the_defaults():
    facts = facts_of("coinbaseexchange")
    assert facts == VenueFacts(venue="coinbaseexchange")
    endpoint = facts.endpoint("BTC/USD")
    assert (endpoint.page_size, endpoint.requests_per_minute) == (None, 60)
    assert (endpoint.klines_method, endpoint.weight_per_minute) == (None, None)
    assert (endpoint.newest_bars_only, facts.archive, facts.halts) == (None, None, ())


@pytest.mark.parametrize(
    ("symbol", "kind"),
    [
        ("BTC/USDT", MarketType.SPOT),
        ("BTC/USDT:USDT", MarketType.LINEAR),
        ("BTC/USDT:USDT-240628", MarketType.LINEAR),
        ("BTC/USD:BTC", MarketType.INVERSE),
        ("BTC/USD:BTC-240628", MarketType.INVERSE),
    ],
)
def test_the_type_of_a_symbol(symbol: str, kind: MarketType):
    assert market_type(symbol) == kind


@pytest.mark.parametrize(
    ("venue", "symbol", "method", "numbers"),
    [
        ("binance", "BTC/USDT", "publicGetKlines", (1000, 3000, 6000)),
        ("binance", "BTC/USDT:USDT", "fapiPublicGetKlines", (499, 1200, 2400)),
        ("binanceusdm", "BTC/USDT:USDT", "fapiPublicGetKlines", (499, 1200, 2400)),
        ("binanceus", "BTC/USDT", "publicGetKlines", (1000, 600, 1200)),
    ],
)
def test_raw_klines(venue: str, symbol: str, method: str, numbers: tuple[int, int, int]):
    assert facts_of(venue).endpoint(symbol) == BarsEndpoint(
        page_size=numbers[0],
        requests_per_minute=numbers[1],
        klines_method=method,
        weight_per_minute=numbers[2],
    )


@pytest.mark.parametrize(
    ("venue", "symbol", "name"),
    [
        ("binance", "BTC/USDT", "BTCUSDT"),
        ("binance", "BTC/USDT:USDT", "BTCUSDT"),
        ("binance", "BTC/USDT:USDT-240628", "BTCUSDT_240628"),
        ("binance", "BTC/USD:BTC", None),
        ("kraken", "BTC/USD", "XBTUSD"),
        ("kraken", "ETH/BTC", "ETHXBT"),
        ("kraken", "DOGE/EUR", "XDGEUR"),
        ("kraken", "BTC/USD:USD", None),
    ],
)
def test_symbols_in_file_names(venue: str, symbol: str, name: str | None):
    archive = facts_of(venue).archive
    assert archive is not None
    assert archive.symbol_id(symbol) == name


def test_only_krakens_files_are_final():
    assert {venue for venue, f in VENUES.items() if f.archive and f.archive.is_final} == {"kraken"}


def test_formats_name_columns_of_bars():
    assert [archive_format.name for archive_format in ARCHIVE_FORMATS] == ["binance", "kraken"]
    for archive_format in ARCHIVE_FORMATS:
        assert archive_format.columns[:6] == COLUMN_NAMES[:6]
        assert set(archive_format.columns) <= {*COLUMN_NAMES, "close_time", "ignore"}


def test_known_halts_lie_in_order_and_apart():
    halts = facts_of("binance").halts
    assert len(halts) == 31
    assert all(timedelta(0) < h.window.end - h.window.start < timedelta(days=2) for h in halts)
    assert all(before.window.end <= after.window.start for before, after in pairwise(halts))


@pytest.mark.parametrize(
    ("span", "found"),
    [
        (window("2023-03-24T13:59", "2023-03-24T14:00"), 1),
        (window("2023-03-24T14:00", "2023-03-25"), 0),
        (window("2023-03-24T12:00", "2023-03-24T12:40"), 0),
        (window("2017-12-18", "2017-12-19"), 2),
    ],
)
def test_halts_of_a_window(span: Window, found: int):
    assert len(facts_of("binance").halts_in(span)) == found
    assert facts_of("kraken").halts_in(span) == []


def test_tolerances_name_columns_and_how_they_were_measured():
    found = {
        (venue, column): t for venue, f in VENUES.items() for column, t in f.tolerances.items()
    }
    assert {key: (t.absolute, t.relative) for key, t in found.items()} == {
        ("binance", "quote_volume"): (Decimal("1e-8"), Decimal("2.7e-16")),
        ("binance", "taker_buy_quote_volume"): (Decimal("1e-8"), Decimal("2.7e-16")),
        ("kraken", "trades"): (Decimal(1), Decimal(0)),
        ("kraken", "volume"): (Decimal(0), Decimal("0.015")),
    }
    assert all(column in COLUMN_NAMES for _, column in found)
    assert all(t.reason and t.measured for t in found.values())
