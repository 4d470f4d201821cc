"""Ingest: fetch what a partition lacks, believe what answers agree on, store it, write down every row and every gap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace

import polars as pl

from marketdata_assets.errors import Damaged, MarketDataError, Unreachable
from marketdata_assets.flows.collect import Collected, collect
from marketdata_assets.lake.ledger import Account, Entry, Gap, State, logged
from marketdata_assets.lake.tables import Table, raw
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.window import Partition, Timeframe, Window
from marketdata_assets.quality.contract import check_bars
from marketdata_assets.toolbox import Toolbox


@dataclass(frozen=True, slots=True)
class Ingested:
    """One partition after an ingest: what is stored now, and what it took.

    `wanted` is the window of open times that the universe asks for, as far as the venue's clock has come; `bars` all
    that is stored of it. `error` is set when the ingest failed; then everything stored is as it was.
    """

    partition: Partition
    timeframe: Timeframe
    wanted: Window
    bars: pl.DataFrame
    gaps: tuple[Gap, ...]
    account: Account
    bytes: int
    complete: bool
    requests: int = 0
    retries: int = 0
    waited: float = 0.0
    note: str | None = None
    error: MarketDataError | None = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    partition: Partition
    table: Table
    wanted: Window
    stored: pl.DataFrame
    gaps: list[Gap]
    state: State | None
    note: str | None = None


_Started = tuple[_Prepared, Future[Collected], ExitStack]


def wanted_window(toolbox: Toolbox, timeframe: Timeframe, partition: Partition) -> Window:
    """The open times the universe wants of a partition: whole bars between since and until (or our now)."""
    venue = toolbox.settings.venues[partition.market.venue]
    if timeframe not in venue.fetched:
        return Window(partition.month.start, partition.month.start)
    span = toolbox.settings.span(partition.market)
    return partition.opens(timeframe) & Window(timeframe.ceil(span.start), timeframe.floor(span.end))


def ingest(toolbox: Toolbox, timeframe: Timeframe, partitions: Sequence[Partition]) -> Iterator[Ingested]:
    """Bring each partition up to date, in order. While one is stored, the next one's requests are under way.

    A partition that fails is yielded with its error and the others go on. Partitions are held against other
    processes one at a time: whoever comes second finds the work done.
    """
    table = raw(timeframe)
    ahead: _Started | None = None
    for i, partition in enumerate(partitions):
        prepared, future, held = ahead or _start(toolbox, table, partition)
        ahead = _start_if_free(toolbox, table, partitions[i + 1]) if i + 1 < len(partitions) else None
        with held:
            yield _finish(toolbox, prepared, future)


def _start(toolbox: Toolbox, table: Table, partition: Partition) -> _Started:
    """Hold the partition, see what it lacks, send the requests."""
    with ExitStack() as held:
        held.enter_context(toolbox.ledger.lock(partition.key))
        return *_ask(toolbox, table, partition), held.pop_all()


def _start_if_free(toolbox: Toolbox, table: Table, partition: Partition) -> _Started | None:
    """The same, unless another process holds the partition: waiting for it now could end in a deadlock."""
    with ExitStack() as held:
        if not held.enter_context(toolbox.ledger.lock(partition.key, wait=False)):
            return None
        return *_ask(toolbox, table, partition), held.pop_all()


def _ask(toolbox: Toolbox, table: Table, partition: Partition) -> tuple[_Prepared, Future[Collected]]:
    try:
        prepared = _prepare(toolbox, table, partition)
    except MarketDataError as error:  # what lies there cannot even be looked at
        failed: Future[Collected] = Future()
        failed.set_exception(error)
        return _Prepared(partition, table, Window(partition.month.start, partition.month.start), empty_bars(), [], None), failed
    work = collect(toolbox, partition.market, table.timeframe, prepared.wanted, prepared.stored, prepared.gaps)
    return prepared, toolbox.submit(work)


def _prepare(toolbox: Toolbox, table: Table, partition: Partition) -> _Prepared:
    wanted = wanted_window(toolbox, table.timeframe, partition)
    state, note = toolbox.ledger.state(table, partition), None
    try:
        stored = toolbox.lake.read(table, partition)
    except Damaged as damage:
        note = f"{damage}; set aside as {toolbox.lake.set_aside(table, partition)}"
        stored = None
    gaps = toolbox.ledger.gaps(table, partition)
    return _Prepared(partition, table, wanted, empty_bars() if stored is None else stored, gaps, state, note)


def _finish(toolbox: Toolbox, prepared: _Prepared, future: Future[Collected]) -> Ingested:
    try:
        return _store(toolbox, prepared, future.result())
    except MarketDataError as error:
        fetches = logged(error.requests, prepared.wanted)
        forgiven = isinstance(error, Unreachable)
        toolbox.ledger.fail(prepared.table, prepared.partition, prepared.wanted, str(error), fetches, toolbox.settings.now(), forgiven)
        retries = len(error.requests)
        failed = _ingested(prepared, prepared.stored, prepared.gaps, Account(), (prepared.state and prepared.state.bytes) or 0, False)
        return replace(failed, requests=retries, retries=retries, error=error)


def _store(toolbox: Toolbox, prepared: _Prepared, got: Collected) -> Ingested:
    table, partition = prepared.table, prepared.partition
    bars = _merged(prepared.stored, got.bars)
    size, digest = (prepared.state.bytes, prepared.state.digest) if prepared.state else (None, None)
    if size is None or prepared.note or not bars.equals(prepared.stored) or size != toolbox.lake.size(table, partition):
        size, digest = toolbox.lake.write(table, partition, check_bars(bars))
    complete = got.through >= prepared.wanted.end and all(gap.settled for gap in got.gaps)
    state = State(
        start=prepared.wanted.start,
        through=max(got.through, prepared.wanted.start, prepared.state.through if prepared.state else got.through),
        newest=bars["open_time"][-1] if bars.height else None,
        complete=complete,
        rows=bars.height,
        bytes=size,
        digest=digest,
        rolled=prepared.state.rolled if prepared.state else None,
        attempts=prepared.state.attempts + 1 if prepared.state else 1,
        failures=0,
        error=None,
    )
    now = toolbox.settings.now()
    toolbox.ledger.commit(Entry(table, partition, state, got.account, got.gaps, got.fetches, got.rejected, got.answers, now))
    done = _ingested(prepared, bars, got.gaps, got.account, size or 0, complete)
    come = Window(prepared.wanted.start, max(prepared.wanted.start, min(prepared.wanted.end, state.through)))
    return replace(done, wanted=come, requests=len(got.fetches), retries=got.retries, waited=got.waited)


def _ingested(prepared: _Prepared, bars: pl.DataFrame, gaps: Sequence[Gap], account: Account, size: int, complete: bool) -> Ingested:
    return Ingested(
        prepared.partition, prepared.table.timeframe, prepared.wanted, bars, tuple(gaps), account, size, complete, note=prepared.note
    )


def _merged(stored: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """What was stored and what is new; where both have an open_time, the new bar stands (two answers agreed on it)."""
    if new.is_empty():
        return stored
    if stored.is_empty():
        return new
    return pl.concat([stored.join(new, on="open_time", how="anti"), new]).sort("open_time")
