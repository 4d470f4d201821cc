"""Delta Lake tables: one per table and timeframe, on a local disk or in S3, partitioned by market
and month.

They use only what every Delta reader supports (reader version 1, writer version 2: no deletion
vectors, no column mapping). Every change of a partition is one commit, checked against all commits
since the partition was read: of two writers, the second reads again and tries again, so that no row
is lost or doubled.
"""

from __future__ import annotations

import importlib.util
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import polars as pl

from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.model.bar import Column
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table
from marketdata_assets.retry import Backoff, retry
from marketdata_assets.storage.delta_maintenance import (
    DeltaMaintenance,
    commit_properties,
    maintain_table,
    writer_properties,
)
from marketdata_assets.storage.s3_client import get_endpoint_url

if TYPE_CHECKING:
    from deltalake import DeltaTable

T = TypeVar("T")

PARTITION_COLUMNS = ("market", "month")
MAX_ATTEMPTS = 12


class DeltaCommit(NamedTuple):
    """A partition after a change: the table's version, the partition's rows and bytes. `changed` is
    false where it held these rows already, so that nothing was committed.
    """

    changed: bool
    version: int
    rows: int
    bytes: int


class DeltaTables:
    """The tables below `<location>/<layer>/ohlcv_<timeframe>`. Raises StoreFailed; a failed call
    leaves all committed rows in place.

    `pause` waits for a number of seconds between two attempts.
    """

    def __init__(self, location: str, pause: Callable[[float], object] | None = None) -> None:
        self.location = location
        self._pause = pause or threading.Event().wait
        self._options = _storage_options() if location.startswith("s3://") else {}
        self._open_tables: dict[Table, DeltaTable] = {}

    def uri(self, table: Table) -> str:
        """Return the location of a table."""
        return f"{self.location}/{table.name}"

    def replace(self, table: Table, partition: Partition, frame: pl.DataFrame) -> DeltaCommit:
        """Make a partition hold exactly these bars, in one commit; no commit where it does already.

        A partition whose file is damaged is replaced as well. Raises BadInput for bars that do not
        belong to the partition, or that occur twice in the frame.
        """
        from deltalake import write_deltalake

        wanted = _check(table, partition, frame)
        where = f"market = '{partition.market.key}' AND month = '{_month(partition)}'"

        def attempt(existing: DeltaTable | None) -> DeltaCommit:
            delta = existing or self._create(table)
            stored = _read(delta, table, where)
            changed = stored is None or not stored.equals(wanted)
            if changed:
                write_deltalake(
                    delta,
                    _with_partition_columns(wanted, partition).to_arrow(),
                    mode="overwrite",
                    predicate=where,
                    writer_properties=writer_properties(),
                    commit_properties=commit_properties(
                        f"replace {partition.key}: {wanted.height} bars"
                    ),
                )
            size = _partition_bytes(delta, partition)
            return DeltaCommit(changed, delta.version(), wanted.height, size)

        return self._retry(table, attempt)

    def maintain(
        self, table: Table, history_days: int, *, dry_run: bool = False
    ) -> DeltaMaintenance | None:
        """Make each partition one sorted file again, and remove files that no version of the last
        `history_days` needs. Return None where the table does not exist.

        Every commit of ours leaves one sorted file per partition, so only files that others have
        added are sorted.
        """

        def attempt(delta: DeltaTable | None) -> DeltaMaintenance | None:
            if delta is None:
                return None
            return maintain_table(delta, self._options, history_days, dry_run=dry_run)

        return self._retry(table, attempt)

    def _retry(self, table: Table, attempt: Callable[[DeltaTable | None], T]) -> T:
        """Call `attempt` with the newest version of the table, again after another writer's
        conflicting commit.
        """
        from deltalake.exceptions import CommitFailedError

        def attempt_with_newest() -> T:
            with self._translate_errors(table):
                return attempt(self._load(table))

        backoff = Backoff(0.05, 2.0, jitter=lambda: random.uniform(0.2, 1))
        try:
            return retry(
                attempt_with_newest,
                should_retry=lambda error: isinstance(error, CommitFailedError),
                pauses=backoff.pauses(MAX_ATTEMPTS - 1),
                sleep=self._pause,
            )
        except CommitFailedError:
            raise StoreFailed(
                f"{self.uri(table)}: other writers were faster {MAX_ATTEMPTS} times; "
                "run it again when they have finished"
            ) from None

    def _load(self, table: Table) -> DeltaTable | None:
        """Return the table at its newest version, or None where it does not exist. Raises
        StoreFailed when its columns differ from ours.
        """
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        delta = self._open_tables.pop(table, None)  # kept again below, unless a call here fails
        if delta is None:
            try:
                delta = DeltaTable(self.uri(table), storage_options=self._options)
            except TableNotFoundError:
                return None
        else:
            delta.update_incremental()
        if differences := _schema_differences(delta, table):
            raise StoreFailed(
                f"{self.uri(table)}: another program changed {', '.join(differences)}; nothing is "
                "written to it until that is undone (RESTORE to the version before), "
                "or `delta:` names another location"
            )
        self._open_tables[table] = delta
        return delta

    def _create(self, table: Table) -> DeltaTable:
        from deltalake import CommitProperties, DeltaTable, Field, Schema
        from deltalake.schema import PrimitiveType

        meanings = {
            "market": "venue and symbol",
            "month": "calendar month, UTC, of the bar's last minute",
        }
        meanings |= {column.name: column.meaning for column in table.columns}
        fields = [
            Field(name, PrimitiveType(kind), metadata={"comment": meanings[name]})
            for name, kind in delta_column_types(table).items()
        ]
        DeltaTable.create(
            self.uri(table),
            Schema(fields),
            mode="ignore",
            partition_by=list(PARTITION_COLUMNS),
            name=table.name.replace("/", "_"),
            # the log holds statistics as JSON numbers, which cannot hold our decimals
            configuration={"delta.dataSkippingStatsColumns": "open_time"},
            storage_options=self._options,
            # a retry would commit the beginning of the table after another process's beginning
            commit_properties=CommitProperties(max_commit_retries=0),
        )
        created = self._load(table)
        assert created is not None
        return created

    @contextmanager
    def _translate_errors(self, table: Table) -> Iterator[None]:
        from deltalake.exceptions import CommitFailedError, DeltaError

        try:
            yield
        except CommitFailedError:
            raise
        except (DeltaError, OSError, ValueError) as error:
            fix = (
                "check the bucket, AWS_ENDPOINT_URL and the AWS keys"
                if self._options
                else "mend the folder or set another `delta:` location"
            )
            raise StoreFailed(f"{self.uri(table)}: {_reason(error)}; {fix}") from None


def open_delta_tables(location: str) -> DeltaTables:
    """Return the tables at a location. Raises BadInput when the Delta library is not installed."""
    if importlib.util.find_spec("deltalake") is None:
        raise BadInput("`delta:` needs the Delta library: pip install 'marketdata-assets[delta]'")
    return DeltaTables(location)


def delta_column_types(table: Table) -> dict[str, str]:
    """Return the columns of a Delta table and their Delta types, in order."""
    types = {column.name: _delta_type(column) for column in table.columns}
    return dict.fromkeys(PARTITION_COLUMNS, "string") | types


def _delta_type(column: Column) -> str:
    if isinstance(column.dtype, pl.Decimal):
        return f"decimal({column.dtype.precision},{column.dtype.scale})"
    return "timestamp" if column.dtype.is_temporal() else "long"


def _schema_differences(delta: DeltaTable, table: Table) -> list[str]:
    """Return the names of columns that have another type than ours, or exist on one side only."""
    expected = delta_column_types(table)
    found = {field.name: getattr(field.type, "type", "nested") for field in delta.schema().fields}
    is_partitioned = delta.metadata().partition_columns == list(PARTITION_COLUMNS)
    if found == expected and is_partitioned:
        return []
    names = {*found, *expected}
    differing = sorted(name for name in names if found.get(name) != expected.get(name))
    return differing or ["its partitioning"]


def _check(table: Table, partition: Partition, frame: pl.DataFrame) -> pl.DataFrame:
    """Return the table's columns in its types, sorted by open_time. Raises BadInput unless every
    bar occurs once and belongs to the partition.
    """
    owned = partition.open_times(table.timeframe)
    checked = frame.select(table.typed_columns).sort("open_time")
    inside = checked["open_time"].is_between(owned.start, owned.end, closed="left")
    if not inside.all() or checked["open_time"].n_unique() != checked.height:
        raise BadInput(
            f"{table.name} {partition.key}: bars of another month, or twice the same bar"
        )
    return checked


def _month(partition: Partition) -> str:
    return partition.month_key[:7]


def _with_partition_columns(bars: pl.DataFrame, partition: Partition) -> pl.DataFrame:
    return bars.select(
        pl.lit(partition.market.key).alias("market"),
        pl.lit(_month(partition)).alias("month"),
        pl.all(),
    )


def _read(delta: DeltaTable, table: Table, where: str) -> pl.DataFrame | None:
    """Return the stored bars, sorted by open_time; None where a file cannot be read."""
    try:
        rows = pl.DataFrame(delta.scan([column.name for column in table.columns], where))
    except pl.exceptions.ComputeError:
        return None
    return rows.select(table.typed_columns).sort("open_time")


def _partition_bytes(delta: DeltaTable, partition: Partition) -> int:
    files = pl.DataFrame(delta.get_add_actions(flatten=True))
    is_ours = (pl.col("partition.market") == partition.market.key) & (
        pl.col("partition.month") == _month(partition)
    )
    return int(files.filter(is_ours)["size_bytes"].sum())


def _storage_options() -> dict[str, str]:
    """Return the options that the library does not find by itself, as it does keys and region."""
    options = {"max_retries": "5", "retry_timeout": "60s"}
    if (get_endpoint_url() or "").startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    return options


_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def _reason(error: Exception) -> str:
    """Return one line of the library's colored tree: the store's error code where it has one, else
    the first and the last line.
    """
    text = _COLOR.sub("", str(error))
    if code := re.search(r"<Code>(\w+)</Code>", text):
        return code[1]
    lines = [line.strip(" ↳") for line in text.splitlines() if line.strip(" ↳")]
    lines = [line for line in lines if not re.match(r"\d+: ", line)] or [type(error).__name__]
    return lines[0][:200] if len(lines) == 1 else f"{lines[0][:120]}: {lines[-1][:120]}"
