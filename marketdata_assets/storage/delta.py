"""Delta Lake tables: one per table and timeframe, on a local disk or in S3, partitioned by market and
month.

Nothing but plain Delta (reader version 1, writer version 2: no deletion vectors, no column
mapping), so that Spark, DuckDB and everybody else can read it. Every change of a partition is one
commit, checked against all commits since the partition was read: whoever comes second reads again
and tries again, so nothing is lost and nothing doubled.
"""

from __future__ import annotations

import importlib.util
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import polars as pl

from marketdata_assets.errors import BadInput, Damaged, StoreFailed
from marketdata_assets.model.bar import Column
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table
from marketdata_assets.model.window import Window, from_ms, iso, month_of
from marketdata_assets.storage.objects import endpoint

if TYPE_CHECKING:
    from deltalake import CommitProperties, DeltaTable, WriterProperties

T = TypeVar("T")

PARTITIONED_BY = ("market", "month")
ATTEMPTS = 12
LOG_DAYS = 30
"""How long the log of commits is kept at the least; Delta's own default."""


class Committed(NamedTuple):
    """A partition after a change: `changed` is False where it held those rows already and nothing was
    committed.
    """

    changed: bool
    version: int
    rows: int
    bytes: int


class Version(NamedTuple):
    """One commit in a table's history; `note` says what we did, and is empty for others' commits."""

    version: int
    at: datetime
    operation: str
    note: str


class Maintained(NamedTuple):
    """What a maintenance did, or would do: partitions made one file again, and files that no kept
    version needs.
    """

    version: int
    partitions_compacted: int
    files_removed: int
    bytes_removed: int


class DeltaTables:
    """The tables below `<location>/<layer>/ohlcv_<timeframe>`. Raises StoreFailed; what was committed
    before survives any failure.
    """

    def __init__(self, location: str, pause: Callable[[float], object] | None = None) -> None:
        self.location = location
        self._pause = pause or threading.Event().wait
        self._options = _storage_options() if location.startswith("s3://") else {}
        self._open: dict[Table, DeltaTable] = {}

    def uri(self, table: Table) -> str:
        """Where a table lies."""
        return f"{self.location}/{table.name}"

    def replace(self, table: Table, partition: Partition, frame: pl.DataFrame) -> Committed:
        """Make a partition hold exactly these bars, in one commit; none where it does already. A
        damaged one is mended.
        """
        wanted = _checked(table, partition, frame, [column.name for column in table.columns])
        return self._rewrite(
            table, partition, lambda stored: wanted, f"replace {partition.key}", mend=True
        )

    def merge(
        self, table: Table, partition: Partition, frame: pl.DataFrame, columns: Sequence[str]
    ) -> Committed:
        """Correct these columns of the bars that are stored; a null in the frame makes the value null.

        Bars that are not stored yet are added only when all columns of the table are given. Delta's
        own MERGE would rewrite the same one file.
        """
        given = _checked(table, partition, frame, ["open_time", *columns])
        how: Any = "full" if len(given.columns) == len(table.columns) else "left"

        def correct(stored: pl.DataFrame) -> pl.DataFrame:
            return stored.update(given, on="open_time", how=how, include_nulls=True).sort(
                "open_time"
            )

        return self._rewrite(
            table, partition, correct, f"merge {' '.join(columns)} {partition.key}"
        )

    def read(
        self, table: Table, market: Market, window: Window, as_of: int | datetime | None = None
    ) -> pl.DataFrame:
        """The bars of a market that open inside the window, sorted: of now, of a version, or as they
        were at a moment.

        Where the table is not there yet, there are none. Raises BadInput for a version that the
        table does not have.
        """
        first, last = (
            month_of(window.start).start,
            month_of(window.end + table.timeframe.width).start,
        )
        inside = f"open_time >= '{iso(window.start)}' AND open_time < '{iso(window.end)}'"
        months = f"month >= '{first:%Y-%m}' AND month <= '{last:%Y-%m}'"
        with self._translated(table):
            delta = self._at(table, as_of)
            if delta is None:
                return _empty(table)
            return _scan(delta, table, f"market = '{market.key}' AND {months} AND {inside}")

    def history(self, table: Table, limit: int | None = None) -> list[Version]:
        """The commits of a table, newest first."""
        with self._translated(table):
            delta = self._load(table)
            return [_version(entry) for entry in delta.history(limit)] if delta else []

    def maintain(self, table: Table, history_days: int, dry_run: bool = False) -> Maintained | None:
        """Make each partition one sorted file again, and remove files that no version of the last days
        needs.

        None where there is no such table. We write one sorted file per partition, so only where
        others have added files is there something to sort.
        """
        return self._retried(
            table,
            lambda delta: _maintain(delta, self._options, history_days, dry_run) if delta else None,
        )

    # ----------------------------------------------------------------------------- commits
    def _rewrite(
        self,
        table: Table,
        partition: Partition,
        change: Callable[[pl.DataFrame], pl.DataFrame],
        note: str,
        mend: bool = False,
    ) -> Committed:
        from deltalake import write_deltalake

        where = f"market = '{partition.market.key}' AND month = '{_month(partition)}'"

        def attempt(found: DeltaTable | None) -> Committed:
            delta = found or self._create(table)
            try:
                stored = _scan(delta, table, where)
            except pl.exceptions.ComputeError:
                if not mend:
                    raise
                stored = None
            wanted = change(_empty(table) if stored is None else stored)
            changed = stored is None or not stored.equals(wanted)
            if changed:
                keys = (
                    pl.lit(partition.market.key).alias("market"),
                    pl.lit(_month(partition)).alias("month"),
                )
                write_deltalake(
                    delta,
                    wanted.select(*keys, pl.all()).to_arrow(),
                    mode="overwrite",
                    predicate=where,
                    writer_properties=_writer(),
                    commit_properties=_commit(f"{note}: {wanted.height} bars"),
                )
            return Committed(changed, delta.version(), wanted.height, _bytes(delta, partition))

        return self._retried(table, attempt)

    def _retried(self, table: Table, attempt: Callable[[DeltaTable | None], T]) -> T:
        """Do it on the newest version; again when somebody else was faster."""
        from deltalake.exceptions import CommitFailedError

        for tried in range(ATTEMPTS):
            try:
                with self._translated(table):
                    return attempt(self._load(table))
            except CommitFailedError:
                self._pause(random.uniform(0.2, 1) * min(2.0, 0.05 * 2**tried))
        raise StoreFailed(
            f"{self.uri(table)}: others were faster {ATTEMPTS} times; run it again when they have finished"
        )

    # ----------------------------------------------------------------------------- tables
    def _load(self, table: Table) -> DeltaTable | None:
        """The table at its newest version, or None where there is none. Raises StoreFailed when its
        columns are not ours.
        """
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        known = self._open.pop(table, None)  # back below, unless something is wrong with it
        if known is None:
            try:
                known = DeltaTable(self.uri(table), storage_options=self._options)
            except TableNotFoundError:
                return None
        else:
            known.update_incremental()
        found = {
            field.name: getattr(field.type, "type", "nested") for field in known.schema().fields
        }
        if found != columns_of(table) or known.metadata().partition_columns != list(PARTITIONED_BY):
            ours = columns_of(table)
            differing = sorted(
                name for name in {*found, *ours} if found.get(name) != ours.get(name)
            ) or ["its partitioning"]
            raise StoreFailed(
                f"{self.uri(table)}: somebody changed {', '.join(differing)}; nothing is written to it until that is "
                "taken back (RESTORE to the version before), or `delta:` names another location"
            )
        self._open[table] = known
        return known

    def _create(self, table: Table) -> DeltaTable:
        from deltalake import CommitProperties, DeltaTable, Field, Schema
        from deltalake.schema import PrimitiveType

        meanings = {
            "market": "venue and symbol",
            "month": "calendar month, UTC, of the bar's last minute",
        }
        meanings |= {column.name: column.meaning for column in table.columns}
        schema = Schema(
            [
                Field(n, PrimitiveType(kind), metadata={"comment": meanings[n]})
                for n, kind in columns_of(table).items()
            ]
        )
        DeltaTable.create(
            self.uri(table),
            schema,
            mode="ignore",
            partition_by=list(PARTITIONED_BY),
            name=table.name.replace("/", "_"),
            # the log holds statistics as JSON numbers, which cannot hold our decimals
            configuration={"delta.dataSkippingStatsColumns": "open_time"},
            storage_options=self._options,
            # a second maker would commit its own beginning after the first one's
            commit_properties=CommitProperties(max_commit_retries=0),
        )
        made = self._load(table)
        assert made is not None
        return made

    def _at(self, table: Table, as_of: int | datetime | None) -> DeltaTable | None:
        from deltalake.exceptions import DeltaError

        delta = self._load(table)
        if delta is None or as_of is None:
            return delta
        del self._open[table]  # it is about to be an old version
        missing = BadInput(
            f"{self.uri(table)} has no version {as_of} any more, or not yet; its newest is {delta.version()}"
        )
        version = _version_at(delta, as_of) if isinstance(as_of, datetime) else as_of
        if not 0 <= version <= delta.version():
            raise missing
        try:
            delta.load_as_version(version)
        except DeltaError:
            raise missing from None
        return delta

    @contextmanager
    def _translated(self, table: Table) -> Iterator[None]:
        from deltalake.exceptions import CommitFailedError, DeltaError

        fix = (
            "check the bucket, AWS_ENDPOINT_URL and the AWS keys"
            if self._options
            else "mend the folder or set another `delta:` location"
        )
        try:
            yield
        except CommitFailedError:
            raise
        except pl.exceptions.ComputeError as error:
            what = "a file of it cannot be read; it is gone, damaged, or older than the history that is kept"
            raise Damaged(f"{self.uri(table)}: {what} ({_why(error)})") from None
        except (DeltaError, OSError, ValueError) as error:
            raise StoreFailed(f"{self.uri(table)}: {_why(error)}; {fix}") from None


def delta_tables(location: str) -> DeltaTables:
    """The tables at a location. Raises BadInput when the Delta library is not installed."""
    if importlib.util.find_spec("deltalake") is None:
        raise BadInput("`delta:` needs the Delta library: pip install 'marketdata-assets[delta]'")
    return DeltaTables(location)


def columns_of(table: Table) -> dict[str, str]:
    """The columns of a Delta table and their Delta types, in order."""
    return dict.fromkeys(PARTITIONED_BY, "string") | {
        column.name: _type_of(column) for column in table.columns
    }


def _type_of(column: Column) -> str:
    if isinstance(column.dtype, pl.Decimal):
        return f"decimal({column.dtype.precision},{column.dtype.scale})"
    return "timestamp" if column.dtype.is_temporal() else "long"


def _checked(
    table: Table, partition: Partition, frame: pl.DataFrame, names: Sequence[str]
) -> pl.DataFrame:
    """These columns in the table's types, sorted; refused unless every bar is there once and belongs
    to the partition.
    """
    types = table.schema
    if unknown := set(names) - set(types) | set(names) - set(frame.columns):
        raise BadInput(
            f"{table.name} {partition.key}: no such column: {', '.join(sorted(unknown))}"
        )
    owned = partition.opens(table.timeframe)
    checked = frame.select(
        pl.col(name).cast(dtype) for name, dtype in types.items() if name in names
    ).sort("open_time")
    inside = checked["open_time"].is_between(owned.start, owned.end, closed="left")
    if not inside.all() or checked["open_time"].n_unique() != checked.height:
        raise BadInput(
            f"{table.name} {partition.key}: bars of another month, or twice the same bar"
        )
    return checked


def _month(partition: Partition) -> str:
    return partition.month_key[:7]


def _empty(table: Table) -> pl.DataFrame:
    return pl.DataFrame(schema=table.schema)


def _scan(delta: DeltaTable, table: Table, where: str) -> pl.DataFrame:
    found = pl.DataFrame(delta.scan([column.name for column in table.columns], where))
    return found.select(table.typed).sort("open_time")


def _bytes(delta: DeltaTable, partition: Partition) -> int:
    files = pl.DataFrame(delta.get_add_actions(flatten=True))
    here = (pl.col("partition.market") == partition.market.key) & (
        pl.col("partition.month") == _month(partition)
    )
    return int(files.filter(here)["size_bytes"].sum())


def _version(entry: dict[str, Any]) -> Version:
    made, note = from_ms(entry.get("timestamp", 0)), entry.get("userMetadata") or ""
    return Version(entry["version"], made, str(entry.get("operation", "")), str(note))


def _version_at(delta: DeltaTable, moment: datetime) -> int:
    """The newest version that was there, by the moments in the log, or -1: those of S3's objects are
    whole seconds.
    """
    return max(
        (entry.version for entry in map(_version, delta.history()) if entry.at <= moment),
        default=-1,
    )


# --------------------------------------------------------------------------------- maintenance
def _maintain(
    delta: DeltaTable, options: dict[str, str], history_days: int, dry_run: bool
) -> Maintained:
    keep = {
        "delta.deletedFileRetentionDuration": f"interval {history_days} days",
        "delta.logRetentionDuration": f"interval {max(LOG_DAYS, history_days)} days",
    }
    if not dry_run and not keep.items() <= delta.metadata().configuration.items():
        delta.alter.set_table_properties(
            keep, commit_properties=_commit(f"keep {history_days} days")
        )
    files = pl.DataFrame(delta.get_add_actions(flatten=True))
    crowded = (
        files.group_by("partition.market", "partition.month")
        .len()
        .filter(pl.col("len") > 1)
        .sort(pl.all())
    )
    if not dry_run:
        for market, month, _ in crowded.iter_rows():
            here = [("market", "=", market), ("month", "=", month)]
            delta.optimize.z_order(
                ["open_time"],
                here,
                writer_properties=_writer(),
                commit_properties=_commit(f"sort {market}|{month}-01"),
            )
    hours = history_days * 24
    sizes = _sizes(
        delta,
        options,
        delta.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=True),
    )
    if sizes and not dry_run:
        delta.vacuum(hours, dry_run=False, full=True)
    return Maintained(delta.version(), crowded.height, len(sizes), sum(sizes))


def _sizes(delta: DeltaTable, options: dict[str, str], paths: list[str]) -> list[int]:
    """The sizes of those that are there: a vacuum also names what an earlier one has removed."""
    from deltalake.fs import DeltaStorageHandler
    from pyarrow.fs import PyFileSystem

    found = PyFileSystem(DeltaStorageHandler(delta.table_uri, options)).get_file_info(paths)
    return [info.size for info in found if info.is_file]


# --------------------------------------------------------------------------------- how it is writte
def _writer() -> WriterProperties:
    """The smallest that every reader takes: Polars cannot read decimals of 38 digits in any encoding
    but plain.
    """
    from deltalake import ColumnProperties, WriterProperties

    packed = ColumnProperties(dictionary_enabled=False, encoding="DELTA_BINARY_PACKED")
    integers = ("open_time", "trades", "bars_expected", "bars_present")
    return WriterProperties(
        compression="ZSTD",
        compression_level=3,
        default_column_properties=ColumnProperties(dictionary_enabled=False),
        column_properties=dict.fromkeys(integers, packed),
    )


def _commit(note: str) -> CommitProperties:
    """Commits to other partitions meanwhile are no conflict: many of them are let pass before we start
    again.
    """
    from deltalake import CommitProperties

    return CommitProperties(custom_metadata={"userMetadata": note}, max_commit_retries=100)


def _storage_options() -> dict[str, str]:
    """What the usual AWS variables do not say; keys and region are found by the library itself."""
    options = {"max_retries": "5", "retry_timeout": "60s"}
    return options | (
        {"AWS_ALLOW_HTTP": "true"} if (endpoint() or "").startswith("http://") else {}
    )


_PAINT = re.compile(r"\x1b\[[0-9;]*m")


def _why(error: Exception) -> str:
    """One line of the library's coloured tree: the store's own code where there is one, else its first
    and last words.
    """
    text = _PAINT.sub("", str(error))
    if code := re.search(r"<Code>(\w+)</Code>", text):
        return code[1]
    lines = [line.strip(" ↳") for line in text.splitlines() if line.strip(" ↳")]
    lines = [line for line in lines if not re.match(r"\d+: ", line)] or [type(error).__name__]
    return lines[0][:200] if len(lines) == 1 else f"{lines[0][:120]}: {lines[-1][:120]}"
