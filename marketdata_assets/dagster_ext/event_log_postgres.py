"""Dagster's event log in PostgreSQL with pooled connections and wipeable partitions.

Dagster's own storage opens a connection for every event, which takes longer than writing it.
"""

from collections.abc import Mapping
from typing import Any, Self

# What Dagster passes to everything that dagster.yaml names.
from dagster._serdes import ConfigurableClassData
from dagster_postgres.event_log import PostgresEventLogStorage
from dagster_postgres.utils import create_pg_engine, pg_url_from_config
from sqlalchemy.pool import QueuePool

from marketdata_assets.dagster_ext.partition_wiping import PartitionWipingMixin


class PooledPostgresEventLogStorage(PartitionWipingMixin, PostgresEventLogStorage):
    """Keeps a few connections, and replaces one that broke before it is used."""

    def __init__(
        self,
        postgres_url: str,
        should_autocreate_tables: bool = True,
        inst_data: ConfigurableClassData | None = None,
    ) -> None:
        super().__init__(postgres_url, should_autocreate_tables, inst_data)
        self._engine = create_pg_engine(
            postgres_url,
            None,
            isolation_level="AUTOCOMMIT",
            poolclass=QueuePool,
            pool_size=2,
            max_overflow=20,
            pool_pre_ping=True,
        )

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """Build the storage that dagster.yaml names."""
        return cls(
            pg_url_from_config(config_value),
            config_value.get("should_autocreate_tables", True),
            inst_data,
        )

    def dispose(self) -> None:
        """Close all connections."""
        self._engine.dispose()
        super().dispose()
