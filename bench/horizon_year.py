"""Fills a year of a venue that serves its newest 5000 bars only, day by day in simulated time.

    python bench/horizon_year.py [--days 366]

The venue is the tests' own Hyperliquid, in its wire format. Every midnight, as the nightly
automation would, the months of the day are brought up to date. Prints seconds, requests and bars,
and exits 1 where one of the year's bars is missing, different or unexplained.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from marketdata_assets.context import open_context
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, to_ms
from marketdata_assets.settings.parts import Clock
from marketdata_assets.settings.universe import Settings
from marketdata_tests.fake_venues import VENUES
from marketdata_tests.fake_venues.frame import MINUTE, serving_venue, true_bar

BEGIN = datetime(2024, 1, 1, tzinfo=UTC)


def settings_at(folder: Path, url: str, now: datetime) -> Settings:
    """Return the universe as a process sees it at a moment."""
    venue = {"symbols": ["BTC/USDC:USDC"], "since": "2024-01-01", "base_url": url}
    universe = {"venues": {"hyperliquid": venue}, "lake": str(folder / "lake")}
    universe |= {"rollups": "parquet", "state": str(folder / "state")}
    settings = Settings.model_validate(universe)
    return settings.model_copy(update={"clock": Clock(start=now)})


def main() -> None:
    """Fill the year and compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=366)
    days = parser.parse_args().days
    fake = VENUES["hyperliquid"](now=to_ms(BEGIN), listed=to_ms(BEGIN))
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, serving_venue(fake) as url:
        folder = Path(name)
        for day in range(1, days + 1):
            now = BEGIN + timedelta(days=day, seconds=30)
            fake.now = to_ms(now)
            settings = settings_at(folder, url, now)
            wanted = Window(now - timedelta(days=2), now)
            with open_context(settings) as context:
                months = settings.partitions(settings.markets, wanted)
                for _ in context.bind(Ingester).ingest(TIMEFRAMES["1m"], months):
                    pass
        with open_context(settings) as context:
            (found,) = context.bind(CoverageReporter).report(settings.markets)
            bars = wrong = 0
            for month in settings.partitions(settings.markets, Window(BEGIN, now)):
                stored = context.lake.read(raw_table(TIMEFRAMES["1m"]), month)
                assert stored is not None
                for opened, close in stored.select("open_time", "close").iter_rows():
                    bars += 1
                    wrong += close != true_bar(to_ms(opened)).c
    seconds = time.perf_counter() - begun
    requests = fake.bar_requests
    print(f"{days} days: {bars} bars, {requests} requests for bars, {seconds:.0f} s")
    print(f"{wrong} differ from the truth; coverage: {found.as_dict()}")
    expected = days * 24 * 60 * 60_000 // MINUTE
    sys.exit(0 if (bars, wrong, found.present) == (expected, 0, expected) else 1)


if __name__ == "__main__":
    main()
