"""Scrub: read everything that is stored from time to time, and find what decayed or was changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

from marketdata_assets.errors import Damaged
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.events import PartitionsRead, ProgressCallback, no_progress
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, every_table
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.bars import BarStorage

DAYS = 7.0
"""After so many days an object is read again."""


class ScrubProblem(NamedTuple):
    """What is wrong with one partition (Dagster key) of a table."""

    table: str
    partition: str
    message: str

    def as_dict(self) -> dict[str, str]:
        """Return it as a row of a table."""
        return self._asdict()


@dataclass(slots=True)
class Scrub:
    """What a scrub read: objects with their rows, and what is wrong. `left`: objects that are due
    and were not read in the time that there was.
    """

    objects: int = 0
    rows: int = 0
    seconds: float = 0.0
    left: int = 0
    problems: list[ScrubProblem] = field(default_factory=list)

    def counts(self) -> dict[str, int | float]:
        """Return its numbers."""
        seconds = round(self.seconds, 3)
        return {"objects": self.objects, "rows": self.rows, "seconds": seconds, "left": self.left}

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {**self.counts(), "problems": [problem.as_dict() for problem in self.problems]}


@dataclass(frozen=True, slots=True)
class Scrubber:
    """Reads the objects of the lake and the source digests of the warehouse.

    What is damaged, missing or older than the ledger says counts as lost from then on: the next
    backfill sets it aside and fetches it, or makes it again.
    """

    settings: Settings
    ledger: Ledger
    storage: BarStorage

    def scrub(
        self,
        *,
        days: float = DAYS,
        minutes: float | None = None,
        on_progress: ProgressCallback = no_progress,
    ) -> Scrub:
        """Read what was not read whole for `days`, the longest ago first, for so many minutes.

        Raises StoreFailed.
        """
        began, found = time.monotonic(), Scrub()
        due = self._due(days)
        for number, (table, partition) in enumerate(due):
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                found.left = len(due) - number
                break
            self._prove(table, partition, found)
            on_progress(PartitionsRead(number + 1, len(due)))
        found.problems += self._outdated_rollups()
        found.seconds = time.monotonic() - began
        return found

    def _due(self, days: float) -> list[tuple[Table, Partition]]:
        """Return the objects to read: those in the lake, and those that the ledger counts."""
        before, never = self.settings.now() - timedelta(days=days), self.settings.since
        waiting = []
        for table in every_table():
            read = self.ledger.objects.scrubbed(table)
            keys = (
                self.storage.lake.list_sizes(table).keys()
                | self.ledger.objects.of_table(table).keys()
            )
            for key in keys:
                at = read.get(key)
                if at is None or at <= before:
                    waiting.append((at or never, table.name, key, table))
        return [
            (table, Partition.from_stored_key(key))
            for _, _, key, table in sorted(waiting, key=lambda each: each[:3])
        ]

    def _prove(self, table: Table, partition: Partition, found: Scrub) -> None:
        state = self.ledger.partitions.get(table, partition)
        try:
            rows = self.storage.lake.prove(table, partition, state.digest if state else None)
        except Damaged as error:
            found.problems.append(ScrubProblem(table.name, partition.key, str(error)))
            return
        if rows is None:
            message = "its object is not in the lake any more"
            found.problems.append(ScrubProblem(table.name, partition.key, message))
            return
        self.ledger.objects.note_scrubbed(table, partition, self.settings.now())
        found.objects += 1
        found.rows += rows

    def _outdated_rollups(self) -> Iterator[ScrubProblem]:
        if not self.storage.rollups_in_warehouse:
            return
        expected = self.ledger.partitions.rollup_sources()
        for key in self.storage.outdated_rollups(expected):
            yield ScrubProblem(
                "rollup",
                Partition.from_stored_key(key).key,
                f"{self.settings.duckdb} does not hold what the ledger counts",
            )
