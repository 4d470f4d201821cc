"""Gaps have a cause and its proof; anomalies and receipts are kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "3"
down_revision = "2"


def upgrade(op: Operations) -> None:
    """From version 2."""
    op.add_column("gaps", sa.Column("cause", sa.Text, nullable=False, server_default=""))
    op.add_column("gaps", sa.Column("proof", sa.Text, nullable=False, server_default="{}"))
    for name in ("first_asked", "last_asked", "next_ask"):
        op.add_column("gaps", sa.Column(name, sa.Text))
    op.create_index(
        "gaps_to_ask",
        "gaps",
        ["tbl", "next_ask"],
        sqlite_where=sa.text("next_ask IS NOT NULL"),
        postgresql_where=sa.text("next_ask IS NOT NULL"),
    )
    op.add_column("partitions", sa.Column("whole_at", sa.Text))
    op.add_column("quarantine", sa.Column("replayed_at", sa.Text))
    op.create_table(
        "anomalies",
        _id(),
        *_texts("tbl", "market", "month", "kind", "severity", "state", "start", "end"),
        sa.Column("bars", sa.Integer, nullable=False),
        *_texts("evidence", "found_at", "changed_at"),
        sa.Column("note", sa.Text),
        sa.UniqueConstraint("tbl", "market", "kind", "start"),
    )
    op.create_table("receipts", _id(), *_texts("kind", "at", "says", "body"))


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def _id() -> sa.Column[int]:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    return sa.Column("id", number, sa.Identity(always=False), primary_key=True)
