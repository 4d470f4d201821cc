"""Derive: all rollups of a partition in one step from one read, touching only what changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.ledger.ledger import WAREHOUSE, State
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.partition import Partition, neighbour
from marketdata_assets.model.table import raw, rollup
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.transforms.rollup import roll_up

WRITES_AT_ONCE = 4
"""Objects of one partition that are on their way to S3."""


@dataclass(frozen=True, slots=True)
class Derived:
    """The rollups of one partition: the bars now stored by timeframe, and how many rows each write
    changed.

    `whole` is the window of base bars that were asked for: every bar that lies wholly inside was
    rolled up.
    """

    partition: Partition
    frames: dict[Timeframe, pl.DataFrame]
    changed: dict[Timeframe, int]
    whole: Window


def derive(toolbox: Toolbox, partitions: Sequence[Partition]) -> Iterator[Derived]:
    """Roll up each partition from the raw bars that are stored. A partition without raw bars gives no
    rollups.
    """
    for partition in partitions:
        yield _derive(toolbox, partition, _wanted(toolbox, partition))
        after = neighbour(partition, +1)
        state = _state(toolbox, after)
        if state is not None and state.rolled is not None:
            _derive(toolbox, after, _straddling(toolbox, after))


def _straddling(toolbox: Toolbox, partition: Partition) -> list[Timeframe]:
    """The timeframes whose first bar here began in the month before."""
    return [
        tf
        for tf in _wanted(toolbox, partition)
        if partition.opens(tf).start < partition.month.start
    ]


def _wanted(toolbox: Toolbox, partition: Partition) -> list[Timeframe]:
    """The timeframes of a market, but for those whose retention has removed this month."""
    settings = toolbox.settings
    return [
        tf
        for tf in settings.rolled(partition.market)
        if partition.month.start >= settings.kept_since(rollup(tf).name)
    ]


def _derive(toolbox: Toolbox, partition: Partition, timeframes: Sequence[Timeframe]) -> Derived:
    base = toolbox.settings.venues[partition.market.venue].base
    state = _state(toolbox, partition)
    if state is None or state.bytes is None or not timeframes:
        return Derived(partition, {}, {}, Window(partition.month.start, partition.month.start))
    bars = toolbox.lake.read(raw(base), partition)
    before, start = _tail(toolbox, partition, base)
    joined = pl.concat([before, empty_bars() if bars is None else bars])
    whole = known(joined["open_time"], base, Window(start or state.start, state.through))
    frames = roll_up(joined, base, timeframes, whole=whole)
    owned = {tf: partition.opens(tf) for tf in timeframes}
    frames = {
        tf: f.filter(pl.col("open_time").is_between(owned[tf].start, owned[tf].end, closed="left"))
        for tf, f in frames.items()
    }
    changed = _write(toolbox, partition, frames, owned)
    if len(timeframes) == len(_wanted(toolbox, partition)) and state.digest:
        toolbox.ledger.set_rolled(raw(base), partition, state.digest)
    return Derived(partition, frames, changed, whole)


def known(opens: pl.Series, base: Timeframe, asked: Window) -> Window:
    """What has been asked for, and what was stored before by somebody who wanted more (another
    machine, an earlier `since`).
    """
    if opens.is_empty():
        return asked
    return Window(min(asked.start, opens[0]), max(asked.end, opens[-1] + base.width))


def _tail(
    toolbox: Toolbox, partition: Partition, base: Timeframe
) -> tuple[pl.DataFrame, datetime | None]:
    """The last days of the month before, and since when there is no span that was not asked for."""
    first = min(
        (partition.opens(tf).start for tf in toolbox.settings.rolled(partition.market)),
        default=partition.month.start,
    )
    earlier = neighbour(partition, -1)
    state = _state(toolbox, earlier)
    if first >= partition.month.start or state is None or state.through < partition.month.start:
        return empty_bars(), None
    bars = toolbox.lake.read(raw(base), earlier, since=first)
    if bars is None:
        return empty_bars(), None
    return bars.filter(pl.col("open_time") >= first), max(first, state.start)


def _state(toolbox: Toolbox, partition: Partition) -> State | None:
    return toolbox.ledger.state(
        raw(toolbox.settings.venues[partition.market.venue].base), partition
    )


def _write(
    toolbox: Toolbox,
    partition: Partition,
    frames: dict[Timeframe, pl.DataFrame],
    owned: dict[Timeframe, Window],
) -> dict[Timeframe, int]:
    if toolbox.settings.rollups == "duckdb":
        with toolbox.ledger.lock(WAREHOUSE):
            changed = toolbox.warehouse.replace(partition.market, frames, owned)
        return {tf: changed[tf.name] for tf in frames}

    def write(timeframe: Timeframe) -> bool:
        return toolbox.lake.write_changed(rollup(timeframe), partition, frames[timeframe])

    with ThreadPoolExecutor(1 if toolbox.lake.local else WRITES_AT_ONCE) as pool:
        return {
            tf: frames[tf].height * changed
            for tf, changed in zip(frames, pool.map(write, frames), strict=True)
        }
