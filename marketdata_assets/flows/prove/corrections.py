"""Corrections: the closed bars that a venue replaced, and what they became."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import polars as pl

from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.intervals import opens_inside
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import Table, history_table, raw_table
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake


@dataclass(frozen=True, slots=True)
class Correction:
    """One bar that was replaced.

    `changes` holds, by column, what it was and what it became; None for a value that was not given.
    """

    table: Table
    market: Market
    open_time: datetime
    known_at: datetime | None
    corrected_at: datetime
    source: str
    changes: dict[str, tuple[Any, Any]]


def list_corrections(
    settings: Settings,
    lake: Lake,
    markets: Iterable[Market],
    *,
    window: Window,
    since: datetime | None = None,
) -> Iterator[Correction]:
    """Yield the corrections of bars that open inside the window, by market and open_time.

    `since` (our clock, inclusive) leaves out earlier corrections. Raises Damaged.
    """
    tables = [raw_table(timeframe) for timeframe in settings.raw_timeframes]
    stored = {table: lake.list_sizes(history_table(table.timeframe)) for table in tables}
    for market in markets:
        for table in tables:
            for partition in partitions_of(market, window):
                if partition.stored_key in stored[table]:
                    yield from _corrections(lake, table, partition, window=window, since=since)


def _corrections(
    lake: Lake, table: Table, partition: Partition, *, window: Window, since: datetime | None
) -> Iterator[Correction]:
    for before, after in _revision_pairs(lake, table, partition, window=window):
        if since is not None and before["replaced_at"] < since:
            continue
        changes = {n: (before[n], after[n]) for n in COLUMN_NAMES if before[n] != after[n]}
        if changes:  # a run that died before it replaced the bar has recorded an equal revision
            yield Correction(
                table,
                partition.market,
                before["open_time"],
                known_at=before["known_at"],
                corrected_at=before["replaced_at"],
                source=after["source"] or "",
                changes=changes,
            )


def _revision_pairs(
    lake: Lake, table: Table, partition: Partition, *, window: Window
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each replaced revision with the one after it."""
    stored = lake.read(table, partition, with_provenance=True)
    replaced = lake.read(history_table(table.timeframe), partition)
    if stored is None or replaced is None:
        return
    revisions = pl.concat([replaced, stored], how="diagonal").filter(opens_inside(window))
    revisions = revisions.join(replaced.select("open_time").unique(), on="open_time", how="semi")
    revisions = revisions.sort("open_time", "replaced_at", nulls_last=True, maintain_order=True)
    for before, after in pairwise(revisions.rows(named=True)):
        if before["open_time"] == after["open_time"] and before["replaced_at"] is not None:
            yield before, after
