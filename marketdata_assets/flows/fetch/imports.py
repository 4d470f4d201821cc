"""Imports: bars out of files, through the same rules, quarantine and accounting as those that a venue
sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.context import Tell, Toolbox, tell_nobody
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.ingest import Ingested, take_in, wanted_window
from marketdata_assets.model.bar import NAMES, decimal_text, empty_bars
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import raw
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, iso, month_of, to_ms
from marketdata_assets.quality.agreement import compare_with_stored, resolve_files
from marketdata_assets.quality.split import add_request_columns, reject_bars, split_rows
from marketdata_assets.sources.archive.options import ImportOptions
from marketdata_assets.sources.archive.reading import ArchiveFile, find_files, read_file

DIFFERENCES = 1000
"""How many values that differ are written down one by one; quarantine has all rows."""


@dataclass(slots=True)
class Tally:
    """What became of the rows of one file: the counts sum to its rows, always.

    `disagree`: bars that are stored with other values, which stay. `conflict`: bars that another of
    the files tells otherwise. `unwanted`: outside the universe's span. `lacking`: bars of the
    file's own span that it does not hold.
    """

    facts: ArchiveFile
    stored: int = 0
    identical: int = 0
    refused: int = 0
    disagree: int = 0
    conflict: int = 0
    unwanted: int = 0

    @property
    def balanced(self) -> bool:
        """Whether every row is accounted for."""
        counts = (
            self.stored,
            self.identical,
            self.refused,
            self.disagree,
            self.conflict,
            self.unwanted,
        )
        return sum(counts) == self.facts.rows

    def as_dict(self) -> dict[str, Any]:
        """As a row of a table."""
        facts, counts = (
            self.facts,
            {name: value for name, value in asdict(self).items() if name != "facts"},
        )
        told = {
            "file": facts.path.name,
            "market": facts.market.key,
            "timeframe": facts.timeframe.name,
            "rows": facts.rows,
        }
        about = {
            "lacking": facts.missing_bars,
            "format": facts.format,
            "unit": facts.unit,
            "sha256": facts.sha256,
        }
        return {**told, **counts, **about, "path": str(facts.path)}


class Difference(NamedTuple):
    """One value that two tell differently: `stored`, or the name of a file, and a file."""

    market: str
    timeframe: str
    open_time: str
    column: str
    value: str
    of: str
    other_value: str
    other: str


@dataclass(slots=True)
class Imported:
    """What an import did. `partitions`: those of which bars were told, by timeframe."""

    files: list[Tally]
    differences: list[Difference] = field(default_factory=list)
    partitions: dict[Timeframe, list[Partition]] = field(default_factory=dict)

    @property
    def disputed(self) -> int:
        """Rows that were not stored and that nothing like them was stored for."""
        return sum(tally.refused + tally.disagree + tally.conflict for tally in self.files)

    def says(self) -> str:
        """All of it in one line."""
        sums: Counter[str] = Counter()
        for tally in self.files:
            sums.update({name: value for name, value in tally.as_dict().items() if name in _COUNTS})
        return f"{len(self.files)} files: " + ", ".join(f"{sums[name]} {name}" for name in _COUNTS)


_COUNTS = ("rows", "stored", "identical", "refused", "disagree", "conflict", "unwanted")


def look(
    toolbox: Toolbox, paths: Iterable[Path], told: ImportOptions, tell: Tell = tell_nobody
) -> list[ArchiveFile]:
    """What the files are; nothing is stored unless all of them can be believed. Raises BadInput."""
    found = []
    for path in find_files(paths):
        facts, _ = read_file(path, told, toolbox.settings.markets)
        _check(toolbox, facts)
        found.append(facts)
        tell({"file": path.name, "rows": facts.rows})
    if all(not (f.rows_window & _wanted(toolbox, f.market, f.timeframe)) for f in found):
        first = found[0]
        raise BadInput(
            f"{first.path}: it holds {first.rows_window}, and {toolbox.settings.source} wants {first.market.key} "
            f"in {_wanted(toolbox, first.market, first.timeframe)}; change since or until there"
        )
    return found


def _check(toolbox: Toolbox, facts: ArchiveFile) -> None:
    settings, venue = toolbox.settings, toolbox.settings.venues[facts.market.venue]
    if facts.timeframe not in venue.fetched:
        known = " ".join(tf.name for tf in venue.fetched)
        raise BadInput(
            f"{facts.path}: {settings.source} fetches {known} of {venue.name} and no {facts.timeframe.name} bars; "
            f"add `reference: [{facts.timeframe.name}]` there, or import the {venue.base.name} bars"
        )
    if facts.rows_window.end - facts.timeframe.width > settings.now():
        last = facts.rows_window.end - facts.timeframe.width
        raise BadInput(
            f"{facts.path}: its bars go until {iso(last)}, and it is now {iso(settings.now())}; is open_time in another unit?"
        )


def _wanted(toolbox: Toolbox, market: Market, timeframe: Timeframe) -> Window:
    """The open times that the universe wants, as far as this month goes: a bar that is not closed yet
    is for a rule to refuse.
    """
    settings, until = toolbox.settings, toolbox.settings.venues[market.venue].until
    end = Partition(market, month_of(settings.now())).opens(timeframe).end
    return Window(
        timeframe.ceil(settings.span(market).start),
        min(end, timeframe.floor(until)) if until else end,
    )


def import_files(
    toolbox: Toolbox,
    files: Sequence[ArchiveFile],
    told: ImportOptions,
    dry_run: bool = False,
    tell: Tell = tell_nobody,
) -> Imported:
    """Take the bars of these files (of `look`) into the lake, month by month, and write a receipt; in
    a dry run do neither.

    A bar that is stored with other values stays and the file's is refused as `disagrees`; a bar
    that two of the files tell differently is refused as `conflict` from both. Sends no request.
    Doing it again changes nothing.
    """
    done = Imported([Tally(facts) for facts in files])
    by_table = sorted(done.files, key=lambda t: (t.facts.market, t.facts.timeframe.width))
    for (market, timeframe), group in groupby(
        by_table, key=lambda t: (t.facts.market, t.facts.timeframe)
    ):
        tallies = list(group)
        for partition, rows in _by_month(toolbox, market, timeframe, tallies, told, tell):
            done.partitions.setdefault(timeframe, []).append(partition)
            for together in _touching(rows):
                _take(toolbox, timeframe, partition, together, done, dry_run)
                tell({"rows": sum(frame.height for _, frame in together)})
    if not dry_run:
        body = {
            "files": [tally.as_dict() for tally in done.files],
            "differences": [d._asdict() for d in done.differences],
        }
        toolbox.receipts.add("import", toolbox.settings.now(), done.says(), body)
    return done


_Rows = tuple[Tally, pl.DataFrame]


def _by_month(
    toolbox: Toolbox,
    market: Market,
    timeframe: Timeframe,
    tallies: Sequence[Tally],
    told: ImportOptions,
    tell: Tell,
) -> Iterator[tuple[Partition, list[_Rows]]]:
    """The wanted rows of files of one market, by partition; a file is held in memory only while its
    months are under way.
    """
    wanted, open_files = _wanted(toolbox, market, timeframe), list[_Rows]()
    waiting = sorted(tallies, key=lambda t: t.facts.rows_window)
    whole = (
        Window(waiting[0].facts.rows_window.start, max(t.facts.rows_window.end for t in waiting))
        & wanted
    )
    for partition in partitions_of(
        market, Window(whole.start, whole.end + timeframe.width) if whole else whole
    ):
        opens = partition.opens(timeframe) & wanted
        while waiting and waiting[0].facts.rows_window.start < opens.end:
            tally = waiting.pop(0)
            rows = _read(toolbox, tally.facts, told)
            inside = rows.filter(_between(wanted))
            tally.unwanted = rows.height - inside.height
            tell({"rows": tally.unwanted})
            open_files.append((tally, inside))
        found = [(tally, rows.filter(_between(opens))) for tally, rows in open_files]
        if found := [(tally, rows) for tally, rows in found if rows.height]:
            yield partition, found
        open_files = [
            (tally, rows) for tally, rows in open_files if tally.facts.rows_window.end > opens.end
        ]
    for tally in waiting:
        tally.unwanted = tally.facts.rows


def _between(window: Window) -> pl.Expr:
    return pl.col("open_time").is_between(to_ms(window.start), to_ms(window.end), closed="left")


def _read(toolbox: Toolbox, facts: ArchiveFile, told: ImportOptions) -> pl.DataFrame:
    again, rows = read_file(facts.path, told, toolbox.settings.markets)
    if again != facts:
        raise BadInput(f"{facts.path}: it was changed while it was imported; import it again")
    return rows


def _touching(rows: Sequence[_Rows]) -> Iterator[list[_Rows]]:
    """Files that overlap or adjoin each other, those that give most columns first; what lies between
    others no file is about.
    """
    together: list[_Rows] = []
    for each in sorted(rows, key=lambda pair: pair[0].facts.span):
        if together and each[0].facts.span.start > max(
            tally.facts.span.end for tally, _ in together
        ):
            yield _richest_first(together)
            together = []
        together.append(each)
    yield _richest_first(together)


def _richest_first(together: Sequence[_Rows]) -> list[_Rows]:
    return sorted(together, key=lambda pair: -len(pair[0].facts.columns))


def _take(
    toolbox: Toolbox,
    timeframe: Timeframe,
    partition: Partition,
    together: Sequence[_Rows],
    done: Imported,
    dry_run: bool,
) -> None:
    """Judge the rows of one partition and store them; count what becomes of each."""
    now, sources = toolbox.settings.now(), [tally.facts.path.name for tally, _ in together]
    judged = [
        split_rows(
            add_request_columns(rows, answer, tally.facts.span),
            timeframe,
            closed_before=now,
            columns=tally.facts.columns,
        )
        for answer, (tally, rows) in enumerate(together)
    ]
    told = resolve_files(pl.concat(one.valid for one in judged))
    broken = pl.concat(one.rejected for one in judged)
    refused = pl.concat([broken, reject_bars(told.conflicts, "conflict")])
    if dry_run:
        stored = toolbox.lake.read(raw(timeframe), partition)
        found = compare_with_stored(
            told.bars.select("answer", *NAMES), empty_bars() if stored is None else stored
        )
    else:
        final = all(tally.facts.is_final for tally, _ in together)
        taken = take_in(toolbox, timeframe, partition, told.bars, refused, sources, final).beside
        assert taken is not None
        found = taken
    repeated = compare_with_stored(
        told.repeats.select("answer", *NAMES), found.different.select(NAMES)
    )  # of a denied bar it is denied as well
    counts = {
        "stored": (found.new,),
        "identical": (found.identical, repeated.new),
        "refused": (broken,),
        "disagree": (found.different, repeated.identical, repeated.different),
        "conflict": (told.conflicts,),
    }
    for name, frames in counts.items():
        for answer, count in (
            pl.concat(frame["answer"] for frame in frames).value_counts().iter_rows()
        ):
            setattr(together[answer][0], name, getattr(together[answer][0], name) + count)
    room = DIFFERENCES - len(done.differences)
    if room > 0:
        done.differences += [
            *_denied(partition, timeframe, found.different, sources),
            *_disputed(partition, timeframe, told.conflicts, sources),
        ][:room]


def _denied(
    partition: Partition, timeframe: Timeframe, denied: pl.DataFrame, sources: Sequence[str]
) -> Iterator[Difference]:
    """Stored bars beside those of a file."""
    for row in _texts(denied).head(DIFFERENCES).iter_rows(named=True):
        yield from _apart(
            partition,
            timeframe,
            row,
            {n: row[n + "_stored"] for n in NAMES[1:]},
            "stored",
            row,
            sources[row["answer"]],
        )


def _disputed(
    partition: Partition, timeframe: Timeframe, disputed: pl.DataFrame, sources: Sequence[str]
) -> Iterator[Difference]:
    """Bars of one file beside those of the next."""
    rows = _texts(disputed.sort("open_time", "answer")).head(DIFFERENCES).iter_rows(named=True)
    for _, variants in groupby(rows, key=lambda row: row["open_time"]):
        first, *others = variants
        for other in others:
            yield from _apart(
                partition,
                timeframe,
                first,
                first,
                sources[first["answer"]],
                other,
                sources[other["answer"]],
            )


def _apart(
    partition: Partition,
    timeframe: Timeframe,
    row: dict[str, Any],
    one: dict[str, Any],
    of: str,
    other: dict[str, Any],
    name: str,
) -> Iterator[Difference]:
    for column in NAMES[1:]:
        if one[column] != other[column] and one[column] is not None and other[column] is not None:
            moment: datetime = row["open_time"]
            yield Difference(
                partition.market.key,
                timeframe.name,
                iso(moment),
                column,
                one[column],
                of,
                other[column],
                name,
            )


def _texts(bars: pl.DataFrame) -> pl.DataFrame:
    """Numbers as their exact digits."""
    decimals = [name for name, dtype in bars.schema.items() if isinstance(dtype, pl.Decimal)]
    counts = [name for name in bars.columns if name.startswith("trades")]
    return bars.with_columns(
        *(decimal_text(name) for name in decimals), pl.col(counts).cast(pl.String)
    )


def to_show(toolbox: Toolbox, done: Imported) -> dict[tuple[str, ...], list[Partition]]:
    """The partitions that an import touched, by what is to be looked at: raw tables, and "rollup"
    where the base is there.
    """
    found: dict[tuple[str, ...], list[Partition]] = {}
    for partition in sorted({p for partitions in done.partitions.values() for p in partitions}):
        base = toolbox.ledger.state(
            raw(toolbox.settings.venues[partition.market.venue].base), partition
        )
        tables = [
            raw(tf).name for tf, partitions in done.partitions.items() if partition in partitions
        ]
        found.setdefault(
            (*tables, *(["rollup"] if base and base.bytes is not None else [])), []
        ).append(partition)
    return found


def as_stored(toolbox: Toolbox, timeframe: Timeframe, partition: Partition) -> Ingested:
    """A partition as it lies there after an import, for the checks; asks nobody and changes nothing.
    Raises Damaged.
    """
    table, wanted = raw(timeframe), wanted_window(toolbox, timeframe, partition)
    stored, state = toolbox.lake.read(table, partition), toolbox.ledger.state(table, partition)
    bars = empty_bars() if stored is None else stored
    ends = [
        wanted.start,
        *([state.through] if state else []),
        *([bars["open_time"][-1] + timeframe.width] if bars.height else []),
    ]
    come = Window(wanted.start, min(wanted.end, max(ends)))
    gaps, account = (
        tuple(toolbox.ledger.gaps(table, partition)),
        toolbox.ledger.account(table, partition),
    )
    size, complete = (state.bytes or 0, state.complete) if state else (0, False)
    return Ingested(partition, timeframe, come, bars, gaps, account, size, complete)
