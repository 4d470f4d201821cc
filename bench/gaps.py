"""Explains every gap of the real bars of ../shared, and sums every market and day.

    python bench/gaps.py [--folder F]

The exchanges are replayed on loopback, and no request leaves this machine. The bench prints the
explained gaps of March 2023 (single minutes are grouped), how many gaps of each cause each market
has, and how many days were summed. Kraken's bars are used twice: as its REST API sends them (an
empty minute is a bar without volume), and as its archive has them (empty minutes are missing),
ingested from a file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from marketdata_assets.context import Context, open_context
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.flows.prove.gaps import GapExplainer, ListedGap
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES
from marketdata_assets.model.gap import GAP_KINDS
from marketdata_assets.model.market import Market
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.quality.split import REJECTED_SCHEMA
from marketdata_assets.settings.load import load_settings
from marketdata_assets.sources import ccxt_rest

SHARED = Path(__file__).resolve().parents[2] / "shared"
MINUTE, DAY = TIMEFRAMES["1m"], timedelta(days=1)
PATHS = {"coinbaseexchange": "coinbase"}
UNIVERSES: dict[str, tuple[str, dict[str, str]]] = {
    "binance, February 2023": (
        "2023-03-01T00:02:30Z",
        {
            "binance": "symbols: [BTC/USDT, ETH/USDT, SOL/USDT], since: 2023-02-01, "
            "until: 2023-03-01, reference: [15m, 1h]"
        },
    ),
    "binance, March and April 2023": (
        "2023-05-01T00:02:30Z",
        {
            "binance": "symbols: [BTC/USDT, ETH/USDT], since: 2023-03-01, "
            "until: 2023-05-01, reference: [15m, 1h]"
        },
    ),
    "four venues, 1 to 21 March 2023": (
        "2023-03-22T00:02:30Z",
        {
            "binance": "symbols: [BTC/USDT, ETH/USDT], since: 2023-03-01, until: 2023-03-22",
            "binanceus": "symbols: [BTC/USDT], since: 2023-03-01, until: 2023-03-22",
            "coinbaseexchange": "symbols: [BTC/USD, BTC/USDT], since: 2023-03-01, "
            "until: 2023-03-22",
            "kraken": "symbols: [BTC/USD, BTC/USDT], since: 2023-03-01, until: 2023-03-22",
        },
    ),
    "kraken's archive, 1 to 21 March 2023": (
        "2023-03-22T00:02:30Z",
        {"kraken": "symbols: [BTC/USD, BTC/USDT], since: 2023-03-01, until: 2023-03-22"},
    ),
    "binance, January and February 2024": (
        "2024-03-01T00:02:30Z",
        {"binance": "symbols: [BTC/USDT, ETH/USDT], since: 2024-01-01, until: 2024-03-01"},
    ),
}
ARCHIVE = {"kraken:BTC-USD": "XBTUSD", "kraken:BTC-USDT": "XBTUSDT"}


def universe(folder: Path, now: str, venues: dict[str, str], url: str) -> None:
    lines = ["venues:"]
    lines += [
        f"  {name}: {{{text}, base_url: {url}/{PATHS.get(name, name)}}}"
        for name, text in venues.items()
    ]
    lines += [
        f"lake: {folder / 'lake'}",
        f"duckdb: {folder / 'market.duckdb'}",
        f"state: {folder / 'state'}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "universe.yaml").write_text("\n".join(lines) + "\n")
    os.environ |= {"MARKETDATA_UNIVERSE": str(folder / "universe.yaml"), "MARKETDATA_NOW": now}


def read_archive(symbol: str) -> pl.DataFrame:
    """Read Kraken's own bars as its archive has them, in our columns."""
    rows = pl.read_parquet(SHARED / f"marketdata/kraken/{symbol}/1m/2023-03-01_2023-03-21.parquet")
    opens = (
        pl.from_epoch("time", time_unit="s")
        .dt.replace_time_zone("UTC")
        .cast(BAR_SCHEMA["open_time"])
        .alias("open_time")
    )
    # the REST API has these columns as well, so the two sources agree
    given = ("open", "high", "low", "close", "volume")
    missing = [
        pl.lit(None, BAR_SCHEMA[name]).alias(name) for name in COLUMN_NAMES[1:] if name not in given
    ]
    return rows.with_columns(opens, *missing).select(
        pl.col(name).cast(BAR_SCHEMA[name]) for name in COLUMN_NAMES
    )


def ingest_all(context: Context, from_archive: bool) -> None:
    settings = context.settings
    for market in settings.markets:
        partitions = settings.partitions([market], settings.span(market))
        if from_archive:
            context.bind(PartitionStore).ingest_frame(
                MINUTE,
                partitions[0],
                read_archive(ARCHIVE[market.key]),
                rejected=pl.DataFrame(schema=REJECTED_SCHEMA),
                sources=["archive"],
            )
        for timeframe in settings.venues[market.venue].fetched_timeframes:
            for done in context.bind(Ingester).ingest(timeframe, partitions):
                if done.error:
                    raise done.error


def check_days(context: Context, found: Sequence[ListedGap]) -> tuple[int, list[str]]:
    """Return the number of days, and the days whose parts differ from a count by the minute.

    `coverage` counts the remainder as not fetched, so its sum proves little. Here every minute must
    be in exactly one of the stored objects and the list of gaps.
    """
    days, wrong = 0, []
    for market in context.settings.markets:
        span, parts = context.settings.span(market), parts_by_minute(context, market, found)
        day = span.start
        while day < span.end:
            minutes = [parts.get(day + i * MINUTE.width, ["not_fetched"]) for i in range(1440)]
            counted = Counter(part for several in minutes for part in several)
            (reported,) = context.bind(CoverageReporter).report([market], Window(day, day + DAY))
            parts_of_day = {
                name: value
                for name, value in reported.as_dict().items()
                if isinstance(value, int) and value
            }
            if (
                parts_of_day != {"expected": 1440, **counted}
                or counted.total() != 1440
                or counted["not_fetched"]
            ):
                wrong.append(
                    f"{market.key} {day:%F}: {parts_of_day}, by the minute {dict(counted)}"
                )
            days, day = days + 1, day + DAY
    return days, wrong


def parts_by_minute(
    context: Context, market: Market, found: Sequence[ListedGap]
) -> dict[datetime, list[str]]:
    """Return the parts of every minute, by the stored objects and the list of gaps."""
    parts: dict[datetime, list[str]] = defaultdict(list)
    for partition in context.settings.partitions([market], context.settings.span(market)):
        bars = context.storage.lake.read(raw_table(MINUTE), partition)
        for moment in [] if bars is None else bars["open_time"]:
            parts[moment].append("present")
    for one in found:
        if one.market == market and one.table.timeframe == MINUTE:
            for i in range(one.gap.bars):
                parts[one.gap.window.start + i * MINUTE.width].append(one.gap.kind)
    return parts


def describe_march(found: Sequence[ListedGap]) -> Iterable[str]:
    """Yield a row for each long gap, and one per market and cause for single minutes."""
    window = Window(parse_time("2023-02-14"), parse_time("2023-04-01"))
    short: dict[tuple[str, str], list[ListedGap]] = {}
    for one in found:
        if one.gap.window & window:
            if one.gap.bars >= 10 or one.gap.kind not in ("no_trade",):
                gap, place = one.gap, f"{one.market.key} {one.table.timeframe.name}"
                span = f"{gap.window.start:%m-%d %H:%M} | {gap.window.end:%m-%d %H:%M}"
                message = gap.explanation
                yield f"| {place} | {span} | {gap.bars} | {one.gap.kind} | {message} |"
            else:
                short.setdefault((one.market.key, one.gap.kind), []).append(one)
    for (market, kind), several in short.items():
        bars = sum(one.gap.bars for one in several)
        first, last = several[0].gap.window.start, several[-1].gap.window.end
        span = f"{first:%m-%d %H:%M} | {last:%m-%d %H:%M}"
        message = several[0].gap.explanation
        yield f"| {market} | {span} | {bars} in {len(several)} gaps | {kind} | {message} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=None)
    folder = options.parse_args().folder or Path(tempfile.mkdtemp(prefix="gaps-"))
    # the replayed Kraken sends all of its bars in every answer
    ccxt_rest.CcxtSource = partial(ccxt_rest.CcxtSource, deadline=300.0)  # type: ignore[misc,assignment]
    sys.path.insert(0, str(SHARED / "bench"))
    from exchange_server import Running  # type: ignore[import-not-found]

    causes: dict[tuple[str, str], Counter[str]] = {}
    for number, (name, (now, venues)) in enumerate(UNIVERSES.items()):
        limits: dict[str, Any] = {
            "weight_limit": 10**9,
            "kraken_rate": 10**6,
            "kraken_burst": 10**6,
            "kraken_max_rows": 10**6,
        }
        limits |= {"coinbase_rate": 10**6, "coinbase_burst": 10**6}
        with Running([str(SHARED / "marketdata")], now=now, **limits) as exchange:
            universe(folder / str(number), now, venues, exchange.url)
            settings = load_settings()
            with open_context(settings) as context:
                begun = time.perf_counter()
                ingest_all(context, "archive" in name)
                ingested = time.perf_counter()
                context.bind(GapExplainer).explain(
                    [
                        p
                        for m in settings.markets
                        for p in settings.partitions([m], settings.span(m))
                    ],
                    send_requests=True,
                )
                explained = time.perf_counter()
                found = context.bind(GapExplainer).list_gaps(
                    settings.markets, Window(settings.since, settings.now())
                )
                days, wrong = check_days(context, found)
                seconds = ingested - begun, explained - ingested
                print(f"\n{name}: ingested in {seconds[0]:.1f} s, explained in {seconds[1]:.1f} s")
                print(f"{days} days summed, {len(wrong)} of them wrong {wrong[:3]}")
                for row in describe_march(found):
                    print(row)
                for market in settings.markets:
                    causes[name, market.key] = Counter()
                for one in found:
                    causes[name, one.market.key].update(
                        {one.gap.kind: 1, f"{one.gap.kind} bars": one.gap.bars}
                    )
    print()
    for (name, key), counts in causes.items():
        kinds = [
            f"{kind} {counts[kind]} ({counts[f'{kind} bars']} bars)"
            for kind in GAP_KINDS
            if counts[kind]
        ]
        print(f"| {name} | {key} | {', '.join(kinds) or 'no gap'} |")


if __name__ == "__main__":
    main()
