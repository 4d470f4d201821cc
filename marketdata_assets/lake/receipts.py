"""The receipts: what a repair, an import or a replay found, did and refused. Written once, never changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from marketdata_assets.lake.database import Database
from marketdata_assets.model.window import iso, parse_time


class Receipt(NamedTuple):
    """One receipt. `kind` is `repair`, `import` or `replay`; `body` is what JSON holds."""

    id: int
    kind: str
    at: datetime
    says: str
    body: dict[str, Any]


class Receipts:
    """The receipts in the ledger's database. Raises StoreFailed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, kind: str, at: datetime, says: str, body: Mapping[str, Any]) -> int:
        """Write one down; its number."""
        sql = "INSERT INTO receipts (kind, at, says, body) VALUES (?, ?, ?, ?) RETURNING id"
        with self._database.transaction() as db:
            return int(db.execute(sql, (kind, iso(at), says, json.dumps(body))).fetchone()[0])

    def list(self, kind: str | None = None, limit: int = 100) -> list[Receipt]:
        """The newest ones, the newest first; of one kind only, where it is given."""
        sql = "SELECT id, kind, at, says, body FROM receipts WHERE (? IS NULL OR kind = ?) ORDER BY id DESC LIMIT ?"
        found = self._database.rows(sql, kind, kind, limit)
        return [Receipt(id, kind, parse_time(at), says, json.loads(body)) for id, kind, at, says, body in found]
