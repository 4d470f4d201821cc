"""What is held against a venue."""

from __future__ import annotations

from typing import NamedTuple


class VenueHealth(NamedTuple):
    """A venue's failures in a row, and until when its breaker and its pause let no request through
    (our clock, seconds since 1970; 0: they let all through).
    """

    failures: int
    broken_until: float
    paused_until: float
