"""Runs a day of automation in half an hour, with faults, an outage and a killed daemon.

    python bench/soak.py [--start 2023-03-24] [--hours 24] [--speed 60] [--faults 0.03]
        [--seed 11] [--keep FOLDER]

The bench needs ../shared (the exchange that replays real bars, with its clock at `speed`).
`marketdata dev` runs as a user starts it, with our clock set to the exchange's. An outage of two
hours begins after a quarter of the day, and the daemon is killed after half of it. The bench
compares every closed bar with the exchange's truth and prints the longest lag of each market, runs,
events and bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from marketdata_assets.context import open_context
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import MINUTE, TIMEFRAMES
from marketdata_assets.model.window import Window, format_time, parse_time, to_ms
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
FAULTS = [
    "http500",
    "timeout",
    "slow",
    "reset",
    "truncate_json",
    "short_read",
    "html_error",
    "empty_body",
    "empty_list",
    "error_200",
    "rate_limit",
    "dup_rows",
    "reorder",
    "reverse",
    "bad_ohlc",
    "null_price",
    "nan_price",
    "zero_price",
    "negative_volume",
    "text_numbers",
    "shift_ts",
    "seconds_ts",
    "partial_last",
    "drop_rows",
    "drop_last",
    "spike",
    "wrong_symbol",
    "wrong_interval",
    "future_row",
    "extra_field",
    "stale",
]
SINCE = parse_time("2023-02-01")
OUTAGE_BEGINS = 45
"""The real second of a minute at which the outage begins; the schedule refreshes at second 0."""
TRUTH = dict(
    zip(COLUMN_NAMES, ("t", "o", "h", "l", "c", "v", "qv", "n", "tbv", "tbq"), strict=True)
)


def universe(folder: Path, url: str, speed: float) -> Settings:
    lines = [
        "venues:",
        "  binance:",
        "    symbols: [BTC/USDT, ETH/USDT]",
        "    since: 2023-02-01",
        "    reference: [1h]",
    ]
    lines += [
        f"    base_url: {url}/binance",
        f"lake: {folder}/lake",
        f"duckdb: {folder}/market.duckdb",
        f"state: {folder}/state",
    ]
    # a minute of the schedule is `speed` minutes of the market, so that much lag is normal
    warn, error = round(1.5 * speed), round(1.75 * speed)
    lines += [
        f"freshness: {{1m: {{warn: {warn}, error: {error}}},"
        f" 1h: {{warn: {warn + 60}, error: {error + 60}}}}}"
    ]
    lines += ["automation: {refresh_minutes: 1}"]
    (folder / "universe.yaml").write_text("\n".join(lines) + "\n")
    os.environ["MARKETDATA_UNIVERSE"] = str(folder / "universe.yaml")
    return load_settings()


def follow_clock(exchange: Any) -> None:
    """Set our clock to the exchange's present moment and speed."""
    state = exchange._http("GET", "/_admin")
    now, speed = state["now"], state["speed"]
    moment = (
        format_time(parse_time(now))
        if isinstance(now, str)
        else format_time(datetime.fromtimestamp(now / 1000, UTC))
    )
    os.environ["MARKETDATA_NOW"] = f"{moment} x{speed:g} since {datetime.now(UTC).isoformat()}"


class LagMonitor(threading.Thread):
    """Measures the lag of each market every second, inside and outside an outage."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self.settings, self.ended, self.outage = settings, threading.Event(), False
        self.longest: dict[tuple[str, bool], timedelta] = {}

    def run(self) -> None:
        while not self.ended.wait(1):
            with sqlite3.connect(self.settings.state / "ledger.db", timeout=60) as ledger:
                sql = (
                    "SELECT market, max(newest) FROM partitions"
                    " WHERE tbl = 'raw/ohlcv_1m' AND newest IS NOT NULL GROUP BY market"
                )
                for market, newest in ledger.execute(sql).fetchall():
                    lag = self.settings.now() - parse_time(newest) - MINUTE
                    key = (market, self.outage)
                    self.longest[key] = max(lag, self.longest.get(key, timedelta(0)))


def start_dev(folder: Path) -> subprocess.Popen[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "marketdata_assets.cli.main", "dev", "--port", str(port)]
    log = (folder / "dev.log").open("w")
    dev = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
    )
    assert dev.stdout is not None
    for line in dev.stdout:
        print("   ", line.strip(), flush=True)
        if line.startswith("UI ready"):
            # a full pipe would block the daemon
            threading.Thread(target=dev.stdout.read, daemon=True).start()
            return dev
    raise SystemExit(f"marketdata dev ended; its log is {log.name}")


def daemon_of(dev: subprocess.Popen[str]) -> int:
    """Return the id of the process that evaluates sensors and launches runs."""
    for pid in Path(f"/proc/{dev.pid}/task/{dev.pid}/children").read_text().split():
        if b"dagster_ext.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    raise SystemExit("marketdata dev has no daemon process")


def wait_until(settings: Settings, moment: datetime) -> None:
    while settings.now() < moment:
        time.sleep(0.2)


def is_complete(settings: Settings, end: datetime) -> bool:
    """Return whether all months are rolled up and the newest bar of each market reaches `end`."""
    with open_context(settings) as context:
        for market in settings.markets:
            states = context.ledger.partitions.of_market(
                raw_table(settings.venues[market.venue].base), market
            ).values()
            months = len(settings.partitions([market], Window(SINCE, end)))
            if (
                len(states) < months
                or max(s.through for s in states) < end
                or not all(s.rollup_source_digest for s in states)
            ):
                return False
    return True


def compare(settings: Settings, exchange: Any, end: datetime) -> None:
    """Compare every closed bar of every timeframe with the exchange's truth."""
    bars = different = missing = 0
    with open_context(settings) as context:
        for market in settings.markets:
            for timeframe in TIMEFRAMES.values():
                window = Window(timeframe.ceil(SINCE), timeframe.floor(end))
                rows = exchange.truth(
                    "binance",
                    market.symbol.replace("/", ""),
                    timeframe.name,
                    format_time(window.start),
                    format_time(window.end),
                )
                rows = [row for row in rows if row["ct"] < to_ms(end)]
                truth = pl.DataFrame(rows, infer_schema_length=None).select(
                    pl.from_epoch(TRUTH[name], time_unit="ms")
                    .dt.replace_time_zone("UTC")
                    .cast(dtype)
                    .alias(name)
                    if name == "open_time"
                    else pl.col(TRUTH[name]).cast(dtype).alias(name)
                    for name, dtype in BAR_SCHEMA.items()
                )
                found = context.bind(BarReader).read(market, timeframe, window).select(COLUMN_NAMES)
                # the dump has five columns of these native bars
                if truth["quote_volume"].sum() == 0:
                    truth, found = truth.select(COLUMN_NAMES[:6]), found.select(COLUMN_NAMES[:6])
                absent = truth.join(found, on="open_time", how="anti").height
                wrong = found.join(truth, on=truth.columns, how="anti", nulls_equal=True).height
                bars, different, missing = bars + truth.height, different + wrong, missing + absent
                if absent or wrong:
                    print(f"    {market} {timeframe.name}: {absent} missing, {wrong} different")
    print(f"bars compared {bars}, different {different}, missing {missing}")


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def count_events(settings: Settings) -> tuple[Counter[str], Counter[str], int]:
    home = settings.state / "dagster" / "history"
    with sqlite3.connect(home / "runs.db", timeout=60) as runs_db:
        ended = Counter(status for (status,) in runs_db.execute("SELECT status FROM runs"))
        kinds = Counter(
            v
            for (v,) in runs_db.execute("SELECT value FROM run_tags WHERE key = 'marketdata/kind'")
        )
    with sqlite3.connect(home / "runs" / "index.db", timeout=60) as index:
        (events,) = index.execute("SELECT count(*) FROM event_logs").fetchone()
    return ended, kinds, events


def count_outcomes(settings: Settings) -> list[tuple[str, str, int]]:
    """Return outcomes and errors of all requests with their counts, the most frequent first."""
    with sqlite3.connect(settings.state / "ledger.db", timeout=60) as ledger:
        return ledger.execute(
            "SELECT outcome, coalesce(error, ''), count(*) AS times FROM fetches"
            " GROUP BY 1, 2 ORDER BY times DESC"
        ).fetchall()


def report(settings: Settings, monitor: LagMonitor, hours: float, before: int) -> None:
    ended, kinds, events = count_events(settings)
    print(
        "longest lag",
        {
            f"{m}{' in the outage' if o else ''}": f"{lag // MINUTE} min"
            for (m, o), lag in sorted(monitor.longest.items())
        },
    )
    run_rate, event_rate = sum(ended.values()) / hours, events / hours
    print(
        f"runs {dict(ended)} {dict(kinds)}: {run_rate:.1f} per hour; "
        f"events in the index {event_rate:.0f} per hour"
    )
    grown = bytes_of(settings.state) - before
    lake = bytes_of(Path(settings.lake))
    print(f"state folder grew {grown / 1e6:.1f} MB in {hours:g} hours; lake {lake / 1e6:.1f} MB")
    alerts = settings.state / "alerts.jsonl"
    lines = alerts.read_text().splitlines() if alerts.exists() else []
    sent = [json.loads(line) for line in lines]
    for incident, times in sorted(
        Counter((line["incident"], line["event"]) for line in sent).items()
    ):
        print("    alert", *incident, times)
    with open_context(settings) as context:
        print(
            "still open:",
            [*context.ledger.incidents.open()],
            "parked:",
            [a.partition.key for a in context.ledger.attempts.all().values() if a.parked_at],
        )
    print("requests:", count_outcomes(settings)[:12])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--start",
        default="2023-03-24",
        help="a moment of the replayed bars, from February to April 2023",
    )
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--speed", type=float, default=60)
    parser.add_argument("--faults", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(SHARED / "bench"))
    from exchange_server import Running  # type: ignore[import-not-found]

    folder = (options.keep or Path(tempfile.mkdtemp(prefix="marketdata-soak-"))).absolute()
    folder.mkdir(exist_ok=True)
    try:
        with Running(
            [str(SHARED / "marketdata")],
            now=format_time(parse_time(options.start)),
            speed=options.speed,
        ) as exchange:
            soak(options, folder, exchange)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def soak(options: argparse.Namespace, folder: Path, exchange: Any) -> None:
    exchange.admin(op="seed", seed=options.seed)
    follow_clock(exchange)
    settings = universe(folder, exchange.url, options.speed)
    begun = settings.now()
    dev = start_dev(folder)
    try:
        monitor = LagMonitor(settings)
        while not is_complete(settings, begun):
            time.sleep(0.5)
        first = settings.now()
        print(
            "history and the open month are stored after "
            f"{(first - begun) / MINUTE / options.speed:.1f} real minutes",
            flush=True,
        )
        before, day = bytes_of(settings.state), timedelta(hours=options.hours)
        for fault in FAULTS:
            exchange.admin(fault=fault, rate=options.faults / len(FAULTS), match="klines")
        monitor.start()
        wait_until(settings, first + day / 4)
        # the outage then covers a refresh at any speed
        while not OUTAGE_BEGINS <= datetime.now(UTC).second < OUTAGE_BEGINS + 5:
            time.sleep(0.1)
        monitor.outage, began = True, settings.now()
        exchange.admin(op="outage", venue="binance", on=True)
        print("outage begins", format_time(settings.now()), flush=True)
        wait_until(settings, began + timedelta(hours=2))
        exchange.admin(op="outage", venue="binance", on=False)
        print("outage ends", format_time(settings.now()), flush=True)
        wait_until(settings, first + day / 2)
        monitor.outage = False
        os.kill(daemon_of(dev), signal.SIGKILL)
        print("daemon killed", format_time(settings.now()), flush=True)
        wait_until(settings, first + day)
        end = settings.now()
        exchange.admin(op="clear")
        while not is_complete(settings, end):
            time.sleep(0.5)
        monitor.ended.set()
        time.sleep(70)  # the sensors run once more
    finally:
        os.killpg(dev.pid, signal.SIGTERM)
        dev.wait(60)
    compare(settings, exchange, end)
    report(settings, monitor, options.hours, before)


if __name__ == "__main__":
    main()
