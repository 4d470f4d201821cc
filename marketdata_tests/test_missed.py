"""What `backfill_missed` and `refresh_open` ask for: everything that lacks, nothing else, and nothing
for ever.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from marketdata_assets.context import open_toolbox
from marketdata_assets.errors import BadInput, StoreFailed, VenueDown
from marketdata_assets.flows.operate import backfill as missed_flow
from marketdata_assets.flows.operate.backfill import missed
from marketdata_assets.flows.operate.refresh import refreshes
from marketdata_assets.flows.read.bars import known_market, read_bars
from marketdata_assets.flows.read.coverage import daily_coverage
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw, rollup
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_assets.storage import objects
from marketdata_tests.conftest import Universe
from marketdata_tests.steps import at, partitions, run_derive, run_ingest, tell_apart

M1 = TIMEFRAMES["1m"]


@pytest.fixture
def settings(sandbox: tuple[SandboxExchange, str], universe: Universe) -> Settings:
    """Two markets: October to December 2023 closed (October from the 30th on), January 2024 open; now
    is the 10th.
    """
    return universe(
        sandbox[1], symbols="[BTC/USDT, ETH/USDT]", since="2023-10-30", now="2024-01-10T00:00:00Z"
    )


@pytest.fixture
def filled(settings: Settings) -> Settings:
    """The same, with everything fetched and rolled up, and no gap left to be asked for again."""
    run_ingest(settings)
    tell_apart(settings)
    run_derive(settings)
    return settings


def at_time(settings: Settings, now: str) -> Settings:
    assert settings.clock
    return dataclasses.replace(settings, clock=dataclasses.replace(settings.clock, start=at(now)))


def look(
    settings: Settings, room: int = 9, busy: Any = (), shown: Any = None
) -> missed_flow.Missed:
    with open_toolbox(settings) as toolbox:
        return missed(toolbox, room, busy, shown or {})


def asked(found: missed_flow.Missed) -> list[str]:
    return [f"{block.first.key}..{block.last.key}" for block in found.blocks]


def file_of(settings: Settings, key: str, timeframe: str = "1m") -> Path:
    return Path(settings.lake, raw(TIMEFRAMES[timeframe]).path(Partition.parse(key)))


def test_an_empty_lake_is_asked_for_newest_first_without_the_open_month(settings: Settings) -> None:
    found = look(settings)
    assert asked(found) == ["binance:BTC-USDT|2023-10-01..binance:ETH-USDT|2023-12-01"]
    assert found.blocks[0].reasons == {"never fetched": 6}
    assert "6 never fetched" in found.says


def test_a_whole_lake_is_left_alone(filled: Settings) -> None:
    found = look(filled)
    assert (found.blocks, found.lost, found.waiting) == ([], {}, {})
    assert found.says == "nothing is missing"


def test_a_deleted_file_is_noticed_and_asked_for_alone(filled: Settings) -> None:
    file_of(filled, "binance:ETH-USDT|2023-11-01").unlink()
    found = look(filled)
    assert asked(found) == ["binance:ETH-USDT|2023-11-01..binance:ETH-USDT|2023-11-01"]
    assert found.lost == {raw(M1): [Partition.parse("binance:ETH-USDT|2023-11-01")]}
    assert found.blocks[0].reasons == {missed_flow.LOST: 1}


def test_a_truncated_file_counts_as_lost(filled: Settings) -> None:
    file = file_of(filled, "binance:ETH-USDT|2023-11-01")
    file.write_bytes(file.read_bytes()[:-1])
    assert asked(look(filled)) == ["binance:ETH-USDT|2023-11-01..binance:ETH-USDT|2023-11-01"]


def test_a_lake_that_lost_most_of_itself_is_not_believed(
    filled: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is not mounted must not cost the history of every event."""
    monkeypatch.setattr(missed_flow, "MANY", 2)
    for key in (
        "binance:ETH-USDT|2023-11-01",
        "binance:ETH-USDT|2023-12-01",
        "binance:BTC-USDT|2023-11-01",
        "binance:BTC-USDT|2023-12-01",
    ):
        file_of(filled, key).unlink()
    with pytest.raises(StoreFailed, match=r"4 of 8 objects .* mounted"):
        look(filled)


def test_what_dagster_does_not_show_is_asked_for(filled: Settings) -> None:
    keys = {p.key for p in partitions(filled)}
    shown = {raw(M1): keys - {"binance:BTC-USDT|2023-12-01"}}
    found = look(filled, shown=shown)
    assert asked(found) == ["binance:BTC-USDT|2023-12-01..binance:BTC-USDT|2023-12-01"]
    assert found.lost == {}


def test_rollups_follow_when_the_raw_bars_are_newer_or_the_warehouse_is_gone(
    settings: Settings,
) -> None:
    run_ingest(settings)
    first = look(settings)
    assert first.blocks[0].reasons == {"its rollups are not up to date": 6}
    run_derive(settings)
    assert look(settings).says == "nothing is missing"
    settings.duckdb.unlink()
    again = look(settings)
    assert again.blocks[0].reasons == {"its rollups are not up to date": 6}
    assert set(again.lost) == {rollup(tf) for tf in settings.rollup_timeframes}


def test_rollups_as_objects_are_looked_at_in_turn(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    settings = universe(
        sandbox[1],
        since="2023-11-28",
        until="2023-12-01",
        now="2024-01-10T00:00:00Z",
        rollups="parquet",
    )
    run_ingest(settings)
    run_derive(settings)
    assert look(settings).blocks == []
    lost = Path(
        settings.lake, rollup(TIMEFRAMES["4h"]).path(Partition.parse("binance:BTC-USDT|2023-11-01"))
    )
    lost.unlink()
    seen = Counter(
        str(look(at_time(settings, f"2024-01-10T00:{minute:02}:00Z")).lost) for minute in range(8)
    )
    assert len(seen) == 2  # seven tables are whole, the eighth is not
    assert sum("4h" in words for words in seen) == 1


def test_busy_partitions_wait(filled: Settings) -> None:
    file_of(filled, "binance:ETH-USDT|2023-11-01").unlink()
    found = look(filled, busy={"binance:ETH-USDT|2023-11-01"})
    assert (found.blocks, dict(found.waiting)) == ([], {"are under way": 1})


def test_no_more_blocks_than_there_is_room_for(filled: Settings) -> None:
    for key in (
        "binance:BTC-USDT|2023-10-01",
        "binance:ETH-USDT|2023-11-01",
        "binance:BTC-USDT|2023-12-01",
    ):
        file_of(filled, key).unlink()
    found = look(filled, room=2)
    assert asked(found) == [
        f"{k}..{k}" for k in ("binance:BTC-USDT|2023-12-01", "binance:ETH-USDT|2023-11-01")
    ]
    assert found.waiting == {"wait for their turn": 1}
    assert look(filled, room=0).blocks == []


def test_three_attempts_with_growing_pauses_then_parked_then_unparked(filled: Settings) -> None:
    key = "binance:ETH-USDT|2023-11-01"
    file_of(filled, key).unlink()
    moments = ["00:00", "00:01", "00:02", "00:11", "00:12", "01:01", "01:02"]
    counts = [len(look(at_time(filled, f"2024-01-10T{moment}:00Z")).blocks) for moment in moments]
    assert counts == [1, 0, 1, 0, 1, 0, 0]  # 2 minutes, 10, 50, then never
    later = at_time(filled, "2024-01-12T00:00:00Z")
    assert look(later).parked == [Partition.parse(key)]
    with open_toolbox(later) as toolbox:
        (ask,) = toolbox.ledger.asks().values()
        assert (ask.attempts, ask.parked_at, ask.reason) == (
            3,
            at("2024-01-10T01:02"),
            missed_flow.LOST,
        )
        assert toolbox.ledger.forget_asks([Partition.parse(key)]) == 1
    assert len(look(later).blocks) == 1


def test_what_was_got_is_forgotten(filled: Settings) -> None:
    key = "binance:ETH-USDT|2023-11-01"
    file_of(filled, key).unlink()
    look(filled)
    run_ingest(filled, wanted=[Partition.parse(key)])
    run_derive(filled)
    assert look(filled).says == "nothing is missing"
    with open_toolbox(filled) as toolbox:
        assert toolbox.ledger.asks() == {}


def test_a_clock_that_jumped_back_does_not_hold_a_partition_for_ever(filled: Settings) -> None:
    file_of(filled, "binance:ETH-USDT|2023-11-01").unlink()
    look(at_time(filled, "2024-01-20T00:00:00Z"))
    assert len(look(filled).blocks) == 1


def test_an_open_breaker_stops_its_venue_and_costs_no_attempt(filled: Settings) -> None:
    file_of(filled, "binance:ETH-USDT|2023-11-01").unlink()
    with open_toolbox(filled) as toolbox:
        now = toolbox.policy.clock()
        for _ in range(30):
            toolbox.ledger.record("binance", False, now)
        found = missed(toolbox, 9, (), {})
        assert found.blocks == []
        assert found.waiting == {"wait for binance, whose circuit breaker is open": 1}
        assert toolbox.ledger.asks() == {}
        assert [r.first for r in refreshes(toolbox, ())] == [None]


def test_a_venue_that_is_down_costs_no_attempt(filled: Settings, universe: Universe) -> None:
    key = "binance:ETH-USDT|2023-11-01"
    file_of(filled, key).unlink()
    look(filled)
    gone = universe(
        "http://127.0.0.1:9/binance",
        symbols="[BTC/USDT, ETH/USDT]",
        since="2023-10-30",
        now="2024-01-10T00:00:00Z",
    )
    (failed,) = run_ingest(gone, wanted=[Partition.parse(key)])
    assert isinstance(failed.error, VenueDown)
    with open_toolbox(filled) as toolbox:
        assert [ask.attempts for ask in toolbox.ledger.asks().values()] == [0]


def test_months_beyond_the_lookback_are_left_alone(settings: Settings) -> None:
    short = dataclasses.replace(
        settings, automation=dataclasses.replace(settings.automation, lookback_days=20)
    )
    assert asked(look(short)) == ["binance:BTC-USDT|2023-12-01..binance:ETH-USDT|2023-12-01"]


def test_long_histories_become_runs_of_a_bounded_size(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    settings = universe(
        sandbox[1],
        symbols="[A/USDT, B/USDT, C/USDT]",
        since="2022-01-01",
        now="2024-01-10T00:00:00Z",
    )
    found = look(settings, room=100)
    assert all(len(block.months) <= missed_flow.MONTHS_A_RUN for block in found.blocks)
    assert all(len(block.partitions) <= missed_flow.PARTITIONS_A_RUN for block in found.blocks)
    keys = [p.key for block in found.blocks for p in block.partitions]
    assert sorted(keys) == sorted(
        p.key for p in partitions(settings) if p.month_key != "2024-01-01"
    )
    assert [block.last.month_key for block in found.blocks] == [
        "2023-12-01",
        "2023-12-01",
        "2022-12-01",
        "2022-12-01",
    ]


def test_a_month_of_which_nothing_is_wanted_is_not_asked_for(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    """The afternoon of its last day holds no whole 1d bar."""
    settings = universe(
        sandbox[1], since="2023-10-31T12:00:00", now="2024-01-10T00:00:00Z", extra="base: 1d"
    )
    assert asked(look(settings)) == ["binance:BTC-USDT|2023-11-01..binance:BTC-USDT|2023-12-01"]


def test_a_new_symbol_is_asked_for_and_a_removed_one_no_more(
    filled: Settings, sandbox: Any, universe: Universe
) -> None:
    more = universe(
        sandbox[1], symbols="[BTC/USDT, SOL/USDT]", since="2023-10-30", now="2024-01-10T00:00:00Z"
    )
    assert asked(look(more)) == ["binance:SOL-USDT|2023-10-01..binance:SOL-USDT|2023-12-01"]
    wanted = Window(at("2023-11-01"), at("2023-12-01"))
    with open_toolbox(more) as toolbox:  # what is stored of a removed one can be read
        eth = known_market(toolbox, "binance:ETH-USDT")
        assert read_bars(toolbox, eth, M1, wanted).equals(generate_bars("ETHUSDT", "1m", wanted))
        assert read_bars(toolbox, eth, TIMEFRAMES["1d"], wanted).height == 30
        with pytest.raises(BadInput, match="is not in"):
            known_market(toolbox, "binance:XRP-USDT")


# --------------------------------------------------------------------------------- refresh_open
def refresh(settings: Settings, busy: Any = ()) -> list[tuple[str, str] | str]:
    with open_toolbox(settings) as toolbox:
        return [
            (r.first.key, r.last.key) if r.first and r.last else r.says
            for r in refreshes(toolbox, busy)
        ]


JANUARY = ("binance:BTC-USDT|2024-01-01", "binance:ETH-USDT|2024-01-01")


def test_the_open_month_is_one_run_a_venue_and_only_when_a_bar_has_closed(filled: Settings) -> None:
    assert refresh(filled) == ["binance: no bar has closed since the last refresh"]
    assert refresh(at_time(filled, "2024-01-10T00:00:59Z")) == [
        "binance: no bar has closed since the last refresh"
    ]
    assert refresh(at_time(filled, "2024-01-10T00:01:00Z")) == [JANUARY]
    assert refresh(at_time(filled, "2024-01-10T00:01:00Z"), busy={JANUARY[1]}) == [
        "binance: a run is under way"
    ]


def test_the_month_before_comes_along_for_an_hour(filled: Settings) -> None:
    early, late = (
        refresh(at_time(filled, moment))
        for moment in ("2024-02-01T00:30:00Z", "2024-02-01T01:00:00Z")
    )
    february = "binance:ETH-USDT|2024-02-01"
    assert early == [(JANUARY[0], february)]
    assert late == [("binance:BTC-USDT|2024-02-01", february)]
    assert asked(look(at_time(filled, "2024-02-01T00:30:00Z"))) == []
    assert asked(look(at_time(filled, "2024-02-01T01:00:00Z"))) == ["..".join(JANUARY)]


def test_a_venue_that_is_over_is_not_refreshed(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    settings = universe(
        sandbox[1], since="2023-11-28", until="2023-12-01", now="2024-01-10T00:00:00Z"
    )
    assert refresh(settings) == ["binance: nothing is wanted after 2023-12-01"]


def test_an_open_month_without_its_object_is_refreshed(filled: Settings) -> None:
    file_of(filled, JANUARY[0]).unlink()
    assert refresh(filled) == [JANUARY]


def test_s3_is_listed_from_time_to_time_and_what_is_lost_is_found(
    sandbox: tuple[SandboxExchange, str],
    universe: Universe,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
):
    settings = universe(
        sandbox[1],
        since="2023-11-01",
        until="2024-01-01",
        now="2024-01-10T00:00:00Z",
        rollups="parquet",
        lake=f"s3://{bucket}/lake",
    )
    run_ingest(settings)
    run_derive(settings)
    listed: list[str] = []
    real = objects._Bucket._objects
    monkeypatch.setattr(
        objects._Bucket,
        "_objects",
        lambda self, prefix: (listed.append(prefix), real(self, prefix))[1],
    )
    with open_toolbox(settings) as toolbox:
        assert missed(toolbox, 4, set(), {}).says == "nothing is missing"
    assert "raw/ohlcv_1m" in listed
    with open_toolbox(settings) as toolbox:
        lost = Partition.parse("binance:BTC-USDT|2023-11-01")
        toolbox.lake.delete(raw(M1), lost)
        listed.clear()
        assert missed(toolbox, 4, set(), {}).says == "nothing is missing"
        daily_coverage(toolbox, raw(M1))
    assert listed == []
    with open_toolbox(at_time(settings, "2024-01-10T00:11:00Z")) as toolbox:
        assert [
            p.key for block in missed(toolbox, 4, set(), {}).blocks for p in block.partitions
        ] == [lost.key]
