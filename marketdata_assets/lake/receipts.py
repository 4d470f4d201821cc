"""The receipts: what was done to stored bars on request, with all that it changed and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from marketdata_assets.lake.database import Database
from marketdata_assets.model.window import iso, parse_time


class Receipt(NamedTuple):
    """One deed: its kind (`import`, `repair`), when by our clock, one line about it, and the whole of it."""

    id: int
    kind: str
    at: datetime
    says: str
    body: dict[str, Any]


class Receipts:
    """Receipts in the ledger's database; none is ever changed. Raises StoreFailed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, kind: str, at: datetime, says: str, body: Mapping[str, Any]) -> int:
        """Write one down; its number."""
        with self._database.transaction() as db:
            sql = "INSERT INTO receipts (kind, at, says, body) VALUES (?, ?, ?, ?) RETURNING id"
            return int(db.execute(sql, (kind, iso(at), says, json.dumps(body))).fetchone()[0])

    def list(self, kind: str) -> Sequence[Receipt]:
        """All of a kind, oldest first."""
        found = self._database.rows("SELECT id, kind, at, says, body FROM receipts WHERE kind = ? ORDER BY id", kind)
        return [Receipt(id, kind, parse_time(at), says, json.loads(body)) for id, kind, at, says, body in found]
