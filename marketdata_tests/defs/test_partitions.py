"""The grid holds every month that is wanted now, by one clock, whatever the machine's clock is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from marketdata_assets.defs.partitions import market_months, partitions_between
from marketdata_assets.model.window import format_time
from marketdata_assets.settings.universe import Settings
from marketdata_tests.conftest import Universe
from marketdata_tests.steps import partitions

REAL = datetime.now(UTC)
THIS_MONTH = REAL.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
NEXT_MONTH = (THIS_MONTH + timedelta(days=32)).replace(day=1)
TOMORROW = REAL + timedelta(days=1)
SECOND = timedelta(seconds=1)
FAR = datetime(2035, 3, 15, tzinfo=UTC)
"""Decades ahead of the machine."""


def months_of(settings: Settings) -> list[str]:
    grid = market_months(settings).get_partitions_def_for_dimension("month")
    return list(grid.get_partition_keys())


def first_of(moment: datetime) -> str:
    return moment.strftime("%Y-%m-01")


@pytest.mark.parametrize(
    ("until", "now", "last"),
    [
        (None, None, first_of(REAL)),
        (TOMORROW, None, first_of(REAL)),
        (NEXT_MONTH, None, first_of(REAL)),
        (NEXT_MONTH + timedelta(days=700), None, first_of(REAL)),
        (THIS_MONTH, None, first_of(THIS_MONTH - SECOND)),
        (datetime(2024, 3, 1, tzinfo=UTC), None, "2024-02-01"),
        (None, THIS_MONTH + SECOND, first_of(REAL)),
        (None, THIS_MONTH, first_of(THIS_MONTH - SECOND)),
        (None, NEXT_MONTH + SECOND, first_of(NEXT_MONTH)),
        (None, datetime(2024, 2, 10, tzinfo=UTC), "2024-02-01"),
        (None, FAR, "2035-03-01"),
        (datetime(2095, 1, 1, tzinfo=UTC), FAR, "2035-03-01"),
        (datetime(2024, 2, 10, tzinfo=UTC), FAR, "2024-02-01"),
    ],
)
def test_the_last_month_is_the_one_that_is_open_or_ends_what_is_wanted(
    universe: Universe, until: datetime | None, now: datetime | None, last: str
) -> None:
    settings = universe(
        "http://127.0.0.1:9",
        since="2023-11-05",
        until=format_time(until) if until else None,
        now=format_time(now) if now else None,
    )
    months = months_of(settings)
    assert (months[0], months[-1]) == ("2023-11-01", last)
    wanted = [partition.key for partition in partitions(settings)]
    grid = market_months(settings)
    assert all(grid.has_partition_key(key) for key in wanted)
    assert partitions_between(grid, wanted[0], wanted[-1]) == wanted
    assert isinstance(grid, dg.MultiPartitionsDefinition)
