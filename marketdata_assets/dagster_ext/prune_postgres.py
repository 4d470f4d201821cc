"""Prune runs whose event log is in database tables, such as PostgreSQL's.

All events lie in one table, whose free space the server uses again by itself. Of an old run its
start, its end and what asset pages show stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import dagster as dg

# The event logs that keep everything in one database: Dagster exports none.
from dagster._core.storage.event_log import SqlEventLogStorage
from sqlalchemy import Connection, text

from marketdata_assets.dagster_ext.prune_sqlite import deletable_plans

_LOG = (
    "(dagster_event_type IS NULL OR dagster_event_type NOT LIKE 'ASSET%'"
    " AND dagster_event_type NOT LIKE 'PIPELINE%')"
)
_CANDIDATES = (
    f"SELECT DISTINCT run_id FROM event_logs WHERE {_LOG}"
    " OR dagster_event_type LIKE 'ASSET%PLANNED'"
)
_PARTS = {
    "log": f"FROM event_logs WHERE run_id = :run AND {_LOG}",
    "plan": deletable_plans(equals="IS NOT DISTINCT FROM"),
}


def prune_tables(
    storage: Any,
    finished: Callable[[Iterable[str]], Iterator[dg.DagsterRun]],
    *,
    dry_run: bool,
) -> Counter[str]:
    """Delete the log and the plans of those runs that `finished` selects, and count them."""
    assert isinstance(storage, SqlEventLogStorage)
    counts = Counter[str]()
    with storage.index_connection() as connection:
        candidates = [run_id for (run_id,) in connection.execute(text(_CANDIDATES))]
        for run in finished(candidates):
            counts += _prune_run(connection, run, dry_run=dry_run)
    return counts


def _prune_run(connection: Connection, run: dg.DagsterRun, *, dry_run: bool) -> Counter[str]:
    counts, values = Counter[str](), {"run": run.run_id}
    for part in ("log", "plan") if run.is_success else ("log",):
        sql = f"SELECT count(*), coalesce(sum(length(event)), 0) {_PARTS[part]}"
        events, size = connection.execute(text(sql), values).one()
        counts[f"{part}s"] += events if part == "plan" else bool(events)
        counts[f"{part}_bytes"] += size
        if events and not dry_run:
            connection.execute(text(f"DELETE {_PARTS[part]}"), values)
    counts["runs"] = int(counts["logs"] + counts["plans"] > 0)
    return counts
