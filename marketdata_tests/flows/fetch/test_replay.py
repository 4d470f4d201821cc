"""Real bars of Binance over loopback are exact in nine columns, with and without faults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import polars as pl
import pytest

from marketdata_assets.context import open_context
from marketdata_assets.flows.derive.rollup import RollupBuilder
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.prove.raw_checks import RAW_CHECKS, RawAuditor
from marketdata_assets.flows.prove.rollup_checks import RollupAuditor
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.bar import BAR_SCHEMA
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources import ccxt_rest
from marketdata_tests.conftest import Universe, needs_shared
from marketdata_tests.steps import (
    SkippingClock,
    assert_bars,
    at,
    lake_files,
    partitions,
    run_derive,
    run_ingest,
    window,
)

pytestmark = needs_shared

NINE = {
    "open": "o",
    "high": "h",
    "low": "l",
    "close": "c",
    "volume": "v",
    "quote_volume": "qv",
    "trades": "n",
    "taker_buy_volume": "tbv",
    "taker_buy_quote_volume": "tbq",
}
MINUTE = TIMEFRAMES["1m"]
JANUARY = window("2024-01-01", "2024-02-01")
HALT = window("2023-03-20", "2023-03-28")
FAULTS: dict[str, dict[str, Any]] = {
    "http500": {},
    "slow": {"seconds": 0.05},
    "timeout": {"seconds": 1.0},
    "reset": {},
    "truncate_json": {},
    "short_read": {},
    "html_error": {},
    "empty_body": {},
    "empty_list": {},
    "error_200": {},
    "rate_limit": {"retry_after": 1},
    "dup_rows": {},
    "reorder": {},
    "reverse": {},
    "bad_ohlc": {},
    "null_price": {},
    "nan_price": {},
    "zero_price": {},
    "negative_volume": {},
    "text_numbers": {},
    "shift_ts": {},
    "seconds_ts": {},
    "partial_last": {},
    "drop_rows": {},
    "drop_last": {},
    "stale": {},
    "spike": {},
    "wrong_symbol": {},
    "wrong_interval": {},
    "future_row": {},
    "extra_field": {},
    "clock_skew": {"ms": 90_000},
}
"""Every REST fault of the exchange except restate_bar, which changes the truth itself."""
NOT_KLINES = ("clock_skew",)


_TRUTH: dict[tuple[str, str, Window], pl.DataFrame] = {}


def expected(exchange: Any, symbol: str, timeframe: Timeframe, span: Window) -> pl.DataFrame:
    """Return the exchange's own bars that lie completely in the span.

    They are equal in every test, so they are requested once.
    """
    key = (symbol, timeframe.name, span)
    if key not in _TRUTH:
        _TRUTH[key] = _fetch_truth(exchange, symbol, timeframe, span)
    return _TRUTH[key]


def _fetch_truth(exchange: Any, symbol: str, timeframe: Timeframe, span: Window) -> pl.DataFrame:
    rows = exchange.truth(
        "binance", symbol, timeframe.name, span.start.isoformat(), span.end.isoformat()
    )
    frame = pl.DataFrame(
        {
            "open_time": [row["t"] for row in rows],
            **{name: [row[key] for row in rows] for name, key in NINE.items()},
        }
    )
    frame = frame.with_columns(
        (pl.col("open_time") * 1000).cast(BAR_SCHEMA["open_time"]),
        *(pl.col(name).cast(BAR_SCHEMA[name]) for name in NINE),
    )
    return frame.filter(pl.col("open_time") + timeframe.width <= span.end)


def compare_all_bars(settings: Settings, exchange: Any, span: Window) -> int:
    """Compare all markets and timeframes with /_truth; return how many bars are equal."""
    compared = 0
    with open_context(settings) as context:
        for market in settings.markets:
            for timeframe in (MINUTE, *settings.rollup_timeframes_of(market)):
                bars = expected(exchange, market.symbol.replace("/", ""), timeframe, span)
                assert_bars(
                    context.bind(BarReader).read(market, timeframe, span),
                    bars,
                )
                compared += bars.height
    return compared


def test_a_month_of_two_markets_equals_the_exchange(
    replay: Callable[..., Any], universe: Universe
) -> None:
    """January 2024 of BTC and ETH: the native 1h bars equal ours and all checks are green.

    A second run sends no request.
    """
    exchange = replay("2024-02-01T00:00:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        "[BTC/USDT, ETH/USDT]",
        until="2024-02-01",
        now="2024-02-02",
        extra="reference: [1h]",
    )
    hours = run_ingest(settings, timeframe="1h")
    with open_context(settings, policy=SkippingClock().policy()) as context:
        done = list(context.bind(Ingester).ingest(MINUTE, partitions(settings)))
        derived = list(context.bind(RollupBuilder).build(partitions(settings)))
        for one in done:
            findings = context.bind(RawAuditor).audit(one)
            assert [finding.check for finding in findings] == list(RAW_CHECKS)
            assert all(finding.passed for finding in findings)
        for one in derived:
            audited = context.bind(RollupAuditor).audit(one)
            findings = [finding for found in audited.values() for finding in found]
            assert all(finding.passed for finding in findings)
            (native,) = [
                finding.numbers for finding in findings if finding.check == "matches_native"
            ]
            assert native == {"compared": 31 * 24, "different": 0, "within_tolerance": 0}
        for found in context.bind(CoverageReporter).report(settings.markets):
            assert (found.expected, found.present, found.unexplained, found.not_fetched) == (
                44640,
                44640,
                0,
                0,
            )
    assert all(
        one.complete and one.account.is_balanced and one.account.quarantined == 0
        for one in (*hours, *done)
    )
    assert compare_all_bars(settings, exchange, JANUARY) > 2 * 55_000
    before = lake_files(settings)
    exchange.log()
    assert all(one.complete for one in run_ingest(settings))
    run_derive(settings)
    assert exchange.log() == []
    assert lake_files(settings) == before


def test_the_halt_of_2023_03_24_is_explained_and_rolled_up(
    replay: Callable[..., Any], universe: Universe
) -> None:
    """Binance stopped within the bar of 12:39 and has no bars until 14:00; its rollups are ours."""
    exchange = replay("2023-03-28T00:00:30Z")
    settings = universe(
        f"{exchange.url}/binance",
        "[BTC/USDT, ETH/USDT]",
        since="2023-03-20",
        until="2023-03-28",
        now="2023-03-29",
    )
    done = run_ingest(settings)
    run_derive(settings)
    assert compare_all_bars(settings, exchange, HALT) > 2 * 11_000
    for one in done:
        assert one.complete
        assert one.account.is_balanced
        assert [(gap.window, gap.bars, gap.reason) for gap in one.gaps] == [
            (window("2023-03-24T12:40", "2023-03-24T14:00"), 80, "no_bars")
        ]


def add_faults(exchange: Any, seed: int, share: float) -> None:
    """Make this share of the klines answers faulty, with all faults equally likely.

    Requests for the clock are rare, so half of their answers are wrong.
    """
    exchange.admin(op="seed", seed=seed)
    for name, params in FAULTS.items():
        match, rate = (
            ("time", 0.5)
            if name in NOT_KLINES
            else ("klines", share / (len(FAULTS) - len(NOT_KLINES)))
        )
        exchange.admin(fault=name, rate=rate, match=match, params=params)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("span", "share"), [(JANUARY, 0.03), (HALT, 0.15)], ids=["january", "halt"]
)
def test_faulty_answers_change_no_bar(
    replay: Callable[..., Any],
    universe: Universe,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    span: Window,
    share: float,
) -> None:
    """All faults mixed, in 3 % of a month and 15 % of a week: the bars are equal to the truth.

    Every row is accounted for.
    """
    monkeypatch.setattr(ccxt_rest, "CcxtSource", partial(ccxt_rest.CcxtSource, deadline=0.8))
    exchange = replay("2024-02-01T00:02:30Z" if span is JANUARY else "2023-03-28T00:02:30Z")
    add_faults(exchange, seed, share)
    since, until = (str(moment)[:10] for moment in (span.start, span.end))
    settings = universe(
        f"{exchange.url}/binance",
        "[BTC/USDT, ETH/USDT]",
        since=since,
        until=until,
        now="2024-02-02",
    )
    for _ in range(3):
        found = run_ingest(settings)
        assert all(one.error is None and one.account.is_balanced for one in found)
        if all(one.complete for one in found):
            break
    assert all(one.complete for one in found)
    assert [
        entry for entry in exchange.log(clear=False) if set(entry["fault"]) - {"slow", "clock_skew"}
    ]
    run_derive(settings)
    assert compare_all_bars(settings, exchange, span) > 20_000


def test_a_third_of_faulty_answers_delays_but_changes_no_bar(
    replay: Callable[..., Any], universe: Universe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 % of the answers over ten days: each stored bar is true, and in the end all are stored."""
    monkeypatch.setattr(ccxt_rest, "CcxtSource", partial(ccxt_rest.CcxtSource, deadline=0.8))
    exchange = replay("2024-01-20T00:02:30Z")
    add_faults(exchange, 4, 0.3)
    settings = universe(
        f"{exchange.url}/binance", since="2024-01-10", until="2024-01-20", now="2024-02-02"
    )
    (_market,) = settings.markets
    truth = expected(exchange, "BTCUSDT", MINUTE, window("2024-01-10", "2024-01-20"))
    for _ in range(8):
        (done,) = run_ingest(settings)
        assert done.error is None or done.account.received == 0
        assert done.account.is_balanced
        assert done.bars.join(truth, on=truth.columns, how="anti").height == 0
        if done.complete:
            break
    assert done.complete
    assert_bars(done.bars, truth)
    assert at("2024-01-10") == done.bars["open_time"][0]
