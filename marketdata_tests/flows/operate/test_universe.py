"""Lists of markets, patterns and rankings, over a venue whose list changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from aiohttp import web

from marketdata_assets.context import open_context
from marketdata_assets.defs.jobs import build_definitions
from marketdata_assets.defs.reference import TAKE_MARKETS
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.flows.operate.universe import (
    InstrumentKeeper,
    former_symbols,
    load_universe,
)
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.ranking import MarketRanker
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.instrument import Instrument
from marketdata_assets.model.partition import partitions_of
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.quality.split import REJECTED_SCHEMA
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_tests.samples import at, frame, row
from marketdata_tests.steps import SkippingClock, serving, window

pytestmark = pytest.mark.server

DAY = TIMEFRAMES["1d"]


@dataclass
class Exchange:
    """Binance's list of spot markets and their volumes of 24 hours; `requests` are the paths."""

    volumes: dict[str, int]
    """By `BASE/QUOTE`, in quote currency."""
    halted: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append(request.path)
        if request.path.endswith("/exchangeInfo"):
            return web.json_response({"symbols": [self._listed(name) for name in self.volumes]})
        if request.path.endswith("/ticker/24hr"):
            tickers = [
                {
                    "symbol": name.replace("/", ""),
                    "lastPrice": "2",
                    "volume": str(volume / 2),
                    "quoteVolume": str(volume),
                }
                for name, volume in self.volumes.items()
            ]
            return web.json_response(tickers)
        return web.json_response({"code": -1, "msg": "no such path"}, status=404)

    def _listed(self, name: str) -> dict[str, Any]:
        base, quote = name.split("/")
        return {
            "symbol": base + quote,
            "status": "BREAK" if name in self.halted else "TRADING",
            "baseAsset": base,
            "quoteAsset": quote,
            "baseAssetPrecision": 8,
            "quotePrecision": 8,
            "permissions": ["SPOT"],
            "isSpotTradingAllowed": True,
            "filters": [
                {"filterType": "PRICE_FILTER", "tickSize": "0.01000000"},
                {"filterType": "LOT_SIZE", "stepSize": "0.00001000", "minQty": "0.00001000"},
            ],
        }


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    found = Exchange({"BTC/USDT": 900, "ETH/USDT": 500, "SOL/USDT": 700, "ETH/BTC": 9000})
    with serving(found.answer) as url:
        found.url = url
        yield found


@pytest.fixture
def write(exchange: Exchange, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `write(symbols, now=...)`, which writes the universe that the environment names."""

    def write(symbols: str, now: str = "2024-06-01") -> None:
        (tmp_path / "universe.yaml").write_text(
            "venues:\n  binance:\n"
            f"    symbols: {symbols}\n    since: 2024-01-01\n    base_url: {exchange.url}\n"
            f"    base: 1d\ntimeframes: [1w]\nrollups: parquet\nlake: {tmp_path / 'lake'}\n"
            f"state: {tmp_path / 'state'}\n"
        )
        monkeypatch.setenv("MARKETDATA_UNIVERSE", str(tmp_path / "universe.yaml"))
        monkeypatch.setenv("MARKETDATA_NOW", now)

    return write


def resolve(settings: Settings) -> tuple[str, ...]:
    """Take a snapshot and look the patterns up, as the daily job does."""
    with open_context(settings, policy=SkippingClock().policy()) as context:
        keeper = context.bind(InstrumentKeeper)
        keeper.take("binance")
        return keeper.resolve(settings.venues["binance"]).symbols


# ------------------------------------------------------------ patterns
@pytest.mark.parametrize(
    ("symbols", "wanted"),
    [
        ('["*/USDT"]', ["BTC/USDT", "ETH/USDT", "SOL/USDT"]),
        ('["ETH/*"]', ["ETH/BTC", "ETH/USDT"]),
        ('[SOL/USDT, "*/USDT"]', ["SOL/USDT", "BTC/USDT", "ETH/USDT"]),
        ("[{quote: USDT}]", ["BTC/USDT", "ETH/USDT", "SOL/USDT"]),
        ("[{quote: USDT, type: spot, top: 2}]", ["BTC/USDT", "SOL/USDT"]),
        ("[{quote: USDT, top: 1}, {quote: BTC}]", ["BTC/USDT", "ETH/BTC"]),
    ],
)
def test_what_a_pattern_means(
    exchange: Exchange, write: Any, symbols: str, wanted: list[str]
) -> None:
    """It is looked up once, and then known without a request."""
    write(symbols)
    assert [market.symbol for market in load_universe().markets] == wanted
    seen = len(exchange.requests)
    exchange.volumes["DOGE/USDT"] = 10**6
    assert [market.symbol for market in load_universe(for_reading=True).markets] == wanted
    assert len(exchange.requests) == seen


def test_a_market_that_is_not_traded_is_not_meant(exchange: Exchange, write: Any) -> None:
    exchange.halted = {"ETH/USDT"}
    write('["*/USDT"]')
    assert [market.symbol for market in load_universe().markets] == ["BTC/USDT", "SOL/USDT"]


def test_a_new_list_changes_the_order_of_nothing(exchange: Exchange, write: Any) -> None:
    """Ranges of markets stay contiguous: what stays keeps its place, what is new comes last."""
    write('["*/USDT"]')
    settings = load_universe()
    del exchange.volumes["ETH/USDT"]
    exchange.volumes |= {"AAA/USDT": 1, "ZZZ/USDT": 2}
    assert resolve(settings) == ("BTC/USDT", "SOL/USDT", "AAA/USDT", "ZZZ/USDT")
    assert resolve(settings) == ("BTC/USDT", "SOL/USDT", "AAA/USDT", "ZZZ/USDT")
    after = load_universe(for_reading=True)
    assert [m.symbol for m in after.markets] == ["BTC/USDT", "SOL/USDT", "AAA/USDT", "ZZZ/USDT"]
    grid = build_definitions(after).resolve_asset_graph().get(dg.AssetKey(["raw", "ohlcv_1d"]))
    assert grid.partitions_def is not None
    keys = [key.split("|")[0] for key in grid.partitions_def.get_partition_keys()]
    assert list(dict.fromkeys(keys)) == [m.key for m in after.markets]


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ('["*/EUR"]', r"binance has no market \*/EUR; its quote currencies are BTC USDT"),
        ("[{quote: EUR, top: 5}]", "binance has no market of type spot with quote currency EUR"),
    ],
)
def test_a_pattern_that_means_nothing(write: Any, symbols: str, message: str) -> None:
    write(symbols)
    with pytest.raises(BadInput, match=message):
        load_universe()


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ('["*"]', "is not a unified symbol"),
        ("[{top: 5}]", "`quote:` is missing"),
        ("[{quote: USDT, top: 0}]", "a whole number of markets, from 1"),
        ("[{quote: USDT, type: swap}]", "'swap' is not one of spot, linear, inverse"),
        ('["*/USDT", "*/USDT"]', "is written twice"),
        ("[{quote: USDT}, {quote: USDT}]", "is written twice"),
    ],
)
def test_a_mistake_in_a_pattern_names_its_line(write: Any, symbols: str, message: str) -> None:
    write(symbols)
    with pytest.raises(BadInput, match=message) as refused:
        load_settings()
    assert "universe.yaml line 3" in str(refused.value)


def test_a_reader_sends_no_request(exchange: Exchange, write: Any) -> None:
    write('["*/USDT"]')
    with pytest.raises(BadInput, match="run `marketdata markets --venue binance --refresh`"):
        load_universe(for_reading=True)
    assert exchange.requests == []


# ------------------------------------------------------------ snapshots
def test_every_change_of_a_list_is_kept(exchange: Exchange, write: Any, tmp_path: Path) -> None:
    write("[BTC/USDT]", "2024-06-01")
    with open_context(load_settings()) as context:
        assert context.bind(InstrumentKeeper).take("binance").total == 4
    exchange.halted = {"SOL/USDT"}
    del exchange.volumes["ETH/BTC"]
    exchange.volumes["NEW/USDT"] = 1
    write("[BTC/USDT]", "2024-06-02")
    with open_context(load_settings()) as context:
        changes = context.bind(InstrumentKeeper).take("binance")
        book = context.ledger.instruments
        symbols = [one.symbol for one in book.list("binance")]
        before = {one.symbol: one for one in book.list("binance", at("2024-06-01T12:00"))}
    assert (changes.listed, changes.gone, changes.changed, changes.total) == (
        ("NEW/USDT",),
        ("ETH/BTC",),
        ("SOL/USDT",),
        4,
    )
    assert symbols == ["BTC/USDT", "ETH/USDT", "NEW/USDT", "SOL/USDT"]
    assert sorted(before) == ["BTC/USDT", "ETH/BTC", "ETH/USDT", "SOL/USDT"]
    assert before["SOL/USDT"] == Instrument(
        symbol="SOL/USDT",
        id="SOLUSDT",
        type="spot",
        base="SOL",
        quote="USDT",
        tick="0.01",
        lot="0.00001",
        active=True,
    )


def test_a_renamed_market_is_linked_with_its_former_name(tmp_path: Path) -> None:
    """By the venue's id, which stays; or by what is known of an asset: MATIC became POL."""
    ledger = Ledger(tmp_path)
    old = [
        Instrument("OLD/USDC", "@142", "spot", "OLD", "USDC"),
        Instrument("MATIC/USDT", "MATICUSDT", "spot", "MATIC", "USDT"),
    ]
    new = [
        Instrument("HFUN/USDC", "@142", "spot", "HFUN", "USDC"),
        Instrument("POL/USDT", "POLUSDT", "spot", "POL", "USDT"),
        Instrument("POL/BTC", "POLBTC", "spot", "POL", "BTC"),
    ]
    ledger.instruments.record("binance", old, {"spot"}, at("2024-08-01"))
    ledger.instruments.record("binance", new, {"spot"}, at("2024-09-14"))
    assert former_symbols(ledger, "binance") == {"HFUN/USDC": "OLD/USDC", "POL/USDT": "MATIC/USDT"}
    ledger.close()


def test_another_type_of_markets_ends_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    spot = Instrument("BTC/USDT", "BTCUSDT", "spot", "BTC", "USDT")
    linear = Instrument("BTC/USDT:USDT", "BTCUSDT", "linear", "BTC", "USDT", "USDT")
    ledger.instruments.record("binance", [spot], {"spot"}, at("2024-08-01"))
    changes = ledger.instruments.record("binance", [linear], {"linear"}, at("2024-08-02"))
    assert (changes.listed, changes.gone) == (("BTC/USDT:USDT",), ())
    assert [one.type for one in ledger.instruments.list("binance")] == ["spot", "linear"]
    ledger.close()


def test_the_daily_job_takes_snapshots_and_looks_patterns_up(
    exchange: Exchange, write: Any
) -> None:
    write('["*/USDT"]')
    settings = load_universe()
    exchange.volumes["NEW/USDT"] = 1
    job = build_definitions(settings).resolve_job_def(TAKE_MARKETS)
    with dg.DagsterInstance.ephemeral() as instance:
        assert job.execute_in_process(instance=instance).success
        event = instance.get_latest_materialization_event(dg.AssetKey(["reference", "markets"]))
    assert event is not None
    assert event.asset_materialization is not None
    assert event.asset_materialization.metadata["markets"].value == 5
    assert [m.symbol for m in load_universe(for_reading=True).markets][-1] == "NEW/USDT"


# ------------------------------------------------------------ rankings
def store(settings: Settings, symbol: str, days: dict[str, int]) -> None:
    """Store daily bars with these volumes in quote currency."""
    rows = [row(at(day), volume=Decimal(v) / 2, quote_volume=Decimal(v)) for day, v in days.items()]
    with open_context(settings) as context:
        (market,) = [m for m in settings.markets if m.symbol == symbol]
        (january,) = partitions_of(market, window("2024-01-01", "2024-02-01"))
        context.bind(PartitionStore).ingest_frame(
            DAY,
            january,
            frame(rows),
            rejected=pl.DataFrame(schema=REJECTED_SCHEMA),
            sources=["test"],
        )


def test_a_ranking_knows_nothing_of_later_days_and_forgets_no_dead_market(
    exchange: Exchange, write: Any
) -> None:
    write("[BTC/USDT, ETH/USDT, SOL/USDT]")
    settings = load_settings()
    store(settings, "BTC/USDT", {"2024-01-01": 10, "2024-01-02": 10, "2024-01-03": 10**6})
    store(settings, "ETH/USDT", {"2024-01-01": 100, "2024-01-02": 100})
    store(settings, "SOL/USDT", {"2024-01-05": 500})
    write("[BTC/USDT]")
    with open_context(load_settings()) as context:
        ranker = context.bind(MarketRanker)
        then = ranker.rank(at("2024-01-03"), days=30, venue=None, quote=None).markets
        later = ranker.rank(at("2024-01-06"), days=2, venue=None, quote="USDT").markets
        reader = context.bind(BarReader)
        eth = next(one.market for one in then if one.market.symbol == "ETH/USDT")
        bars = reader.read(eth, DAY, window("2024-01-01", "2024-02-01"))
    found = [(one.market.symbol, one.volume, one.days, one.is_wanted) for one in then]
    assert found == [("ETH/USDT", 200, 2, False), ("BTC/USDT", 20, 2, True)]
    assert [one.market.symbol for one in later] == ["SOL/USDT"]
    assert bars.height == 2  # what left the list stays readable
