"""Fetches four weeks from a venue that lies in a share of its pages, three times over, and counts
the wrong bars that are stored.

    python bench/lying.py [--seeds 5] [--kinds scaled,shifted,other,repeated]
        [--shares 0.01,0.1,0.3] [--modes request,random,old] [--reference]

Modes: `request` lies about the same requests every time, `random` about any, `old` about all pages
that begin in the first part of the span, `all` about every page of 1m bars. With `--reference` the
venue's own 1h bars are fetched as well (`reference: [1h]`). Every run ends with no wrong bar, or
with a red check; only `all` without a reference cannot be noticed by anybody. The sandbox exchange
answers, and its generator is the truth.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from marketdata_assets.context import open_context
from marketdata_assets.flows.operate.pipeline import AuditedIngest, Pipeline
from marketdata_assets.model.finding import Finding
from marketdata_assets.model.partition import partitions_of
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.settings.load import load_settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread

Rows = list[list[Any]]
SPAN = Window(parse_time("2024-01-01"), parse_time("2024-01-29"))
FIRST_RUN, RUNS = 3, 3
"""The day of March of the first run; the others follow on the next days."""


def scaled(rows: Rows, factor: str = "1.0003") -> Rows:
    """Prices that are 3 bp too high."""
    scale = Decimal(factor)
    return [[row[0], *(str(Decimal(v) * scale) for v in row[1:5]), *row[5:]] for row in rows]


def shifted(rows: Rows) -> Rows:
    """Each bar under the open time of the one before."""
    following = [*rows[1:], rows[-1]]
    return [[a[0], *b[1:6], a[6], *b[7:]] for a, b in zip(rows, following, strict=True)]


def other(rows: Rows) -> Rows:
    """The prices of another market."""
    return scaled(rows, "0.06")


def repeated(rows: Rows) -> Rows:
    """The bars of the page before."""
    width = 60_000 * len(rows)
    return [[row[0] - width, *row[1:6], row[6] - width, *row[7:]] for row in rows]


KINDS: dict[str, Callable[[Rows], Rows]] = {
    lie.__name__: lie for lie in (scaled, shifted, other, repeated)
}


class Trial(NamedTuple):
    """How a venue lies."""

    mode: str
    kind: str
    share: float
    seed: int
    has_reference: bool = False


class RunResult(NamedTuple):
    """What is stored after a run: wrong bars, all bars, and those that should be there; whether a
    check is red.
    """

    wrong: int
    stored: int
    expected: int
    is_red: bool


def run_trial(trial: Trial) -> tuple[list[RunResult], int]:
    """Return what each run stored, and how many requests all of them took."""
    chance, known = random.Random(trial.seed), dict[Any, bool]()
    until = int((SPAN.start + (SPAN.end - SPAN.start) * trial.share).timestamp() * 1000)

    async def answer(request: Any, rows: Rows) -> Rows:
        if len(rows) < 5:
            return rows
        if trial.mode == "all":
            lies = request.query["interval"] == "1m"
        elif trial.mode == "old":
            lies = rows[0][0] < until
        else:
            lies = chance.random() < trial.share
            if trial.mode == "request":
                key = tuple(request.query.get(name) for name in ("startTime", "endTime", "limit"))
                lies = known.setdefault(key, lies)
        return KINDS[trial.kind](rows) if lies else rows

    exchange = SandboxExchange(
        now=lambda: int(parse_time("2024-03-02").timestamp() * 1000),
        weight_limit=10**9,
        tamper=answer,
    )
    with serve_in_thread(exchange) as url, tempfile.TemporaryDirectory() as folder:
        _write_universe(Path(folder), url, trial.has_reference)
        return [_run(day) for day in range(FIRST_RUN, FIRST_RUN + RUNS)], len(exchange.requests)


def _write_universe(folder: Path, url: str, has_reference: bool) -> None:
    file = folder / "universe.yaml"
    file.write_text(
        f"venues: {{binance: {{symbols: [BTC/USDT], since: {SPAN.start:%Y-%m-%d}, "
        f"until: {SPAN.end:%Y-%m-%d}, base_url: '{url}'{', reference: [1h]' * has_reference}}}}}\n"
        f"lake: {folder}/lake\nrollups: parquet\nstate: {folder}/state\n"
    )
    os.environ["MARKETDATA_UNIVERSE"] = str(file)


def _run(day: int) -> RunResult:
    os.environ["MARKETDATA_NOW"] = f"2024-03-{day:02}"
    settings, timeframe = load_settings(), TIMEFRAMES["1m"]
    truth = generate_bars("BTCUSDT", "1m", SPAN)
    (partition,) = partitions_of(settings.markets[0], SPAN)
    with open_context(settings) as context:
        pipeline, findings = context.bind(Pipeline), list[Finding]()
        for fetched in settings.raw_timeframes:
            for audit in pipeline.fetch(fetched, [partition]):
                findings += audit.findings if isinstance(audit, AuditedIngest) else [audit.finding]
        for rolled_up in pipeline.roll_up([partition]):
            findings += [each for found in rolled_up.findings.values() for each in found]
        is_red = any(not finding.passed for finding in findings)
        bars = context.lake.read(raw_table(timeframe), partition)
    if bars is None:
        return RunResult(0, 0, truth.height, is_red)
    wrong = bars.join(truth, on=truth.columns, how="anti", nulls_equal=True)
    return RunResult(wrong.height, bars.height, truth.height, is_red)


def main() -> None:
    """Run the matrix and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--shares", default="0.01,0.1,0.3")
    parser.add_argument("--modes", default="request,random,old")
    parser.add_argument("--reference", action="store_true")
    arguments = parser.parse_args()
    wrong = unseen = 0
    for mode in arguments.modes.split(","):
        for kind in arguments.kinds.split(","):
            for share in map(float, arguments.shares.split(",")):
                runs = [
                    run_trial(Trial(mode, kind, share, seed, arguments.reference))
                    for seed in range(arguments.seeds)
                ]
                found = [[result[index] for result, _ in runs] for index in range(RUNS)]
                wrong += sum(run.wrong for results in found for run in results)
                unseen += sum(run.wrong for run in found[-1] if not run.is_red)
                red = sum(run.is_red for run in found[-1])
                stored = " ".join(
                    f"{sum(r.stored for r in results) / sum(r.expected for r in results):6.1%}"
                    for results in found
                )
                requests = sum(count for _, count in runs) // len(runs)
                worst = max(run.wrong for results in found for run in results)
                print(
                    f"{mode:8} {kind:9} {share:5.0%}  wrong {worst:5}  stored {stored}  "
                    f"requests {requests}  red {red} of {len(runs)}",
                    flush=True,
                )
    print(f"{wrong} wrong bars, {unseen} of them at the end with no red check")


if __name__ == "__main__":
    main()
