"""What the ledger alone knows about each market-month, in a file beside the lake's objects:
`ledger/<market>/<month>/rows.json.gz`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from marketdata_assets.errors import Damaged
from marketdata_assets.model.partition import PartitionKey
from marketdata_assets.model.table import market_folder

if TYPE_CHECKING:
    from marketdata_assets.storage.objects import ObjectStore

NAME = "rows.json.gz"
FOLDER = "ledger"


class LedgerFiles:
    """Rows by the name of their table, as JSON, by market key and month key. Raises StoreFailed."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def write(self, key: PartitionKey, rows: dict[str, list[dict[str, Any]]]) -> None:
        """Replace the rows about a market-month."""
        content = json.dumps(rows, separators=(",", ":")).encode()
        self._store.write(_path(key), gzip.compress(content, compresslevel=6, mtime=0))

    def read(self, key: PartitionKey) -> dict[str, list[dict[str, Any]]]:
        """Return the rows about a market-month; none where there is no file. Raises Damaged."""
        content = self._store.read(_path(key))
        if content is None:
            return {}
        try:
            found = json.loads(gzip.decompress(content))
        except (ValueError, OSError, EOFError, zlib.error):
            raise Damaged(f"{_path(key)} in the lake is damaged or no file of ours") from None
        if not isinstance(found, dict):
            raise Damaged(f"{_path(key)} in the lake is no file of ours")
        return found

    def market_months(self) -> Iterator[PartitionKey]:
        """Yield the market-months that have a file."""
        for key, _ in self._store.list(FOLDER, NAME):
            yield key


def _path(key: PartitionKey) -> str:
    market, month = key
    return f"{FOLDER}/{market_folder(market)}/month={month.removesuffix('-01')}/{NAME}"
