"""Repair: what a span needs, the repair itself, and the receipt of what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.errors import Damaged
from marketdata_assets.flows.fetch.open_partition import IngestResult, wanted_window
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.flows.fetch.plan import BackfillPlanner, new_bars_per_request
from marketdata_assets.flows.operate.pipeline import AuditedIngest, Pipeline, PipelineResult
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.receipts import Receipt
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.clean import clean_bars
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage
from marketdata_assets.storage.fingerprint import fingerprint


class RepairAction(StrEnum):
    """What a repair does with an object."""

    CLEAN = "clean"
    FETCH = "fetch"
    ASK_AGAIN = "ask again"
    ROLL_UP = "roll up"


@dataclass(frozen=True, slots=True)
class RepairStep:
    """One thing that a repair would do."""

    table: str
    partition: str
    what: RepairAction
    why: str
    bars: int = 0
    requests: int = 0


class PartitionContent(NamedTuple):
    """How many rows a partition of a table has, and their fingerprint; None when it is damaged."""

    rows: int | None
    hash: str | None


Contents = Mapping[tuple[str, str], PartitionContent]
"""By table name and partition key."""


@dataclass(frozen=True, slots=True)
class FetchSummary:
    """What one fetch of a repair brought."""

    table: str
    partition: str
    requests: int
    stored: int
    corrected: int
    refused: int
    error: str | None


class RepairRequest(NamedTuple):
    """What a repair works on. With `again`, stored bars that open inside `window` are requested
    once more. `run_id` names the Dagster run in the receipt.
    """

    partitions: Sequence[Partition]
    window: Window
    again: bool
    run_id: str


class RepairResult(NamedTuple):
    """The receipt of a repair, and how many partitions had failed or parked attempts."""

    receipt: Receipt
    unparked: int


@dataclass(frozen=True, slots=True)
class Repairer:
    """Plans repairs, cleans stored objects, and writes the receipts of repairs."""

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def plan(self, partitions: Sequence[Partition], again: Window | None) -> list[RepairStep]:
        """Return what a repair of these partitions would do, in order.

        Reads their objects; sends no request and changes nothing. With `again`, stored bars that
        open inside it are requested once more.
        """
        return [step for partition in partitions for step in self._steps(partition, again)]

    def _steps(self, partition: Partition, again: Window | None) -> Iterator[RepairStep]:
        venue, key = self.settings.venues[partition.market.venue], partition.key
        page = new_bars_per_request(partition.market)
        for timeframe in venue.fetched_timeframes:
            table = raw_table(timeframe)
            stored, problem = self._read_and_check(table, partition)
            if problem:
                yield RepairStep(table.name, key, RepairAction.CLEAN, problem)
            window = again & wanted_window(self.settings, timeframe, partition) if again else None
            if not window or stored is None:
                continue
            opens = stored["open_time"]
            bars = int(opens.is_between(window.start, window.end, closed="left").sum())
            if bars:
                requests = 2 * math.ceil(window.count(timeframe) / page)
                why = f"{window} was asked for"
                yield RepairStep(table.name, key, RepairAction.ASK_AGAIN, why, bars, requests)
        planner = BackfillPlanner(self.settings, self.ledger, self.storage)
        for planned in planner.plan([partition]):
            what = RepairAction.FETCH if planned.bars else RepairAction.ROLL_UP
            table = raw_table(venue.base)
            yield RepairStep(table.name, key, what, planned.reason, planned.bars, planned.requests)

    def _read_and_check(
        self, table: Table, partition: Partition
    ) -> tuple[pl.DataFrame | None, str]:
        """Return the rows of an object and what is wrong with them."""
        try:
            rows = self.storage.lake.read(table, partition, with_provenance=True, with_foreign=True)
        except Damaged as damage:
            return None, str(damage).partition(";")[0]
        if rows is None:
            return None, ""
        return rows, clean_bars(
            rows, table.timeframe, partition.open_times(table.timeframe)
        ).message

    def remove_invalid_rows(self, partitions: Sequence[Partition]) -> list[dict[str, str]]:
        """Remove stored rows that must not be there; return what was removed, by object.

        Rejected rows go to quarantine.
        """
        store, found = PartitionStore(self.settings, self.ledger, self.storage.lake), []
        for partition in partitions:
            for timeframe in self.settings.venues[partition.market.venue].fetched_timeframes:
                if message := store.remove_invalid_rows(timeframe, partition):
                    table = raw_table(timeframe).name
                    found.append({"table": table, "partition": partition.key, "says": message})
        return found

    def read_contents(self, partitions: Sequence[Partition]) -> Contents:
        """Return what is stored of the fetched and the rolled-up tables."""
        places: list[tuple[Table, Partition]] = []
        for partition in partitions:
            venue = self.settings.venues[partition.market.venue]
            places += [(raw_table(tf), partition) for tf in venue.fetched_timeframes]
            places += [
                (rollup_table(tf), partition)
                for tf in self.settings.rollup_timeframes_of(partition.market)
            ]
        with self.storage.warehouse.keep_open():
            return {(table.name, p.key): self._read_content(table, p) for table, p in places}

    def _read_content(self, table: Table, partition: Partition) -> PartitionContent:
        try:
            stored = self.storage.read(table, partition)
        except Damaged:
            return PartitionContent(None, None)
        return PartitionContent(stored.height, fingerprint(stored))

    def write_receipt(
        self,
        request: Mapping[str, Any],
        before: Contents,
        after: Contents,
        *,
        fetched: Sequence[FetchSummary],
        cleaned: Sequence[Mapping[str, str]],
    ) -> Receipt:
        """Record what a repair did: counts, and rows and hash of every table before and after."""
        rows = [_content_row(key, before[key], after[key]) for key in after]
        changed = [row for row in rows if row["hash_before"] != row["hash_after"]]
        names = ("requests", "stored", "corrected", "refused")
        totals = {name: sum(getattr(summary, name) for summary in fetched) for name in names}
        failed = [
            {"table": f.table, "partition": f.partition, "says": f.error}
            for f in fetched
            if f.error
        ]
        message = (
            f"{len(changed)} of {len(rows)} changed: "
            f"{totals['stored'] - totals['corrected']} bars new, {totals['corrected']} corrected, "
            f"{totals['refused']} rows refused, {len(cleaned)} objects cleaned, "
            f"{len(failed)} partitions failed"
        )
        body = {
            "asked": dict(request),
            **totals,
            "tables": [row for row in rows if row["table"].startswith("raw/") or row in changed],
            "cleaned": [dict(each) for each in cleaned],
            "failed": failed,
        }
        return self.ledger.receipts.add("repair", self.settings.now(), message=message, body=body)


def repair_partitions(
    repairer: Repairer,
    pipeline: Pipeline,
    request: RepairRequest,
    *,
    on_result: Callable[[PipelineResult], None],
) -> RepairResult:
    """Repair what a request names and write the receipt; the work of the job `repair`.

    Parked partitions are tried again, invalid rows are removed, missing bars are fetched, gaps are
    explained and rollups are built. `on_result` receives every result of the pipeline; a partition
    that fails does not stop the others.
    """
    settings, partitions = repairer.settings, request.partitions
    unparked = repairer.ledger.attempts.clear(partitions)
    before = repairer.read_contents(partitions)
    cleaned = repairer.remove_invalid_rows(partitions)
    fetched = []
    for timeframe in settings.raw_timeframes:
        again = request.window if request.again else None
        for result in pipeline.fetch(timeframe, partitions, again):
            on_result(result)
            if isinstance(result, AuditedIngest):
                fetched.append(summarize_fetch(result.result))
    for rolled_up in pipeline.roll_up(partitions):
        on_result(rolled_up)
    after = repairer.read_contents(partitions)
    wanted = {
        **describe_request(partitions, request.window),
        "again": request.again,
        "run": request.run_id,
    }
    receipt = repairer.write_receipt(wanted, before, after, fetched=fetched, cleaned=cleaned)
    return RepairResult(receipt, unparked)


def summarize_fetch(result: IngestResult) -> FetchSummary:
    """Return what an ingest brought, for the receipt."""
    return FetchSummary(
        table=raw_table(result.timeframe).name,
        partition=result.partition.key,
        requests=result.requests,
        stored=result.account.stored,
        corrected=result.replaced.height,
        refused=result.account.quarantined,
        error=str(result.error) if result.error else None,
    )


def describe_request(partitions: Sequence[Partition], window: Window) -> dict[str, Any]:
    """Return what a repair was asked for, for its receipt."""
    markets = sorted({partition.market.key for partition in partitions})
    return {"markets": markets, "start": format_time(window.start), "end": format_time(window.end)}


def _content_row(
    key: tuple[str, str], before: PartitionContent, after: PartitionContent
) -> dict[str, Any]:
    table, partition = key
    return {
        "table": table,
        "partition": partition,
        "rows_before": before.rows,
        "hash_before": before.hash,
        "rows_after": after.rows,
        "hash_after": after.hash,
    }
