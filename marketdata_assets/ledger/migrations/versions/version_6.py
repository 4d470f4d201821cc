"""What was stored last of every object of the lake."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "6"
down_revision = "5"


def upgrade(op: Operations) -> None:
    """From version 5. An object without a record is believed when it is read first."""
    op.create_table(
        "objects",
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("tbl", "market", "month")),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("checksum", sa.Text, nullable=False),
        sa.Column("stamp", sa.Text, nullable=False),
    )
