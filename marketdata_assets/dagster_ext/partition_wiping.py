"""Wiping of partitions, for Dagster's event logs in SQLite and PostgreSQL.

Dagster's own event logs can only wipe a whole asset.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import dagster as dg

# The event of a wipe, which Dagster itself reports for whole assets, and the names it reports
# events under that belong to no run.
from dagster._core.events import AssetWipedData
from dagster._core.instance.utils import RUNLESS_JOB_NAME, RUNLESS_RUN_ID

# The common base of both event logs: Dagster exports none.
from dagster._core.storage.event_log import SqlEventLogStorage

# What an overridden method receives.
from dagster._core.storage.partition_status_cache import AssetStatusCacheValue

# The clock of all events.
from dagster._time import get_current_timestamp
from sqlalchemy import bindparam, text

BATCH_SIZE = 10_000
"""How many partitions one statement names; databases limit the values of a statement."""

_SELECTION = "asset_key = :asset AND partition IN :keys"
_WIPE = (
    "DELETE FROM asset_event_tags"
    f" WHERE event_id IN (SELECT id FROM event_logs WHERE {_SELECTION})",
    f"DELETE FROM event_logs WHERE {_SELECTION}",
    # The evaluation of a check has neither asset nor partition in that table, and its plan is one
    # event for many partitions.
    "DELETE FROM event_logs WHERE dagster_event_type = 'ASSET_CHECK_EVALUATION'"
    " AND id IN (SELECT evaluation_event_storage_id FROM asset_check_executions"
    f" WHERE {_SELECTION})",
    f"DELETE FROM asset_check_executions WHERE {_SELECTION}",
)
_EVENTS = "FROM event_logs WHERE asset_key = :asset AND dagster_event_type IN"
_PLAN_OR_RESULT = "'ASSET_MATERIALIZATION', 'ASSET_MATERIALIZATION_PLANNED'"
# Without `last_materialization` Dagster looks for the newest that is left.
_RESET_ASSET = (
    "UPDATE asset_keys SET cached_status_data = NULL, last_materialization = NULL,"
    f" last_run_id = (SELECT run_id {_EVENTS} ({_PLAN_OR_RESULT}) ORDER BY id DESC LIMIT 1),"
    f" last_materialization_timestamp = (SELECT max(timestamp) {_EVENTS}"
    f" ({_PLAN_OR_RESULT}, 'ASSET_OBSERVATION'))"
    " WHERE asset_key = :asset"
)
_CACHE_STATUS = (
    "UPDATE asset_keys SET cached_status_data = :status WHERE asset_key = :asset AND NOT EXISTS"
    " (SELECT 1 FROM event_logs WHERE asset_key = :asset AND dagster_event_type = 'ASSET_WIPED'"
    " AND id > :latest)"
)


class PartitionWipingMixin(SqlEventLogStorage):
    """Lets an event log wipe partitions. Tables and all other behavior are Dagster's."""

    def wipe_asset_partitions(self, asset_key: dg.AssetKey, partition_keys: Sequence[str]) -> None:
        """Delete every plan, materialization, observation and check result of these partitions.

        An event in the index records the wipe. It is written first, so that no id is used again
        (cursors would skip new events), and keeps older statuses from being cached afterwards.
        """
        asset = asset_key.to_string()
        with self.index_transaction() as connection:
            connection.execute(self.prepare_insert_event(_wipe_event(asset_key, partition_keys)))
            for start in range(0, len(partition_keys), BATCH_SIZE):
                keys = list(partition_keys[start : start + BATCH_SIZE])
                for statement in _WIPE:
                    sql = text(statement).bindparams(bindparam("keys", expanding=True))
                    connection.execute(sql, {"asset": asset, "keys": keys})
            connection.execute(text(_RESET_ASSET), {"asset": asset})

    def update_asset_cached_status_data(
        self, asset_key: dg.AssetKey, cache_values: AssetStatusCacheValue
    ) -> None:
        """Cache partition statuses, unless a wipe is newer than the events behind them."""
        values = {
            "asset": asset_key.to_string(),
            "status": dg.serialize_value(cache_values),
            "latest": cache_values.latest_storage_id,
        }
        with self.index_connection() as connection:
            connection.execute(text(_CACHE_STATUS), values)


def _wipe_event(asset_key: dg.AssetKey, partition_keys: Sequence[str]) -> dg.EventLogEntry:
    data = AssetWipedData(asset_key=asset_key, partition_keys=list(partition_keys))
    event = dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.ASSET_WIPED.value,
        job_name=RUNLESS_JOB_NAME,
        event_specific_data=data,
    )
    return dg.EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None,
        level=logging.INFO,
        user_message="",
        run_id=RUNLESS_RUN_ID,
        timestamp=get_current_timestamp(),
        job_name=RUNLESS_JOB_NAME,
        dagster_event=event,
    )
