"""Plan: what a backfill would do, and what it would cost, before anything runs. Sends no request."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from marketdata_assets.context import Toolbox
from marketdata_assets.flows.fetch.ingest import wanted_window
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.intervals import holes, left_of
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Venue
from marketdata_assets.sources.archive import (
    FILES_A_MONTH,
    NEWEST_ONLY,
    ONLY_IN_FILES,
    monthly_archive,
)

PAGE = {"binance": 998, "binanceus": 998}
PER_MINUTE = {"binance": 3000, "binanceus": 600}
DEFAULT_PAGE, DEFAULT_PER_MINUTE = 298, 60


@dataclass(frozen=True, slots=True)
class Offer:
    """Bars of one table of a partition that files give for less: `url` is where they are. We download
    nothing ourselves.

    `requests`: how many the files save; None where the venue's API has not these bars at all.
    """

    timeframe: Timeframe
    bars: int
    requests: int | None
    url: str


@dataclass(frozen=True, slots=True)
class Task:
    """One partition that needs work: bars to fetch, about how many requests that takes, and why."""

    partition: Partition
    bars: int
    requests: int
    reason: str
    offers: tuple[Offer, ...] = ()


def plan(toolbox: Toolbox, partitions: Sequence[Partition]) -> list[Task]:
    """The partitions that are missing, open or not rolled up, in the order given."""
    due = {
        raw_table(tf): toolbox.gaps.due(raw_table(tf), toolbox.settings.now())
        for tf in toolbox.settings.raw_timeframes
    }
    return [
        task for partition in partitions if (task := _task(toolbox, partition, due)) is not None
    ]


def page_size(venue: str) -> int:
    """How many new bars a venue's answer brings, about."""
    return PAGE.get(venue, DEFAULT_PAGE)


def minutes(tasks: Sequence[Task], venue: Venue) -> float:
    """How long the venue's limit makes these requests take, at the least."""
    return sum(
        task.requests for task in tasks if task.partition.market.venue == venue.name
    ) / per_minute(venue)


def per_minute(venue: Venue) -> int:
    """How many requests a minute the venue's limit lets through."""
    return venue.requests_per_minute or PER_MINUTE.get(venue.name, DEFAULT_PER_MINUTE)


_Due = Mapping[Table, Container[tuple[str, str]]]
"""By table: market key and month key of the partitions with a gap that is to be asked for again."""


def _task(toolbox: Toolbox, partition: Partition, due: _Due) -> Task | None:
    venue = toolbox.settings.venues[partition.market.venue]
    lacking = {tf: _lacking(toolbox, tf, partition, due) for tf in venue.fetched}
    bars = sum(lacking.values())
    requests = sum(math.ceil(n / page_size(venue.name)) for n in lacking.values())
    state = toolbox.ledger.state(raw_table(venue.base), partition)
    if bars:
        offers = tuple(
            offer
            for tf, n in lacking.items()
            if n
            and (offer := _offer(toolbox, tf, partition, n, math.ceil(n / page_size(venue.name))))
        )
        return Task(
            partition,
            bars,
            requests,
            _reason(state is not None, state.error if state else None),
            offers,
        )
    if state is None or _rolled(toolbox, partition, state.rolled, state.digest):
        return None
    return Task(partition, 0, 0, "rollups are not up to date")


def _offer(
    toolbox: Toolbox, timeframe: Timeframe, partition: Partition, bars: int, requests: int
) -> Offer | None:
    """What files give of the bars that lack, where that costs less than asking, or where asking gives
    nothing.
    """
    market, now = partition.market, toolbox.settings.now()
    if market.venue in NEWEST_ONLY:
        oldest = timeframe.floor(now) - NEWEST_ONLY[market.venue] * timeframe.width
        gone = min(
            bars,
            (
                wanted_window(toolbox, timeframe, partition) & Window(partition.month.start, oldest)
            ).count(timeframe),
        )
        return Offer(timeframe, gone, None, ONLY_IN_FILES[market.venue]) if gone else None
    url = monthly_archive(market, timeframe, partition.month, now)
    return (
        Offer(timeframe, bars, requests - FILES_A_MONTH, url)
        if url and requests > FILES_A_MONTH
        else None
    )


def _reason(known: bool, error: str | None) -> str:
    if error:
        return f"failed: {error}"
    return "open, or holds a gap that may still be filled" if known else "missing"


def _lacking(toolbox: Toolbox, timeframe: Timeframe, partition: Partition, due: _Due) -> int:
    """Bars that a backfill would ask for. Reads the object only where the ledger cannot say."""
    table, wanted = raw_table(timeframe), wanted_window(toolbox, timeframe, partition)
    if not wanted:
        return 0
    state = toolbox.ledger.state(table, partition)
    there = (
        state is not None
        and state.bytes is not None
        and toolbox.lake.size(table, partition) == state.bytes
    )
    if state is None or not there:
        return wanted.count(timeframe)
    quiet = partition.stored_key not in due[table]
    if state.complete and quiet and state.start <= wanted.start and wanted.end <= state.through:
        return 0
    stored = toolbox.lake.read(table, partition)
    opens = (empty_bars() if stored is None else stored)["open_time"]
    now = toolbox.settings.now()
    waiting = [gap.window for gap in toolbox.ledger.gaps(table, partition) if not gap.due(now)]
    return sum(rest.count(timeframe) for rest in left_of(holes(opens, timeframe, wanted), waiting))


def _rolled(toolbox: Toolbox, partition: Partition, rolled: str | None, digest: str | None) -> bool:
    timeframes = toolbox.settings.rolled(partition.market)
    if not timeframes:
        return True
    if rolled is None or rolled != digest:
        return False
    if toolbox.settings.rollups == "duckdb":
        return toolbox.warehouse.exists
    return all(toolbox.lake.size(rollup_table(tf), partition) is not None for tf in timeframes)
