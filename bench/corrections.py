"""Restates bars at random, some of them twice, and checks that the corrections are found.

    python bench/corrections.py [--shared ../shared] [--bars 500] [--twice 100] [--seed 1]
        [--keep FOLDER]

The bench also checks that every moment can be read and that nothing else changes. It fetches,
restates and repairs real bars of Binance (BTC/USDT and ETH/USDT, January and February 2024) from
the loopback exchange of ../shared, with the commands that a person types. The truth of each moment
is the exchange's own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from marketdata_assets import open_reader
from marketdata_assets.model.bar import BAR_SCHEMA
from marketdata_assets.storage.fingerprint import fingerprint

MARKETS = {"binance:BTC-USDT": "BTCUSDT", "binance:ETH-USDT": "ETHUSDT"}
TIMEFRAMES = ("1m", "5m", "15m", "1h", "4h", "1d")
START, END = "2024-01-01", "2024-03-01"
KEYS = {
    "open": "o",
    "high": "h",
    "low": "l",
    "close": "c",
    "volume": "v",
    "quote_volume": "qv",
    "trades": "n",
}
KEYS |= {"taker_buy_volume": "tbv", "taker_buy_quote_volume": "tbq"}
Truth = dict[tuple[str, str], pl.DataFrame]


def read_truth(exchange: Any) -> Truth:
    """Return the exchange's present bars of every market and timeframe."""
    return {
        (market, tf): _read_bars(exchange, symbol, tf)
        for market, symbol in MARKETS.items()
        for tf in TIMEFRAMES
    }


def _read_bars(exchange: Any, symbol: str, timeframe: str) -> pl.DataFrame:
    rows = exchange.truth("binance", symbol, timeframe, START, END)
    sent = pl.DataFrame(
        {
            "open_time": [r["t"] for r in rows],
            **{name: [r[key] for r in rows] for name, key in KEYS.items()},
        }
    )
    return sent.select(
        (pl.col("open_time") * 1000).cast(BAR_SCHEMA["open_time"]),
        *(pl.col(n).cast(BAR_SCHEMA[n]) for n in KEYS),
    )


def restate(exchange: Any, dice: random.Random, opens: list[tuple[str, int]]) -> None:
    """Change the volume of each of these bars, and the close of half of them."""
    for symbol, moment in opens:
        changes: dict[str, Any] = {"volume_factor": dice.choice((0.5, 0.9, 1.1, 1.25, 2))}
        if dice.random() < 0.5:
            bar = exchange.truth("binance", symbol, "1m", str(moment), str(moment + 60_000))[0]
            changes["close"] = bar[dice.choice("ohl")]
        exchange.admin(op="restate", venue="binance", symbol=symbol, t=moment, **changes)


def marketdata(now: str, *arguments: str) -> str:
    environment = {**os.environ, "MARKETDATA_NOW": now}
    command = [sys.executable, "-m", "marketdata_assets.cli.main", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def compare(name: str, expected: Truth, as_of: str | None = None) -> None:
    """Compare every market and timeframe with the truth of that moment, exactly."""
    wrong = compared = 0
    begun = time.perf_counter()
    with open_reader() as reader:
        for (market, tf), bars in expected.items():
            found = reader.bars(market, tf, START, END, as_of=as_of).select(*BAR_SCHEMA).collect()
            wrong += pl.concat([found, bars]).is_unique().sum()
            compared += bars.height
    seconds = time.perf_counter() - begun
    print(
        f"{name:<44} {compared:>8} bars compared  {wrong:>4} differ  {seconds:6.1f} s", flush=True
    )


@contextmanager
def exchange_at(shared: Path, now: str) -> Iterator[Any]:
    sys.path.insert(0, str(shared / "bench"))
    from exchange_server import Running  # type: ignore[import-not-found]

    with Running([str(shared / "marketdata")], now=now, weight_limit=10**9) as exchange:
        yield exchange


def hashes(lake: Path) -> dict[str, str]:
    return {
        str(p.relative_to(lake)): fingerprint(pl.read_parquet(p))
        for p in sorted(lake.rglob("*.parquet"))
        if "history" not in p.parts
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--bars", type=int, default=500)
    parser.add_argument("--twice", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    dice, folder = (
        random.Random(options.seed),
        options.keep or Path(tempfile.mkdtemp(prefix="corrections-")),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with exchange_at(options.shared.resolve(), "2024-03-02T00:00:00Z") as exchange:
        lines = [
            "venues:",
            "  binance:",
            "    symbols: [BTC/USDT, ETH/USDT]",
            f"    since: {START}",
            f"    until: {END}",
        ]
        lines += [f"    base_url: {exchange.url}/binance", "rollups: parquet"]
        lines += [f"{name}: {folder / name}" for name in ("lake", "state")] + [
            f"duckdb: {folder}/market.duckdb"
        ]
        (folder / "universe.yaml").write_text("\n".join(lines) + "\n")
        os.environ |= {
            "MARKETDATA_UNIVERSE": str(folder / "universe.yaml"),
            "MARKETDATA_NOW": "2024-03-20",
        }
        run(exchange, dice, options.bars, options.twice, folder / "lake")
    if not options.keep:
        shutil.rmtree(folder)


def run(exchange: Any, dice: random.Random, bars: int, twice: int, lake: Path) -> None:
    marketdata("2024-03-02", "backfill")
    first = read_truth(exchange)
    compare("fetched", first)
    opens = [int(t.timestamp() * 1000) for t in first["binance:BTC-USDT", "1m"]["open_time"]]
    january = [t for t in opens if t < opens[0] + 31 * 86_400_000]
    # Ethereum's February is not restated
    once = [("BTCUSDT", t) for t in dice.sample(opens, bars * 2 // 3 - twice)] + [
        ("ETHUSDT", t) for t in dice.sample(january, bars // 3)
    ]
    again = dice.sample(once, bars - len(once))
    before = hashes(lake)
    restate(exchange, dice, once)
    second = read_truth(exchange)
    begun = time.perf_counter()
    receipt = json.loads(marketdata("2024-03-05", "repair", "--start", START, "--format", "json"))
    took = f"{receipt['requests']} requests, {time.perf_counter() - begun:.1f} s"
    print(f"on demand: {receipt['corrected']} of {len(once)} corrections found, {took}")
    compare("after the first corrections", second)
    restate(exchange, dice, again)
    third = read_truth(exchange)
    begun = time.perf_counter()
    receipt = json.loads(marketdata("2024-03-10", "repair", "--start", START, "--format", "json"))
    seconds = time.perf_counter() - begun
    print(f"on demand: {receipt['corrected']} of {len(again)} found again, {seconds:.1f} s")
    for name, expected, moment in (
        ("now", third, None),
        ("as of before the first corrections", first, "2024-03-04"),
        ("as of between them", second, "2024-03-07"),
        ("as of after the second ones", third, "2024-03-15"),
    ):
        compare(name, expected, moment)
    report = json.loads(marketdata("2024-03-20", "corrections", "--format", "json"))
    after = hashes(lake)
    same = [path for path in before if before[path] == after[path]]
    # a week of February begins in January
    untouched = [
        path for path in before if "ETH" in path and "2024-02" in path and "1w" not in path
    ]
    print(
        f"report: {len(report)} corrections of {bars} restated bars; "
        f"objects of the market-month without corrections: {len(untouched)},",
        end=" ",
    )
    print(f"of them changed: {len(set(untouched) - set(same))}; objects in all: {len(after)}")


if __name__ == "__main__":
    main()
