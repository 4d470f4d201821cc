"""An anomaly: bars that keep every rule and are hard to believe, how bad that is, and what a person
made of it.
"""

from __future__ import annotations

from datetime import datetime
from enum import IntEnum, StrEnum
from typing import NamedTuple


class AnomalySeverity(IntEnum):
    """How much harm it would do if it is an error."""

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    @property
    def word(self) -> str:
        """`high`"""
        return self.name.lower()


class AnomalyState(StrEnum):
    """What became of it: nobody looked, somebody knows it (a real move), or it is over (mended, or no
    longer found).
    """

    OPEN = "open"
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"


class Anomaly(NamedTuple):
    """`kind` names a row of `quality.anomalies.RULES`. It lies in the bars that open in `[start,
    end)`; `bars` of them were found.

    `evidence` is what was measured, as text by name: `size` and the `limit` it is above, and what
    it `says` to a person.
    """

    kind: str
    severity: AnomalySeverity
    start: datetime
    end: datetime
    bars: int
    evidence: dict[str, str]
