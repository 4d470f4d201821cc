"""What repairs, imports and replays found, did and refused. A receipt is never changed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from marketdata_assets.ledger.book import Book
from marketdata_assets.ledger.tables import receipts
from marketdata_assets.model.window import format_time

_c = receipts.c
_RECEIPT = (_c.id, _c.kind, _c["at"], _c.message, _c.body)


class Receipt(NamedTuple):
    """One receipt. `kind` is `repair`, `import` or `replay`; `at` is our clock; `body` holds what
    JSON does.
    """

    id: int
    kind: str
    at: datetime
    message: str
    body: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The receipt as the command line prints it."""
        return {
            "id": self.id,
            "kind": self.kind,
            "at": format_time(self.at),
            "says": self.message,
            "body": self.body,
        }


class ReceiptBook(Book):
    """The table `receipts`. Raises StoreFailed."""

    def add(self, kind: str, at: datetime, *, message: str, body: Mapping[str, Any]) -> Receipt:
        """Write a receipt."""
        insert = sa.insert(receipts).returning(_c.id)
        row = {"kind": kind, "at": at, "message": message, "body": dict(body)}
        with self._database.transaction() as connection:
            number: int = connection.execute(insert, row).scalar_one()
        return Receipt(number, kind, at, message, dict(body))

    def find(self, number: int) -> Receipt | None:
        """The receipt with this number."""
        found = self._database.rows(sa.select(*_RECEIPT).where(_c.id == number))
        return Receipt(*found[0]) if found else None

    def list(self, kind: str | None = None, limit: int = 100) -> list[Receipt]:
        """The newest receipts of a kind (None: of all), the newest first."""
        statement = sa.select(*_RECEIPT).order_by(_c.id.desc()).limit(limit)
        if kind:
            statement = statement.where(_c.kind == kind)
        return [Receipt(*row) for row in self._database.rows(statement)]
