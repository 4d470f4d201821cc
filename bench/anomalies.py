"""Measures false alarms of the anomaly rules on real bars and their recall on planted errors.

A rolling z-score of 3 is measured beside them.

    python bench/anomalies.py [--data ../shared/marketdata] [--plants 1000] [--seed 1]

The first table judges every real file of 1m, 15m, 1h and 1d bars by month, as an ingest does.
The second table plants each kind of error at random real bars of all markets; all of these errors
pass the row rules. The rules find an error when an anomaly holds its bar. The z-score (of returns
of closes, against the 60 before) finds an error when it exceeds 3 at the bar or at the next one.
Prices and volumes stay decimals, and nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl

from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES, PRICES
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, month_of
from marketdata_assets.quality import anomalies
from marketdata_assets.quality.anomalies import CONTEXT, find_anomalies
from marketdata_assets.quality.anomaly_rules import RULES

Row = dict[str, Any]
Rows = list[Row]
MINUTE = TIMEFRAMES["1m"]
BLOCK = 40
"""Bars of a planted error together with the unchanged bars that must follow it."""


# --------------------------------------------------------------------------------- real bars
def read_markets(data: Path, timeframe: str = "1m") -> dict[str, pl.DataFrame]:
    """Return all real bars of a timeframe, by venue and symbol, in the model's columns."""
    found: dict[str, list[pl.DataFrame]] = {}
    for file in sorted(data.glob(f"*/*/{timeframe}/*.parquet")):
        frame = pl.read_parquet(file)
        if frame.schema.get("close") == pl.Float64 and "time" not in frame.columns:
            continue  # native bars in floats repeat the minutes of other files
        found.setdefault(f"{file.parts[-4]} {file.parts[-3]}", []).append(as_bars(frame))
    if timeframe == "1m":  # a futures month that was not used to choose the limits
        with zipfile.ZipFile(data / "csv_import" / "UMFUT-FILUSDT-1m-2023-09.zip") as archive:
            frame = pl.read_csv(archive.read(archive.namelist()[0]), infer_schema=False).cast(
                {"open_time": pl.Int64}
            )
        found["binance futures FILUSDT, held out"] = [as_bars(frame)]
    return {name: pl.concat(frames).sort("open_time") for name, frames in found.items()}


def as_bars(frame: pl.DataFrame) -> pl.DataFrame:
    """Convert a file's columns to the model's columns; a column that is missing is null."""
    frame = frame.rename(
        {
            old: new
            for old, new in (("time", "open_time"), ("count", "trades"))
            if old in frame.columns
        }
    )
    seconds = frame["open_time"][0] < 10**11
    opens = (pl.col("open_time") * (1_000_000 if seconds else 1000)).cast(BAR_SCHEMA["open_time"])
    given = [
        pl.col(n).cast(pl.String).cast(BAR_SCHEMA[n])
        if n in frame.columns
        else pl.lit(None, BAR_SCHEMA[n]).alias(n)
        for n in COLUMN_NAMES[1:]
    ]
    return frame.select(opens, *given)


def split_months(bars: pl.DataFrame, timeframe: Timeframe) -> Iterator[tuple[pl.DataFrame, Window]]:
    """Yield each month with the bars around it, as an ingest judges them."""
    context = CONTEXT * timeframe.width
    for start in bars["open_time"].dt.truncate("1mo").unique().sort():
        month = month_of(start)
        yield (
            bars.filter(
                pl.col("open_time").is_between(
                    month.start - context, month.end + context, closed="left"
                )
            ),
            month,
        )


def judge(bars: pl.DataFrame, timeframe: Timeframe = MINUTE) -> list[Any]:
    return [
        found
        for frame, month in split_months(bars, timeframe)
        for found in find_anomalies(frame, timeframe, month)
    ]


@contextmanager
def halve_limits() -> Iterator[None]:
    """Halve every floor and factor, to show the distance between the limits and real bars."""
    original = dict(RULES)
    RULES.update(
        {
            name: replace(rule, floor=rule.floor / 2, times=rule.times / 2)
            for name, rule in original.items()
        }
    )
    anomalies.GAP_TIMES /= 2
    try:
        yield
    finally:
        RULES.update(original)
        anomalies.GAP_TIMES *= 2


def z_score(bars: pl.DataFrame) -> pl.Series:
    """Mark bars whose return is over three deviations from the mean of the 60 before."""
    returns = bars.select(pl.col("close").cast(pl.Float64).log().diff()).to_series()
    deviation = (returns - returns.rolling_mean(60).shift(1)) / returns.rolling_std(60).shift(1)
    return (deviation.abs() > 3).fill_null(False)


# --------------------------------------------------------------------------------- errors
def scale_prices(row: Row, factor: Decimal, *names: str) -> Row:
    """Multiply some prices by a factor and adjust high and low.

    The quote volumes are multiplied as well when all prices are.
    """
    places = Decimal(1).scaleb(-12)
    new = row | {name: (row[name] * factor).quantize(places) for name in names}
    new["high"], new["low"] = max(new[n] for n in PRICES), min(new[n] for n in PRICES)
    if len(names) == len(PRICES):
        new |= {
            n: (row[n] * factor).quantize(places)
            for n in ("quote_volume", "taker_buy_quote_volume")
            if row[n] is not None
        }
    return new


def scale_all_prices(factor: str, bars: int = 1) -> Callable[[Rows], Rows]:
    return lambda rows: [scale_prices(row, Decimal(factor), *PRICES) for row in rows[:bars]]


def scale_one_price(name: str, factor: str) -> Callable[[Rows], Rows]:
    return lambda rows: [scale_prices(rows[0], Decimal(factor), name)]


def swap_digits(rows: Rows) -> Rows:
    """Swap the first two adjacent digits of the close that differ."""
    text = format(rows[0]["close"], "f")
    digits = [i for i, letter in enumerate(text) if letter != "."]
    i, j = next(pair for pair in itertools.pairwise(digits) if text[pair[0]] != text[pair[1]])
    return [
        scale_prices(
            rows[0]
            | {"close": Decimal(text[:i] + text[j] + text[i + 1 : j] + text[i] + text[j + 1 :])},
            Decimal(1),
        )
    ]


def swap_open_and_close(rows: Rows) -> Rows:
    return [rows[0] | {"open": rows[0]["close"], "close": rows[0]["open"]}]


def freeze_prices(bars: int) -> Callable[[Rows], Rows]:
    """Repeat the first bar's prices, with the volumes of each bar."""

    def plant(rows: Rows) -> Rows:
        prices = {name: rows[0][name] for name in PRICES}
        return [
            row | prices | dict.fromkeys(("quote_volume", "taker_buy_quote_volume"))
            for row in rows[1:bars]
        ]

    return plant


def repeat_bar(bars: int) -> Callable[[Rows], Rows]:
    """Repeat the first bar with its volumes."""
    return lambda rows: [rows[0] | {"open_time": row["open_time"]} for row in rows[1:bars]]


def multiply_volume(factor: int, trades: bool) -> Callable[[Rows], Rows]:
    names = [
        "volume",
        "quote_volume",
        "taker_buy_volume",
        "taker_buy_quote_volume",
        *(["trades"] if trades else []),
    ]
    return lambda rows: [
        rows[0] | {n: rows[0][n] * factor for n in names if rows[0][n] is not None}
    ]


def clear_volume(rows: Rows) -> Rows:
    names = ("volume", "quote_volume", "taker_buy_volume", "taker_buy_quote_volume", "trades")
    return [rows[0] | {name: rows[0][name] * 0 for name in names if rows[0][name] is not None}]


KINDS: dict[str, Callable[[Rows], Rows]] = {
    **{
        f"all prices x {f}": scale_all_prices(f)
        for f in ("1.005", "1.01", "0.99", "1.03", "0.97", "1.1", "0.9", "10", "0.1")
    },
    **{f"all prices of 5 bars x {f}": scale_all_prices(f, 5) for f in ("1.01", "0.97")},
    "all prices of 30 bars x 1.03": scale_all_prices("1.03", 30),
    **{f"close x {f}": scale_one_price("close", f) for f in ("1.01", "0.97", "1.1", "10")},
    **{f"open x {f}": scale_one_price("open", f) for f in ("0.99", "1.03")},
    "close of another market (ETH for BTC)": scale_one_price("close", "0.0712345"),
    "close with two digits swapped": swap_digits,
    "open and close swapped": swap_open_and_close,
    **{f"high x {f}": scale_one_price("high", f) for f in ("1.01", "1.03", "1.1", "10")},
    **{f"low x {f}": scale_one_price("low", f) for f in ("0.99", "0.97", "0.9", "0.1")},
    **{f"{n} bars with the same prices": freeze_prices(n) for n in (10, 20, 40)},
    **{f"{n} bars the same, volume too": repeat_bar(n) for n in (5, 10, 40)},
    "volume x 1000": multiply_volume(1000, trades=False),
    "volume and trades x 1000": multiply_volume(1000, trades=True),
    "volume 0, prices as they were": clear_volume,
}


def plant_errors(
    bars: pl.DataFrame, plant: Callable[[Rows], Rows], places: list[int]
) -> tuple[pl.DataFrame, list[tuple[Any, Any]]]:
    """Return the bars with errors at these rows, and the first and last open time of each error."""
    new: Rows = []
    spans = []
    for place in places:
        rows = plant(bars[place : place + BLOCK].to_dicts())
        new += rows
        spans.append((rows[0]["open_time"], rows[-1]["open_time"]))
    changed = pl.DataFrame(new, schema=BAR_SCHEMA)
    return pl.concat([bars.join(changed, on="open_time", how="anti"), changed]).sort(
        "open_time"
    ), spans


def recall(
    real: dict[str, pl.DataFrame], plant: Callable[[Rows], Rows], places: dict[str, list[int]]
) -> tuple[Counter[str], Counter[str]]:
    """Count the errors of each market that the rules find and that the z-score finds."""
    ours: Counter[str] = Counter()
    zs: Counter[str] = Counter()
    for name, bars in real.items():
        changed, spans = plant_errors(bars, plant, places[name])
        found = judge(changed)
        above_3 = changed.filter(z_score(changed))["open_time"]
        for first, last in spans:
            ours[name] += any(one.start <= last and first < one.end for one in found)
            zs[name] += above_3.is_between(first, last + MINUTE.width).any()
    return ours, zs


def choose_places(
    real: dict[str, pl.DataFrame], count: int, dice: random.Random
) -> dict[str, list[int]]:
    """Choose `count` traded bars, each in a separate stretch, from each market by its size."""
    total, before, places = sum(bars.height for bars in real.values()), 0, {}
    for name, bars in real.items():
        share = round(count * (before + bars.height) / total) - round(count * before / total)
        before += bars.height
        length = bars.height // share
        traded = (bars["volume"] > 0).to_list()
        starts = range(0, length * share, length)
        places[name] = [
            dice.choice(
                [i for i in range(s + BLOCK, min(s + length, bars.height) - BLOCK) if traded[i]]
            )
            for s in starts
        ]
    return places


# --------------------------------------------------------------------------------- tables
def print_rates(data: Path) -> None:
    head = f"{'real bars':44}{'bars':>9}{'found':>7}{'per million':>13}{'half limits':>13}"
    print(f"{head}{'z-score 3':>12}{'per million':>13}{'ms a month':>12}  found at half limits")
    for timeframe in ("1m", "15m", "1h", "1d"):
        for name, bars in read_markets(data, timeframe).items():
            begun = time.perf_counter()
            found = judge(bars, TIMEFRAMES[timeframe])
            spent = (time.perf_counter() - begun) / bars["open_time"].dt.truncate("1mo").n_unique()
            with halve_limits():
                looser = judge(bars, TIMEFRAMES[timeframe])
            above_3 = int(z_score(bars).sum())
            kinds = ", ".join(
                f"{kind} {count}" for kind, count in Counter(one.kind for one in looser).items()
            )
            million = 1e6 / bars.height
            row = f"{name + ' ' + timeframe:44}{bars.height:9}{len(found):7}"
            row += f"{len(found) * million:13.0f}{len(looser):13}"
            print(f"{row}{above_3:12}{above_3 * million:13.0f}{spent * 1000:12.1f}  {kinds}")


def print_recall(real: dict[str, pl.DataFrame], count: int, seed: int) -> None:
    liquid = [name for name in real if name.startswith("binance_spot ")]
    head = f"{'planted errors, found in %':44}{'errors':>9}{'all':>7}"
    print(f"\n{head}{'Binance':>13}{'others':>12}{'z-score 3':>13}")
    for kind, plant in KINDS.items():
        places = choose_places(real, count, random.Random(f"{seed} {kind}"))
        ours, zs = recall(real, plant, places)
        sizes = {name: len(chosen) for name, chosen in places.items()}
        here = sum(sizes[name] for name in liquid)
        rest = sum(sizes.values()) - here
        shares = (
            sum(ours.values()) / (here + rest),
            sum(ours[name] for name in liquid) / here,
            sum(ours[name] for name in real if name not in liquid) / rest,
            sum(zs.values()) / (here + rest),
        )
        cells = "".join(
            f"{100 * share:{width}.1f}"
            for share, width in zip(shares, (7, 13, 12, 13), strict=True)
        )
        print(f"{kind:44}{here + rest:9}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "marketdata"
    )
    parser.add_argument("--plants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print_rates(options.data)
    print_recall(read_markets(options.data), options.plants, options.seed)


if __name__ == "__main__":
    main()
