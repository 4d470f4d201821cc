"""What Dagster's instance holds: unfinished runs, runs that ended, and materialized partitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import dagster as dg

from marketdata_assets.defs.partitions import RANGE_END, RANGE_START, partitions_between
from marketdata_assets.defs.specs import asset_key
from marketdata_assets.defs.tags import PARTITION, REPAIR_END, REPAIR_START
from marketdata_assets.errors import MarketDataError
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table

_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_ENDED = [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS]
_ENDED_RUNS_PER_TICK = 200


class EndedRun(NamedTuple):
    """A run that succeeded, or that failed and is not retried; `venue` may be empty."""

    run_id: str
    job: str
    venue: str
    has_succeeded: bool


def get_unfinished_runs(instance: dg.DagsterInstance) -> Sequence[dg.DagsterRun]:
    """Return the runs that wait or work."""
    return instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED))


def find_busy_partitions(
    runs: Iterable[dg.DagsterRun], grid: dg.MultiPartitionsDefinition
) -> set[str]:
    """Return the keys of the grid's partitions that these runs cover."""
    busy: set[str] = set()
    for run in runs:
        tags = run.tags
        if REPAIR_START in tags:
            busy.update(partitions_between(grid, tags[REPAIR_START], tags[REPAIR_END]))
        elif RANGE_START in tags and RANGE_END in tags:
            busy.update(partitions_between(grid, tags[RANGE_START], tags[RANGE_END]))
        elif PARTITION in tags:
            busy.add(tags[PARTITION])
    return busy


def find_ended_runs(instance: dg.DagsterInstance, after: float) -> tuple[Sequence[EndedRun], float]:
    """Return the runs that ended after a moment, the oldest first, and the moment of the last one.

    Moments are seconds since 1970 by the clock of Dagster's storage.
    """
    records = instance.get_run_records(
        dg.RunsFilter(statuses=_ENDED), limit=_ENDED_RUNS_PER_TICK, order_by="update_timestamp"
    )
    ended = []
    for record in reversed(records):
        run, moment = record.dagster_run, record.update_timestamp.timestamp()
        if moment <= after:
            continue
        after = moment
        has_succeeded = run.status == dg.DagsterRunStatus.SUCCESS
        if has_succeeded or run.tags.get("dagster/will_retry") != "true":
            ended.append(EndedRun(run.run_id, run.job_name, _venue_of(run), has_succeeded))
    return ended, after


def find_materialized_partitions(
    instance: dg.DagsterInstance, tables: Iterable[Table]
) -> dict[Table, set[str]]:
    """Return the keys of the partitions that Dagster shows as materialized, by table."""
    return {table: instance.get_materialized_partitions(asset_key(table)) for table in tables}


def wipe_lost_partitions(
    instance: dg.DagsterInstance, lost: Mapping[Table, Sequence[Partition]]
) -> None:
    """Delete the events of partitions that are not stored any more, so that the grid shows it.

    An empty list of partitions means all partitions of the table.
    """
    for table, partitions in lost.items():
        shown = instance.get_materialized_partitions(asset_key(table))
        gone = shown & {p.key for p in partitions} if partitions else shown
        if gone:
            instance.wipe_asset_partitions(asset_key(table), sorted(gone))


@contextmanager
def as_tick_failure() -> Iterator[None]:
    """Turn an error of ours into one line of a failed tick of a sensor or a schedule."""
    try:
        yield
    except MarketDataError as error:
        raise dg.DagsterInvariantViolationError(str(error)) from None


def _venue_of(run: dg.DagsterRun) -> str:
    key = run.tags.get(RANGE_START) or run.tags.get(PARTITION) or ""
    return key.partition(":")[0] if ":" in key else ""
