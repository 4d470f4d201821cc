"""The outcome of one check of one partition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Row = dict[str, str | int]
ROWS_SHOWN = 20
"""How many rows the table of a finding shows."""


class FindingSeverity(StrEnum):
    """How much a check that did not pass matters."""

    ERROR = "error"
    """It makes a backfill fail."""
    WARNING = "warning"
    """It is shown and fails no command."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of one partition.

    A blocking finding that did not pass stops what is made from the partition. `numbers` may be
    summed over partitions, `details` may not. `severity` is None for a check that makes a backfill
    fail and is an error in the UI only when it blocks.
    """

    check: str
    passed: bool
    message: str
    blocking: bool = False
    numbers: Mapping[str, int] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    severity: FindingSeverity | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
