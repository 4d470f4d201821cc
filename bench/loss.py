"""Deletes objects and events of random partitions and measures the time until all are restored.

    python bench/loss.py [--lost 20] [--seed 1] [--keep FOLDER]

`marketdata dev` runs as a user starts it, on the sandbox exchange. The sensors alone fetch five
markets by twelve months, which is measured too. The bench counts ticks, runs and seconds, and
compares all bars.
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
from marketdata_assets.defs.specs import asset_key
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table, rollup_table
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
    """Return the digest of the rows of every object, without their provenance."""
    frames = {file: pl.read_parquet(file) for file in Path(settings.lake).rglob("*.parquet")}
    return {
        file: fingerprint(frame.drop("known_at", "source", strict=False))
        for file, frame in frames.items()
    }


def materialized(settings: Settings) -> set[tuple[str, str]]:
    """Return asset and partition of everything that Dagster shows as materialized."""
    tables = [
        *map(raw_table, settings.raw_timeframes),
        *map(rollup_table, settings.rollup_timeframes),
    ]
    with dg.DagsterInstance.get() as instance:
        return {
            (t.name, key)
            for t in tables
            for key in instance.get_materialized_partitions(asset_key(t))
        }


def count_ticks_and_runs(settings: Settings) -> tuple[int, int]:
    """Return the number of ticks of `backfill_missed` and of runs until now."""
    history = settings.state / "dagster"
    with sqlite3.connect(history / "history" / "runs.db", timeout=60) as runs_db:
        (run_count,) = runs_db.execute("SELECT count(*) FROM runs").fetchone()
    with sqlite3.connect(history / "schedules" / "schedules.db", timeout=60) as ticks_db:
        (tick_count,) = ticks_db.execute(
            "SELECT count(*) FROM job_ticks WHERE tick_body LIKE '%backfill_missed%'"
        ).fetchone()
    return tick_count, run_count


def wait_until_complete(settings: Settings, objects: int, events: int) -> float:
    begun = time.monotonic()
    while len(digests(settings)) < objects or len(materialized(settings)) < events:
        time.sleep(1)
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lost", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="marketdata-loss-"))).absolute()
    folder.mkdir(exist_ok=True)
    try:
        with run_sandbox() as url:
            settings = universe(folder, url)
            os.environ.update(dagster_environment(settings))
            dev = start_dev(folder)
            try:
                measure(settings, options)
            finally:
                os.killpg(dev.pid, signal.SIGTERM)
                dev.wait(60)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def measure(settings: Settings, options: argparse.Namespace) -> None:
    partitions = settings.partitions(settings.markets, settings.span(settings.markets[0]))
    objects, events = (
        len(partitions) * len(settings.raw_timeframes),
        len(partitions) * (len(settings.raw_timeframes) + len(settings.rollup_timeframes)),
    )
    seconds = wait_until_complete(settings, objects, events)
    ticks, run_count = count_ticks_and_runs(settings)
    print(
        f"stored {len(partitions)} partitions in {seconds:.0f} s, {ticks} ticks, {run_count} runs",
        flush=True,
    )
    before, events_before = digests(settings), materialized(settings)
    lost = random.Random(options.seed).sample(partitions, options.lost)
    delete_partitions(settings, lost)
    ticks, run_count = count_ticks_and_runs(settings)
    seconds = wait_until_complete(settings, objects, events)
    ticks_after, runs_after = count_ticks_and_runs(settings)
    print(
        f"{len(lost)} lost, all restored after {seconds:.0f} s: "
        f"{ticks_after - ticks} ticks, {runs_after - run_count} runs"
    )
    print(
        "objects equal:",
        digests(settings) == before,
        "events equal:",
        materialized(settings) == events_before,
    )


def delete_partitions(settings: Settings, lost: list[Partition]) -> None:
    with dg.DagsterInstance.get() as instance:
        for timeframe in settings.raw_timeframes:
            for partition in lost:
                Path(settings.lake, raw_table(timeframe).path(partition)).unlink()
        for table in (
            *map(raw_table, settings.raw_timeframes),
            *map(rollup_table, settings.rollup_timeframes),
        ):
            instance.wipe_asset_partitions(asset_key(table), [partition.key for partition in lost])


if __name__ == "__main__":
    main()
