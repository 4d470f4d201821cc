"""Revisions: what was known at a moment, and what was corrected since. Sends no request."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.read.bars import base_of, table_of
from marketdata_assets.model.bar import NAMES, ROLLUP_SCHEMA, TIME, empty_bars
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, neighbour, partitions_of
from marketdata_assets.model.table import Table, history, raw
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, iso
from marketdata_assets.transforms.rollup import roll_up


def read_as_of(
    toolbox: Toolbox, market: Market, timeframe: Timeframe, window: Window, moment: datetime
) -> pl.DataFrame:
    """The bars that open inside the window as they were known at `moment` (our clock, inclusive),
    sorted by open_time.

    Fetched timeframes come from the stored bars and their history, rolled-up ones are rolled up
    from what was known then. A bar of before revisions were kept counts as always known. Raises
    BadInput for a moment before the first fetch.
    """
    if moment > toolbox.settings.now():
        raise BadInput(
            f"--as-of {iso(moment)} lies in the future; it is now {iso(toolbox.settings.now())}"
        )
    table = table_of(toolbox, market, timeframe)
    if table.layer not in ("raw", "rollup"):
        raise BadInput(
            f"{market.key} keeps no revisions, as it is made of other markets; ask for one of these as of {iso(moment)}"
        )
    base = timeframe if table.layer == "raw" else base_of(toolbox, market)
    span = Window(window.start, window.end + timeframe.width)
    known = toolbox.ledger.states(raw(base), market)
    months = [p for p in partitions_of(market, span) if p.month_key in known]
    frames = [partition_as_of(toolbox, table, partition, moment) for partition in months]
    inside = pl.col("open_time").is_between(window.start, window.end, closed="left")
    found = pl.concat(frames).filter(inside) if frames else pl.DataFrame(schema=table.schema)
    if found.is_empty():
        _refuse_before_the_first(toolbox, market, base, months, moment)
    return found


def partition_as_of(
    toolbox: Toolbox, table: Table, partition: Partition, moment: datetime
) -> pl.DataFrame:
    """One partition of a table as it was known at `moment`; no bars where nothing was."""
    if table.layer == "raw":
        return _raw_then(toolbox, partition, table.timeframe, moment)
    return _rolled_then(
        toolbox, partition, base_of(toolbox, partition.market), table.timeframe, moment
    )


def _refuse_before_the_first(
    toolbox: Toolbox, market: Market, base: Timeframe, months: Iterable[Partition], moment: datetime
) -> None:
    stored = [toolbox.lake.read(raw(base), partition, provenance=True) for partition in months]
    before = [toolbox.lake.read(history(base), partition) for partition in months]
    known = pl.concat(
        [
            pl.Series("known_at", dtype=TIME),
            *(f["known_at"] for f in (*stored, *before) if f is not None),
        ]
    )
    first = None if known.null_count() else known.min()
    if isinstance(first, datetime) and first > moment:
        raise BadInput(
            f"nothing of {market.key} in these months was known at {iso(moment)}; the first of it was fetched at {iso(first)}"
        )


def _raw_then(
    toolbox: Toolbox, partition: Partition, base: Timeframe, moment: datetime
) -> pl.DataFrame:
    """One partition of a fetched timeframe."""
    stored = toolbox.lake.read(raw(base), partition, provenance=True)
    if stored is None:
        return empty_bars()
    known = pl.col("known_at").is_null() | (pl.col("known_at") <= moment)
    current = stored.filter(known)
    if current.height == stored.height:
        return current.select(NAMES)
    former = toolbox.lake.read(history(base), partition)
    if former is None:
        return current.select(NAMES)
    then = former.filter(known & (pl.col("replaced_at") > moment)).join(
        current, on="open_time", how="anti"
    )
    return pl.concat(
        [
            current.select(NAMES),
            then.unique("open_time", keep="first", maintain_order=True).select(NAMES),
        ]
    ).sort("open_time")


def _rolled_then(
    toolbox: Toolbox, partition: Partition, base: Timeframe, timeframe: Timeframe, moment: datetime
) -> pl.DataFrame:
    """One partition of a rolled-up timeframe: made as flows.derive would have made it then."""
    owned, earlier = partition.opens(timeframe), neighbour(partition, -1)
    state, before = (toolbox.ledger.state(raw(base), p) for p in (partition, earlier))
    if state is None:
        return pl.DataFrame(schema=ROLLUP_SCHEMA)
    bars, start = _raw_then(toolbox, partition, base, moment), state.start
    if (
        owned.start < partition.month.start
        and before is not None
        and before.through >= partition.month.start
    ):
        tail = _raw_then(toolbox, earlier, base, moment).filter(pl.col("open_time") >= owned.start)
        bars, start = pl.concat([tail, bars]), max(owned.start, before.start)
    if bars.is_empty():
        return roll_up(bars, base, [timeframe], whole=owned)[timeframe]
    whole = state.whole_at is not None and state.whole_at <= moment
    asked = Window(
        min(start, bars["open_time"][0]),
        max(bars["open_time"][-1] + base.width, state.through if whole else start),
    )
    made = roll_up(bars, base, [timeframe], whole=asked)[timeframe]
    return made.filter(pl.col("open_time").is_between(owned.start, owned.end, closed="left"))


# --------------------------------------------------------------------------------- the report
