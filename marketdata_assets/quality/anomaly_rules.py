"""The table of anomalies: what each kind is, when a bar is one, and how severe it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from marketdata_assets.model.anomaly import AnomalySeverity


@dataclass(frozen=True, slots=True, kw_only=True)
class AnomalyRule:
    """One kind of anomaly. A bar is found when its size is at least `floor` and `times` the usual.

    What the size of a kind is, and what is usual, `quality.anomalies` measures.
    """

    name: str
    meaning: str
    reason: str
    """Why real bars do not do this, or why a person should look."""
    floor: float
    times: float
    severities: dict[AnomalySeverity, float]
    """By severity: the least size that has it. A smaller size is LOW."""
    is_of_price: bool = False
    """Whether trades, another venue or a coarser bar can show that the price was real."""

    def severity(self, size: float) -> AnomalySeverity:
        """Return the worst severity that a size reaches."""
        reached = (severity for severity, least in self.severities.items() if size >= least)
        return max(reached, default=AnomalySeverity.LOW)


_GAP_FLOOR, _GAP_TIMES = 0.0025, 3
"""Of both rules that begin with a gap between two bars; which it is, the bars after it show."""
_OF_PRICE = {
    AnomalySeverity.MEDIUM: 0.005,
    AnomalySeverity.HIGH: 0.02,
    AnomalySeverity.CRITICAL: 0.2,
}
"""Sizes that are shares of the price."""

RULES: dict[str, AnomalyRule] = {
    row.name: row
    for row in (
        AnomalyRule(
            name="spike",
            meaning="prices leave between two bars, or within one, and come back at once",
            reason="A market's next bar opens where the last one closed: of 600,000 real minutes "
            "none moves more than 0.53 % in between.",
            floor=_GAP_FLOOR,
            times=_GAP_TIMES,
            is_of_price=True,
            severities=_OF_PRICE,
        ),
        AnomalyRule(
            name="jump",
            meaning="a bar opens far from where the bar before it closed, and prices stay there",
            reason="As spike; real ones come after halts, false ones where another market or unit "
            "begins.",
            floor=_GAP_FLOOR,
            times=_GAP_TIMES,
            is_of_price=True,
            severities=_OF_PRICE,
        ),
        AnomalyRule(
            name="swapped",
            meaning="open and close have changed places: only so do both fit the bars beside it",
            reason="It takes a gap on both sides that the body undoes: real bars never reach 4 "
            "times the gaps that are usual.",
            floor=0.0005,
            times=0,
            severities=_OF_PRICE,
        ),
        AnomalyRule(
            name="wick",
            meaning="a high or low far beyond the bar's own open and close and both neighbors, "
            "with too little volume to get there",
            reason="Volume grows with the square of how far prices move.",
            floor=0.003,
            times=4,
            is_of_price=True,
            severities=_OF_PRICE,
        ),
        AnomalyRule(
            name="move",
            meaning="more than 10 % in one minute (in a bar of n minutes: root n as much in "
            "logarithms)",
            reason="Real crashes do this, too: somebody should have looked.",
            floor=math.log(1.1),
            times=0,
            is_of_price=True,
            severities={AnomalySeverity.HIGH: 0, AnomalySeverity.CRITICAL: math.log(2)},
        ),
        AnomalyRule(
            name="frozen",
            meaning="bars with volume, all with equal prices, far longer than this market's prices "
            "ever stand still",
            reason="The longest real stretch is 11 bars, in a market that trades every other "
            "minute.",
            floor=10,
            times=8,
            severities={
                AnomalySeverity.MEDIUM: 0,
                AnomalySeverity.HIGH: 60,
                AnomalySeverity.CRITICAL: 1440,
            },
        ),
        AnomalyRule(
            name="volume",
            meaning="a volume, or a volume per trade, far above the large ones here, with prices "
            "that hardly moved",
            reason="Volume has heavy tails: its limit grows with how far the large ones lie above "
            "the usual ones.",
            floor=0,
            times=30,
            severities={AnomalySeverity.MEDIUM: 1, AnomalySeverity.HIGH: 10},
        ),
        AnomalyRule(
            name="untraded",
            meaning="prices moved, or trades were counted, without volume; or volume without a "
            "trade",
            reason="A bar without trades stands at the last close.",
            floor=0,
            times=0,
            severities={AnomalySeverity.MEDIUM: 0},
        ),
    )
}
"""By the kind's name, which is also what an anomaly is filed under."""
