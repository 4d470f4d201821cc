"""Plan: what a backfill would do, and what it would cost, before anything runs. Sends no request."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from marketdata_assets.context import Toolbox
from marketdata_assets.flows.fetch.ingest import wanted_window
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.intervals import find_gaps, subtract_windows
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw, rollup
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Venue
from marketdata_assets.sources.archive.names import month_file_url
from marketdata_assets.venues.registry import facts_of

OVERLAP = 2
"""Bars of each page that its neighbors return as well."""


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
        raw(tf): toolbox.gaps.due(raw(tf), toolbox.settings.now())
        for tf in toolbox.settings.raw_timeframes
    }
    return [
        task for partition in partitions if (task := _task(toolbox, partition, due)) is not None
    ]


def page_size(market: Market) -> int:
    """How many new bars a venue's answer brings, about."""
    return facts_of(market.venue).endpoint(market.symbol).page_size - OVERLAP


def minutes(tasks: Sequence[Task], venue: Venue) -> float:
    """How long the venue's limit makes these requests take, at the least."""
    return sum(
        task.requests for task in tasks if task.partition.market.venue == venue.name
    ) / per_minute(venue)


def per_minute(venue: Venue) -> int:
    """How many requests a minute the venue's limit lets through."""
    return venue.requests_per_minute or (
        facts_of(venue.name).endpoint(venue.symbols[0]).requests_per_minute
    )


_Due = Mapping[Table, Container[tuple[str, str]]]
"""By table: market key and month key of the partitions with a gap that is to be asked for again."""


def _task(toolbox: Toolbox, partition: Partition, due: _Due) -> Task | None:
    venue = toolbox.settings.venues[partition.market.venue]
    lacking = {tf: _lacking(toolbox, tf, partition, due) for tf in venue.fetched}
    bars = sum(lacking.values())
    page = page_size(partition.market)
    requests = sum(math.ceil(n / page) for n in lacking.values())
    state = toolbox.ledger.state(raw(venue.base), partition)
    if bars:
        offers = tuple(
            offer
            for tf, n in lacking.items()
            if n and (offer := _offer(toolbox, tf, partition, n, math.ceil(n / page)))
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
    facts = facts_of(market.venue)
    if facts.newest_bars_only and facts.archive and facts.archive.overview_url:
        oldest = timeframe.floor(now) - facts.newest_bars_only * timeframe.width
        gone = min(
            bars,
            (
                wanted_window(toolbox, timeframe, partition) & Window(partition.month.start, oldest)
            ).count(timeframe),
        )
        return Offer(timeframe, gone, None, facts.archive.overview_url) if gone else None
    url = month_file_url(market, timeframe, partition.month, now=now)
    if facts.archive is None or url is None or requests <= facts.archive.files_per_month:
        return None
    return Offer(timeframe, bars, requests - facts.archive.files_per_month, url)


def _reason(known: bool, error: str | None) -> str:
    if error:
        return f"failed: {error}"
    return "open, or holds a gap that may still be filled" if known else "missing"


def _lacking(toolbox: Toolbox, timeframe: Timeframe, partition: Partition, due: _Due) -> int:
    """Bars that a backfill would ask for. Reads the object only where the ledger cannot say."""
    table, wanted = raw(timeframe), wanted_window(toolbox, timeframe, partition)
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
    quiet = (partition.market.key, partition.month_key) not in due[table]
    if state.complete and quiet and state.start <= wanted.start and wanted.end <= state.through:
        return 0
    stored = toolbox.lake.read(table, partition)
    opens = (empty_bars() if stored is None else stored)["open_time"]
    now = toolbox.settings.now()
    waiting = [gap.window for gap in toolbox.ledger.gaps(table, partition) if not gap.due(now)]
    return sum(
        rest.count(timeframe)
        for rest in subtract_windows(find_gaps(opens, timeframe, wanted), waiting)
    )


def _rolled(toolbox: Toolbox, partition: Partition, rolled: str | None, digest: str | None) -> bool:
    timeframes = toolbox.settings.rolled(partition.market)
    if not timeframes:
        return True
    if rolled is None or rolled != digest:
        return False
    if toolbox.settings.rollups == "duckdb":
        return toolbox.warehouse.exists
    return all(toolbox.lake.size(rollup(tf), partition) is not None for tf in timeframes)
