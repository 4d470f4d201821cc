"""Adopt: take what lies in the lake into a ledger that does not know it. Sends no request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.flows.fetch.answers import FetchResult
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.gap import Gap, GapCause, GapReason
from marketdata_assets.model.intervals import find_gaps
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

NOT_KNOWN = "adopted from the lake without its ledger; nobody was asked yet"
"""The evidence of a gap of which nothing is known."""


@dataclass(slots=True)
class Adoption:
    """What came into the ledger: market-months with all that was known about them, partitions of
    which only the bars are known, and what could not be read, by name.
    """

    with_proofs: int = 0
    bars_only: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {
            "with_proofs": self.with_proofs,
            "bars_only": self.bars_only,
            "refused": self.refused,
        }


@dataclass(frozen=True, slots=True)
class Adopter:
    """Fills a ledger from the lake alone.

    Files beside the objects hold what an earlier ledger knew: coverage, gaps with their proofs,
    acknowledgements and receipts. What the ledger knows already stays as it is. Objects without
    such a file are read: their bars are there, and what is missing between them is unexplained
    until a run has requested it.
    """

    settings: Settings
    ledger: Ledger
    lake: Lake

    def adopt(self) -> Adoption:
        """Adopt everything that the ledger does not know. Raises StoreFailed."""
        found, known = Adoption(), self.ledger.copies.known()
        for key in self.lake.ledger_files.market_months():
            if key in known:
                continue
            try:
                self.ledger.copies.adopt(key, self.lake.ledger_files.read(key))
                found.with_proofs += 1
            except (BadInput, Damaged) as error:
                found.refused["|".join(key)] = str(error)
        self._adopt_first_bars()
        for timeframe in self.settings.raw_timeframes:
            self._adopt_objects(raw_table(timeframe), found)
        return found

    def _adopt_first_bars(self) -> None:
        """Know again where the markets begin: where the last gap ends that is not listed."""
        for market in self.settings.markets:
            table = raw_table(self.settings.venues[market.venue].base)
            every = Window(self.settings.since, self.settings.now())
            gaps = self.ledger.gaps.between(table, market, every)
            unlisted = [gap for gap in gaps if gap.cause == GapCause.NOT_LISTED]
            if unlisted and self.ledger.markets.claim(market)[0] is None:
                last = unlisted[-1]
                self.ledger.markets.set_first_bar(market, last.window.end, last.evidence)

    def _adopt_objects(self, table: Table, found: Adoption) -> None:
        known = self.ledger.partitions.summaries(table)
        wanted = {market.key for market in self.settings.markets}
        for key in sorted(self.lake.list_sizes(table)):
            if key in known or key[0] not in wanted:
                continue
            try:
                self._adopt_object(table, key)
                found.bars_only += 1
            except (BadInput, Damaged) as error:
                found.refused[f"{table.name} {'|'.join(key)}"] = str(error)

    def _adopt_object(self, table: Table, key: PartitionKey) -> None:
        store = PartitionStore(self.settings, self.ledger, self.lake)
        partition = Partition.from_stored_key(key)
        with self.ledger.lock(partition.key):
            self.lake.read(table, partition)
            before = store.open(table, partition)
            opens, timeframe = before.stored["open_time"], table.timeframe
            through = before.wanted.start
            if opens.len():
                through = max(through, min(before.wanted.end, timeframe.shift(opens[-1], 1)))
            gaps = tuple(
                Gap(w, w.count(timeframe), GapReason.UNANSWERED, 1, NOT_KNOWN)
                for w in find_gaps(opens, timeframe, Window(before.wanted.start, through))
            )
            store.save(before, FetchResult(gaps=gaps, through=through))
