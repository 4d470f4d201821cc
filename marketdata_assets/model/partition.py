"""Partitions: one market for one calendar month each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, month_of, parse_time

_LAST_YEAR = 9998  # the end of a later month exceeds what datetime can hold


PartitionKey: TypeAlias = tuple[str, str]
"""The market key and the month key of a partition, as the ledger and the lake have them:
`("binance:BTC-USDT", "2024-03-01")`. A plain tuple: the garbage collector stops tracking those of
text, and there is one per partition in every tick of a sensor.
"""


@dataclass(frozen=True, order=True, slots=True)
class Partition:
    """One market for one calendar month. Dagster key: `binance:BTC-USDT|2024-03-01`."""

    market: Market
    month: Window

    @property
    def month_key(self) -> str:
        """The first day of the month: `2024-03-01`."""
        return self.month.start.date().isoformat()

    @property
    def key(self) -> str:
        """Dagster's partition key, with the dimensions in Dagster's order: market, month."""
        return f"{self.market.key}|{self.month_key}"

    @property
    def stored_key(self) -> PartitionKey:
        """The market key and the month key, as the ledger stores them."""
        return self.market.key, self.month_key

    @classmethod
    def parse(cls, key: str) -> Partition:
        """Return the partition of a Dagster key. Raises BadInput."""
        name, _, month = key.partition("|")
        market, start = Market.parse(name), parse_time(month)
        if start.date().replace(day=1).isoformat() != month or start.year > _LAST_YEAR:
            raise BadInput(
                f"partition {key!r}: {month} is not the first day of a month, "
                "written like 2024-03-01"
            )
        return cls(market, month_of(start))

    @classmethod
    def from_stored_key(cls, key: PartitionKey) -> Partition:
        """Return the partition of a market key and a month key. Raises BadInput."""
        return cls.parse("|".join(key))

    def open_times(self, timeframe: Timeframe) -> Window:
        """Return the open times of this partition's bars: a bar belongs to the month in which its
        end lies, or that ends with it.

        A 1w bar therefore belongs to the month of its Sunday, and may open in the month before.
        """
        return Window(timeframe.floor(self.month.start), timeframe.floor(self.month.end))


def partitions_of(market: Market, span: Window) -> list[Partition]:
    """Return the partitions whose months touch the span, oldest first; none for an empty span."""
    found = []
    month = month_of(span.start)
    while span and month.start < span.end:
        found.append(Partition(market, month))
        month = month_of(month.end)
    return found


def adjacent_partition(partition: Partition, step: int) -> Partition:
    """Return the partition of that market one month later (+1) or earlier (-1)."""
    moment = partition.month.end if step > 0 else partition.month.start - timedelta(days=1)
    return Partition(partition.market, month_of(moment))
