"""The grid of markets and months, and the check that a run covers all partitions of its range."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg

from marketdata_assets.model.partition import Partition
from marketdata_assets.model.window import month_of
from marketdata_assets.settings.universe import Settings

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"
"""Dagster's tags of a run over a range of partitions; both are keys, inclusive."""


def market_months(settings: Settings) -> dg.MultiPartitionsDefinition:
    """Return the grid: every market by every month since the universe's first day.

    The month that is open by our clock belongs to it. It grows by itself with the machine's clock,
    to the last month that a venue wants; where MARKETDATA_NOW is set, it is what that clock says.
    """
    start = month_of(settings.since).start
    end = _grid_end(settings)
    months = dg.MonthlyPartitionsDefinition(
        start_date=start.strftime("%Y-%m-%d"),
        end_date=end.strftime("%Y-%m-%d") if end else None,
        end_offset=_months_ahead(settings, end),
    )
    return dg.MultiPartitionsDefinition(
        {
            "market": dg.StaticPartitionsDefinition([m.key for m in settings.markets]),
            "month": months,
        }
    )


def _grid_end(settings: Settings) -> datetime | None:
    """Return the end of the last month, exclusive; None for a grid that grows by itself."""
    untils = [venue.until for venue in settings.venues.values()]
    last = max((until for until in untils if until), default=None) if all(untils) else None
    if settings.clock:
        now = settings.now()
        if settings.clock.speed:
            now = month_of(now).end + timedelta(days=1)  # a replay may reach the next month
        last = min(last or now, now)
    return month_of(last - timedelta(microseconds=1)).end if last else None


def _months_ahead(settings: Settings, end: datetime | None) -> int:
    """Return how many months the grid may reach beyond the last one that Dagster's clock, which is
    the machine's, has ended: the open one, or as many as a clock of our own is ahead.
    """
    if end is None or settings.clock is None:
        return 1
    real = datetime.now(UTC)
    return max(1, (end.year - real.year) * 12 + end.month - real.month)


def partitions_of_run(context: dg.AssetExecutionContext) -> list[Partition]:
    """Return the partitions that a run must process. Raises Failure where Dagster lost some.

    Runs of a job's backfill carry a range for many partitions and one key; a range whose ends are
    swapped expands to nothing. Both would "succeed" on fewer partitions than were asked for.
    """
    keys = list(context.partition_keys)
    start, end = context.run.tags.get(RANGE_START), context.run.tags.get(RANGE_END)
    if start and end:
        expected = _keys_of_range(context, start, end)
        if sorted(expected) != sorted(keys) or not keys:
            raise dg.Failure(
                f"this run covers {len(keys)} partitions but its range {start} .. {end} holds "
                f"{len(expected)}; launch the range from the asset's page, or with "
                "`marketdata backfill`, with the earlier month first",
                allow_retries=False,
            )
    if not keys:
        raise dg.Failure("this run covers no partition; choose at least one", allow_retries=False)
    return [Partition.parse(key) for key in keys]


def _keys_of_range(context: dg.AssetExecutionContext, start: str, end: str) -> Sequence[str]:
    grid = context.assets_def.partitions_def
    assert isinstance(grid, dg.MultiPartitionsDefinition)
    return partitions_between(grid, start, end) or [start, end]


def partitions_between(grid: dg.MultiPartitionsDefinition, start: str, end: str) -> list[str]:
    """Return all keys between two corners of the grid (inclusive): markets by months.

    The order of markets is the universe's. The list is empty where a corner is outside the grid.
    """
    first, last = Partition.parse(start), Partition.parse(end)
    markets, months = (
        list(grid.get_partitions_def_for_dimension(dimension).get_partition_keys())
        for dimension in ("market", "month")
    )
    try:
        rows = markets[markets.index(first.market.key) : markets.index(last.market.key) + 1]
        columns = months[months.index(first.month_key) : months.index(last.month_key) + 1]
    except ValueError:
        return []
    return [f"{market}|{month}" for market in rows for month in columns]
