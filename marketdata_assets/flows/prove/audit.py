"""Audit: the checks of one partition, computed from what is stored and not from what was meant to be
stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.flows.derive.rollup import Derived
from marketdata_assets.flows.fetch.ingest import Ingested
from marketdata_assets.flows.prove.anomalies import CHECK, alarming, judge, row_of, words
from marketdata_assets.flows.prove.gaps import UNEXPLAINED, words_of
from marketdata_assets.flows.prove.parity import compare
from marketdata_assets.ledger.ledger import Account, Gap
from marketdata_assets.model.anomaly import AnomalyState
from marketdata_assets.model.bar import COLUMN_NAMES, ROLLUP_SCHEMA, format_number
from marketdata_assets.model.intervals import holes, left_of
from marketdata_assets.model.partition import Partition, adjacent_partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.parity import UNEQUAL, WITHIN
from marketdata_assets.quality.split import asked_columns, split

Row = dict[str, str | int]
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of one partition. `blocking` findings stop what is made from the partition.

    `numbers` may be summed over partitions, `shown` stands beside them. `severity`: `error` for a
    red one that does not block, `warning` for one that does not make a backfill fail; empty: a red
    one does, and is an error where it blocks.
    """

    check: str
    passed: bool
    says: str
    blocking: bool = False
    numbers: dict[str, int] = field(default_factory=dict)
    table: Sequence[Row] = ()
    severity: str = ""
    shown: Mapping[str, Any] = field(default_factory=dict)


RAW_CHECKS: dict[str, str] = {
    "ohlc": (
        "Every stored bar keeps every rule of the table (prices, volumes, grid, window). "
        "If red: see `marketdata quarantine list`, then materialize the partition again."
    ),
    "duplicates": "No open_time is stored twice. If red: materialize the partition again; it is rebuilt from the venue.",
    "gaps": (
        "Every bar that is not stored is explained by evidence. If red: materialize the partition again; "
        "a hole that nobody has answered for is asked for in three runs, then at growing distance. `marketdata gaps` explains each."
    ),
    "accounting": (
        "Rows received = stored + identical + quarantined. If red: it is a defect of ours; please report the metadata."
    ),
    CHECK: (
        "No bar that keeps every rule is hard to believe (spikes, jumps, wicks, frozen prices, impossible volume) without a word from "
        "a person. If red: `marketdata anomalies` lists them with their bars; acknowledge what is real, fetch again what is not."
    ),
}
BLOCKING = ("ohlc", "duplicates", "accounting")


def audit_raw(toolbox: Toolbox, done: Ingested) -> list[Finding]:
    """The checks of a raw partition, in the order of RAW_CHECKS (the last of base bars only).

    Which of them are red stands in the ledger afterwards.
    """
    findings = [_ohlc(done), _duplicates(done), _gaps(done), _accounting(done.account)]
    if done.timeframe == toolbox.settings.venues[done.partition.market.venue].base:
        findings.append(_anomalies(toolbox, done))
    return _remembered(toolbox, raw_table(done.timeframe), done.partition, findings)


def audit_gaps(toolbox: Toolbox, done: Ingested) -> Finding:
    """The check `gaps` alone, once more, by what the ledger says of them now."""
    table = raw_table(done.timeframe)
    explained = replace(done, gaps=tuple(toolbox.ledger.gaps(table, done.partition)))
    return _remembered(toolbox, table, done.partition, [_gaps(explained)])[0]


def _remembered(
    toolbox: Toolbox, table: Table, partition: Partition, findings: list[Finding]
) -> list[Finding]:
    for finding in findings:
        red = None if finding.passed else (finding.blocking, finding.says)
        toolbox.ledger.set_check(table, partition, finding.check, red, toolbox.settings.now())
    return findings


def _ohlc(done: Ingested) -> Finding:
    broken = _broken(done)
    return Finding(
        "ohlc",
        not broken,
        f"{len(broken)} bars break a rule",
        True,
        {"broken": len(broken)},
        broken[:SHOWN],
    )


def _duplicates(done: Ingested) -> Finding:
    repeated = done.bars.height - done.bars["open_time"].n_unique()
    return Finding(
        "duplicates",
        repeated == 0,
        f"{repeated} open times are stored twice",
        True,
        {"duplicates": repeated},
    )


def _gaps(done: Ingested) -> Finding:
    unexplained = _unexplained(done)
    words = _gap_words(unexplained, done.gaps, done.timeframe)
    return Finding(
        "gaps",
        not unexplained,
        words,
        False,
        _gap_numbers(unexplained, done),
        _gap_table(unexplained, done),
    )


def _accounting(account: Account) -> Finding:
    return Finding(
        "accounting",
        account.balanced,
        "received = stored + identical + quarantined",
        True,
        asdict(account),
    )


def _anomalies(toolbox: Toolbox, done: Ingested) -> Finding:
    entries = sorted(
        judge(toolbox, done),
        key=lambda e: (list(AnomalyState).index(e.state), -e.anomaly.severity, e.anomaly.start),
    )
    numbers = {
        state.value: sum(entry.state == state for entry in entries) for state in AnomalyState
    }
    alarms = sum(map(alarming, entries))
    return Finding(
        CHECK,
        not alarms,
        words(entries),
        False,
        {**numbers, "alarming": alarms},
        [row_of(e) for e in entries[:SHOWN]],
    )


def _broken(done: Ingested) -> list[Row]:
    sent = done.bars.with_columns(
        pl.col("open_time").dt.epoch("ms"),
        *(pl.col(n).cast(pl.String) for n in COLUMN_NAMES if n not in ("open_time", "trades")),
    )
    refused = split(asked_columns(sent, 0, done.wanted), done.timeframe, done.wanted.end).rejected
    return [
        {"open_time": format_time(t), "reasons": r, "fields": f}
        for _, t, r, f in refused.iter_rows()
    ]


def _unexplained(done: Ingested) -> list[Window]:
    explained = [gap.window for gap in done.gaps if gap.settled or gap.reason == "quarantined"]
    first = done.bars["open_time"][0] if done.bars.height else done.wanted.start
    window = Window(
        max(done.wanted.start, first) if done.complete else done.wanted.start, done.wanted.end
    )
    found = left_of(holes(done.bars["open_time"], done.timeframe, window), explained)
    return found if done.bars.height or not done.complete else []


def _gap_words(unexplained: Sequence[Window], gaps: Sequence[Gap], timeframe: Timeframe) -> str:
    open_bars = sum(w.count(timeframe) for w in unexplained)
    return f"{open_bars} bars are missing without an explanation, {sum(g.bars for g in gaps if g.settled)} with one"


def _gap_numbers(unexplained: Sequence[Window], done: Ingested) -> dict[str, int]:
    numbers = {"expected": done.wanted.count(done.timeframe), "present": done.bars.height}
    for gap in done.gaps:
        numbers[gap.reason] = numbers.get(gap.reason, 0) + gap.bars
    return {**numbers, "unexplained": sum(w.count(done.timeframe) for w in unexplained)}


def _gap_table(unexplained: Sequence[Window], done: Ingested) -> list[Row]:
    known: list[Row] = [
        {
            "from": format_time(g.window.start),
            "until": format_time(g.window.end),
            "bars": g.bars,
            "cause": g.cause or UNEXPLAINED,
            "reason": g.reason,
            "evidence": words_of(g),
        }
        for g in done.gaps
    ]
    asked = {str(row["from"]) for row in known}
    rest: list[Row] = [
        {
            "from": format_time(w.start),
            "until": format_time(w.end),
            "bars": w.count(done.timeframe),
            "cause": UNEXPLAINED,
            "reason": "not fetched yet",
            "evidence": "",
        }
        for w in unexplained
        if format_time(w.start) not in asked
    ]
    return (known + rest)[:SHOWN]


# --------------------------------------------------------------------------------- rollups
def audit_rollup(toolbox: Toolbox, derived: Derived, timeframe: Timeframe) -> list[Finding]:
    """`complete`, and `matches_native` where the venue's own bars of that timeframe are stored."""
    partition = derived.partition
    frame = derived.frames.get(timeframe, pl.DataFrame(schema=ROLLUP_SCHEMA))
    findings = [_complete(toolbox, partition, timeframe, frame)]
    if timeframe in toolbox.settings.venues[partition.market.venue].reference:
        findings.append(_matches_native(toolbox, derived, timeframe))
    return _remembered(toolbox, rollup_table(timeframe), partition, findings)


def _complete(
    toolbox: Toolbox, partition: Partition, timeframe: Timeframe, frame: pl.DataFrame
) -> Finding:
    """Every bar that holds fewer base bars than a full one must owe it to bars the venue never had."""
    short = frame.filter(pl.col("bars_present") < pl.col("bars_expected"))
    absent = (
        _absent_bars(toolbox, partition, timeframe)
        if short.height
        else pl.DataFrame(schema=_ABSENT)
    )
    judged = short.join(absent, on="open_time", how="left").with_columns(
        pl.col("absent").fill_null(0)
    )
    unexplained = judged.filter(pl.col("bars_present") + pl.col("absent") < pl.col("bars_expected"))
    rows: list[Row] = [
        {"open_time": format_time(t), "expected": e, "present": p}
        for t, e, p in unexplained.select("open_time", "bars_expected", "bars_present").iter_rows()
    ]
    numbers = {"bars": frame.height, "short": short.height, "unexplained": unexplained.height}
    return Finding(
        "complete",
        not rows,
        f"{short.height} bars are made of fewer than they could, {len(rows)} without an explanation",
        False,
        numbers,
        rows[:SHOWN],
    )


def _absent_bars(toolbox: Toolbox, partition: Partition, timeframe: Timeframe) -> pl.DataFrame:
    """How many base bars each bucket lacks because the venue has none, by the ledger's evidence."""
    base = toolbox.settings.venues[partition.market.venue].base
    known = [
        gap
        for p in (adjacent_partition(partition, -1), partition)
        for gap in toolbox.ledger.gaps(raw_table(base), p)
    ]
    gaps = [gap.window for gap in known if gap.cause or gap.reason == "no_bars"]
    listed = toolbox.ledger.listed(partition.market)
    if listed:
        gaps.append(Window(timeframe.floor(listed), base.floor(listed)))
    absent: Counter[datetime] = Counter()
    for gap in gaps:
        moment = gap.start
        while moment < gap.end:
            absent[timeframe.floor(moment)] += 1
            moment += base.width
    return pl.DataFrame(
        {"open_time": list(absent), "absent": list(absent.values())}, schema=_ABSENT
    )


_ABSENT: dict[str, pl.DataType] = {"open_time": pl.Datetime("us", "UTC"), "absent": pl.Int64()}


def _matches_native(toolbox: Toolbox, derived: Derived, timeframe: Timeframe) -> Finding:
    """Our rollup beside the venue's own bars; where they differ, the bars that cause it."""
    judged = compare(toolbox, derived, timeframe)
    differing = judged.filter(pl.col("outcome").is_in(UNEQUAL))
    within = judged.filter(pl.col("outcome") == WITHIN).height
    rows: list[Row] = [_difference(row) for row in differing.head(SHOWN).iter_rows(named=True)]
    numbers = {"compared": judged.height, "different": differing.height, "within_tolerance": within}
    words = f"{differing.height} of {judged.height} bars differ from the venue's own, {within} lie within its tolerance"
    if judged.is_empty():
        words = "no bars of the venue's own are stored to compare"
    return Finding("matches_native", differing.is_empty(), words, False, numbers, rows)


def _difference(row: dict[str, Any]) -> Row:
    values = [
        f"{name} {format_number(row[name])} / {format_number(row[name + '_native'])}"
        for name in row["columns"].split()
    ]
    minutes = row["minutes"].split()
    shown = [
        *minutes[:SHOWN],
        *([f"and {len(minutes) - SHOWN} more"] if len(minutes) > SHOWN else []),
    ]
    return {
        "open_time": format_time(row["open_time"]),
        "outcome": row["outcome"],
        "ours / the venue's": ", ".join(values),
        "cause": row["cause"],
        "minutes": " ".join(shown),
    }
