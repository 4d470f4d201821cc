"""How often the anomaly rules speak on real bars, and how many planted errors they find, beside a
rolling z-score of 3.

    python bench/anomalies.py [--data ../shared/marketdata] [--plants 1000] [--seed 1]

First table: every real file of 1m, 15m, 1h and 1d bars, judged month by month as an ingest does it.
Second table: for each kind of error so many of them at random real bars of all markets, each such
that the row rules let it pass. An error counts as found when an anomaly holds its bar; the z-score
(of returns of closes, against the 60 before) when it speaks at its bar or the next. Prices and
volumes stay decimals; nothing is written.
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

from marketdata_assets.model.bar import NAMES, PRICES, SCHEMA
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, month_of
from marketdata_assets.quality import anomalies as rules
from marketdata_assets.quality.anomalies import CONTEXT, find_anomalies
from marketdata_assets.quality.anomaly_rules import RULES

Row = dict[str, Any]
Rows = list[Row]
MINUTE = TIMEFRAMES["1m"]
BLOCK = 40
"""An error and what must lie around it undisturbed."""


# --------------------------------------------------------------------------------- the real bars
def markets(data: Path, timeframe: str = "1m") -> dict[str, pl.DataFrame]:
    """All real bars of a timeframe, by venue and symbol, in the model's columns."""
    found: dict[str, list[pl.DataFrame]] = {}
    for file in sorted(data.glob(f"*/*/{timeframe}/*.parquet")):
        frame = pl.read_parquet(file)
        if frame.schema.get("close") == pl.Float64 and "time" not in frame.columns:
            continue  # the native bars, in floats: the same minutes again
        found.setdefault(f"{file.parts[-4]} {file.parts[-3]}", []).append(as_bars(frame))
    if timeframe == "1m":  # a futures month that no limit was chosen by
        with zipfile.ZipFile(data / "csv_import" / "UMFUT-FILUSDT-1m-2023-09.zip") as archive:
            frame = pl.read_csv(archive.read(archive.namelist()[0]), infer_schema=False).cast(
                {"open_time": pl.Int64}
            )
        found["binance futures FILUSDT, held out"] = [as_bars(frame)]
    return {name: pl.concat(frames).sort("open_time") for name, frames in found.items()}


def as_bars(frame: pl.DataFrame) -> pl.DataFrame:
    """A file's columns as the model's; what it does not have is null."""
    frame = frame.rename(
        {
            old: new
            for old, new in (("time", "open_time"), ("count", "trades"))
            if old in frame.columns
        }
    )
    seconds = frame["open_time"][0] < 10**11
    opens = (pl.col("open_time") * (1_000_000 if seconds else 1000)).cast(SCHEMA["open_time"])
    given = [
        pl.col(n).cast(pl.String).cast(SCHEMA[n])
        if n in frame.columns
        else pl.lit(None, SCHEMA[n]).alias(n)
        for n in NAMES[1:]
    ]
    return frame.select(opens, *given)


def months(bars: pl.DataFrame, timeframe: Timeframe) -> Iterator[tuple[pl.DataFrame, Window]]:
    """What an ingest would judge: each month with the bars around it."""
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
        for frame, month in months(bars, timeframe)
        for found in find_anomalies(frame, timeframe, month)
    ]


@contextmanager
def half_the_limits() -> Iterator[None]:
    """Every floor and every factor halved: how much room real bars leave."""
    whole = dict(RULES)
    RULES.update(
        {
            name: replace(rule, floor=rule.floor / 2, times=rule.times / 2)
            for name, rule in whole.items()
        }
    )
    rules.GAP_TIMES /= 2
    try:
        yield
    finally:
        RULES.update(whole)
        rules.GAP_TIMES *= 2


def z_score(bars: pl.DataFrame) -> pl.Series:
    """Where the return lies more than three deviations from the mean of the 60 before."""
    returns = bars.select(pl.col("close").cast(pl.Float64).log().diff()).to_series()
    deviation = (returns - returns.rolling_mean(60).shift(1)) / returns.rolling_std(60).shift(1)
    return (deviation.abs() > 3).fill_null(False)


# --------------------------------------------------------------------------------- the errors
def scaled(row: Row, factor: Decimal, *names: str) -> Row:
    """Some prices times a factor; high and low follow, and so does the quote volume where all prices
    move.
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


def all_prices(factor: str, bars: int = 1) -> Callable[[Rows], Rows]:
    return lambda rows: [scaled(row, Decimal(factor), *PRICES) for row in rows[:bars]]


def one_price(name: str, factor: str) -> Callable[[Rows], Rows]:
    return lambda rows: [scaled(rows[0], Decimal(factor), name)]


def transposed(rows: Rows) -> Rows:
    """The first two different digits of the close change places."""
    text = format(rows[0]["close"], "f")
    digits = [i for i, letter in enumerate(text) if letter != "."]
    i, j = next(pair for pair in itertools.pairwise(digits) if text[pair[0]] != text[pair[1]])
    return [
        scaled(
            rows[0]
            | {"close": Decimal(text[:i] + text[j] + text[i + 1 : j] + text[i] + text[j + 1 :])},
            Decimal(1),
        )
    ]


def swapped(rows: Rows) -> Rows:
    return [rows[0] | {"open": rows[0]["close"], "close": rows[0]["open"]}]


def frozen(bars: int) -> Callable[[Rows], Rows]:
    """The first bar's prices again and again; volumes go on, at those prices."""

    def plant(rows: Rows) -> Rows:
        prices = {name: rows[0][name] for name in PRICES}
        return [
            row | prices | dict.fromkeys(("quote_volume", "taker_buy_quote_volume"))
            for row in rows[1:bars]
        ]

    return plant


def repeated(bars: int) -> Callable[[Rows], Rows]:
    """The first bar again and again, volumes and all."""
    return lambda rows: [rows[0] | {"open_time": row["open_time"]} for row in rows[1:bars]]


def more_volume(factor: int, trades: bool) -> Callable[[Rows], Rows]:
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


def no_volume(rows: Rows) -> Rows:
    names = ("volume", "quote_volume", "taker_buy_volume", "taker_buy_quote_volume", "trades")
    return [rows[0] | {name: rows[0][name] * 0 for name in names if rows[0][name] is not None}]


KINDS: dict[str, Callable[[Rows], Rows]] = {
    **{
        f"all prices x {f}": all_prices(f)
        for f in ("1.005", "1.01", "0.99", "1.03", "0.97", "1.1", "0.9", "10", "0.1")
    },
    **{f"all prices of 5 bars x {f}": all_prices(f, 5) for f in ("1.01", "0.97")},
    "all prices of 30 bars x 1.03": all_prices("1.03", 30),
    **{f"close x {f}": one_price("close", f) for f in ("1.01", "0.97", "1.1", "10")},
    **{f"open x {f}": one_price("open", f) for f in ("0.99", "1.03")},
    "close of another market (ETH for BTC)": one_price("close", "0.0712345"),
    "close with two digits swapped": transposed,
    "open and close swapped": swapped,
    **{f"high x {f}": one_price("high", f) for f in ("1.01", "1.03", "1.1", "10")},
    **{f"low x {f}": one_price("low", f) for f in ("0.99", "0.97", "0.9", "0.1")},
    **{f"{n} bars with the same prices": frozen(n) for n in (10, 20, 40)},
    **{f"{n} bars the same, volume too": repeated(n) for n in (5, 10, 40)},
    "volume x 1000": more_volume(1000, trades=False),
    "volume and trades x 1000": more_volume(1000, trades=True),
    "volume 0, prices as they were": no_volume,
}


def planted(
    bars: pl.DataFrame, plant: Callable[[Rows], Rows], places: list[int]
) -> tuple[pl.DataFrame, list[tuple[Any, Any]]]:
    """The bars with errors at these rows, and the first and last open time of each error."""
    new: Rows = []
    spans = []
    for place in places:
        rows = plant(bars[place : place + BLOCK].to_dicts())
        new += rows
        spans.append((rows[0]["open_time"], rows[-1]["open_time"]))
    changed = pl.DataFrame(new, schema=SCHEMA)
    return pl.concat([bars.join(changed, on="open_time", how="anti"), changed]).sort(
        "open_time"
    ), spans


def recall(
    real: dict[str, pl.DataFrame], plant: Callable[[Rows], Rows], places: dict[str, list[int]]
) -> tuple[Counter[str], Counter[str]]:
    """How many errors of each market were found, by us and by the z-score, and the latter's rate on
    changed bars.
    """
    ours: Counter[str] = Counter()
    zs: Counter[str] = Counter()
    for name, bars in real.items():
        changed, spans = planted(bars, plant, places[name])
        found = judge(changed)
        loud = changed.filter(z_score(changed))["open_time"]
        for first, last in spans:
            ours[name] += any(one.start <= last and first < one.end for one in found)
            zs[name] += loud.is_between(first, last + MINUTE.width).any()
    return ours, zs


def choose(real: dict[str, pl.DataFrame], count: int, dice: random.Random) -> dict[str, list[int]]:
    """So many traded bars, each in a stretch of its own, markets by their size."""
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


# --------------------------------------------------------------------------------- the tables
def print_rates(data: Path) -> None:
    head = f"{'real bars':44}{'bars':>9}{'found':>7}{'per million':>13}{'half limits':>13}"
    print(f"{head}{'z-score 3':>12}{'per million':>13}{'ms a month':>12}  found at half limits")
    for timeframe in ("1m", "15m", "1h", "1d"):
        for name, bars in markets(data, timeframe).items():
            begun = time.perf_counter()
            found = judge(bars, TIMEFRAMES[timeframe])
            spent = (time.perf_counter() - begun) / bars["open_time"].dt.truncate("1mo").n_unique()
            with half_the_limits():
                looser = judge(bars, TIMEFRAMES[timeframe])
            loud = int(z_score(bars).sum())
            kinds = ", ".join(
                f"{kind} {count}" for kind, count in Counter(one.kind for one in looser).items()
            )
            row = f"{name + ' ' + timeframe:44}{bars.height:9}{len(found):7}{len(found) / bars.height * 1e6:13.0f}{len(looser):13}"
            print(f"{row}{loud:12}{loud / bars.height * 1e6:13.0f}{spent * 1000:12.1f}  {kinds}")


def print_recall(real: dict[str, pl.DataFrame], count: int, seed: int) -> None:
    liquid = [name for name in real if name.startswith("binance_spot ")]
    print(
        f"\n{'planted errors, found in %':44}{'errors':>9}{'all':>7}{'Binance':>13}{'others':>12}{'z-score 3':>13}"
    )
    for kind, plant in KINDS.items():
        places = choose(real, count, random.Random(f"{seed} {kind}"))
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
        told = "".join(
            f"{100 * share:{width}.1f}"
            for share, width in zip(shares, (7, 13, 12, 13), strict=True)
        )
        print(f"{kind:44}{here + rest:9}{told}")


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
    print_recall(markets(options.data), options.plants, options.seed)


if __name__ == "__main__":
    main()
