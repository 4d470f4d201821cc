"""Corrections: the stored bars that the venue replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import Table, history_table, raw_table
from marketdata_assets.model.window import Window


@dataclass(frozen=True, slots=True)
class Correction:
    """One bar that was replaced. `changes` holds what it was and what it became, by column, null where
    it was not given.
    """

    table: Table
    market: Market
    open_time: datetime
    known_at: datetime | None
    corrected_at: datetime
    source: str
    changes: dict[str, tuple[Any, Any]]


def corrections(
    toolbox: Toolbox, markets: Iterable[Market], window: Window, since: datetime | None = None
) -> Iterator[Correction]:
    """Every correction of bars that open inside the window, made at or after `since`, market by market
    in order of open_time.
    """
    tables = [raw_table(tf) for tf in toolbox.settings.raw_timeframes]
    there = {table: toolbox.lake.list_sizes(history_table(table.timeframe)) for table in tables}
    for market in markets:
        for table in tables:
            for partition in partitions_of(market, window):
                if (market.key, partition.month_key) in there[table]:
                    yield from _corrections(toolbox, table, partition, window, since)


def _corrections(
    toolbox: Toolbox, table: Table, partition: Partition, window: Window, since: datetime | None
) -> Iterator[Correction]:
    for was, became in _pairs(toolbox, table, partition, window):
        if since is None or was["replaced_at"] >= since:
            changes = {n: (was[n], became[n]) for n in COLUMN_NAMES if was[n] != became[n]}
            moments = was["open_time"], was["known_at"], was["replaced_at"]
            if changes:  # none: a run wrote this revision down and died before it replaced it
                yield Correction(table, partition.market, *moments, became["source"] or "", changes)


def _pairs(
    toolbox: Toolbox, table: Table, partition: Partition, window: Window
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each replaced revision with the one after it."""
    stored = toolbox.lake.read(table, partition, with_provenance=True)
    former = toolbox.lake.read(history_table(table.timeframe), partition)
    if stored is None or former is None:
        return
    inside = pl.col("open_time").is_between(window.start, window.end, closed="left")
    told = pl.concat([former.filter(inside), stored.filter(inside)], how="diagonal")
    told = told.join(former.select("open_time").unique(), on="open_time", how="semi").sort(
        "open_time", "replaced_at", nulls_last=True, maintain_order=True
    )
    rows = told.rows(named=True)
    for was, became in pairwise(rows):
        if was["open_time"] == became["open_time"] and was["replaced_at"] is not None:
            yield was, became
