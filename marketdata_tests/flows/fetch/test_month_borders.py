"""A silent market at the end of one month and the beginning of the next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import pytest

from marketdata_assets.context import open_context
from marketdata_assets.model.gap import GapReason
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, from_ms, month_of, to_ms
from marketdata_assets.settings.universe import Settings
from marketdata_tests.fake_venues import VENUES
from marketdata_tests.fake_venues.frame import MINUTE, serving_venue
from marketdata_tests.steps import partitions, run_ingest

pytestmark = pytest.mark.server

ONE_MINUTE = TIMEFRAMES["1m"]


@pytest.mark.parametrize(
    ("first", "last"),
    [(-10, 10), (-3, 0), (0, 3), (-1200, 600)],
    ids=["across", "at the end", "at the beginning", "longer than a page"],
)
@pytest.mark.parametrize("name", ["binance", "bybit", "kucoin"])
def test_a_silence_at_a_months_border_is_confirmed(
    universe: Callable[..., Settings], name: str, first: int, last: int
) -> None:
    """Minutes `first` to `last` of a month have no bar: two answers say so, in two runs at most."""
    now = int(time.time() * 1000) // MINUTE * MINUTE + 30_000
    border = month_of(month_of(from_ms(now)).start - timedelta(days=1)).start
    silent = [to_ms(border) + minute * MINUTE for minute in range(first, last)]
    venue = VENUES[name](now=now, silent=frozenset(silent))
    day = timedelta(days=1)
    with serving_venue(venue) as url:
        settings = universe(
            url,
            symbols=f"[{venue.spot}]",
            since=(border - day).isoformat(),
            until=(border + day).isoformat(),
            venue=name,
        )
        for _ in range(2):
            run_ingest(settings)
    with open_context(settings) as context:
        table = raw_table(ONE_MINUTE)
        found = [gap for p in partitions(settings) for gap in context.ledger.gaps.of(table, p)]
    expected = [
        Window(from_ms(silent[0]), border),
        Window(border, from_ms(silent[-1]) + ONE_MINUTE.width),
    ]
    assert [gap.window for gap in found] == [window for window in expected if window]
    assert {gap.reason for gap in found} == {GapReason.NO_BARS}
