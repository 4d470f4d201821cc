"""Twenty random partitions lose their object and their events: ticks, runs and seconds until all are
back, bar for bar.

    python bench/loss.py [--lost 20] [--seed 1] [--keep FOLDER]

`marketdata dev` runs as a user starts it, on the sandbox exchange: five markets by twelve months,
filled by the sensors alone, which is timed too.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import dagster as dg
import polars as pl

from marketdata_assets.cli.dagster_home import dagster_environment
from marketdata_assets.cli.demo import run_sandbox
from marketdata_assets.defs.assets import asset_key
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw, rollup
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.fingerprint import fingerprint

sys.path.insert(0, str(Path(__file__).parent))
from soak import start_dev

SYMBOLS = "BTC/USDT, ETH/USDT, SOL/USDT, DOGE/USDT, ADA/USDT"


def universe(folder: Path, url: str) -> Settings:
    lines = [
        "venues:",
        "  binance:",
        f"    symbols: [{SYMBOLS}]",
        "    since: 2023-01-01",
        "    until: 2024-01-01",
    ]
    lines += ["    reference: [1h]", f"    base_url: {url}"]
    lines += [f"lake: {folder}/lake", f"duckdb: {folder}/market.duckdb", f"state: {folder}/state"]
    (folder / "universe.yaml").write_text("\n".join(lines) + "\n")
    os.environ["MARKETDATA_UNIVERSE"] = str(folder / "universe.yaml")
    return load_settings()


def digests(settings: Settings) -> dict[Path, str]:
    """What the rows of every object say, without when we came to know it."""
    frames = {file: pl.read_parquet(file) for file in Path(settings.lake).rglob("*.parquet")}
    return {
        file: fingerprint(frame.drop("known_at", "source", strict=False))
        for file, frame in frames.items()
    }


def shown(settings: Settings) -> set[tuple[str, str]]:
    """What Dagster shows as materialized: asset and partition."""
    tables = [*map(raw, settings.raw_timeframes), *map(rollup, settings.rollup_timeframes)]
    with dg.DagsterInstance.get() as instance:
        return {
            (t.name, key)
            for t in tables
            for key in instance.get_materialized_partitions(asset_key(t))
        }


def counted(settings: Settings) -> tuple[int, int]:
    """Ticks of `backfill_missed` and runs, until now."""
    history = settings.state / "dagster"
    with sqlite3.connect(history / "history" / "runs.db", timeout=60) as runs:
        (run_count,) = runs.execute("SELECT count(*) FROM runs").fetchone()
    with sqlite3.connect(history / "schedules" / "schedules.db", timeout=60) as ticks:
        (tick_count,) = ticks.execute(
            "SELECT count(*) FROM job_ticks WHERE tick_body LIKE '%backfill_missed%'"
        ).fetchone()
    return tick_count, run_count


def until_whole(settings: Settings, objects: int, events: int) -> float:
    begun = time.monotonic()
    while len(digests(settings)) < objects or len(shown(settings)) < events:
        time.sleep(1)
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lost", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    folder = (asked.keep or Path(tempfile.mkdtemp(prefix="marketdata-loss-"))).absolute()
    folder.mkdir(exist_ok=True)
    try:
        with run_sandbox() as url:
            settings = universe(folder, url)
            os.environ.update(dagster_environment(settings))
            dev = start_dev(folder)
            try:
                measure(settings, asked)
            finally:
                os.killpg(dev.pid, signal.SIGTERM)
                dev.wait(60)
    finally:
        if not asked.keep:
            shutil.rmtree(folder)


def measure(settings: Settings, asked: argparse.Namespace) -> None:
    partitions = settings.partitions(settings.markets, settings.span(settings.markets[0]))
    objects, events = (
        len(partitions) * len(settings.raw_timeframes),
        len(partitions) * (len(settings.raw_timeframes) + len(settings.rollup_timeframes)),
    )
    seconds = until_whole(settings, objects, events)
    ticks, runs = counted(settings)
    print(
        f"filled {len(partitions)} partitions in {seconds:.0f} s, {ticks} ticks, {runs} runs",
        flush=True,
    )
    before, events_before = digests(settings), shown(settings)
    lost = random.Random(asked.seed).sample(partitions, asked.lost)
    lose(settings, lost)
    ticks, runs = counted(settings)
    seconds = until_whole(settings, objects, events)
    ticks_after, runs_after = counted(settings)
    print(
        f"{len(lost)} lost, all back after {seconds:.0f} s: {ticks_after - ticks} ticks, {runs_after - runs} runs"
    )
    print(
        "objects equal:",
        digests(settings) == before,
        "events shown as before:",
        shown(settings) == events_before,
    )


def lose(settings: Settings, lost: list[Partition]) -> None:
    with dg.DagsterInstance.get() as instance:
        for timeframe in settings.raw_timeframes:
            for partition in lost:
                Path(settings.lake, raw(timeframe).path(partition)).unlink()
        for table in (*map(raw, settings.raw_timeframes), *map(rollup, settings.rollup_timeframes)):
            instance.wipe_asset_partitions(asset_key(table), [partition.key for partition in lost])


if __name__ == "__main__":
    main()
