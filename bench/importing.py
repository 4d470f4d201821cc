"""A million rows out of files into the lake: split, told apart, stored and written down, beside
`polars.read_csv` alone.

    python bench/importing.py [--rows 1000000] [--rounds 3] [--files ../shared/marketdata/csv_import]

The rows are real minutes (the days of the 1m archives in that folder, drawn with a seed) moved to
consecutive days from 2022-01-01 on, once as one CSV of all months and once as a zip a month, as
Binance publishes them. Ours is the whole import but for Dagster: reading, checksums, units, rules,
agreement, Parquet with fsync, ledger, receipt. The second time all rows are there already.
Everything lies in a temporary folder.
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
from marketdata_assets.sources.archive import Told

FIRST, DAY_MS = parse_time("2022-01-01"), 86_400_000
UNIVERSE = """venues: {{binance: {{symbols: [BTC/USDT], since: 2022-01-01, base_url: http://127.0.0.1:1}}}}
lake: {0}/lake
duckdb: {0}/market.duckdb
state: {0}/state
"""


def real_days(folder: Path) -> list[list[list[str]]]:
    """The whole days of real minutes in 1m archives, as cells of text, the times as milliseconds of
    their day.
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


def made(days: list[list[list[str]]], rows: int) -> Iterator[tuple[str, str]]:
    """So many minutes from FIRST on: the month and the line of each."""
    dice, moment = random.Random(2022), FIRST
    for _ in range(-(-rows // 1440)):
        start, month = int(moment.timestamp() * 1000), moment.strftime("%Y-%m")
        for row in dice.choice(days):
            opened = start + int(row[0])
            yield month, ",".join((str(opened), *row[1:6], str(opened + int(row[6])), *row[7:]))
        moment += timedelta(days=1)


def write(folder: Path, days: list[list[list[str]]], rows: int) -> tuple[Path, list[Path]]:
    """All of it as one CSV, and a zip for each month that it fills."""
    by_month: dict[str, list[str]] = {}
    for month, line in [*made(days, rows)][:rows]:
        by_month.setdefault(month, []).append(line)
    whole, zips = folder / "minutes.csv", []
    whole.write_text("".join("\n".join(lines) + "\n" for lines in by_month.values()))
    for month, lines in by_month.items():
        zips.append(folder / f"BTCUSDT-1m-{month}.zip")
        with zipfile.ZipFile(zips[-1], "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr(f"BTCUSDT-1m-{month}.csv", "\n".join(lines) + "\n")
    return whole, zips


def imported(place: Path, files: list[Path], fresh: bool) -> int:
    """One import into that place; how many rows were stored."""
    if fresh:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "universe.yaml").write_text(UNIVERSE.format(place))
    settings = load_settings(
        {"MARKETDATA_UNIVERSE": str(place / "universe.yaml"), "MARKETDATA_NOW": "2030-01-01"}
    )
    told = Told(settings.markets[0], TIMEFRAMES["1m"])
    with open_context(settings) as context:
        done = context.bind(FileImporter).import_files(
            inspect_files(context.settings, files, told), told
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
        whole, zips = write(folder, real_days(options.files), options.rows)
        contenders: dict[str, Callable[[], object]] = {
            "polars.read_csv alone, typed (floats)": lambda: pl.read_csv(whole, has_header=False),
            "polars.read_csv alone, all text": lambda: pl.read_csv(
                whole, has_header=False, infer_schema=False
            ),
            "import of one CSV": lambda: imported(folder / "one", [whole], True),
            "import of it again": lambda: imported(folder / "one", [whole], False),
            f"import of {len(zips)} monthly zips": lambda: imported(folder / "many", zips, True),
        }
        seconds: dict[str, list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            for what, run in contenders.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                seconds.setdefault(what, []).append(
                    (time.perf_counter() - wall, time.process_time() - cpu)
                )
        print(
            f"{options.rows:,} rows, {whole.stat().st_size / 1e6:.0f} MB of CSV, median of {options.rounds}"
        )
        for what, took in seconds.items():
            wall, cpu = (statistics.median(each) for each in zip(*took, strict=True))
            print(
                f"{what:40} {options.rows / wall:12,.0f} rows/s {wall:7.2f} s wall {cpu:7.2f} s cpu"
            )


if __name__ == "__main__":
    main()
