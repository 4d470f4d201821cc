"""Measures automation at 500 markets x 96 months: sensor ticks and the UI's partition page.

    python bench/automation.py [--markets 500] [--months 96] [--lost 200] [--keep FOLDER]

For each partition the lake holds one small object, the ledger a complete row, and Dagster a
materialization (one real event that is copied in its database). CPU seconds are the robust figure.
The bare work that a tick cannot avoid is measured as well: it reads the ledger's rows, the size of
every object, and what Dagster shows.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from marketdata_assets.cli.dagster_home import dagster_environment
from marketdata_assets.context import open_context
from marketdata_assets.defs.jobs import build_definitions
from marketdata_assets.defs.specs import asset_key
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.window import format_time
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings


def universe(folder: Path, markets: int, months: int) -> Settings:
    now = datetime.now(UTC)
    first = now.year * 12 + now.month - 1 - months
    symbols = ", ".join(f"S{i:03}/USDT" for i in range(markets))
    since, until = f"{first // 12}-{first % 12 + 1:02}-01", f"{now.year}-{now.month:02}-01"
    lines = [
        "venues:",
        "  binance:",
        f"    symbols: [{symbols}]",
        f"    since: {since}",
        f"    until: {until}",
    ]
    lines += [f"lake: {folder}/lake", f"duckdb: {folder}/market.duckdb", f"state: {folder}/state"]
    (folder / "universe.yaml").write_text("\n".join(lines) + "\n")
    os.environ["MARKETDATA_UNIVERSE"] = str(folder / "universe.yaml")
    return load_settings()


def fill(settings: Settings, instance: dg.DagsterInstance) -> list[Partition]:
    """Create every partition in the lake, in the ledger and in Dagster."""
    partitions = settings.partitions(settings.markets, settings.span(settings.markets[0]))
    table = raw_table(next(iter(settings.venues.values())).base)
    for partition in partitions:
        file = Path(settings.lake, table.path(partition))
        file.parent.mkdir(parents=True)
        file.write_bytes(b"bar")
    settings.duckdb.touch()
    with open_context(settings):
        pass
    rows = [
        (
            table.name,
            p.market.key,
            p.month_key,
            format_time(p.month.start),
            format_time(p.month.end),
            format_time(p.month.end),
            1,
            43200,
            3,
            "d",
            "d",
            1,
            0,
            None,
            None,
            "",
            None,
        )
        for p in partitions
    ]
    with sqlite3.connect(settings.state / "ledger.db") as ledger:
        ledger.executemany(f"INSERT INTO partitions VALUES ({', '.join('?' * 17)})", rows)
    for shown in (table, rollup_table(settings.rollup_timeframes[0])):
        copy_events(instance, shown, partitions)
    return partitions


def copy_events(instance: dg.DagsterInstance, table: Table, partitions: list[Partition]) -> None:
    first = partitions[0].key
    metadata = {"rows": 43200, "bytes": 1_200_000}
    instance.report_runless_asset_event(
        dg.AssetMaterialization(asset_key(table), partition=first, metadata=metadata)
    )
    with sqlite3.connect(
        Path(os.environ["DAGSTER_HOME"], "history", "runs", "index.db"), timeout=60
    ) as index:
        columns = "run_id, event, dagster_event_type, timestamp, step_key, asset_key, partition"
        (row,) = index.execute(
            f"SELECT {columns} FROM event_logs WHERE asset_key = ?", [asset_key(table).to_string()]
        ).fetchall()
        copies = [
            tuple(v.replace(first, p.key) if isinstance(v, str) else v for v in row)
            for p in partitions[1:]
        ]
        index.executemany(
            f"INSERT INTO event_logs ({columns}) VALUES ({', '.join('?' * 7)})", copies
        )


def measure_once(work: Callable[[], Any]) -> tuple[float, float, Any]:
    begun, cpu = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    result = work()
    return (
        time.perf_counter() - begun,
        sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - cpu,
        result,
    )


def show(name: str, work: Callable[[], Any], times: int = 3) -> Any:
    found = [measure_once(work) for _ in range(times)]
    wall, cpu, result = sorted(found, key=lambda f: f[1])[times // 2]
    print(f"{name:58} {wall:7.2f} s wall {cpu:7.2f} s CPU", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markets", type=int, default=500)
    parser.add_argument("--months", type=int, default=96)
    parser.add_argument("--lost", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="create the data in this folder and keep it")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="marketdata-automation-"))
    folder.mkdir(exist_ok=True)
    settings = universe(folder.absolute(), options.markets, options.months)
    os.environ.update(dagster_environment(settings))
    try:
        with dg.DagsterInstance.get() as instance:
            partitions = fill(settings, instance)
            print(f"{len(partitions)} partitions")
            measure(settings, instance, partitions, options.lost)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def measure(
    settings: Settings, instance: dg.DagsterInstance, partitions: list[Partition], lost: int
) -> None:
    table = raw_table(next(iter(settings.venues.values())).base)
    definitions = show("definitions of the code location", lambda: build_definitions(settings), 1)
    repository = definitions.get_repository_def()

    def tick(name: str) -> str:
        context = dg.build_sensor_context(instance=instance, repository_def=repository)
        result = repository.get_sensor_def(name)(context)
        skipped = (
            result.skip_reason.skip_message
            if isinstance(result, dg.SensorResult) and result.skip_reason
            else ""
        )
        return skipped or f"{len(getattr(result, 'run_requests', None) or ())} runs requested"

    def read_everything() -> None:
        with open_context(settings) as context:
            context.ledger.partitions.summaries(table)
            context.storage.lake.list_sizes(table)
        instance.get_materialized_partitions(asset_key(table))

    show("bare reading of ledger, lake and Dagster", read_everything)
    print("   ", show("backfill_missed, nothing is missing", lambda: tick("backfill_missed")))
    print("   ", show("watch_markets, nothing is missing", lambda: tick("watch_markets")))
    for partition in random.Random(1).sample(partitions, lost):
        Path(settings.lake, table.path(partition)).unlink()
    print(
        "   ",
        show(f"backfill_missed, {lost} lost (first tick)", lambda: tick("backfill_missed"), 1),
    )
    print(
        "   ", show(f"backfill_missed, {lost} lost (later ticks)", lambda: tick("backfill_missed"))
    )
    grid, keys = (
        repository.asset_graph.get(asset_key(table)).partitions_def,
        [p.key for p in partitions],
    )

    def statuses() -> Any:
        return instance.get_status_by_partition(asset_key(table), keys, grid)

    show("Dagster's status of every partition (the UI's page)", statuses)


if __name__ == "__main__":
    main()
