"""Imports: bars out of files, through the rules, quarantine and accounting of those that venues
send.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.import_differences import (
    between_files,
    with_stored,
)
from marketdata_assets.flows.fetch.import_result import FileTally, ImportResult
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import COLUMN_NAMES, empty_bars
from marketdata_assets.model.events import (
    FileInspected,
    ProgressCallback,
    RowsProcessed,
    no_progress,
)
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time, month_of, to_ms
from marketdata_assets.quality.agreement import (
    StoredComparison,
    compare_with_stored,
    resolve_files,
)
from marketdata_assets.quality.split import (
    SplitRows,
    add_request_columns,
    reject_bars,
    split_rows,
)
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.archive.options import ImportOptions
from marketdata_assets.sources.archive.reading import ArchiveFile, find_files, read_file
from marketdata_assets.storage.lake import Lake

MAX_DIFFERENCES = 1000
"""How many differing values are recorded one by one; quarantine has all rows."""


class _FileRows(NamedTuple):
    """Rows of one file."""

    tally: FileTally
    rows: pl.DataFrame


def inspect_files(
    settings: Settings,
    paths: Iterable[Path],
    options: ImportOptions,
    *,
    on_progress: ProgressCallback = no_progress,
) -> list[ArchiveFile]:
    """Return what the files are; stores nothing. Raises BadInput unless all of them can be used."""
    found = []
    for path in find_files(paths):
        file, _ = read_file(path, options, settings.markets)
        _raise_if_unwanted(settings, file)
        found.append(file)
        on_progress(FileInspected(path.name, file.rows))
    windows = [_wanted_window(settings, file.market, file.timeframe) for file in found]
    if not any(f.rows_window & window for f, window in zip(found, windows, strict=True)):
        first = found[0]
        raise BadInput(
            f"{first.path}: it holds {first.rows_window}, and {settings.source} wants "
            f"{first.market.key} in {windows[0]}; change since or until there"
        )
    return found


@dataclass(frozen=True, slots=True)
class FileImporter:
    """Imports files that `inspect_files` has accepted."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def import_files(
        self,
        files: Sequence[ArchiveFile],
        options: ImportOptions,
        dry_run: bool = False,
        *,
        on_progress: ProgressCallback = no_progress,
    ) -> ImportResult:
        """Store the bars of the files month by month and write a receipt; in a dry run do neither.

        A bar that is stored with other values stays, and the file's is rejected as `disagrees`; a
        bar that two files give other values is rejected as `conflict` from both. Sends no request.
        Importing again changes nothing.
        """
        result = ImportResult([FileTally(file) for file in files])
        ordered = sorted(result.files, key=lambda t: (t.file.market, t.file.timeframe.width))
        for (market, timeframe), group in groupby(
            ordered, key=lambda t: (t.file.market, t.file.timeframe)
        ):
            months = self._read_months(
                market, timeframe, list(group), options=options, on_progress=on_progress
            )
            for partition, rows in months:
                result.partitions.setdefault(timeframe, []).append(partition)
                for adjoining in _group_adjoining(rows):
                    self._import_rows(partition, adjoining, result, dry_run=dry_run)
                    count = sum(frame.height for _, frame in adjoining)
                    on_progress(RowsProcessed(count))
        if not dry_run:
            body = {
                "files": [tally.as_dict() for tally in result.files],
                "differences": [d._asdict() for d in result.differences],
            }
            self.ledger.receipts.add(
                "import", self.settings.now(), message=result.message, body=body
            )
        return result

    def tables_to_check(self, result: ImportResult) -> dict[tuple[str, ...], list[Partition]]:
        """Return the imported partitions by the raw tables to check.

        "rollup" is among the tables where the base is stored, so that rollups can be made.
        """
        found: dict[tuple[str, ...], list[Partition]] = {}
        for partition in sorted({p for group in result.partitions.values() for p in group}):
            base = raw_table(self.settings.venues[partition.market.venue].base)
            state = self.ledger.partitions.get(base, partition)
            tables = [
                raw_table(tf).name for tf, group in result.partitions.items() if partition in group
            ]
            if state and state.bytes is not None:
                tables.append("rollup")
            found.setdefault(tuple(tables), []).append(partition)
        return found

    def _read_months(
        self,
        market: Market,
        timeframe: Timeframe,
        tallies: Sequence[FileTally],
        *,
        options: ImportOptions,
        on_progress: ProgressCallback,
    ) -> Iterator[tuple[Partition, list[_FileRows]]]:
        """Yield the wanted rows of one market's files by partition.

        A file is held in memory only while its months are imported.
        """
        wanted, open_files = _wanted_window(self.settings, market, timeframe), list[_FileRows]()
        waiting = sorted(tallies, key=lambda tally: tally.file.rows_window)
        ends = (tally.file.rows_window.end for tally in tallies)
        whole = Window(waiting[0].file.rows_window.start, max(ends)) & wanted
        if whole:
            whole = Window(whole.start, whole.end + timeframe.width)
        for partition in partitions_of(market, whole):
            opens = partition.open_times(timeframe) & wanted
            while waiting and waiting[0].file.rows_window.start < opens.end:
                tally = waiting.pop(0)
                rows = self._read_again(tally.file, options)
                inside = rows.filter(_opens_between(wanted))
                tally.unwanted = rows.height - inside.height
                on_progress(RowsProcessed(tally.unwanted))
                open_files.append(_FileRows(tally, inside))
            of_month = [_FileRows(t, rows.filter(_opens_between(opens))) for t, rows in open_files]
            if of_month := [each for each in of_month if each.rows.height]:
                yield partition, of_month
            open_files = [f for f in open_files if f.tally.file.rows_window.end > opens.end]
        for tally in waiting:
            tally.unwanted = tally.file.rows

    def _read_again(self, file: ArchiveFile, options: ImportOptions) -> pl.DataFrame:
        again, rows = read_file(file.path, options, self.settings.markets)
        if again != file:
            raise BadInput(f"{file.path}: it was changed while it was imported; import it again")
        return rows

    def _import_rows(
        self,
        partition: Partition,
        files: Sequence[_FileRows],
        result: ImportResult,
        *,
        dry_run: bool,
    ) -> None:
        """Apply the rules to the rows of one partition, store them, and count their fate."""
        timeframe = files[0].tally.file.timeframe
        sources = [tally.file.path.name for tally, _ in files]
        judged = [self._judge(tally.file, rows, i) for i, (tally, rows) in enumerate(files)]
        resolved = resolve_files(pl.concat(each.valid for each in judged))
        broken = pl.concat(each.rejected for each in judged)
        if dry_run:
            stored = self.lake.read(raw_table(timeframe), partition)
            bars = resolved.bars.select("answer", *COLUMN_NAMES)
            comparison = compare_with_stored(bars, empty_bars() if stored is None else stored)
        else:
            store = PartitionStore(self.settings, self.ledger, self.lake)
            ingested = store.ingest_frame(
                timeframe,
                partition,
                resolved.bars,
                rejected=pl.concat([broken, reject_bars(resolved.conflicts, "conflict")]),
                sources=sources,
                settles_gaps=all(tally.file.is_final for tally, _ in files),
            )
            assert ingested.comparison is not None, "frames are compared with what is stored"
            comparison = ingested.comparison
        _count_rows(
            files,
            comparison,
            broken,
            repeated=resolved.repeats,
            conflicting=resolved.conflicts,
        )
        room = MAX_DIFFERENCES - len(result.differences)
        if room > 0:
            market = partition.market
            found = [
                *with_stored(market, timeframe, comparison.different, sources=sources),
                *between_files(market, timeframe, resolved.conflicts, sources=sources),
            ]
            result.differences += found[:room]

    def _judge(self, file: ArchiveFile, rows: pl.DataFrame, answer: int) -> SplitRows:
        return split_rows(
            add_request_columns(rows, answer, file.span),
            file.timeframe,
            closed_before=self.settings.now(),
            columns=file.columns,
        )


def _count_rows(
    files: Sequence[_FileRows],
    comparison: StoredComparison,
    broken: pl.DataFrame,
    *,
    repeated: pl.DataFrame,
    conflicting: pl.DataFrame,
) -> None:
    """Add what became of the rows to the tally of their file, the column `answer`."""
    # a repeated row shares the fate of the row that it repeats
    of_repeated = compare_with_stored(
        repeated.select("answer", *COLUMN_NAMES), comparison.different.select(COLUMN_NAMES)
    )
    counts = {
        "stored": (comparison.new,),
        "identical": (comparison.identical, of_repeated.new),
        "refused": (broken,),
        "disagree": (comparison.different, of_repeated.identical, of_repeated.different),
        "conflict": (conflicting,),
    }
    for name, frames in counts.items():
        answers = pl.concat(frame["answer"] for frame in frames)
        for answer, count in answers.value_counts().iter_rows():
            tally = files[answer].tally
            setattr(tally, name, getattr(tally, name) + count)
    for answer, reasons, fields in broken.select("answer", "reasons", "fields").iter_rows():
        tally = files[answer].tally
        tally.reasons.update(reasons.split())
        tally.example = tally.example or fields


def _raise_if_unwanted(settings: Settings, file: ArchiveFile) -> None:
    venue, timeframe = settings.venues[file.market.venue], file.timeframe
    if timeframe not in venue.fetched_timeframes:
        known = " ".join(tf.name for tf in venue.fetched_timeframes)
        raise BadInput(
            f"{file.path}: {settings.source} fetches {known} of {venue.name} and no "
            f"{timeframe.name} bars; add `reference: [{timeframe.name}]` there, or import the "
            f"{venue.base.name} bars"
        )
    last, now = file.rows_window.end - timeframe.width, settings.now()
    if last > now:
        raise BadInput(
            f"{file.path}: its bars go until {format_time(last)}, and it is now "
            f"{format_time(now)}; is open_time in another unit?"
        )


def _wanted_window(settings: Settings, market: Market, timeframe: Timeframe) -> Window:
    """Return the open times that the universe wants, to the end of the running month.

    A bar that is not closed yet is rejected by a rule.
    """
    until = settings.venues[market.venue].until
    end = Partition(market, month_of(settings.now())).open_times(timeframe).end
    if until:
        end = min(end, timeframe.floor(until))
    return Window(timeframe.ceil(settings.span(market).start), end)


def _opens_between(window: Window) -> pl.Expr:
    """Return the filter of rows as sent, whose open times are milliseconds."""
    start, end = to_ms(window.start), to_ms(window.end)
    return pl.col("open_time").is_between(start, end, closed="left")


def _group_adjoining(rows: Sequence[_FileRows]) -> Iterator[list[_FileRows]]:
    """Yield files that overlap or adjoin, those with most columns first.

    What lies between two groups is in no file.
    """
    group: list[_FileRows] = []
    for each in sorted(rows, key=lambda each: each.tally.file.span):
        end = max((tally.file.span.end for tally, _ in group), default=None)
        if end is not None and each.tally.file.span.start > end:
            yield _most_columns_first(group)
            group = []
        group.append(each)
    yield _most_columns_first(group)


def _most_columns_first(files: Sequence[_FileRows]) -> list[_FileRows]:
    return sorted(files, key=lambda each: -len(each.tally.file.columns))
