"""Measures what it costs to prove what is read: a scrub over 10 M bars, and reads with the records
of the ledger beside the same reads that believe every object, in turns.

    python bench/proofs.py [--markets 20] [--months 12] [--rounds 20]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from marketdata_assets.context import Context, open_context
from marketdata_assets.flows.operate.scrub import Scrubber
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.settings.load import load_settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.storage.lake import Lake

TABLE = raw_table(TIMEFRAMES["1m"])
START = parse_time("2023-01-01")
WEEK = 7 * 86_400


def write_universe(folder: Path, markets: int) -> None:
    """Name the lake and so many markets."""
    symbols = ", ".join(f"M{number:02}/USDT" for number in range(markets))
    file = folder / "universe.yaml"
    file.write_text(
        f"venues: {{binance: {{symbols: [{symbols}], since: {START:%Y-%m-%d}}}}}\n"
        f"lake: {folder}/lake\nrollups: parquet\nstate: {folder}/state\n"
    )
    os.environ |= {"MARKETDATA_UNIVERSE": str(file), "MARKETDATA_NOW": "2024-06-01"}


def fill(context: Context, months: list[Window]) -> int:
    """Write the bars of one sandbox market under every market's name; return how many."""
    count = 0
    for month in months:
        bars = generate_bars("BTCUSDT", "1m", month)
        for market in context.settings.markets:
            context.lake.write(TABLE, Partition(market, month), bars)
            count += bars.height
    return count


def in_turns(rounds: int, ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median CPU seconds of each way; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def believing(location: str) -> Lake:
    """Return a lake that believes every object, as all releases before the records did."""
    lake = Lake(location)
    lake._proof.accepts = lambda *_, **__: True  # type: ignore[method-assign]
    return lake


def compare_reads(context: Context, months: list[Window], rounds: int) -> None:
    """Print reads with records beside those without."""
    markets = context.settings.markets
    day = Window(months[-1].end - timedelta(days=1), months[-1].end)
    hour = Window(day.end - timedelta(hours=1), day.end)
    year = [Partition(markets[0], month) for month in months]
    newest = [Partition(market, months[-1]) for market in markets]
    proven, plain = context.lake, believing(context.settings.lake)

    def read(lake: Lake, partitions: list[Partition], window: Window) -> None:
        for partition in partitions:
            lake.read_inside(TABLE, partition, window)

    def read_anew(lake: Callable[[], Lake], partitions: list[Partition]) -> None:
        new = lake()
        known = new.records(TABLE, partitions)
        for partition in partitions:
            new.read(TABLE, partition, known=known)

    def with_records() -> Lake:
        return Lake(context.settings.lake, book=context.ledger.objects)

    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "an hour of all markets, again": (
            lambda: read(proven, newest, hour),
            lambda: read(plain, newest, hour),
        ),
        "a market-year, again": (
            lambda: [proven.read(TABLE, each) for each in year],
            lambda: [plain.read(TABLE, each) for each in year],
        ),
        "a market-year, first in a process": (
            lambda: read_anew(with_records, year),
            lambda: read_anew(lambda: believing(context.settings.lake), year),
        ),
    }
    for name, (one, other) in works.items():
        one(), other()
        found = in_turns(rounds, {"proven": one, "plain": other})
        print(
            f"{name:36} {1000 * found['proven']:8.2f} ms proven {1000 * found['plain']:8.2f} ms "
            f"plain  ratio {found['proven'] / found['plain']:.3f}",
            flush=True,
        )


def main() -> None:
    """Fill a lake, scrub it and read it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markets", type=int, default=20)
    parser.add_argument("--months", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_universe(Path(folder), arguments.markets)
        settings = load_settings()
        end = parse_time(f"{2023 + arguments.months // 12}-{arguments.months % 12 + 1:02}-01")
        months = [p.month for p in partitions_of(settings.markets[0], Window(START, end))]
        with open_context(settings) as context:
            print(f"{fill(context, months)} bars", flush=True)
            began = time.process_time()
            found = context.bind(Scrubber).scrub(days=0)
            cpu = time.process_time() - began
            print(
                f"scrub: {found.objects} objects, {found.rows} bars in {found.seconds:.1f} s "
                f"({found.rows / found.seconds:,.0f} bars/s), {cpu:.1f} CPU s: "
                f"{cpu / WEEK:.4%} of a core, once a week; {len(found.problems)} problems",
                flush=True,
            )
            compare_reads(context, months, arguments.rounds)


if __name__ == "__main__":
    main()
