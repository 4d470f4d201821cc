"""Measures the import of a million rows from files beside `polars.read_csv` alone.

    python bench/importing.py [--rows 1000000] [--rounds 3]
        [--files ../shared/marketdata/csv_import]

The rows are real minutes (days of the 1m archives in that folder, drawn with a seed) that are moved
to consecutive days from 2022-01-01 on, once as one CSV of all months and once as a zip per month,
as Binance publishes them. The import is complete except for Dagster: reading, checksums, units,
rules, agreement, Parquet with fsync, ledger, receipt. In the second import all rows are stored
already. All files are in a temporary folder.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import polars as pl

from marketdata_assets.context import open_context
from marketdata_assets.flows.fetch.imports import FileImporter, inspect_files
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import parse_time
from marketdata_assets.settings.load import load_settings
from marketdata_assets.sources.archive.options import ImportOptions

FIRST, DAY_MS = parse_time("2022-01-01"), 86_400_000
UNIVERSE = """venues:
  binance: {{symbols: [BTC/USDT], since: 2022-01-01, base_url: http://127.0.0.1:1}}
lake: {0}/lake
duckdb: {0}/market.duckdb
state: {0}/state
"""


def real_days(folder: Path) -> list[list[list[str]]]:
    """Return the complete days of real minutes in 1m archives, as cells of text.

    The times are milliseconds of their day.
    """
    days = []
    for file in sorted(folder.glob("*-1m-*.zip")):
        with zipfile.ZipFile(file) as packed:
            lines = packed.read(packed.namelist()[0]).decode().splitlines()
        rows = [line.split(",") for line in lines if line[0].isdigit()]
        by_day: dict[int, list[list[str]]] = {}
        for row in rows:
            opened = int(row[0])
            moved = [str(opened % DAY_MS), *row[1:6], str(int(row[6]) - opened), *row[7:]]
            by_day.setdefault(opened // DAY_MS, []).append(moved)
        days += [day for day in by_day.values() if len(day) == 1440]
    return days


def draw_rows(days: list[list[list[str]]], rows: int) -> Iterator[tuple[str, str]]:
    """Yield month and line of at least `rows` minutes from FIRST on."""
    dice, moment = random.Random(2022), FIRST
    for _ in range(-(-rows // 1440)):
        start, month = int(moment.timestamp() * 1000), moment.strftime("%Y-%m")
        for row in dice.choice(days):
            opened = start + int(row[0])
            yield month, ",".join((str(opened), *row[1:6], str(opened + int(row[6])), *row[7:]))
        moment += timedelta(days=1)


def write(folder: Path, days: list[list[list[str]]], rows: int) -> tuple[Path, list[Path]]:
    """Write all rows as one CSV, and as one zip per month."""
    by_month: dict[str, list[str]] = {}
    for month, line in [*draw_rows(days, rows)][:rows]:
        by_month.setdefault(month, []).append(line)
    csv_file, zips = folder / "minutes.csv", []
    csv_file.write_text("".join("\n".join(lines) + "\n" for lines in by_month.values()))
    for month, lines in by_month.items():
        zips.append(folder / f"BTCUSDT-1m-{month}.zip")
        with zipfile.ZipFile(zips[-1], "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr(f"BTCUSDT-1m-{month}.csv", "\n".join(lines) + "\n")
    return csv_file, zips


def import_files_into(place: Path, files: list[Path], fresh: bool) -> int:
    """Import the files into that folder; return how many rows were stored."""
    if fresh:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "universe.yaml").write_text(UNIVERSE.format(place))
    settings = load_settings(
        {"MARKETDATA_UNIVERSE": str(place / "universe.yaml"), "MARKETDATA_NOW": "2030-01-01"}
    )
    stated = ImportOptions(settings.markets[0], TIMEFRAMES["1m"])
    with open_context(settings) as context:
        done = context.bind(FileImporter).import_files(
            inspect_files(context.settings, files, stated), stated
        )
    assert all(tally.is_balanced for tally in done.files)
    assert not done.disputed
    return sum(tally.stored for tally in done.files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--files",
        type=Path,
        default=Path(__file__).resolve().parents[2] / "shared" / "marketdata" / "csv_import",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="marketdata-import-") as name:
        folder = Path(name)
        csv_file, zips = write(folder, real_days(options.files), options.rows)
        contenders: dict[str, Callable[[], object]] = {
            "polars.read_csv alone, typed (floats)": lambda: pl.read_csv(
                csv_file, has_header=False
            ),
            "polars.read_csv alone, all text": lambda: pl.read_csv(
                csv_file, has_header=False, infer_schema=False
            ),
            "import of one CSV": lambda: import_files_into(folder / "one", [csv_file], True),
            "import of it again": lambda: import_files_into(folder / "one", [csv_file], False),
            f"import of {len(zips)} monthly zips": lambda: import_files_into(
                folder / "many", zips, True
            ),
        }
        seconds: dict[str, list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            for what, run in contenders.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                seconds.setdefault(what, []).append(
                    (time.perf_counter() - wall, time.process_time() - cpu)
                )
        size = csv_file.stat().st_size / 1e6
        print(f"{options.rows:,} rows, {size:.0f} MB of CSV, median of {options.rounds}")
        for what, turns in seconds.items():
            wall, cpu = (statistics.median(each) for each in zip(*turns, strict=True))
            print(
                f"{what:40} {options.rows / wall:12,.0f} rows/s {wall:7.2f} s wall {cpu:7.2f} s cpu"
            )


if __name__ == "__main__":
    main()
