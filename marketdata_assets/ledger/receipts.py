"""The receipts: what a repair, an import or a replay found, did and refused. Written once, never
changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from marketdata_assets.ledger.database import Database
from marketdata_assets.model.window import format_time, parse_time


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

    def add(self, kind: str, at: datetime, says: str, body: Mapping[str, Any]) -> Receipt:
        """Write one down."""
        sql = "INSERT INTO receipts (kind, at, says, body) VALUES (?, ?, ?, ?) RETURNING id"
        with self._database.transaction() as db:
            (id,) = db.execute(sql, (kind, format_time(at), says, json.dumps(body))).fetchone()
        return Receipt(int(id), kind, at, says, dict(body))

    def find(self, number: int) -> Receipt | None:
        """The one with this number."""
        found = self._database.rows(f"SELECT {_COLUMNS} FROM receipts WHERE id = ?", number)
        return _receipt(*found[0]) if found else None

    def list(self, kind: str | None = None, limit: int = 100) -> list[Receipt]:
        """The newest ones, the newest first; of one kind only, where it is given."""
        sql = f"SELECT {_COLUMNS} FROM receipts WHERE (? IS NULL OR kind = ?) ORDER BY id DESC LIMIT ?"
        return [_receipt(*row) for row in self._database.rows(sql, kind, kind, limit)]


_COLUMNS = "id, kind, at, says, body"


def _receipt(id: int, kind: str, at: str, says: str, body: str) -> Receipt:
    return Receipt(id, kind, parse_time(at), says, json.loads(body))
