"""Repair: what a span needs, before anything runs; and the receipt of what a repair has done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import Damaged
from marketdata_assets.flows.fetch.ingest import Ingested, clean_stored, wanted_window
from marketdata_assets.flows.fetch.plan import page_size, plan
from marketdata_assets.flows.read.lock import content
from marketdata_assets.ledger.receipts import Receipt
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.clean import clean
from marketdata_assets.storage.fingerprint import fingerprint


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a repair would do. `what` is `clean`, `fetch`, `ask again` or `roll up`."""

    table: str
    partition: str
    what: str
    why: str
    bars: int = 0
    requests: int = 0


def plan_repair(
    toolbox: Toolbox, partitions: Sequence[Partition], again: Window | None
) -> list[Step]:
    """What a repair of these partitions would do, in order. Reads their objects; sends no request,
    changes nothing.
    """
    return [step for partition in partitions for step in _steps(toolbox, partition, again)]


def _steps(toolbox: Toolbox, partition: Partition, again: Window | None) -> Iterator[Step]:
    venue = toolbox.settings.venues[partition.market.venue]
    page = page_size(venue.name)
    for timeframe in venue.fetched:
        table = raw_table(timeframe)
        stored, why = _stored(toolbox, table, partition)
        if why:
            yield Step(table.name, partition.key, "clean", why)
        window = again & wanted_window(toolbox, timeframe, partition) if again else None
        if window and stored is not None:
            bars = int(
                stored["open_time"].is_between(window.start, window.end, closed="left").sum()
            )
            requests = 2 * math.ceil(window.count(timeframe) / page) if bars else 0
            if bars:
                yield Step(
                    table.name,
                    partition.key,
                    "ask again",
                    f"{window} was asked for",
                    bars,
                    requests,
                )
    for task in plan(toolbox, [partition]):
        what = "fetch" if task.bars else "roll up"
        yield Step(
            raw_table(venue.base).name, partition.key, what, task.reason, task.bars, task.requests
        )


def _stored(
    toolbox: Toolbox, table: Table, partition: Partition
) -> tuple[pl.DataFrame | None, str]:
    """The rows of an object and what is wrong with them."""
    try:
        rows = toolbox.lake.read(table, partition, with_provenance=True)
    except Damaged as damage:
        return None, str(damage).partition(";")[0]
    return rows, clean(
        rows, table.timeframe, partition.open_times(table.timeframe)
    ).says if rows is not None else ""


def clean_up(toolbox: Toolbox, partitions: Sequence[Partition]) -> list[dict[str, Any]]:
    """Take out of the stored objects what must not be there: what was taken out, by object. Refused
    rows go to quarantine.
    """
    found = []
    for partition in partitions:
        for timeframe in toolbox.settings.venues[partition.market.venue].fetched:
            said = clean_stored(toolbox, timeframe, partition)
            if said:
                found.append(
                    {"table": raw_table(timeframe).name, "partition": partition.key, "says": said}
                )
    return found


# --------------------------------------------------------------------------------- the receipt
@dataclass(frozen=True, slots=True)
class Content:
    """How many rows a partition of a table has, and their fingerprint; None where it cannot be
    read.
    """

    rows: int | None
    hash: str | None


def contents(toolbox: Toolbox, partitions: Sequence[Partition]) -> dict[tuple[str, str], Content]:
    """By table name and partition key: what is stored of the fetched and the rolled-up tables."""
    tables = [
        (p, raw_table(tf))
        for p in partitions
        for tf in toolbox.settings.venues[p.market.venue].fetched
    ]
    tables += [
        (p, rollup_table(tf)) for p in partitions for tf in toolbox.settings.rolled(p.market)
    ]
    with toolbox.warehouse.keep_open():
        return {
            (table.name, partition.key): _content(toolbox, table, partition)
            for partition, table in tables
        }


def _content(toolbox: Toolbox, table: Table, partition: Partition) -> Content:
    try:
        stored = content(toolbox, table, partition)
    except Damaged:
        return Content(None, None)
    return Content(stored.height, fingerprint(stored))


@dataclass(frozen=True, slots=True)
class Told:
    """What one fetch of a repair brought."""

    table: str
    partition: str
    requests: int
    stored: int
    corrected: int
    refused: int
    failed: str | None


def told(done: Ingested) -> Told:
    """An ingest, for the receipt."""
    failed = str(done.error) if done.error else None
    account, table = done.account, raw_table(done.timeframe).name
    return Told(
        table,
        done.partition.key,
        done.requests,
        account.stored,
        done.replaced.height,
        account.quarantined,
        failed,
    )


def write_receipt(
    toolbox: Toolbox,
    asked: dict[str, Any],
    before: dict[tuple[str, str], Content],
    after: dict[tuple[str, str], Content],
    fetched: Sequence[Told],
    cleaned: Sequence[dict[str, Any]],
) -> Receipt:
    """Write down what a repair has done."""
    rows = [
        {
            "table": table,
            "partition": key,
            **{f"{name}_before": value for name, value in asdict(before[table, key]).items()},
            **{f"{name}_after": value for name, value in asdict(after[table, key]).items()},
        }
        for table, key in after
    ]
    changed = [row for row in rows if row["hash_before"] != row["hash_after"]]
    totals = {
        name: sum(getattr(t, name) for t in fetched)
        for name in ("requests", "stored", "corrected", "refused")
    }
    failed = [
        {"table": t.table, "partition": t.partition, "says": t.failed} for t in fetched if t.failed
    ]
    says = (
        f"{len(changed)} of {len(rows)} changed: {totals['stored'] - totals['corrected']} bars new, {totals['corrected']} corrected, "
        f"{totals['refused']} rows refused, {len(cleaned)} objects cleaned, {len(failed)} partitions failed"
    )
    kept = [row for row in rows if row["table"].startswith("raw/") or row in changed]
    body = {"asked": asked, **totals, "tables": kept, "cleaned": list(cleaned), "failed": failed}
    return toolbox.receipts.add("repair", toolbox.settings.now(), says, body)


def span_of(partitions: Sequence[Partition], window: Window) -> dict[str, Any]:
    """What a repair was asked for, for its receipt."""
    markets = sorted({partition.market.key for partition in partitions})
    return {"markets": markets, "start": format_time(window.start), "end": format_time(window.end)}
