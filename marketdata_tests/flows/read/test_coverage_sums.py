"""Coverage beside a count of every single bar, over universes that are edited at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from marketdata_assets.context import open_context
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.listings import LISTINGS
from marketdata_tests.samples import at
from marketdata_tests.steps import run_ingest, stored_bars, window

pytestmark = pytest.mark.server

SYMBOLS = {"BTC/USDT": "BTCUSDT", "ETH/USDT": "ETHUSDT", "SHIB/USDT": "SHIBUSDT"}
LISTED = at("2021-05-10T11:30")
"""SHIB's first minute: spans lie around it, and around the end of a month."""
UNIVERSES, EDITS = 8, 3


def edit(dice: random.Random) -> dict[str, str]:
    """Return a random universe: some symbols, a base, and a span of up to four days."""
    begin = dice.choice([LISTED - timedelta(days=1), at("2021-05-30")])
    since = begin + timedelta(minutes=dice.randrange(3000))
    until = since + timedelta(minutes=dice.randrange(1, 6000))
    chosen = dice.sample(list(SYMBOLS), dice.randint(1, len(SYMBOLS)))
    base = dice.choice(["1m", "5m", "1h", "4h"])
    return {
        "symbols": f"[{', '.join(chosen)}]",
        "since": since.isoformat(),
        "until": until.isoformat(),
        "extra": f"base: {base}",
    }


def wanted_opens(settings: Settings) -> list[datetime]:
    """Return the open times of all bars of the base that lie wholly in the span, one by one."""
    (venue,) = settings.venues.values()
    assert venue.until
    width, found = venue.base.width, []
    moment = at("2021-05-01")
    while moment + width <= venue.until:
        if moment >= venue.since:
            found.append(moment)
        moment += width
    return found


def check(settings: Settings, market: Market) -> None:
    (venue,) = settings.venues.values()
    opens, minutes = wanted_opens(settings), venue.base.width // timedelta(minutes=1)
    with open_context(settings) as context:
        (found,) = context.bind(CoverageReporter).report([market])
        (half,) = context.bind(CoverageReporter).report(
            [market], window("2021-05-01", "2021-05-11")
        )
    parts = found.as_dict()
    expected = parts.pop("expected")
    del parts["market"]
    assert expected == len(opens) * minutes
    assert sum(int(value) for value in parts.values()) == expected
    key = market.key.replace(":", "%3A")
    stored = set(stored_bars(settings, key, venue.base.name)["open_time"].to_list())
    assert parts["present"] == len(stored & set(opens)) * minutes
    listed = LISTINGS[SYMBOLS[market.symbol]].listed_at
    first = venue.base.floor(listed)
    assert parts["not_listed"] == sum(moment < first for moment in opens) * minutes
    assert parts["not_fetched"] == 0
    assert half.expected == sum(t + venue.base.width <= at("2021-05-11") for t in opens) * minutes


@pytest.mark.parametrize("seed", range(UNIVERSES))
def test_the_parts_sum_to_a_count_of_every_bar(
    sandbox: Any, universe: Callable[..., Settings], seed: int
) -> None:
    """Symbols come and go, the span moves, and the base changes; the lake and the ledger stay."""
    dice = random.Random(seed)
    for _ in range(EDITS):
        settings = universe(sandbox[1], now="2021-07-01", **edit(dice))
        (venue,) = settings.venues.values()
        run_ingest(settings, timeframe=venue.base.name)
        for market in settings.markets:
            check(settings, market)


def test_the_bases_of_these_universes_are_timeframes() -> None:
    bases = {edit(random.Random(seed))["extra"].partition(" ")[2] for seed in range(UNIVERSES)}
    assert bases <= set(TIMEFRAMES)
    assert len(bases) > 2
