"""Scan: from market, timeframe and span straight to the files, and bars that are read only when they
are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.flows.read.bars import in_warehouse, table_of
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window


def scan_bars(
    toolbox: Toolbox, market: Market, timeframe: Timeframe, window: Window
) -> pl.LazyFrame:
    """The bars that open inside the window, sorted by open_time; what is not stored is not there.
    Raises BadInput.
    """
    table = table_of(toolbox, market, timeframe)
    inside = pl.col("open_time").is_between(window.start, window.end, closed="left")
    if in_warehouse(toolbox, table):
        return toolbox.warehouse.read(table, market, window).lazy()
    frames = _scans(toolbox, table, market, Window(window.start, window.end + timeframe.width))
    return pl.concat([frame.filter(inside) for frame in frames])


def newest_bars(toolbox: Toolbox, markets: Sequence[Market], timeframe: Timeframe) -> pl.DataFrame:
    """The open time of each market's newest stored bar: raw ones from the ledger alone, rolled-up ones
    from their last objects.
    """
    known = {
        key: moment for key, (moment, *_) in toolbox.ledger.newest(raw_table(timeframe)).items()
    }
    rows = []
    for market in markets:
        table = table_of(toolbox, market, timeframe)
        moment = (
            known.get(market.key)
            if table.layer == "raw"
            else _newest_rolled(toolbox, table, market)
        )
        rows.append((market.key, moment))
    return pl.DataFrame(
        rows, schema={"market": pl.String, "open_time": pl.Datetime("us", "UTC")}, orient="row"
    )


def _newest_rolled(toolbox: Toolbox, table: Table, market: Market) -> object:
    base = toolbox.settings.venues[market.venue].base
    months = sorted(toolbox.ledger.states(raw_table(base), market), reverse=True)
    for month in months[
        :2
    ]:  # a week ends in the month after it began, so the newest month may have none yet
        partition = Partition.parse(f"{market.key}|{month}")
        window = partition.open_times(table.timeframe)
        found = (
            scan_bars(toolbox, market, table.timeframe, window)
            .select(pl.col("open_time").max())
            .collect()
            .item()
        )
        if found is not None:
            return found
    return None


def _scans(toolbox: Toolbox, table: Table, market: Market, window: Window) -> list[pl.LazyFrame]:
    partitions, known = list(partitions_of(market, window)), False
    if toolbox.settings.lake.startswith(
        "s3://"
    ):  # the ledger knows what is there; asking the store would take a listing
        stored = _stored_months(toolbox, table, market)
        known = bool(stored)
        partitions = [p for p in partitions if p.month_key in stored] if known else partitions
    frames = toolbox.lake.scan(table, partitions, all_exist=known)
    return frames or [pl.LazyFrame(schema=table.schema)]


def _stored_months(toolbox: Toolbox, table: Table, market: Market) -> set[str]:
    venue = toolbox.settings.venues.get(market.venue)
    source = raw_table(venue.base) if table.layer == "rollup" and venue else table
    states = toolbox.ledger.states(source, market)
    kept = f"{toolbox.settings.kept_since(table.name):%Y-%m-%d}"
    return {
        month
        for month, s in states.items()
        if (s.bytes if source == table else s.rolled) is not None and month >= kept
    }
