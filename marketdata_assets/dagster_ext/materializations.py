"""The materializations that checks judge.

Dagster's grid counts the result of a check only where it names the newest materialization.
"""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

# The type of AssetCheckEvaluation's public argument `target_materialization_data`, which Dagster
# does not export.
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData as CheckTarget,
)

__all__ = ["CheckTarget", "newest_materialization", "newest_materializations"]


def newest_materialization(instance: dg.DagsterInstance, key: dg.AssetKey) -> CheckTarget | None:
    """Return the newest materialization of an asset; None where there is none."""
    records = instance.fetch_materializations(key, limit=1).records
    return _target(records[0]) if records else None


def newest_materializations(
    instance: dg.DagsterInstance, key: dg.AssetKey, partitions: Sequence[str]
) -> dict[str, CheckTarget]:
    """Return the newest materialization of each partition that has one, by partition."""
    kind = dg.DagsterEventType.ASSET_MATERIALIZATION
    ids = instance.event_log_storage.get_latest_storage_id_by_partition(key, kind, set(partitions))
    if not ids:
        return {}
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(key, storage_ids=list(ids.values())), limit=len(ids)
    ).records
    targets = {record.storage_id: _target(record) for record in records}
    return {partition: targets[id] for partition, id in ids.items() if id in targets}


def _target(record: dg.EventLogRecord) -> CheckTarget:
    return CheckTarget(
        storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
    )
