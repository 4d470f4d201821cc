"""Partitions: one market for one calendar month each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import MINUTE, Timeframe
from marketdata_assets.model.window import Window, month_of, parse_time

_LAST_YEAR = 9998  # the end of a later month is no moment any more


@dataclass(frozen=True, order=True, slots=True)
class Partition:
    """One market for one calendar month. Dagster key: `binance:BTC-USDT|2024-03-01`."""

    market: Market
    month: Window

    @property
    def month_key(self) -> str:
        """`2024-03-01`"""
        return self.month.start.date().isoformat()

    @property
    def key(self) -> str:
        """Dagster's partition key (it sorts dimensions by name: market, month)."""
        return f"{self.market.key}|{self.month_key}"

    @classmethod
    def parse(cls, key: str) -> Partition:
        """The partition of a Dagster key; raises BadInput."""
        name, _, month = key.partition("|")
        market, start = Market.parse(name), parse_time(month)
        if start.date().replace(day=1).isoformat() != month or start.year > _LAST_YEAR:
            raise BadInput(
                f"partition {key!r}: {month} is not the first day of a month, written like 2024-03-01"
            )
        return cls(market, month_of(start))

    def opens(self, tf: Timeframe) -> Window:
        """The open times of the bars that belong here: a bar belongs to the month of its last minute.

        A 1w bar therefore lies in the month of its Sunday and looks back, never ahead.
        """
        back = tf.width - MINUTE
        return Window(tf.ceil(self.month.start - back), tf.ceil(self.month.end - back))


def partitions_of(market: Market, span: Window) -> list[Partition]:
    """The partitions whose months touch the span, oldest first; none for an empty one."""
    found = []
    month = month_of(span.start)
    while span and month.start < span.end:
        found.append(Partition(market, month))
        month = month_of(month.end)
    return found


def neighbour(partition: Partition, step: int) -> Partition:
    """The same market one month later (+1) or earlier (-1)."""
    moment = partition.month.end if step > 0 else partition.month.start - timedelta(days=1)
    return Partition(partition.market, month_of(moment))
