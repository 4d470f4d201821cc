"""How a table appears in Dagster: its key, its description, and its columns."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from marketdata_assets.model.bar import Column
from marketdata_assets.model.table import Table

OWNERS = ["team:marketdata"]


def asset_key(table: Table) -> dg.AssetKey:
    """Return the key of a table's asset, such as `raw/ohlcv_1m`."""
    return dg.AssetKey(list(table.key))


def asset_spec(
    table: Table,
    deps: Sequence[dg.AssetDep],
    description: str,
    *,
    kinds: set[str],
    skippable: bool = True,
    freshness_policy: dg.FreshnessPolicy | None = None,
) -> dg.AssetSpec:
    """Return the spec of a table's asset; its group is the table's layer.

    `skippable`: a run may end without a materialization of the asset.
    """
    return dg.AssetSpec(
        asset_key(table),
        deps=deps,
        description=description,
        group_name=table.layer,
        kinds=kinds,
        owners=OWNERS,
        skippable=skippable,
        freshness_policy=freshness_policy,
        metadata={
            "dagster/column_schema": dg.TableSchema([_table_column(c) for c in table.columns]),
            "dagster/table_name": table.name,
        },
    )


def storage_kind(location: str) -> str:
    """Return the icon of a folder or a bucket of Parquet files."""
    return "s3" if location.startswith("s3://") else "parquet"


def _table_column(column: Column) -> dg.TableColumn:
    constraints = dg.TableColumnConstraints(nullable=column.optional)
    return dg.TableColumn(column.name, _type_name(column), column.meaning, constraints=constraints)


def _type_name(column: Column) -> str:
    if column.dtype.is_temporal():
        return "timestamp UTC"
    if column.dtype.is_decimal():
        return "decimal(38, 12)"
    return "bigint" if column.dtype.is_integer() else "varchar"
