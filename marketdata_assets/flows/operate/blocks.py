"""Blocks: partitions as rectangles of the grid (adjacent markets by consecutive months), one run
each.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.window import Window, month_of

MONTHS_A_RUN = 12


@dataclass(frozen=True, slots=True)
class Block:
    """What one run is asked for: adjacent markets of a venue by consecutive months, and why."""

    markets: Sequence[Market]
    months: Sequence[Window]
    reasons: Mapping[str, int]

    @property
    def first(self) -> Partition:
        """The first market's first month."""
        return Partition(self.markets[0], self.months[0])

    @property
    def last(self) -> Partition:
        """The last market's last month."""
        return Partition(self.markets[-1], self.months[-1])

    @property
    def partitions(self) -> list[Partition]:
        """All partitions of the rectangle."""
        return [Partition(market, month) for market in self.markets for month in self.months]

    def __str__(self) -> str:
        return f"{self.first.key} .. {self.last.key} ({count_reasons(self.reasons)})"


class _MonthSpan(NamedTuple):
    """Consecutive months, first and last, counted from year 0."""

    first: int
    last: int


def plan_blocks(
    groups: Iterable[Sequence[Market]],
    reasons: Mapping[PartitionKey, str],
    room: int,
    *,
    most: int,
) -> list[Block]:
    """Return the newest partitions as at most `room` blocks, each of one group's adjacent markets.

    `reasons` has the reason of each partition; a block holds at most `most` partitions.
    """
    by_market: dict[str, list[int]] = defaultdict(list)
    for market, month in reasons:
        by_market[market].append(int(month[:4]) * 12 + int(month[5:7]) - 1)
    found: list[tuple[_MonthSpan, Sequence[Market]]] = []
    for markets in groups:
        rows = ((i, by_market.get(market.key, [])) for i, market in enumerate(markets))
        spans = [
            (span, row)
            for row, months in rows
            for span in _month_spans(months, min(most, MONTHS_A_RUN))
        ]
        spans.sort(key=lambda item: (-item[0].last, item[0].first, item[1]))
        for span, members in _rectangles(spans, most):
            found.append((span, [markets[i] for i in members]))
    found.sort(key=lambda item: -item[0].last)
    return [_block(markets, span, reasons) for span, markets in found[:room]]


def count_reasons(reasons: Mapping[str, int]) -> str:
    """Return reasons and their counts as text."""
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items())


def _month_spans(months: Sequence[int], most: int) -> Iterator[_MonthSpan]:
    """Yield consecutive months, the newest first, none longer than `most`."""
    remaining = sorted(months)
    while remaining:
        last = first = remaining.pop()
        while remaining and remaining[-1] == first - 1 and last - first + 1 < most:
            first = remaining.pop()
        yield _MonthSpan(first, last)


def _rectangles(
    spans: Sequence[tuple[_MonthSpan, int]], most: int
) -> Iterator[tuple[_MonthSpan, list[int]]]:
    """Join adjacent rows with the same months; none of more than `most` partitions."""
    rows: list[int] = []
    for i, (span, row) in enumerate(spans):
        rows.append(row)
        following = spans[i + 1] if i + 1 < len(spans) else None
        is_full = (len(rows) + 1) * (span.last - span.first + 1) > most
        if is_full or following != (span, row + 1):
            yield span, rows
            rows = []


def _block(
    markets: Sequence[Market], span: _MonthSpan, reasons: Mapping[PartitionKey, str]
) -> Block:
    numbers = range(span.first, span.last + 1)
    months = [month_of(datetime(n // 12, n % 12 + 1, 1, tzinfo=UTC)) for n in numbers]
    partitions = Block(markets, months, Counter()).partitions
    kinds = Counter(reasons[partition.stored_key].partition(":")[0] for partition in partitions)
    return Block(markets, months, kinds)
