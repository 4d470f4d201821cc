"""The ledger: what neither the lake nor Dagster holds.

Each attribute is a book: the statements about one group of tables. All of them share one database,
SQLite in the state folder or PostgreSQL.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from marketdata_assets.ledger.anomalies import AnomalyBook
from marketdata_assets.ledger.attempts import AttemptBook
from marketdata_assets.ledger.checks import CheckBook
from marketdata_assets.ledger.consolidations import ConsolidationBook
from marketdata_assets.ledger.copies import CopyBook
from marketdata_assets.ledger.fetches import FetchBook
from marketdata_assets.ledger.gaps import GapBook
from marketdata_assets.ledger.heartbeats import HeartbeatBook
from marketdata_assets.ledger.incidents import IncidentBook
from marketdata_assets.ledger.instruments import InstrumentBook
from marketdata_assets.ledger.markets import MarketBook
from marketdata_assets.ledger.objects import ObjectBook
from marketdata_assets.ledger.opening import open_database
from marketdata_assets.ledger.partitions import PartitionBook
from marketdata_assets.ledger.quarantine import QuarantineBook
from marketdata_assets.ledger.receipts import ReceiptBook
from marketdata_assets.ledger.venues import VenueBook


class Ledger:
    """The books of one instance, and its locks. Raises StoreFailed.

    It lies in the database at `url` (postgresql://), else in the state folder. With `for_reading`,
    a state folder that cannot be written is read from a temporary copy, in which nothing can be
    written (`is_read_only`). Opening it raises BadInput where it is of a newer release.
    """

    def __init__(self, state: Path, url: str | None = None, *, for_reading: bool = False) -> None:
        self.database = database = open_database(state, url, for_reading=for_reading)
        self.partitions = PartitionBook(database)
        self.objects = ObjectBook(database)
        self.markets = MarketBook(database)
        self.instruments = InstrumentBook(database)
        self.gaps = GapBook(database)
        self.quarantine = QuarantineBook(database)
        self.fetches = FetchBook(database)
        self.attempts = AttemptBook(database)
        self.checks = CheckBook(database)
        self.heartbeats = HeartbeatBook(database)
        self.venues = VenueBook(database)
        self.incidents = IncidentBook(database)
        self.anomalies = AnomalyBook(database)
        self.receipts = ReceiptBook(database)
        self.consolidations = ConsolidationBook(database)
        self.copies = CopyBook(database)

    @property
    def is_read_only(self) -> bool:
        """Whether it is a copy that cannot be written."""
        return self.database.is_read_only

    @property
    def clock_skew(self) -> float:
        """Seconds that the clock which all workers share is ahead of ours; 0 on one machine."""
        return self.database.clock_skew

    def lock(self, name: str, wait: bool = True) -> AbstractContextManager[bool]:
        """Hold a name, such as a partition's key, against all other threads and processes; the lock
        ends with its process.

        False when `wait` is off and the name is held elsewhere.
        """
        return self.database.lock(name, wait)

    def check_connection(self) -> None:
        """Raise StoreFailed where this thread's connection broke, and with it its locks."""
        self.database.check_connection()

    def close(self) -> None:
        """Close all connections; a copy is removed."""
        self.database.close()
