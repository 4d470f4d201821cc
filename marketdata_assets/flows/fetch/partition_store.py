"""Store what was fetched for one partition: bars, revisions, gaps, rejected rows and the row
account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import polars as pl

from marketdata_assets.errors import Damaged, MarketDataError, Unreachable
from marketdata_assets.flows.fetch.answers import FetchResult
from marketdata_assets.flows.fetch.first_bar import withdraw_contradicted
from marketdata_assets.flows.fetch.known_gaps import remaining_gaps
from marketdata_assets.flows.fetch.open_partition import (
    IngestResult,
    OpenPartition,
    empty_raw_bars,
    wanted_window,
)
from marketdata_assets.ledger.fetches import to_log
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import IngestFailure, IngestRecord, PartitionState, RowAccount
from marketdata_assets.model.bar import COLUMN_NAMES, HISTORY_COLUMNS, TIME, empty_bars
from marketdata_assets.model.gap import Gap, GapReason
from marketdata_assets.model.intervals import (
    find_gaps,
    group_consecutive,
    subtract_window,
    subtract_windows,
)
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, history_table, raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window
from marketdata_assets.quality.agreement import StoredComparison, compare_with_stored
from marketdata_assets.quality.clean import clean_bars
from marketdata_assets.quality.contract import check_bars
from marketdata_assets.quality.split import reject_bars
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.lake import Lake

REST = "rest"
"""The stored source of bars that came from the venue's API."""
CLEAN_UP = "clean-up"
"""The stored source of rows that a clean-up removed from the lake."""


@dataclass(frozen=True, slots=True)
class PartitionStore:
    """Opens partitions of raw tables and stores what was fetched for them, one transaction each."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def open(
        self, table: Table, partition: Partition, *, with_foreign: bool = False
    ) -> OpenPartition:
        """Read what is stored of a partition; a damaged object is moved out of the way.

        One with rows of another month is damaged, unless they are wanted `with_foreign`.
        """
        wanted = wanted_window(self.settings, table.timeframe, partition)
        note = None
        try:
            stored = self.lake.read(
                table, partition, with_provenance=True, with_foreign=with_foreign
            )
        except Damaged as damage:
            note = f"{damage}; set aside as {self.lake.quarantine_object(table, partition)}"
            stored = None
        return OpenPartition(
            partition,
            table,
            wanted=wanted,
            stored=empty_raw_bars() if stored is None else stored,
            gaps=list(self.ledger.gaps.of(table, partition)),
            state=self.ledger.partitions.get(table, partition),
            note=note,
        )

    def save(
        self, before: OpenPartition, fetched: FetchResult, sources: Sequence[str] = ()
    ) -> IngestResult:
        """Write revisions, bars and ledger rows, in this order: a crash in between loses nothing.

        `sources` names what delivered the rows, by `answer`; without it, the venue's API did.
        """
        table, partition, now = before.table, before.partition, self.settings.now()
        source = pl.col("source") if sources else pl.lit(REST).alias("source")
        new = fetched.bars.select(*COLUMN_NAMES, pl.lit(now, TIME).alias("known_at"), source)
        replaced = before.stored.join(new, on="open_time", how="semi").with_columns(
            pl.lit(now, TIME).alias("replaced_at")
        )
        if replaced.height:
            self._append_history(table, partition, replaced)
        bars = _merge(before.stored, new)
        size, digest = self._write_if_changed(before, bars)
        state = self._next_state(before, fetched, bars, size=size, digest=digest)
        self.ledger.partitions.commit(
            IngestRecord(
                table,
                partition,
                state,
                account=fetched.account,
                gaps=fetched.gaps,
                fetches=fetched.fetches,
                rejected=fetched.rejected,
                answers=fetched.answers,
                now=now,
                sources=sources,
            )
        )
        if new.height:
            withdraw_contradicted(
                self.settings, self.ledger, partition.market, bars["open_time"], table.timeframe
            )
        start = before.wanted.start
        return replace(
            before.as_result(bars, fetched.gaps, bytes=size or 0),
            account=fetched.account,
            complete=state.is_complete,
            replaced=replaced,
            wanted=Window(start, max(start, min(before.wanted.end, state.through))),
            requests=len(fetched.fetches),
            retries=fetched.retries,
            seconds_waited=fetched.seconds_waited,
        )

    def read_result(self, table: Table, partition: Partition) -> IngestResult:
        """Return a partition as it is stored, without asking a venue. Raises Damaged."""
        wanted = wanted_window(self.settings, table.timeframe, partition)
        stored = self.lake.read(table, partition)
        bars = empty_bars() if stored is None else stored
        state = self.ledger.partitions.get(table, partition)
        ends = [wanted.start]
        if state:
            ends.append(state.through)
        if bars.height:
            ends.append(table.timeframe.shift(bars["open_time"][-1], 1))
        return IngestResult(
            partition,
            table.timeframe,
            wanted=Window(wanted.start, min(wanted.end, max(ends))),
            bars=bars,
            gaps=tuple(self.ledger.gaps.of(table, partition)),
            account=self.ledger.partitions.account(table, partition),
            bytes=(state.bytes or 0) if state else 0,
            complete=state.is_complete if state else False,
        )

    def record_failure(self, before: OpenPartition, error: MarketDataError) -> IngestResult:
        """Write a failed ingest into the ledger; everything stored stays as it is."""
        failure = IngestFailure(
            before.table,
            before.partition,
            before.wanted,
            error=str(error),
            fetches=to_log(error.requests, before.wanted),
            now=self.settings.now(),
            is_excused=isinstance(error, Unreachable),
        )
        self.ledger.partitions.record_failure(failure)
        size = before.state.bytes if before.state else None
        unchanged = before.as_result(before.stored, before.gaps, bytes=size or 0)
        tries = len(error.requests)
        return replace(unchanged, requests=tries, retries=tries, error=error)

    def ingest_frame(
        self,
        timeframe: Timeframe,
        partition: Partition,
        kept: pl.DataFrame,
        *,
        rejected: pl.DataFrame,
        sources: Sequence[str],
        settles_gaps: bool = True,
    ) -> IngestResult:
        """Store bars that did not come from the venue's API, such as those of files.

        `kept` (model.bar.COLUMN_NAMES, one bar per open_time) has passed the rules, `rejected`
        (quality.split.REJECTED_SCHEMA) has not. With several `sources`, the column `answer` of both
        frames is the index of the source of a row. Stored bars stay: an equal bar is identical,
        another one is rejected as `disagrees`. A gap between two bars of `kept` is settled when
        `settles_gaps`, else it is still requested from the venue. Sends no request.
        """
        table = raw_table(timeframe)
        with self.ledger.lock(partition.key):
            before = self.open(table, partition)
            fetched, comparison = _compare_frame(
                before, kept, rejected, sources=sources, settles_gaps=settles_gaps
            )
            return replace(self.save(before, fetched, sources), comparison=comparison)

    def remove_invalid_rows(self, timeframe: Timeframe, partition: Partition) -> str:
        """Remove stored rows that are repeated, misplaced or break a rule; return what was wrong.

        Returns an empty text when nothing was. Rejected rows go to quarantine; the next ingest
        fetches what is missing then. A damaged object is moved out of the way.
        """
        with self.ledger.lock(partition.key):
            before = self.open(raw_table(timeframe), partition, with_foreign=True)
            cleaned = clean_bars(before.stored, timeframe, partition.open_times(timeframe))
            problem = cleaned.message
            if problem:
                before = replace(before, stored=cleaned.bars, note=before.note or problem)
                none = cleaned.bars.clear()
                fetched, _ = _compare_frame(before, none, cleaned.rejected, sources=[CLEAN_UP])
                self.save(before, fetched, [CLEAN_UP])
            return before.note or problem

    def _write_if_changed(
        self, before: OpenPartition, bars: pl.DataFrame
    ) -> tuple[int | None, str | None]:
        """Return size and digest of the object that holds the bars."""
        state = before.state
        if not before.note and bars.equals(before.stored):
            size = self.lake.proven_size(before.table, before.partition)
            if state and state.bytes == size:
                return size, state.digest
            if size is not None:  # another host's, or written again in other types
                return size, fingerprint(bars.select(COLUMN_NAMES))
        check_bars(bars.select(COLUMN_NAMES))
        return self.lake.write(before.table, before.partition, bars)

    def _next_state(
        self,
        before: OpenPartition,
        fetched: FetchResult,
        bars: pl.DataFrame,
        *,
        size: int | None,
        digest: str | None,
    ) -> PartitionState:
        old = before.state
        through = max(fetched.through, before.wanted.start, old.through if old else fetched.through)
        settled = all(gap.is_settled for gap in fetched.gaps)
        return PartitionState(
            start=before.wanted.start,
            through=through,
            newest=bars["open_time"][-1] if bars.height else None,
            is_complete=fetched.through >= before.wanted.end and settled,
            rows=bars.height,
            bytes=size,
            digest=digest,
            rollup_source_digest=old.rollup_source_digest if old else None,
            attempts=old.attempts + 1 if old else 1,
            failures=0,
            error=None,
            completed_at=self._completed_at(before, through),
        )

    def _completed_at(self, before: OpenPartition, through: datetime) -> datetime | None:
        """Return since when everything that the universe will ever want has been requested."""
        if before.state and before.state.completed_at:
            return before.state.completed_at
        timeframe = before.table.timeframe
        until = self.settings.venues[before.partition.market.venue].until
        end = before.partition.open_times(timeframe).end
        last = min(end, timeframe.floor(until)) if until else end
        return self.settings.now() if through >= last else None

    def _append_history(self, table: Table, partition: Partition, replaced: pl.DataFrame) -> None:
        """Add revisions; one that a crashed run has added already is the same revision. A damaged
        object is moved out of the way.
        """
        place = history_table(table.timeframe)
        try:
            stored = self.lake.read(place, partition)
        except Damaged:
            self.lake.quarantine_object(place, partition)
            stored = None
        every = replaced if stored is None else pl.concat([stored, replaced])
        last = every.unique([*COLUMN_NAMES, "known_at"], keep="last", maintain_order=True)
        ordered = last.sort("open_time", "replaced_at").select(c.name for c in HISTORY_COLUMNS)
        self.lake.write(place, partition, ordered)


def _compare_frame(
    before: OpenPartition,
    kept: pl.DataFrame,
    rejected: pl.DataFrame,
    *,
    sources: Sequence[str],
    settles_gaps: bool = True,
) -> tuple[FetchResult, StoredComparison]:
    """Return what to store of rows from other sources, and their comparison with the store."""
    timeframe = before.table.timeframe
    if len(sources) == 1:
        kept = kept.with_columns(pl.lit(0, pl.Int64).alias("answer"))
    found = compare_with_stored(
        kept.select("answer", *COLUMN_NAMES).sort("open_time"), before.stored
    )
    name = pl.col("answer").replace_strict(range(len(sources)), sources, return_dtype=pl.String)
    bars = found.new.with_columns(name.alias("source"))
    opens = pl.concat([before.stored["open_time"], bars["open_time"]]).sort()
    gaps = remaining_gaps(before.gaps, opens, timeframe)
    moments = kept["open_time"].sort()
    inside = Window(moments[0], moments[-1]) & before.wanted if kept.height else None
    new = subtract_windows(
        find_gaps(opens, timeframe, inside) if inside else [], [gap.window for gap in gaps]
    )
    broken = timeframe.floors(rejected["open_time"].drop_nulls()).to_list()
    quarantined = group_consecutive(broken, timeframe)
    for window in new:
        gaps += _gaps_of_sources(
            window, quarantined, timeframe, sources=sources, settles_gaps=settles_gaps
        )
    settled = [gap.window for gap in gaps if gap.is_settled]
    missing = subtract_windows(find_gaps(opens, timeframe, before.wanted), settled)
    fetched = FetchResult(
        bars=bars,
        rejected=pl.concat([rejected, reject_bars(found.different, "disagrees")]),
        gaps=tuple(sorted(gaps, key=lambda gap: gap.window)),
        account=RowAccount(
            received=kept.height + rejected.height,
            stored=bars.height,
            identical=found.identical.height,
            quarantined=rejected.height + found.different.height,
        ),
        through=missing[0].start if missing else before.wanted.end,
    )
    return fetched, found


def _gaps_of_sources(
    window: Window,
    quarantined: Sequence[Window],
    timeframe: Timeframe,
    *,
    sources: Sequence[str],
    settles_gaps: bool,
) -> list[Gap]:
    """Return the gaps between two delivered bars: rejected rows, and no rows at all."""
    first, last = sources[0], sources[-1]
    name = first if len(sources) == 1 else f"{first} .. {last} ({len(sources)} files)"
    absent = subtract_window(window, quarantined)
    gaps = [
        Gap(w, w.count(timeframe), GapReason.QUARANTINED, 1, f"{name} holds rows that break a rule")
        for w in subtract_window(window, absent)
    ]
    reason, answers = (GapReason.NO_BARS, 2) if settles_gaps else (GapReason.UNANSWERED, 1)
    evidence = f"{name} holds both neighbors and nothing between them"
    return gaps + [Gap(w, w.count(timeframe), reason, answers, evidence) for w in absent]


def _merge(stored: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """Return stored and new bars, sorted; a new bar replaces the stored one of its open_time."""
    if new.is_empty():
        return stored
    if stored.is_empty():
        return new
    return pl.concat([stored.join(new, on="open_time", how="anti"), new]).sort("open_time")
