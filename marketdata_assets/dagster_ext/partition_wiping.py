"""Partitions that can be wiped, for Dagster's event logs in SQLite and PostgreSQL: the stock ones can
only wipe a whole asset.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import dagster as dg
from dagster._core.events import AssetWipedData, DagsterEvent, DagsterEventType
from dagster._core.instance.utils import RUNLESS_JOB_NAME, RUNLESS_RUN_ID
from dagster._core.storage.event_log import SqlEventLogStorage
from dagster._core.storage.partition_status_cache import AssetStatusCacheValue
from dagster._serdes import serialize_value
from dagster._time import get_current_timestamp
from sqlalchemy import bindparam, text

AT_ONCE = 10_000
"""Databases bind so many values in one statement."""

_WIPED = "asset_key = :asset AND partition IN :keys"
_WIPE = (
    f"DELETE FROM asset_event_tags WHERE event_id IN (SELECT id FROM event_logs WHERE {_WIPED})",
    f"DELETE FROM event_logs WHERE {_WIPED}",
    # what a check found bears neither asset nor partition there; what it planned is one event for
    # many partitions
    "DELETE FROM event_logs WHERE dagster_event_type = 'ASSET_CHECK_EVALUATION'"
    f" AND id IN (SELECT evaluation_event_storage_id FROM asset_check_executions WHERE {_WIPED})",
    f"DELETE FROM asset_check_executions WHERE {_WIPED}",
)
_OF_ASSET = "FROM event_logs WHERE asset_key = :asset AND dagster_event_type IN"
_PLAN_OR_MADE = "'ASSET_MATERIALIZATION', 'ASSET_MATERIALIZATION_PLANNED'"
# Without `last_materialization` Dagster looks for the newest that is left.
_FORGET = (
    "UPDATE asset_keys SET cached_status_data = NULL, last_materialization = NULL,"
    f" last_run_id = (SELECT run_id {_OF_ASSET} ({_PLAN_OR_MADE}) ORDER BY id DESC LIMIT 1),"
    f" last_materialization_timestamp = (SELECT max(timestamp) {_OF_ASSET} ({_PLAN_OR_MADE}, 'ASSET_OBSERVATION'))"
    " WHERE asset_key = :asset"
)
_CACHE = (
    "UPDATE asset_keys SET cached_status_data = :status WHERE asset_key = :asset AND NOT EXISTS"
    " (SELECT 1 FROM event_logs WHERE asset_key = :asset AND dagster_event_type = 'ASSET_WIPED' AND id > :latest)"
)


class Wiping(SqlEventLogStorage):
    """What both event logs of ours can do beyond the stock ones. Tables and all else are the stock
    ones.
    """

    def wipe_asset_partitions(self, asset_key: dg.AssetKey, partition_keys: Sequence[str]) -> None:
        """Forget that these partitions were ever planned, materialized, observed or checked.

        An event in the index says so. It comes first, so that no id is used again (cursors would
        skip new events), and keeps statuses that were computed before it from being cached.
        """
        asset = asset_key.to_string()
        with self.index_transaction() as connection:
            connection.execute(self.prepare_insert_event(_wiped(asset_key, partition_keys)))
            for start in range(0, len(partition_keys), AT_ONCE):
                for statement in _WIPE:
                    bound = text(statement).bindparams(bindparam("keys", expanding=True))
                    connection.execute(
                        bound,
                        {"asset": asset, "keys": list(partition_keys[start : start + AT_ONCE])},
                    )
            connection.execute(text(_FORGET), {"asset": asset})

    def update_asset_cached_status_data(
        self, asset_key: dg.AssetKey, cache_values: AssetStatusCacheValue
    ) -> None:
        """Cache partition statuses, unless partitions were wiped after the events that these rest
        on.
        """
        status = {"status": serialize_value(cache_values), "latest": cache_values.latest_storage_id}
        with self.index_connection() as connection:
            connection.execute(text(_CACHE), {"asset": asset_key.to_string(), **status})


def _wiped(asset_key: dg.AssetKey, partition_keys: Sequence[str]) -> dg.EventLogEntry:
    kind = DagsterEventType.ASSET_WIPED.value
    data = AssetWipedData(asset_key=asset_key, partition_keys=list(partition_keys))
    wiped = DagsterEvent(event_type_value=kind, job_name=RUNLESS_JOB_NAME, event_specific_data=data)
    return dg.EventLogEntry(
        None,
        logging.INFO,
        "",
        RUNLESS_RUN_ID,
        get_current_timestamp(),
        None,
        RUNLESS_JOB_NAME,
        wiped,
    )  # type: ignore[no-untyped-call]
