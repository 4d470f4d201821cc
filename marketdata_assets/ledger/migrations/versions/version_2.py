"""Rejected rows are compared by a hash: no index of PostgreSQL can hold their fields.

Early ledgers of version 1 have none of the tables for backfill attempts, checks and incidents.
"""

from __future__ import annotations

import hashlib
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations

revision = "2"
down_revision = None


def upgrade(op: Operations) -> None:
    """From version 1."""
    _hash_rejected_rows(op)
    op.create_table(
        "asks",
        _text("market", primary_key=True),
        _text("month", primary_key=True),
        _integer("attempts"),
        _text("asked_at"),
        sa.Column("parked_at", sa.Text),
        _text("reason"),
        if_not_exists=True,
    )
    op.create_table(
        "red_checks",
        *(_text(name, primary_key=True) for name in ("tbl", "market", "month", "name")),
        _integer("blocking"),
        _text("says"),
        _integer("times", server_default=sa.text("1")),
        _text("since"),
        if_not_exists=True,
    )
    op.create_table("beats", _text("name", primary_key=True), _text("at"), if_not_exists=True)
    _create_incidents(op)
    op.create_table("schema_version", _integer("version"))
    op.execute("INSERT INTO schema_version VALUES (1)")


def _hash_rejected_rows(op: Operations) -> None:
    op.rename_table("quarantine", "quarantine_1")
    op.drop_index("quarantine_content", if_exists=True)
    quarantine = op.create_table(
        "quarantine",
        _id(),
        *(_text(name) for name in ("tbl", "market", "month")),
        sa.Column("open_time", sa.Text),
        *(_text(name) for name in ("reasons", "fields", "source")),
        sa.Column("fetch_id", sa.BigInteger),
        _integer("seen", server_default=sa.text("1")),
        *(_text(name) for name in ("first_seen", "last_seen", "content")),
        sa.UniqueConstraint("tbl", "market", "month", "content"),
    )
    names = [column.name for column in quarantine.columns if column.name != "content"]
    found = op.get_bind().execute(sa.text(f"SELECT {', '.join(names)} FROM quarantine_1"))
    rows = [{**row, "content": _content(row)} for row in found.mappings()]
    op.bulk_insert(quarantine, rows)
    op.drop_table("quarantine_1")


def _content(row: Any) -> str:
    parts = (row["open_time"] or "", row["reasons"], row["fields"])
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def _create_incidents(op: Operations) -> None:
    op.create_table(
        "incidents",
        _id(),
        *(_text(name) for name in ("key", "severity", "title", "body", "opened_at")),
        sa.Column("recovered_at", sa.Text),
        if_not_exists=True,
    )
    op.create_index(
        "incidents_open",
        "incidents",
        ["key"],
        unique=True,
        if_not_exists=True,
        sqlite_where=sa.text("recovered_at IS NULL"),
        postgresql_where=sa.text("recovered_at IS NULL"),
    )
    op.create_table(
        "letters",
        _id(),
        sa.Column("incident", sa.BigInteger, nullable=False),
        *(_text(name) for name in ("event", "channel")),
        sa.Column("sent_at", sa.Text),
        _integer("tries", server_default=sa.text("0")),
        sa.Column("error", sa.Text),
        sa.UniqueConstraint("incident", "event", "channel"),
        if_not_exists=True,
    )


def _text(name: str, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, **options)


def _integer(name: str, **options: Any) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, nullable=False, **options)


def _id() -> sa.Column[int]:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    return sa.Column("id", number, sa.Identity(always=False), primary_key=True)
