"""The market x month grid, and the guard against runs that silently cover less than they were asked
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import dagster as dg

from marketdata_assets.model.partition import Partition
from marketdata_assets.model.window import month_of
from marketdata_assets.settings.universe import Settings

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"


def market_months(settings: Settings) -> dg.MultiPartitionsDefinition:
    """Every market x every month since the universe's first day; the open month belongs to it."""
    first = month_of(settings.since).start
    ends = [venue.until for venue in settings.venues.values()]
    last = (
        max((end for end in ends if end), default=settings.now()) if all(ends) else settings.now()
    )
    bounded = settings.clock is not None or all(ends)
    if settings.clock and settings.clock.speed and not all(ends):
        last = month_of(last).end + timedelta(days=1)  # a replay may run into the next month
    end = month_of(last - timedelta(microseconds=1)).end if bounded else None
    months = dg.MonthlyPartitionsDefinition(
        start_date=first.strftime("%Y-%m-%d"),
        end_date=end.strftime("%Y-%m-%d") if end else None,
        end_offset=0 if end else 1,
    )
    return dg.MultiPartitionsDefinition(
        {
            "market": dg.StaticPartitionsDefinition([m.key for m in settings.markets]),
            "month": months,
        }
    )


def partitions_of_run(context: dg.AssetExecutionContext) -> list[Partition]:
    """The partitions a run must do. Fails when its keys are not exactly those of its range (Dagster
    may lose some).

    Dagster runs of a job's backfill carry a range for many partitions and one key; a range with its
    ends swapped expands to nothing. Both would "succeed" on fewer partitions than asked.
    """
    keys = list(context.partition_keys)
    start, end = context.run.tags.get(RANGE_START), context.run.tags.get(RANGE_END)
    if start and end:
        wanted = _range(context, start, end)
        if sorted(wanted) != sorted(keys) or not keys:
            raise dg.Failure(
                f"this run covers {len(keys)} partitions but its range {start} .. {end} holds {len(wanted)}; launch the "
                "range from the asset's page, or with `marketdata backfill`, with the earlier month first",
                allow_retries=False,
            )
    if not keys:
        raise dg.Failure("this run covers no partition; choose at least one", allow_retries=False)
    return [Partition.parse(key) for key in keys]


def _range(context: dg.AssetExecutionContext, start: str, end: str) -> Sequence[str]:
    grid = context.assets_def.partitions_def
    assert isinstance(grid, dg.MultiPartitionsDefinition)
    return partitions_between(grid, start, end) or [start, end]


def partitions_between(grid: dg.MultiPartitionsDefinition, start: str, end: str) -> list[str]:
    """All keys between two corners of the grid: markets in the grid's order, months in time's. None
    for keys outside it.
    """
    first, last = Partition.parse(start), Partition.parse(end)
    markets, months = (
        list(grid.get_partitions_def_for_dimension(d).get_partition_keys())
        for d in ("market", "month")
    )
    try:
        rows = markets[markets.index(first.market.key) : markets.index(last.market.key) + 1]
        columns = months[months.index(first.month_key) : months.index(last.month_key) + 1]
    except ValueError:
        return []
    return [f"{market}|{month}" for market in rows for month in columns]
