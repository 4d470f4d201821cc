"""An anomaly: bars that pass every rule and are still hard to believe."""

from __future__ import annotations

from datetime import datetime
from enum import IntEnum, StrEnum
from typing import NamedTuple


class AnomalySeverity(IntEnum):
    """How much harm an anomaly does if its bars are wrong."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    @property
    def label(self) -> str:
        """The severity in lower case, as it is stored and shown: `high`."""
        return self.name.lower()


class AnomalyState(StrEnum):
    """How far the review of an anomaly has come."""

    OPEN = "open"
    """Nobody has reviewed it."""
    ACKNOWLEDGED = "acknowledged"
    """A person confirmed that the bars are right, for example a real crash."""
    RESOLVED = "resolved"
    """The bars were repaired, or the anomaly is no longer found."""


class Anomaly(NamedTuple):
    """Suspicious bars of one market, which open in `[start, end)`.

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
