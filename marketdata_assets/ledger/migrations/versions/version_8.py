"""What only the ledger holds about a market-month is written beside the lake when it changes; when
each object was read whole.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

from marketdata_assets.ledger.tables import trigger_statements

revision = "8"
down_revision = "7"

_WATCHED = ("partitions", "objects", "gaps", "quarantine", "anomalies", "red_checks", "asks")


def upgrade(op: Operations) -> None:
    """From version 7. Everything that is there has still to be written."""
    op.create_table(
        "scrubs",
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("tbl", "market", "month")),
        sa.Column("at", sa.Text, nullable=False),
    )
    op.create_table(
        "unsaved",
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("market", "month")),
        sa.Column("version", sa.Integer, nullable=False),
    )
    for table in (*_WATCHED, "receipts"):
        for statement in trigger_statements(op.get_bind().dialect.name, table):
            op.get_bind().exec_driver_sql(statement)
    op.execute("INSERT INTO unsaved SELECT DISTINCT market, month, 1 FROM partitions")
    op.execute(
        "INSERT INTO unsaved SELECT 'receipts', 'all-01', 1 WHERE EXISTS (SELECT 1 FROM receipts)"
    )
