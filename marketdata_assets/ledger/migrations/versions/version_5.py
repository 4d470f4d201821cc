"""The lists of markets that venues gave, and what patterns meant in them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "5"
down_revision = "4"


def upgrade(op: Operations) -> None:
    """From version 4."""
    op.create_table(
        "instruments",
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("venue", "symbol", "since")),
        sa.Column("until", sa.Text),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "snapshots",
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("venue", "day")),
        sa.Column("at", sa.Text, nullable=False),
        sa.Column("markets", sa.Integer, nullable=False),
    )
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "selections",
        sa.Column("id", number, sa.Identity(always=False), primary_key=True),
        *(
            sa.Column(name, sa.Text, nullable=False)
            for name in ("venue", "patterns", "resolved_at", "symbols")
        ),
    )
