"""A gap's status is a column; it was written into the proof and the time of the next request."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations

revision = "4"
down_revision = "3"


def upgrade(op: Operations) -> None:
    """From version 3."""
    op.add_column("gaps", sa.Column("status", sa.Text, nullable=False, server_default="open"))
    op.execute("UPDATE gaps SET status = 'final' WHERE cause <> '' AND next_ask IS NULL")
    op.execute("UPDATE gaps SET status = 'explained' WHERE cause <> '' AND next_ask IS NOT NULL")
    connection = op.get_bind()
    keys = "tbl, market, start"
    found = connection.execute(sa.text(f"SELECT {keys}, proof FROM gaps WHERE proof <> '{{}}'"))
    reopened = [
        {"t": row.tbl, "m": row.market, "s": row.start}
        for row in found
        if _is_reopened(json.loads(row.proof))
    ]
    if reopened:
        where = "tbl = :t AND market = :m AND start = :s"
        connection.execute(sa.text(f"UPDATE gaps SET status = 'reopened' WHERE {where}"), reopened)


def _is_reopened(proof: Any) -> bool:
    return isinstance(proof, dict) and "reopened" in proof
