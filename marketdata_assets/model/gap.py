"""Gaps: windows without bars, what the answers said about them, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from marketdata_assets.model.window import Window

APART = timedelta(minutes=30)
"""Equal answers that came closer together than this may share one fault of the venue."""
LONGEST_PAUSE = timedelta(days=30)
"""Between two requests of a gap. A longer one was written while our clock was wrong."""
PROMPT_ATTEMPTS = 3
"""An unanswered gap is requested in this many runs without a pause between them."""


class GapReason(StrEnum):
    """What the answers said about a gap."""

    NO_BARS = "no_bars"
    """Two answers delivered both neighbors and nothing between them."""
    QUARANTINED = "quarantined"
    """The venue delivered rows that break a rule."""
    DOUBTED = "doubted"
    """The venue delivered rows that contradict each other, bar by bar or as whole answers."""
    NOT_SERVED = "not_served"
    """The venue serves bars only from a later moment on, as an answer showed."""
    NOT_LISTED = "not_listed"
    """It lies before the market's first bar, as answers of several kinds showed."""
    UNANSWERED = "unanswered"
    """No answer has settled yet whether bars exist."""


ANSWERED = (GapReason.NO_BARS, GapReason.NOT_SERVED)
"""Reasons that answers of the venue have settled."""
EXPLAIN_THEMSELVES = (GapReason.QUARANTINED, GapReason.DOUBTED, GapReason.NOT_LISTED)
"""Reasons that need no further evidence: rejected rows, and the search for the first bar."""


class GapCause(StrEnum):
    """What a gap means. A value is also the part of the coverage that counts its bars."""

    NO_TRADE = "no_trade"
    HALTED = "halted"
    NOT_LISTED = "not_listed"
    DELISTED = "delisted"
    MISSING_AT_SOURCE = "missing_at_source"


class GapStatus(StrEnum):
    """How far the search for the cause of a gap has come."""

    OPEN = "open"
    """No cause is known."""
    EXPLAINED = "explained"
    """A cause is known; the gap is still requested at growing distance."""
    FINAL = "final"
    """Two kinds of evidence agree on the cause, and answers of two moments that lie APART: the gap
    is never requested again.
    """
    REOPENED = "reopened"
    """A person discarded the cause; no cause is looked for until the next run has requested it."""


UNEXPLAINED = "unexplained"
GAP_KINDS = (*GapCause, GapReason.QUARANTINED.value, UNEXPLAINED)
"""What `Gap.kind` can be."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A window of open times of one market without bars.

    `bars` counts the open times inside `window`. `answers` counts the answers, or the runs, that
    ended in `reason`. `evidence` says what the last answers delivered; `proof` holds, as JSON does,
    what shows the cause (empty: nobody has looked for it yet). `first_requested`, `last_requested`
    and `next_request` are moments of our clock; `next_request` is None when no time is set.
    """

    window: Window
    bars: int
    reason: GapReason
    answers: int
    evidence: str
    cause: GapCause | None = None
    status: GapStatus = GapStatus.OPEN
    proof: dict[str, Any] = field(default_factory=dict)
    first_requested: datetime | None = None
    last_requested: datetime | None = None
    next_request: datetime | None = None

    @property
    def is_settled(self) -> bool:
        """Whether its meaning is known, or it was requested often enough to wait now."""
        if self.reason == GapReason.DOUBTED:
            return False
        return self.reason in ANSWERED or self.cause is not None or self.answers >= PROMPT_ATTEMPTS

    @property
    def is_rejected(self) -> bool:
        """Whether the venue delivered rows for it, which lie in quarantine."""
        return self.reason in (GapReason.QUARANTINED, GapReason.DOUBTED)

    @property
    def is_asked_apart(self) -> bool:
        """Whether the answers about it came at two moments that lie APART."""
        first, last = self.first_requested, self.last_requested
        return first is not None and last is not None and last - first >= APART

    @property
    def needs_cause(self) -> bool:
        """Whether a cause is to be looked for."""
        searched = self.status in (GapStatus.OPEN, GapStatus.EXPLAINED)
        return searched and self.reason not in EXPLAIN_THEMSELVES

    @property
    def explanation(self) -> str:
        """Why it is what it is; before a cause was looked for, what the answers delivered."""
        return str(self.proof.get("words") or self.evidence)

    @property
    def kind(self) -> str:
        """The part of the coverage that counts its bars, and what people filter by:
        `quarantined`, a cause, or `unexplained`.
        """
        if self.is_rejected:
            return GapReason.QUARANTINED
        return self.cause or UNEXPLAINED

    def is_due(self, now: datetime) -> bool:
        """Whether a run requests it at `now` (our clock)."""
        if self.next_request is not None:
            return not now < self.next_request <= now + LONGEST_PAUSE
        return not self.is_settled
