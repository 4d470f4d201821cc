"""What an import did: the tally of every file, and the values that differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from marketdata_assets.flows.fetch.import_differences import ValueDifference
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.sources.archive.reading import ArchiveFile

_COUNTS = ("stored", "identical", "refused", "disagree", "conflict", "unwanted")


@dataclass(slots=True)
class FileTally:
    """What became of the rows of one file: the counts always sum to its rows.

    `disagree`: bars that are stored with other values, which stay. `conflict`: bars that another
    file gives other values. `unwanted`: rows outside of the universe's span.
    """

    file: ArchiveFile
    stored: int = 0
    identical: int = 0
    refused: int = 0
    disagree: int = 0
    conflict: int = 0
    unwanted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why rows were refused: the names of the rules that they broke, and how many did."""
    example: str = ""
    """One refused row."""

    @property
    def counts(self) -> dict[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in _COUNTS}

    @property
    def is_balanced(self) -> bool:
        """Whether every row is accounted for."""
        return sum(self.counts.values()) == self.file.rows

    def as_dict(self) -> dict[str, Any]:
        """Return it as a row of a table."""
        return {
            "file": self.file.path.name,
            "market": self.file.market.key,
            "timeframe": self.file.timeframe.name,
            "rows": self.file.rows,
            **self.counts,
            "lacking": self.file.missing_bars,
            "reasons": dict(self.reasons.most_common()),
            "example": self.example,
            "format": self.file.format,
            "unit": self.file.unit,
            "sha256": self.file.sha256,
            "path": str(self.file.path),
        }


@dataclass(slots=True)
class ImportResult:
    """What an import did. `partitions`: those with bars in the files, by timeframe."""

    files: list[FileTally]
    differences: list[ValueDifference] = field(default_factory=list)
    partitions: dict[Timeframe, list[Partition]] = field(default_factory=dict)

    @property
    def disputed(self) -> int:
        """Rows that were not stored and whose open time holds no equal bar."""
        return sum(tally.refused + tally.disagree + tally.conflict for tally in self.files)

    @property
    def message(self) -> str:
        """All of it in one line."""
        sums = Counter(rows=sum(tally.file.rows for tally in self.files))
        for tally in self.files:
            sums.update(tally.counts)
        counts = ", ".join(f"{sums[name]} {name}" for name in ("rows", *_COUNTS))
        return f"{len(self.files)} files: {counts}"
