"""Second opinions: one series from several venues with its provenance, and their differences."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from marketdata_assets.charts.lines import draw_differences
from marketdata_assets.context import open_context
from marketdata_assets.defs.consolidated import CONSOLIDATE
from marketdata_assets.defs.jobs import INGEST, build_definitions
from marketdata_assets.defs.partitions import RANGE_END, RANGE_START
from marketdata_assets.defs.tags import KIND, RunKind
from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.flows.derive.consolidate import ConsolidationResult, Consolidator
from marketdata_assets.flows.operate.retire import RetirementAction, Retirer
from marketdata_assets.flows.prove.reconcile import check_reconciled
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.finding import FindingSeverity
from marketdata_assets.model.gap import GapCause, GapStatus
from marketdata_assets.model.market import CONSOLIDATED_VENUE, Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import consolidated_table, raw_table, reconciled_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, format_time, from_ms, month_of
from marketdata_assets.quality.reconcile import (
    compare_pair,
    compare_venues,
    largest_differences,
    summarize_pairs,
)
from marketdata_assets.reader import Reader
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_assets.transforms.consolidate import consolidate as as_one_series
from marketdata_assets.transforms.consolidate import find_venue_switches
from marketdata_tests.cli.test_cli import marketdata, text_of
from marketdata_tests.conftest import needs_shared
from marketdata_tests.defs.test_automation import tick
from marketdata_tests.defs.test_dagster import check_results, checked_partitions, latest
from marketdata_tests.samples import MINUTE, START, frame, minutes, random_rows, row, run_sql
from marketdata_tests.steps import SkippingClock, at, lake_files, run_ingest, window

M1 = TIMEFRAMES["1m"]
TABLE = consolidated_table(M1)
KEY = dg.AssetKey(["consolidated", "ohlcv_1m"])
BTC = Market(CONSOLIDATED_VENUE, "BTC/USDT")


# --------------------------------------------------------------------------------- pure functions
def span(first: int, end: int) -> Window:
    """Return a window in minutes counted from START."""
    return Window(START + first * MINUTE, START + end * MINUTE)


def test_each_minute_comes_from_the_first_venue_that_was_up():
    """Three venues cover eight minutes.

    a has bars 0 and 1, no trade in 2 and 3, and is down from 4 to 6. b has bars 0 to 4 and no trade
    in 5. c has all bars except 7.
    """
    opens = minutes(8)
    bars = {
        "a": frame(row(m) for m in opens[:2]),
        "b": frame(row(m, trades=2) for m in opens[:5]),
        "c": frame(row(m) for m in opens[:7]),
    }
    found = as_one_series(bars, {"a": [span(2, 4)], "b": [span(5, 6)]})
    assert list(zip(found["open_time"], found["venue"], strict=True)) == [
        *((opens[i], "a") for i in (0, 1)),
        (opens[4], "b"),
        (opens[6], "c"),
    ]
    assert found["trades"].to_list() == [7, 7, 2, 7]
    assert found.columns == [*COLUMN_NAMES, "venue"]
    assert find_venue_switches(found).rows() == [(opens[4], "a", "b"), (opens[6], "b", "c")]


@pytest.mark.parametrize("seed", range(20))
def test_any_pattern_of_missing_bars_equals_a_loop_over_minutes(seed: int):
    dice, opens = random.Random(seed), minutes(200)
    bars, no_trade = {}, {}
    for n, venue in enumerate(("a", "b", "c", "d")[: dice.randint(1, 4)]):
        state = [dice.choice(("bar", "bar", "no trade", "down")) for _ in range(40)]
        each = [state[i // 5] for i in range(200)]
        bars[venue] = frame(
            random_rows(seed * 10 + n, [m for m, s in zip(opens, each, strict=True) if s == "bar"])
        )
        no_trade[venue] = [
            Window(m, m + MINUTE) for m, s in zip(opens, each, strict=True) if s == "no trade"
        ]
        dice.shuffle(no_trade[venue])
    expected = []
    for m in opens:
        for venue in bars:
            rows = bars[venue].filter(pl.col("open_time") == m).rows()
            if rows:
                expected.append((*rows[0], venue))
            if rows or any(w.start <= m < w.end for w in no_trade[venue]):
                break
    assert as_one_series(bars, no_trade).rows() == expected


def test_venues_without_bars_give_an_empty_series():
    assert as_one_series({"a": frame([]), "b": frame([])}, {"a": [span(0, 5)]}).is_empty()
    assert compare_venues({"a": frame([]), "b": frame([])}, M1).is_empty()
    assert list(summarize_pairs(compare_venues({"a": frame([]), "b": frame([])}, M1))) == []


def closes(*values: str | None, volume: int = 1) -> pl.DataFrame:
    given = [(m, Decimal(v)) for m, v in zip(minutes(len(values)), values, strict=False) if v]
    return frame(row(m, close=v, volume=Decimal(volume)) for m, v in given)


def test_basis_points_equal_a_calculation_by_hand():
    found = compare_pair(
        closes("100.25", "101", None, "99", "100"), closes("100", "101", "100", "100", "102"), M1
    )
    assert found["open_time"].to_list() == [START + i * MINUTE for i in (0, 1, 3, 4)]
    assert found["close_bp"].to_list() == [
        Decimal("25"),
        Decimal(0),
        Decimal("-100"),
        Decimal("-196.0784"),
    ]
    # 101/100.25 - 101/100 = -0.25187...%; no bar before 3; 100/99 - 102/100 = -0.98989...%
    assert found["return_bp"].to_list() == [None, Decimal("-25.1870"), None, Decimal("-98.9899")]


def test_basis_points_equal_fractions():
    dice = random.Random(5)
    pairs = [
        (
            Decimal(dice.randrange(1, 10**14)).scaleb(-8),
            Decimal(dice.randrange(1, 10**14)).scaleb(-8),
        )
        for _ in range(300)
    ]
    ours, theirs = (
        frame(row(m, close=p[i]) for m, p in zip(minutes(300), pairs, strict=True)) for i in (0, 1)
    )
    for found, (a, b) in zip(compare_pair(ours, theirs, M1)["close_bp"], pairs, strict=True):
        exact = (Fraction(a) / Fraction(b) - 1) * 10_000
        assert abs(Fraction(found) - exact) <= Fraction(1, 10_000) + abs(exact) / 10**12


def test_a_bar_without_trades_is_not_compared():
    assert compare_pair(closes("100", volume=0), closes("150"), M1).is_empty()
    assert compare_pair(closes("150"), closes("100", volume=0), M1).is_empty()


def test_every_pair_of_venues_is_compared_in_order():
    dice = random.Random(7)
    bars = {
        venue: frame(row(m, close=Decimal(20_000) + dice.randrange(-60, 60)) for m in minutes(1000))
        for venue in ("kraken", "binance", "b")
    }
    pairs = compare_venues(bars, M1)
    found = list(summarize_pairs(pairs))
    assert [(o.venue, o.other, o.bars) for o in found] == [
        ("kraken", "binance", 1000),
        ("kraken", "b", 1000),
        ("binance", "b", 1000),
    ]
    distances = sorted(
        abs((float(x) / float(y) - 1) * 1e4)
        for x, y in zip(bars["kraken"]["close"], bars["b"]["close"], strict=True)
    )
    assert found[1].close.largest == pytest.approx(distances[-1], abs=1e-4)
    assert found[1].close.p50 == pytest.approx(statistics.median(distances), abs=1e-4)
    assert found[1].close.p99 == pytest.approx(
        statistics.quantiles(distances, n=100, method="inclusive")[98], abs=1e-4
    )
    assert (found[1].warned, found[1].failed) == (sum(value >= 25 for value in distances), 0)
    assert pairs["open_time"].is_sorted()
    assert abs(largest_differences(pairs, 1)["close_bp"][0]) == max(
        abs(value) for value in pairs["close_bp"]
    )


def test_the_picture_of_differences_is_small():
    bars = {
        venue: frame(
            row(m, close=Decimal(20_000 + i * shift)) for i, m in enumerate(minutes(44_640)[::60])
        )
        for venue, shift in (("a", 1), ("b", 2))
    }
    picture = draw_differences(compare_venues(bars, TIMEFRAMES["1h"]), month_of(START), 25, 100)
    assert picture.startswith("![differences](data:image/svg+xml")
    assert len(picture) < 1000
    assert (
        draw_differences(
            compare_venues({"a": frame([]), "b": frame([])}, M1), month_of(START), 25, 100
        )
        == "no two venues"
    )


# --------------------------------------------------------------------------------- the universe
VENUES = """venues:
  binance: {symbols: [BTC/USDT, ETH/USDT], since: 2024-01-01}
  kraken: {symbols: [BTC/USDT, BTC/USD], since: 2024-01-01}
  coinbaseexchange: {symbols: [BTC/USDT], since: 2024-01-01, base: 1h}
"""


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        (
            "consolidate: {BTC/USDT: [binance, kraken, bitstamp]}",
            5,
            "'bitstamp' is not a venue of this universe; it has binance, kraken",
        ),
        (
            "consolidate:\n  BTC/USD:\n    - kraken\n    - binance",
            8,
            "binance has no BTC/USD but BTC/USDT, ETH/USDT; add it there",
        ),
        (
            "consolidate: {BTC/USDT: [binance, coinbaseexchange]}",
            5,
            "binance has 1m bars and coinbaseexchange has 1h bars",
        ),
        ("consolidate: {BTC/USDT: [kraken, kraken]}", 5, "kraken is written twice"),
        ("consolidate: {BTC/USDT: [kraken]}", 5, "at least two venues are expected here"),
        (
            "consolidate: {BTCUSDT: [kraken, binance]}",
            5,
            "symbol 'BTCUSDT' is not a unified symbol",
        ),
        (
            "consolidate: {BTC/USDT: [kraken, 'binance:us']}",
            5,
            "venue 'binance:us' is not a ccxt id",
        ),
        ("consolidate: {BTC/USDT: kraken}", 5, "a list such as"),
        ("consolidate: [BTC/USDT]", 5, "`key: value` lines are expected here"),
    ],
)
def test_bad_entries_name_their_line(tmp_path: Path, text: str, line: int, complaint: str):
    file = tmp_path / "universe.yaml"
    file.write_text(VENUES + text + "\n")
    with pytest.raises(BadInput) as error:
        load_settings({"MARKETDATA_UNIVERSE": str(file)})
    assert str(error.value).startswith(f"{file} line {line}: ")
    assert complaint in str(error.value)


def test_a_valid_entry_is_loaded(tmp_path: Path):
    file = tmp_path / "universe.yaml"
    file.write_text(VENUES + "consolidate: {BTC/USDT: [kraken, binance]}\n")
    settings = load_settings({"MARKETDATA_UNIVERSE": str(file), "MARKETDATA_NOW": "2024-03-05"})
    assert settings.consolidate == {
        BTC: (Market("kraken", "BTC/USDT"), Market("binance", "BTC/USDT"))
    }
    assert settings.span(BTC) == window("2024-01-01", "2024-03-05")
    assert settings.consolidated_timeframes == (M1,)
    assert BTC not in settings.markets
    with pytest.raises(
        BadInput,
        match="consolidated:BTC-USDT is no market of a venue; "
        "it is made of kraken:BTC-USDT binance:BTC-USDT",
    ):
        settings.market("consolidated:BTC-USDT")


# --------------------------------------------------------------------------------- real bars
Make = Callable[..., Settings]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return `make(venues, rest, now=...)`, which writes and loads a universe of several venues.

    Each venue is a line `name: {...}`; all stores lie below tmp_path.
    """

    def make(venues: Sequence[str], rest: str, now: str) -> Settings:
        places = [f"lake: {tmp_path / 'lake'}", "rollups: parquet", f"state: {tmp_path / 'state'}"]
        (tmp_path / "universe.yaml").write_text(
            "\n".join(["venues:", *(f"  {venue}" for venue in venues), *places, rest, ""])
        )
        monkeypatch.setenv("MARKETDATA_UNIVERSE", str(tmp_path / "universe.yaml"))
        monkeypatch.setenv("MARKETDATA_NOW", now)
        return load_settings()

    return make


def build_outdated(settings: Settings, timeframe: str = "1m") -> list[ConsolidationResult]:
    """Build every consolidated partition that is not up to date."""
    with open_context(settings) as context:
        return list(
            context.bind(Consolidator).build(
                TIMEFRAMES[timeframe],
                list(context.bind(Consolidator).find_outdated(search_lake=True)),
            )
        )


def reasons(settings: Settings) -> dict[str, str]:
    with open_context(settings) as context:
        return {
            partition.key: late.reason
            for partition, late in context.bind(Consolidator)
            .find_outdated(search_lake=True)
            .items()
        }


def series(settings: Settings) -> pl.DataFrame:
    with open_context(settings) as context:
        return context.bind(BarReader).read(
            context.bind(BarReader).find_market(BTC.key),
            M1,
            window("2000-01-01", "2100-01-01"),
        )


SYMBOLS = {
    "coinbaseexchange": ("coinbase", "BTC-USDT"),
    "binanceus": ("binanceus", "BTCUSDT"),
    "kraken": ("kraken", "XBTUSDT"),
}
MARCH = "consolidated:BTC-USDT|2023-03-01"


def true_closes(exchange: Any, end: str) -> list[tuple[datetime, Decimal, str]]:
    """Return the close of each minute by the exchange's truth: of Coinbase, else of Binance.US.

    Binance.US has every minute.
    """
    found: dict[datetime, tuple[datetime, Decimal, str]] = {}
    for venue in ("coinbaseexchange", "binanceus"):
        for bar in exchange.truth(*SYMBOLS[venue], "1m", "2023-03-04T10:00:00Z", end):
            found.setdefault(from_ms(bar["t"]), (from_ms(bar["t"]), Decimal(bar["c"]), venue))
    return sorted(found.values())


def set_gap_causes(settings: Settings, cause: str, which: str) -> int:
    """Write a cause for some gaps into the ledger; return their number."""
    with open_context(settings) as context:
        change = f"UPDATE gaps SET cause = :cause, status = :status WHERE {which}"
        return run_sql(context.ledger, change, cause=cause, status=GapStatus.EXPLAINED)


def no_trade_at_coinbase(settings: Settings) -> list[Window]:
    with open_context(settings) as context:
        return context.ledger.consolidations.no_trade_windows(
            raw_table(M1), Partition.parse("coinbaseexchange:BTC-USDT|2023-03-01")
        )


@needs_shared
def test_another_venue_replaces_the_first_one_only_while_it_is_down(
    replay: Callable[..., Any], write: Make
) -> None:
    """Coinbase is first: it has maintenance on 2023-03-04 from 17:00, then an outage, then bars.

    Its own series never holds bars of another venue.
    """
    exchange = replay("2023-03-04T19:00:30Z", kraken_rate=0, coinbase_rate=0)
    venues = [
        f"{name}: {{symbols: [BTC/USDT], since: 2023-03-04T10:00,"
        f" base_url: '{exchange.url}/{name.removesuffix('exchange')}'}}"
        for name in SYMBOLS
    ]
    settings = write(
        venues, "consolidate: {BTC/USDT: [coinbaseexchange, binanceus, kraken]}", now="2023-03-05"
    )
    assert all(done.error is None for done in run_ingest(settings))
    set_gap_causes(settings, "", "bars > 0")
    (done,) = build_outdated(settings)
    assert (done.partition.key, done.changed, done.error) == (MARCH, True, None)
    expected = true_closes(exchange, "2023-03-04T19:00:00Z")
    assert series(settings).select("open_time", "close", "venue").rows() == expected
    assert done.bars.equals(series(settings))
    during = done.bars.filter(pl.col("open_time") >= at("2023-03-04T17:10"))
    assert set(during["venue"]) == {"binanceus"}
    assert reasons(settings) == {}

    # a venue that was up and had no trade gives no bar: so the ledger explains each gap of Coinbase
    # except its maintenance
    assert set_gap_causes(settings, GapCause.NO_TRADE, "market LIKE 'coinbase%' AND bars < 60") > 10
    no_trade = no_trade_at_coinbase(settings)
    assert reasons(settings) == {MARCH: "its venues' bars have changed"}
    (done,) = build_outdated(settings)
    remaining = [row for row in expected if not any(w.start <= row[0] < w.end for w in no_trade)]
    assert len(expected) - len(remaining) == sum(w.count(M1) for w in no_trade)
    assert series(settings).select("open_time", "close", "venue").rows() == remaining
    assert set(during["open_time"]) <= set(done.bars["open_time"])

    # the venue is down: the next one replaces it
    native = {
        name: content
        for name, content in lake_files(settings).items()
        if name.startswith("raw/") and "coinbase" in name
    }
    assert len(native) == 1
    exchange.admin(op="outage", venue="coinbase", on=True)
    exchange.admin(op="now", now="2023-03-04T23:00:30Z")
    failed = [one.partition.market.venue for one in run_ingest(settings) if one.error]
    assert failed == ["coinbaseexchange"]
    (done,) = build_outdated(settings)
    replacements = done.bars.filter(pl.col("open_time") >= at("2023-03-04T19:00"))
    assert set(replacements["venue"]) == {"binanceus"}
    assert replacements.height == 240
    assert lake_files(settings).items() >= native.items()

    # the venue is up again: its bars replace the others, except in its maintenance
    exchange.admin(op="outage", venue="coinbase", on=False)
    assert all(one.error is None for one in run_ingest(settings, SkippingClock().policy()))
    assert reasons(settings) == {MARCH: "its venues' bars have changed"}
    (done,) = build_outdated(settings)
    assert done.changed
    after_outage = done.bars.filter(pl.col("open_time") >= at("2023-03-04T22:30"))
    assert "coinbaseexchange" in set(after_outage["venue"])
    everywhere = true_closes(exchange, "2023-03-04T23:00:00Z")
    no_trade = no_trade_at_coinbase(settings)
    remaining = [row for row in everywhere if not any(w.start <= row[0] < w.end for w in no_trade)]
    assert series(settings).select("open_time", "close", "venue").rows() == remaining
    for market in settings.markets:  # no series of a venue holds bars of another one
        with open_context(settings) as context:
            bars = context.bind(BarReader).read(market, M1, window("2023-03-01", "2023-04-01"))
        closes_by_time = {
            r["t"]: Decimal(r["c"])
            for r in exchange.truth(
                *SYMBOLS[market.venue], "1m", "2023-03-04T10:00Z", "2023-03-04T23:00Z"
            )
        }
        traded = bars.filter(pl.col("volume") > 0) if market.venue == "kraken" else bars
        assert (
            dict(zip(traded["open_time"].dt.epoch("ms"), traded["close"], strict=True))
            == closes_by_time
        )
    build_outdated(settings)
    assert reasons(settings) == {}


@needs_shared
@pytest.mark.parametrize(
    ("factor", "severity", "red"),
    [(1.005, FindingSeverity.WARNING, 0), (1.02, FindingSeverity.ERROR, 1)],
)
def test_a_planted_difference_is_found(
    replay: Callable[..., Any], write: Make, factor: float, severity: FindingSeverity, red: int
) -> None:
    """One close of Binance.US is restated 0.5 or 2 % higher; other minutes are within 25 bp."""
    exchange = replay("2023-03-05T12:00:30Z", kraken_rate=0, coinbase_rate=0)
    hour = "2023-03-05T09:00:00Z", "2023-03-05T10:00:00Z"
    traded = {r["t"] for r in exchange.truth("coinbase", "BTC-USDT", "1m", *hour)}
    bar = next(
        r
        for r in exchange.truth("binanceus", "BTCUSDT", "1m", *hour)
        if r["t"] in traded and Decimal(r["v"]) > 0
    )
    exchange.admin(
        op="restate",
        venue="binanceus",
        symbol="BTCUSDT",
        t=bar["t"],
        close=float(bar["c"]) * factor,
    )
    names = ("coinbaseexchange", "binanceus")
    base = {name: f"{exchange.url}/{name.removesuffix('exchange')}" for name in names}
    venues = [
        f"{name}: {{symbols: [BTC/USDT], since: 2023-03-05T08:00, base_url: '{base[name]}'}}"
        for name in names
    ]
    settings = write(
        venues, "consolidate: {BTC/USDT: [coinbaseexchange, binanceus]}", now="2023-03-06"
    )
    run_ingest(settings)
    (done,) = build_outdated(settings)
    with open_context(settings) as context:
        finding = check_reconciled(settings, context.ledger, M1, result=done)
        assert len(context.ledger.checks.failed()) == red
    assert (finding.passed, finding.blocking, finding.severity) == (False, False, severity)
    assert finding.numbers["compared"] > 100
    assert (finding.numbers["warned"], finding.numbers["failed"]) == (1, red)
    assert finding.rows[0]["open_time"] == format_time(from_ms(bar["t"]))
    spike = -(1 - 1 / factor) * 1e4
    assert float(finding.rows[0]["close_bp"]) == pytest.approx(spike, abs=20)
    assert finding.details["coinbaseexchange_binanceus_close_bp_max"] == pytest.approx(
        -spike, abs=20
    )


# --------------------------------------------------------------------------------- Dagster
ENDS = {"binance": "2023-11-29", "binanceus": "2023-12-02"}
NOV, DEC = "2023-11-01", "2023-12-01"
ALL = {f"consolidated:{name}|{month}" for name in ("BTC-USDT", "ETH-USDT") for month in (NOV, DEC)}


@pytest.fixture
def settings(sandbox: tuple[SandboxExchange, str], write: Make) -> Settings:
    """Load two symbols at two venues: Binance until 2023-11-29, Binance.US until 2023-12-02."""
    both = f"symbols: [BTC/USDT, ETH/USDT], since: 2023-11-28, base_url: '{sandbox[1]}'"
    venues = [f"{name}: {{{both}, until: {end}}}" for name, end in ENDS.items()]
    rest = (
        "timeframes: [1h]\n"
        "consolidate: {BTC/USDT: [binance, binanceus], ETH/USDT: [binanceus, binance]}"
    )
    return write(venues, rest, now="2024-01-10T00:00:00Z")


def run(
    settings: Settings, instance: dg.DagsterInstance, start: str, end: str
) -> dg.ExecuteInProcessResult:
    job = build_definitions(settings).resolve_job_def(CONSOLIDATE)
    return job.execute_in_process(
        instance=instance, tags={RANGE_START: start, RANGE_END: end}, raise_on_error=False
    )


def test_the_asset_depends_on_the_raw_partitions_of_its_venues(settings: Settings):
    definitions = build_definitions(settings)
    graph = definitions.get_repository_def().asset_graph
    node = graph.get(KEY)
    assert node.parent_keys == {dg.AssetKey(["raw", "ohlcv_1m"])}
    assert set(node.partitions_def.get_partition_keys()) == ALL
    mapping, raw_partitions = (
        node.partition_mappings[dg.AssetKey(["raw", "ohlcv_1m"])],
        graph.get(dg.AssetKey(["raw", "ohlcv_1m"])).partitions_def,
    )
    one = node.partitions_def.subset_with_partition_keys([f"consolidated:ETH-USDT|{DEC}"])
    upstream = mapping.get_upstream_mapped_partitions_result_for_partitions(
        one, node.partitions_def, raw_partitions
    )
    assert set(upstream.partitions_subset.get_partition_keys()) == {
        f"{venue}:ETH-USDT|{DEC}" for venue in ("binance", "binanceus")
    }
    downstream = mapping.get_downstream_partitions_for_partitions(
        raw_partitions.subset_with_partition_keys([f"binance:BTC-USDT|{NOV}"]),
        raw_partitions,
        node.partitions_def,
    )
    assert set(downstream.get_partition_keys()) == {f"consolidated:BTC-USDT|{NOV}"}
    ingest, consolidation = (
        definitions.resolve_job_def(name).asset_layer for name in (INGEST, CONSOLIDATE)
    )
    assert KEY not in ingest.executable_asset_keys
    assert consolidation.executable_asset_keys == {KEY}
    assert {
        check.name for check in consolidation.asset_graph.asset_check_keys if check.asset_key == KEY
    } == {"reconciled"}
    assert node.metadata["dagster/column_schema"].columns[-1].name == "venue"


def test_without_the_key_there_is_no_asset_and_no_sensor(
    sandbox: tuple[SandboxExchange, str], write: Make
):
    plain = write(
        [f"binance: {{symbols: [BTC/USDT], since: 2023-11-28, base_url: '{sandbox[1]}'}}"],
        "",
        now="2024-01-10",
    )
    definitions = build_definitions(plain)
    assert KEY not in definitions.get_repository_def().asset_graph.get_all_asset_keys()
    assert "keep_consolidated" not in {sensor.name for sensor in definitions.sensors or ()}
    assert reasons(plain) == {}


def test_a_range_run_materializes_each_partition(settings: Settings, instance: dg.DagsterInstance):
    run_ingest(settings)
    done = run(settings, instance, f"consolidated:BTC-USDT|{NOV}", f"consolidated:ETH-USDT|{DEC}")
    assert done.success
    assert instance.get_materialized_partitions(KEY) == ALL
    assert check_results(instance, KEY, "reconciled") == {None: True, **dict.fromkeys(ALL, True)}
    assert checked_partitions(settings, instance, KEY, "reconciled")["SUCCEEDED"] == ALL
    btc, eth = (
        latest(instance, KEY, f"consolidated:{name}|{NOV}") for name in ("BTC-USDT", "ETH-USDT")
    )
    bars_by_symbol = {
        name: generate_bars(name, "1m", window("2023-11-28", "2023-12-01"))
        for name in ("BTCUSDT", "ETHUSDT")
    }
    day = bars_by_symbol["BTCUSDT"].filter(pl.col("open_time") < at("2023-11-29")).height
    assert (btc["bars_binance"], btc["bars_binanceus"], btc["switches"]) == (
        day,
        bars_by_symbol["BTCUSDT"].height - day,
        1,
    )
    assert (eth["bars_binanceus"], eth["switches"], eth["switched"]) == (
        bars_by_symbol["ETHUSDT"].height,
        0,
        "never",
    )
    assert "bars_binance" not in eth
    assert btc["rows"] == btc["dagster/partition_row_count"] == bars_by_symbol["BTCUSDT"].height
    for picture in (btc["closes"], btc["differences"]):
        assert picture.startswith("![")
        assert len(picture) < 1000
    # start and end of the range are swapped
    assert not run(
        settings, instance, f"consolidated:BTC-USDT|{DEC}", f"consolidated:ETH-USDT|{NOV}"
    ).success
    assert run(
        settings, instance, f"consolidated:BTC-USDT|{NOV}", f"consolidated:BTC-USDT|{NOV}"
    ).success


def test_the_check_shows_a_difference_and_a_failure_stops_no_other_partition(
    settings: Settings, instance: dg.DagsterInstance
):
    run_ingest(settings)
    btc, eth = (Partition.parse(f"binance:{name}|{NOV}") for name in ("BTC-USDT", "ETH-USDT"))
    with open_context(settings) as context:
        bars = context.storage.lake.read(raw_table(M1), btc)
        assert bars is not None
        context.storage.lake.write(
            raw_table(M1),
            btc,
            bars.with_columns(pl.col("close") * Decimal("1.02")).select(
                pl.col(n).cast(bars.schema[n]) for n in COLUMN_NAMES
            ),
        )
        context.storage.lake.delete(raw_table(M1), eth)
    done = run(settings, instance, f"consolidated:BTC-USDT|{NOV}", f"consolidated:ETH-USDT|{NOV}")
    assert not done.success  # ETH
    assert instance.get_materialized_partitions(KEY) == {f"consolidated:BTC-USDT|{NOV}"}
    key = dg.AssetCheckKey(KEY, "reconciled")
    records = instance.event_log_storage.get_asset_check_execution_history(key, limit=5)
    events = [
        record.event.dagster_event
        for record in records
        if record.event and record.event.dagster_event
    ]
    evaluations = [
        e.asset_check_evaluation_data
        for e in events
        if e.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ]
    found = [f for f in evaluations if f.partition == f"consolidated:BTC-USDT|{NOV}"]
    assert [(f.passed, f.severity, f.blocking) for f in found] == [
        (False, dg.AssetCheckSeverity.ERROR, False)
    ]
    metadata = {name: value.value for name, value in found[0].metadata.items()}
    assert metadata["binance_binanceus_close_bp_max"] == pytest.approx(200, abs=0.01)
    assert metadata["failed"] == bars.filter(pl.col("volume") > 0).height
    assert len(metadata["rows"].records) == 20
    assert metadata["differences"].startswith("![differences]")
    with open_context(settings) as context:
        # a lost object is no failure of the partition
        assert {
            key: count for key, (count, _) in context.ledger.partitions.failure_streaks().items()
        } == {}
        state = context.ledger.partitions.get(
            TABLE, Partition.parse(f"consolidated:ETH-USDT|{NOV}")
        )
    assert state is not None
    assert "raw/ohlcv_1m binance:ETH-USDT|2023-11-01 is not in the lake any more" in str(
        state.error
    )
    assert state.bytes is None


def test_the_sensor_requests_what_is_not_up_to_date(
    settings: Settings, instance: dg.DagsterInstance
):
    assert (
        tick(settings, instance, "keep_consolidated").skip_reason.skip_message
        == "every consolidated partition is up to date"
    )
    run_ingest(settings)
    first = tick(settings, instance, "keep_consolidated")
    (request,) = first.run_requests
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == (
        f"consolidated:BTC-USDT|{NOV}",
        f"consolidated:ETH-USDT|{DEC}",
    )
    assert request.tags[KIND] == RunKind.CONSOLIDATE
    # a run that fails is not repeated at once
    assert tick(settings, instance, "keep_consolidated").run_requests[0].run_key == request.run_key
    job = build_definitions(settings).resolve_job_def(CONSOLIDATE)
    assert job.execute_in_process(instance=instance, tags=dict(request.tags)).success
    assert not tick(settings, instance, "keep_consolidated").run_requests

    # one raw partition changes, one object and one event are lost: only these are requested
    with open_context(settings) as context:
        run_sql(
            context.ledger,
            "UPDATE partitions SET digest = 'other' WHERE market = 'binanceus:BTC-USDT'"
            " AND month = :month AND tbl = 'raw/ohlcv_1m'",
            month=DEC,
        )
    (Path(settings.lake) / TABLE.path(Partition.parse(f"consolidated:ETH-USDT|{NOV}"))).unlink()
    instance.wipe_asset_partitions(KEY, [f"consolidated:ETH-USDT|{DEC}"])
    assert reasons(settings) == {
        f"consolidated:BTC-USDT|{DEC}": "its venues' bars have changed",
        f"consolidated:ETH-USDT|{NOV}": "its object is not in the lake any more",
    }
    again = tick(settings, instance, "keep_consolidated").run_requests
    # the grid shows the lost partitions as missing
    assert instance.get_materialized_partitions(KEY) == {
        f"consolidated:BTC-USDT|{month}" for month in (NOV, DEC)
    }
    for request in again:
        assert job.execute_in_process(instance=instance, tags=dict(request.tags)).success
    assert instance.get_materialized_partitions(KEY) == ALL
    assert reasons(settings) == {}
    # `retire` wipes the events of every table from which it removes; this table is no asset
    no_asset = dg.AssetKey(["reconciled", "ohlcv_1m"])
    instance.wipe_asset_partitions(no_asset, sorted(ALL))
    assert instance.get_materialized_partitions(no_asset) == set()


def test_another_order_of_venues_rebuilds_the_series(settings: Settings):
    run_ingest(settings)
    build_outdated(settings)
    assert reasons(settings) == {}
    parts = {**settings.consolidate, BTC: tuple(reversed(settings.consolidate[BTC]))}
    reversed_order = settings.model_copy(update={"consolidate": parts})
    assert reasons(reversed_order) == {
        f"consolidated:BTC-USDT|{month}": "its venues' bars have changed" for month in (NOV, DEC)
    }
    # December has one venue only
    assert [done.changed for done in build_outdated(reversed_order)] == [True, False]
    assert set(series(reversed_order)["venue"]) == {"binanceus"}


def test_command_reader_and_sql_read_the_series(sandbox: tuple[SandboxExchange, str], write: Make):
    venues = [
        f"{name}: {{symbols: [BTC/USDT], since: 2023-11-28, until: {end},"
        f" base_url: '{sandbox[1]}'}}"
        for name, end in ENDS.items()
    ]
    settings = write(
        venues,
        "timeframes: [1h]\nconsolidate: {BTC/USDT: [binance, binanceus]}",
        now="2024-01-10T00:00:00Z",
    )
    assert (series(settings).columns, series(settings).height) == ([*COLUMN_NAMES, "venue"], 0)
    first = marketdata("backfill")
    assert first.returncode == 0, text_of(first)
    second = marketdata("backfill")
    assert (second.returncode, "nothing to do" in text_of(second)) == (0, True)
    printed = marketdata(
        "bars",
        "consolidated:BTC-USDT",
        "1m",
        "--start",
        "2023-11-28T23:59",
        "--end",
        "2023-11-29T00:01",
        "--format",
        "csv",
    )
    lines = printed.stdout.splitlines()
    assert lines[0] == ",".join([*COLUMN_NAMES, "venue"])
    assert [(line.split(",")[0], line.split(",")[-1]) for line in lines[1:]] == [
        ("2023-11-28T23:59:00Z", "binance"),
        ("2023-11-29T00:00:00Z", "binanceus"),
    ]
    expected = generate_bars("BTCUSDT", "1m", window("2023-11-28", "2023-12-02"))
    with open_context(settings) as context:
        reader = Reader(context)
        with pytest.raises(BadInput, match="consolidated:BTC-USDT has no 1h bars; it has 1m"):
            reader.bars("consolidated:BTC-USDT", "1h")
        bars = reader.bars("consolidated:BTC-USDT", "1m").collect()
        assert bars.select(COLUMN_NAMES).equals(expected)
        both = reader.bars(["consolidated:BTC-USDT", "binanceus:BTC-USDT"], "1m").collect()
        assert both.columns == ["market", *COLUMN_NAMES, "venue"]
        assert both["venue"].null_count() == expected.height
        counts = reader.sql(
            "SELECT market, venue, count(*) FROM consolidated.ohlcv_1m GROUP BY ALL ORDER BY ALL"
        ).rows()
        assert counts == [
            ("consolidated:BTC-USDT", "binance", 1440),
            ("consolidated:BTC-USDT", "binanceus", expected.height - 1440),
        ]
        compared = reader.sql(
            "SELECT count(*), max(abs(close_bp)), max(abs(return_bp)) FROM reconciled.ohlcv_1m"
        ).row(0)
        assert compared == (
            expected.filter(
                (pl.col("open_time") < at("2023-11-29")) & (pl.col("volume") > 0)
            ).height,
            0,
            0,
        )
    without_series = settings.model_copy(update={"consolidate": {}})
    # a series that was removed from the universe can still be read
    with open_context(without_series) as context:
        assert (
            context.bind(BarReader)
            .read(
                context.bind(BarReader).find_market(BTC.key),
                M1,
                window("2023-11-28", "2024-01-01"),
            )
            .equals(bars)
        )


def test_retention_keeps_a_series_without_its_raw_months(settings: Settings):
    run_ingest(settings)
    build_outdated(settings)
    before = {
        name: content
        for name, content in lake_files(settings).items()
        if not name.startswith("raw/")
    }
    old = settings.model_copy(update={"retention": {"raw/ohlcv_1m": 5}})
    with open_context(old) as context:
        run_sql(context.ledger, "UPDATE partitions SET rolled = digest WHERE tbl = 'raw/ohlcv_1m'")
        assert {
            (removal.table.name, removal.partition.month_key[:7])
            for removal in context.bind(Retirer).retire()
            if removal.action == RetirementAction.REMOVED
        } == {("raw/ohlcv_1m", "2023-11")}
        assert context.bind(Consolidator).find_outdated(search_lake=True) == {}
        (kept,) = context.bind(Consolidator).build(M1, [Partition(BTC, month_of(at(NOV)))])
        assert (kept.changed, kept.error, kept.bars.height) == (False, None, 3 * 1440)
        assert "it stays as it is" in str(kept.note)
    assert {
        name: content
        for name, content in lake_files(settings).items()
        if not name.startswith("raw/")
    } == before
    retention = {TABLE.name: 5, reconciled_table(M1).name: 5}
    short = old.model_copy(update={"retention": retention})
    with open_context(short) as context:
        assert {
            (removal.table.name, removal.action) for removal in context.bind(Retirer).retire()
        } == {
            (TABLE.name, "removed"),
            (reconciled_table(M1).name, "removed"),
        }
        assert context.bind(Consolidator).find_outdated(search_lake=True) == {}
    assert {name.partition("/")[0] for name in lake_files(settings)} == {"raw"}


def insert_gap(ledger: Ledger, partition: Partition, hour: int, cause: GapCause) -> None:
    """Insert a gap of two bars on the 28th of November into the ledger's table."""
    run_sql(
        ledger,
        'INSERT INTO gaps (tbl, market, month, start, "end", bars, reason, answers, evidence,'
        " cause, status) VALUES ('raw/ohlcv_1m', :market, :month, :start, :end, 2, 'no_bars', 2,"
        " '', :cause, 'explained')",
        market=partition.market.key,
        month=partition.month_key,
        start=f"2023-11-28T{hour:02}:00:00Z",
        end=f"2023-11-28T{hour:02}:02:00Z",
        cause=cause,
    )


@pytest.mark.usefixtures("either_database")
def test_the_ledger_finds_changed_gaps_in_both_databases(settings: Settings):
    run_ingest(settings)
    build_outdated(settings)
    partition = Partition.parse(f"binance:BTC-USDT|{NOV}")
    with open_context(settings) as context:
        assert context.bind(Consolidator).find_outdated(search_lake=True) == {}
        assert context.ledger.consolidations.no_trade_windows(raw_table(M1), partition) == []
        insert_gap(context.ledger, partition, hour=5, cause=GapCause.HALTED)
        assert context.bind(Consolidator).find_outdated(search_lake=True) == {}
        insert_gap(context.ledger, partition, hour=6, cause=GapCause.NO_TRADE)
        assert set(context.bind(Consolidator).find_outdated(search_lake=True)) == {
            Partition(BTC, partition.month)
        }
        list(
            context.bind(Consolidator).build(
                M1,
                list(context.bind(Consolidator).find_outdated(search_lake=True)),
            )
        )
        # another gap with as many bars replaces it
        run_sql(
            context.ledger,
            "UPDATE gaps SET start = :start, \"end\" = :end WHERE cause = 'no_trade'",
            start="2023-11-28T07:00:00Z",
            end="2023-11-28T07:02:00Z",
        )
        assert [
            late.reason
            for late in context.bind(Consolidator).find_outdated(search_lake=True).values()
        ] == ["its venues' bars have changed"]
        assert context.ledger.consolidations.no_trade_windows(raw_table(M1), partition) == [
            window("2023-11-28T07:00", "2023-11-28T07:02")
        ]


def test_a_lake_that_is_not_mounted_is_not_changed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    run_ingest(settings)
    build_outdated(settings)
    monkeypatch.setattr("marketdata_assets.model.partition_status.LOST_AT_ONCE", 3)
    for partition in sorted(ALL):
        (Path(settings.lake) / TABLE.path(Partition.parse(partition))).unlink()
    with (
        open_context(settings) as context,
        pytest.raises(StoreFailed, match=r"4 of 4 objects are not in .* is it mounted"),
    ):
        context.bind(Consolidator).find_outdated(search_lake=True)
