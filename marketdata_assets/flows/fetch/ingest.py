"""Ingest: fetch what a partition lacks, believe what answers agree on, store it, write down every row
and every gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import Damaged, MarketDataError, Unreachable
from marketdata_assets.flows.fetch.collect import Collected, collect, still_lacking
from marketdata_assets.ledger.ledger import Account, Entry, Gap, State, logged
from marketdata_assets.model.bar import COLUMN_NAMES, HISTORY_COLUMNS, STORED_RAW_SCHEMA, TIME
from marketdata_assets.model.intervals import holes, left_of, runs, without
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, history_table, raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.quality.agreement import Beside, beside
from marketdata_assets.quality.clean import clean
from marketdata_assets.quality.contract import check_bars
from marketdata_assets.quality.split import reject

REST = "rest"
"""The source of bars that the venue's API told."""
CLEAN_UP = "clean-up"
"""The source of rows that lay in the lake and must not."""


def _no_bars(*more: str) -> pl.DataFrame:
    return pl.DataFrame(schema={**STORED_RAW_SCHEMA, **dict.fromkeys(more, TIME)})


@dataclass(frozen=True, slots=True)
class Ingested:
    """One partition after an ingest: what is stored now, and what it took.

    `wanted` is the window of open times that the universe asks for, as far as the venue's clock has
    come; `bars` all that is stored of it; `replaced` the bars of which it holds another revision
    now, as they lie in the history. `error` is set when the ingest failed; then everything stored
    is as it was.
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
    replaced: pl.DataFrame = field(default_factory=lambda: _no_bars("replaced_at"))
    beside: Beside | None = None
    """What was taken in, beside what was stored before."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One partition before an ingest; `stored` has the bars with their provenance."""

    partition: Partition
    table: Table
    wanted: Window
    stored: pl.DataFrame
    gaps: list[Gap]
    state: State | None
    note: str | None = None


_Started = tuple[_Prepared, Future[Collected], ExitStack]


def wanted_window(toolbox: Toolbox, timeframe: Timeframe, partition: Partition) -> Window:
    """The open times the universe wants of a partition: whole bars between since and until (or our
    now).
    """
    venue = toolbox.settings.venues[partition.market.venue]
    if timeframe not in venue.fetched:
        return Window(partition.month.start, partition.month.start)
    span = toolbox.settings.span(partition.market)
    return partition.open_times(timeframe) & Window(
        timeframe.ceil(span.start), timeframe.floor(span.end)
    )


def ingest(
    toolbox: Toolbox,
    timeframe: Timeframe,
    partitions: Sequence[Partition],
    again: Window | None = None,
) -> Iterator[Ingested]:
    """Bring each partition up to date, in order. While one is stored, the next one's requests are
    under way.

    Bars that open inside `again` are asked for once more; where the venue tells another bar twice,
    it becomes the stored one, and the one before goes to the history.

    A partition that fails is yielded with its error and the others go on. Partitions are held
    against other processes one at a time: whoever comes second finds the work done.
    """
    table = raw_table(timeframe)
    ahead: _Started | None = None
    for i, partition in enumerate(partitions):
        prepared, future, held = ahead or _start(toolbox, table, partition, again)
        ahead = (
            _start_if_free(toolbox, table, partitions[i + 1], again)
            if i + 1 < len(partitions)
            else None
        )
        with held:
            yield _finish(toolbox, prepared, future)


def take_in(
    toolbox: Toolbox,
    timeframe: Timeframe,
    partition: Partition,
    kept: pl.DataFrame,
    rejected: pl.DataFrame,
    source: str | Sequence[str],
    final: bool = True,
) -> Ingested:
    """Store bars of one partition that something else than the venue's API told: `source`, such as a
    file's name.

    `kept` (model.bar.COLUMN_NAMES, one bar an open_time) has passed the rules, `rejected`
    (quality.split.REJECTED_SCHEMA) has not. Of several sources, the column `answer` of both frames
    says which one told a row. What is stored already stays: a bar that says the same is identical,
    another one is refused as `disagrees`. A hole between two bars of `kept` is a gap by the
    evidence of its source: settled where that has the last word (`final`), else to be asked for.
    Sends no request.
    """
    table, sources = raw_table(timeframe), [source] if isinstance(source, str) else list(source)
    with toolbox.ledger.lock(partition.key):
        prepared = _prepare(toolbox, table, partition)
        got, found = _told(prepared, kept, rejected, sources, final)
        return replace(_store(toolbox, prepared, got, sources), beside=found)


def _told(
    prepared: _Prepared,
    kept: pl.DataFrame,
    rejected: pl.DataFrame,
    sources: Sequence[str],
    final: bool = True,
) -> tuple[Collected, Beside]:
    """What is to be stored of rows that were told, and all of them beside what is stored."""
    timeframe = prepared.table.timeframe
    if len(sources) == 1:
        kept = kept.with_columns(pl.lit(0, pl.Int64).alias("answer"))
    found = beside(kept.select("answer", *COLUMN_NAMES).sort("open_time"), prepared.stored)
    bars = found.new.with_columns(
        pl.col("answer")
        .replace_strict(range(len(sources)), sources, return_dtype=pl.String)
        .alias("source")
    )
    opens = pl.concat([prepared.stored["open_time"], bars["open_time"]]).sort()
    known = still_lacking(prepared.gaps, opens, timeframe)
    moments = kept["open_time"].sort()
    inside = Window(moments[0], moments[-1]) & prepared.wanted if kept.height else None
    told = left_of(holes(opens, timeframe, inside) if inside else [], [gap.window for gap in known])
    broken = runs(
        rejected["open_time"].drop_nulls().dt.truncate(timeframe.every).to_list(), timeframe
    )
    gaps = known + [
        gap for window in told for gap in _gaps_told(window, broken, timeframe, sources, final)
    ]
    lacking = left_of(
        holes(opens, timeframe, prepared.wanted), [gap.window for gap in gaps if gap.settled]
    )
    got = Collected(
        bars=bars,
        rejected=pl.concat([rejected, reject(found.denied, "disagrees")]),
        gaps=tuple(sorted(gaps)),
        account=Account(
            kept.height + rejected.height,
            bars.height,
            found.identical.height,
            rejected.height + found.denied.height,
        ),
        through=lacking[0].start if lacking else prepared.wanted.end,
    )
    return got, found


def _gaps_told(
    window: Window,
    broken: Sequence[Window],
    timeframe: Timeframe,
    sources: Sequence[str],
    final: bool,
) -> list[Gap]:
    """A hole between two bars that were told: where its rows were refused that is why, and elsewhere
    there were none.
    """
    teller = (
        sources[0] if len(sources) == 1 else f"{sources[0]} .. {sources[-1]} ({len(sources)} files)"
    )
    absent = without(window, broken)
    says = f"{teller} holds both neighbours and nothing between"
    return [
        *(
            Gap(w, w.count(timeframe), "quarantined", 1, f"{teller} holds it, and it was refused")
            for w in without(window, absent)
        ),
        *(
            Gap(
                w, w.count(timeframe), "no_bars" if final else "unanswered", 2 if final else 1, says
            )
            for w in absent
        ),
    ]


def clean_stored(toolbox: Toolbox, timeframe: Timeframe, partition: Partition) -> str:
    """Take rows out of a partition that must not be there (see quality.clean); what was wrong, empty
    when nothing was.

    What was stored twice stays once; what is refused goes to quarantine, and what is lacking then
    is fetched by the next ingest. A damaged object is left to that, too.
    """
    table = raw_table(timeframe)
    with toolbox.ledger.lock(partition.key):
        prepared = _prepare(toolbox, table, partition)
        cleaned = clean(prepared.stored, timeframe, partition.open_times(timeframe))
        says = cleaned.says
        if says:
            prepared = replace(prepared, stored=cleaned.bars, note=prepared.note or says)
            got, _ = _told(prepared, cleaned.bars.clear(), cleaned.rejected, [CLEAN_UP])
            _store(toolbox, prepared, got, [CLEAN_UP])
        return prepared.note or says


def _start(toolbox: Toolbox, table: Table, partition: Partition, again: Window | None) -> _Started:
    """Hold the partition, see what it lacks, send the requests."""
    with ExitStack() as held:
        held.enter_context(toolbox.ledger.lock(partition.key))
        return *_ask(toolbox, table, partition, again), held.pop_all()


def _start_if_free(
    toolbox: Toolbox, table: Table, partition: Partition, again: Window | None
) -> _Started | None:
    """The same, unless another process holds the partition: waiting for it now could end in a
    deadlock.
    """
    with ExitStack() as held:
        if not held.enter_context(toolbox.ledger.lock(partition.key, wait=False)):
            return None
        return *_ask(toolbox, table, partition, again), held.pop_all()


def _ask(
    toolbox: Toolbox, table: Table, partition: Partition, again: Window | None
) -> tuple[_Prepared, Future[Collected]]:
    try:
        prepared = _prepare(toolbox, table, partition)
    except MarketDataError as error:  # what lies there cannot even be looked at
        failed: Future[Collected] = Future()
        failed.set_exception(error)
        return _Prepared(
            partition,
            table,
            Window(partition.month.start, partition.month.start),
            _no_bars(),
            [],
            None,
        ), failed
    inside = again & prepared.wanted if again else None
    work = collect(
        toolbox,
        partition.market,
        table.timeframe,
        prepared.wanted,
        prepared.stored,
        prepared.gaps,
        inside,
    )
    return prepared, toolbox.submit(work)


def _prepare(toolbox: Toolbox, table: Table, partition: Partition) -> _Prepared:
    wanted = wanted_window(toolbox, table.timeframe, partition)
    state, note = toolbox.ledger.state(table, partition), None
    try:
        stored = toolbox.lake.read(table, partition, with_provenance=True)
    except Damaged as damage:
        note = f"{damage}; set aside as {toolbox.lake.quarantine_object(table, partition)}"
        stored = None
    gaps = toolbox.ledger.gaps(table, partition)
    return _Prepared(
        partition, table, wanted, _no_bars() if stored is None else stored, gaps, state, note
    )


def _finish(toolbox: Toolbox, prepared: _Prepared, future: Future[Collected]) -> Ingested:
    try:
        return _store(toolbox, prepared, future.result())
    except MarketDataError as error:
        fetches = logged(error.requests, prepared.wanted)
        forgiven = isinstance(error, Unreachable)
        toolbox.ledger.fail(
            prepared.table,
            prepared.partition,
            prepared.wanted,
            str(error),
            fetches,
            toolbox.settings.now(),
            forgiven,
        )
        retries = len(error.requests)
        failed = _ingested(
            prepared,
            prepared.stored,
            prepared.gaps,
            Account(),
            (prepared.state and prepared.state.bytes) or 0,
            False,
        )
        return replace(failed, requests=retries, retries=retries, error=error)


def _store(
    toolbox: Toolbox, prepared: _Prepared, got: Collected, sources: Sequence[str] = ()
) -> Ingested:
    table, partition, now = prepared.table, prepared.partition, toolbox.settings.now()
    source = pl.col("source") if sources else pl.lit(REST).alias("source")
    told = got.bars.select(*COLUMN_NAMES, pl.lit(now, TIME).alias("known_at"), source)
    replaced = prepared.stored.join(told, on="open_time", how="semi").with_columns(
        pl.lit(now, TIME).alias("replaced_at")
    )
    if replaced.height:  # before the bars themselves: whatever happens now, no revision is lost
        _remember(toolbox, table, partition, replaced)
    bars = _merged(prepared.stored, told)
    size, digest = (prepared.state.bytes, prepared.state.digest) if prepared.state else (None, None)
    if (
        size is None
        or prepared.note
        or not bars.equals(prepared.stored)
        or size != toolbox.lake.size(table, partition)
    ):
        check_bars(bars.select(COLUMN_NAMES))
        size, digest = toolbox.lake.write(table, partition, bars)
    complete = got.through >= prepared.wanted.end and all(gap.settled for gap in got.gaps)
    through = max(
        got.through,
        prepared.wanted.start,
        prepared.state.through if prepared.state else got.through,
    )
    state = State(
        start=prepared.wanted.start,
        through=through,
        newest=bars["open_time"][-1] if bars.height else None,
        complete=complete,
        rows=bars.height,
        bytes=size,
        digest=digest,
        rolled=prepared.state.rolled if prepared.state else None,
        attempts=prepared.state.attempts + 1 if prepared.state else 1,
        failures=0,
        error=None,
        whole_at=_whole_at(toolbox, prepared, through, now),
    )
    toolbox.ledger.commit(
        Entry(
            table,
            partition,
            state,
            got.account,
            got.gaps,
            got.fetches,
            got.rejected,
            got.answers,
            now,
            sources,
        )
    )
    done = replace(
        _ingested(prepared, bars, got.gaps, got.account, size or 0, complete), replaced=replaced
    )
    come = Window(
        prepared.wanted.start, max(prepared.wanted.start, min(prepared.wanted.end, state.through))
    )
    return replace(
        done, wanted=come, requests=len(got.fetches), retries=got.retries, waited=got.waited
    )


def _remember(toolbox: Toolbox, table: Table, partition: Partition, replaced: pl.DataFrame) -> None:
    """Add revisions to the history; one that was added before, by a run that died then, is the same
    revision.
    """
    place = history_table(table.timeframe)
    known = toolbox.lake.read(place, partition)
    every = replaced if known is None else pl.concat([known, replaced])
    last = every.unique([*COLUMN_NAMES, "known_at"], keep="last", maintain_order=True)
    toolbox.lake.write(
        place,
        partition,
        last.sort("open_time", "replaced_at").select(c.name for c in HISTORY_COLUMNS),
    )


def _whole_at(
    toolbox: Toolbox, prepared: _Prepared, through: datetime, now: datetime
) -> datetime | None:
    """When all that will ever be wanted of the partition had been asked for."""
    if prepared.state and prepared.state.whole_at:
        return prepared.state.whole_at
    timeframe, until = (
        prepared.table.timeframe,
        toolbox.settings.venues[prepared.partition.market.venue].until,
    )
    end = prepared.partition.open_times(timeframe).end
    return now if through >= (min(end, timeframe.floor(until)) if until else end) else None


def _ingested(
    prepared: _Prepared,
    bars: pl.DataFrame,
    gaps: Sequence[Gap],
    account: Account,
    size: int,
    complete: bool,
) -> Ingested:
    return Ingested(
        prepared.partition,
        prepared.table.timeframe,
        prepared.wanted,
        bars.select(COLUMN_NAMES),
        tuple(gaps),
        account,
        size,
        complete,
        note=prepared.note,
    )


def _merged(stored: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """What was stored and what is new; where both have an open_time, the new bar stands (two answers
    agreed on it).
    """
    if new.is_empty():
        return stored
    if stored.is_empty():
        return new
    return pl.concat([stored.join(new, on="open_time", how="anti"), new]).sort("open_time")
