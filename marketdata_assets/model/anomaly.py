"""An anomaly: bars that keep every rule and are hard to believe, and what a person made of them."""

from __future__ import annotations

from datetime import datetime
from enum import IntEnum, StrEnum
from typing import NamedTuple


class AnomalySeverity(IntEnum):
    """How much harm the bars would do if they are an error."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    @property
    def word(self) -> str:
        """`high`"""
        return self.name.lower()


class AnomalyState(StrEnum):
    """What became of an anomaly."""

    OPEN = "open"
    """No person has judged it."""
    ACKNOWLEDGED = "acknowledged"
    """A person says that the bars are right: the move was real."""
    RESOLVED = "resolved"
    """The bars were corrected, or it is no longer found."""


class Anomaly(NamedTuple):
    """Bars of one market that look wrong in one way.

    `kind` names a row of `quality.anomaly_rules.RULES`. `bars` bars that open in `[start, end)`
    were found. `evidence` is what was measured, as text by name: `size`, the `limit` that it is
    above, and `says`, a sentence for a person.
    """

    kind: str
    severity: AnomalySeverity
    start: datetime
    end: datetime
    bars: int
    evidence: dict[str, str]
