"""`backfill_missed` and `refresh_open` request missing bars, nothing else and nothing forever."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput, StoreFailed, VenueDown
from marketdata_assets.flows.operate.backfill import (
    PARTITIONS_A_RUN,
    BackfillPlan,
    BacklogFinder,
)
from marketdata_assets.flows.operate.blocks import MONTHS_A_RUN
from marketdata_assets.flows.operate.refresh import RefreshPlanner
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model import partition_status
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.partition_status import LOST_REASON
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_assets.storage.s3 import S3Objects
from marketdata_tests.conftest import Universe
from marketdata_tests.steps import at, mark_gaps_final, partitions, run_derive, run_ingest

M1 = TIMEFRAMES["1m"]


@pytest.fixture
def settings(sandbox: tuple[SandboxExchange, str], universe: Universe) -> Settings:
    """Load a universe of two markets from October 30, 2023 on; now is January 10, 2024."""
    return universe(
        sandbox[1], symbols="[BTC/USDT, ETH/USDT]", since="2023-10-30", now="2024-01-10T00:00:00Z"
    )


@pytest.fixture(scope="module")
def stored_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full_lake") / "copy"


@pytest.fixture
def full_lake(settings: Settings, tmp_path: Path, stored_once: Path) -> Settings:
    """Fetch and roll up everything, and leave no gap that would be fetched again.

    The first test does it, and the others copy what it stored.
    """
    if stored_once.exists():
        shutil.copytree(stored_once, tmp_path, dirs_exist_ok=True)
        return settings
    run_ingest(settings)
    mark_gaps_final(settings)
    run_derive(settings)
    shutil.copytree(tmp_path, stored_once, ignore=shutil.ignore_patterns("universe.yaml"))
    return settings


def at_time(settings: Settings, now: str) -> Settings:
    assert settings.clock
    return settings.model_copy(
        update={"clock": settings.clock.model_copy(update={"start": at(now)})}
    )


def plan_backfill_now(
    settings: Settings, room: int = 9, busy: Any = (), shown: Any = None
) -> BackfillPlan:
    with open_context(settings) as context:
        return context.bind(BacklogFinder).plan_backfill(room, busy, shown or {})


def block_keys(found: BackfillPlan) -> list[str]:
    return [f"{block.first.key}..{block.last.key}" for block in found.blocks]


def file_of(settings: Settings, key: str, timeframe: str = "1m") -> Path:
    return Path(settings.lake, raw_table(TIMEFRAMES[timeframe]).path(Partition.parse(key)))


def test_an_empty_lake_is_requested_newest_first_without_the_open_month(settings: Settings) -> None:
    found = plan_backfill_now(settings)
    assert block_keys(found) == ["binance:BTC-USDT|2023-10-01..binance:ETH-USDT|2023-12-01"]
    assert found.blocks[0].reasons == {"never fetched": 6}
    assert "6 never fetched" in found.message


def test_a_complete_lake_causes_no_request(full_lake: Settings) -> None:
    found = plan_backfill_now(full_lake)
    assert (found.blocks, found.lost, found.waiting) == ([], {}, {})
    assert found.message == "nothing is missing"


def test_only_the_partition_of_a_deleted_file_is_requested(full_lake: Settings) -> None:
    file_of(full_lake, "binance:ETH-USDT|2023-11-01").unlink()
    found = plan_backfill_now(full_lake)
    assert block_keys(found) == ["binance:ETH-USDT|2023-11-01..binance:ETH-USDT|2023-11-01"]
    assert found.lost == {raw_table(M1): [Partition.parse("binance:ETH-USDT|2023-11-01")]}
    assert found.blocks[0].reasons == {LOST_REASON: 1}


def test_a_truncated_file_counts_as_lost(full_lake: Settings) -> None:
    file = file_of(full_lake, "binance:ETH-USDT|2023-11-01")
    file.write_bytes(file.read_bytes()[:-1])
    assert block_keys(plan_backfill_now(full_lake)) == [
        "binance:ETH-USDT|2023-11-01..binance:ETH-USDT|2023-11-01"
    ]


def test_a_lake_that_lost_most_objects_counts_as_not_mounted(
    full_lake: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is not mounted must not delete the history of every event."""
    monkeypatch.setattr(partition_status, "LOST_AT_ONCE", 2)
    for key in (
        "binance:ETH-USDT|2023-11-01",
        "binance:ETH-USDT|2023-12-01",
        "binance:BTC-USDT|2023-11-01",
        "binance:BTC-USDT|2023-12-01",
    ):
        file_of(full_lake, key).unlink()
    with pytest.raises(StoreFailed, match=r"4 of 8 objects .* mounted"):
        plan_backfill_now(full_lake)


def test_a_partition_that_dagster_does_not_show_is_requested(full_lake: Settings) -> None:
    keys = {p.key for p in partitions(full_lake)}
    shown = {raw_table(M1): keys - {"binance:BTC-USDT|2023-12-01"}}
    found = plan_backfill_now(full_lake, shown=shown)
    assert block_keys(found) == ["binance:BTC-USDT|2023-12-01..binance:BTC-USDT|2023-12-01"]
    assert found.lost == {}


def test_rollups_are_requested_when_raw_bars_are_newer_or_the_warehouse_is_gone(
    settings: Settings,
) -> None:
    run_ingest(settings)
    first = plan_backfill_now(settings)
    assert first.blocks[0].reasons == {"its rollups are not up to date": 6}
    run_derive(settings)
    assert plan_backfill_now(settings).message == "nothing is missing"
    settings.duckdb.unlink()
    again = plan_backfill_now(settings)
    assert again.blocks[0].reasons == {"its rollups are not up to date": 6}
    assert set(again.lost) == {rollup_table(tf) for tf in settings.rollup_timeframes}


def test_rollup_objects_are_checked_one_table_per_tick(
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
    assert plan_backfill_now(settings).blocks == []
    lost = Path(
        settings.lake,
        rollup_table(TIMEFRAMES["4h"]).path(Partition.parse("binance:BTC-USDT|2023-11-01")),
    )
    lost.unlink()
    seen = Counter(
        str(plan_backfill_now(at_time(settings, f"2024-01-10T00:{minute:02}:00Z")).lost)
        for minute in range(8)
    )
    assert len(seen) == 2  # seven tables are complete, the eighth is not
    assert sum("4h" in words for words in seen) == 1


def test_busy_partitions_wait(full_lake: Settings) -> None:
    file_of(full_lake, "binance:ETH-USDT|2023-11-01").unlink()
    found = plan_backfill_now(full_lake, busy={"binance:ETH-USDT|2023-11-01"})
    assert (found.blocks, dict(found.waiting)) == ([], {"are under way": 1})


def test_no_more_runs_are_requested_than_there_is_room_for(full_lake: Settings) -> None:
    for key in (
        "binance:BTC-USDT|2023-10-01",
        "binance:ETH-USDT|2023-11-01",
        "binance:BTC-USDT|2023-12-01",
    ):
        file_of(full_lake, key).unlink()
    found = plan_backfill_now(full_lake, room=2)
    assert block_keys(found) == [
        f"{k}..{k}" for k in ("binance:BTC-USDT|2023-12-01", "binance:ETH-USDT|2023-11-01")
    ]
    assert found.waiting == {"wait for their turn": 1}
    assert plan_backfill_now(full_lake, room=0).blocks == []


def test_three_attempts_with_growing_pauses_then_parked_then_unparked(full_lake: Settings) -> None:
    key = "binance:ETH-USDT|2023-11-01"
    file_of(full_lake, key).unlink()
    moments = ["00:00", "00:01", "00:02", "00:11", "00:12", "01:01", "01:02"]
    counts = [
        len(plan_backfill_now(at_time(full_lake, f"2024-01-10T{moment}:00Z")).blocks)
        for moment in moments
    ]
    assert counts == [1, 0, 1, 0, 1, 0, 0]  # pauses of 2, 10 and 50 minutes, then no more attempt
    later = at_time(full_lake, "2024-01-12T00:00:00Z")
    assert plan_backfill_now(later).parked == [Partition.parse(key)]
    with open_context(later) as context:
        (attempt,) = context.ledger.attempts.all().values()
        assert (attempt.attempts, attempt.parked_at, attempt.reason) == (
            3,
            at("2024-01-10T01:02"),
            LOST_REASON,
        )
        assert context.ledger.attempts.clear([Partition.parse(key)]) == 1
    assert len(plan_backfill_now(later).blocks) == 1


def test_attempts_are_cleared_when_the_partition_is_complete(full_lake: Settings) -> None:
    key = "binance:ETH-USDT|2023-11-01"
    file_of(full_lake, key).unlink()
    plan_backfill_now(full_lake)
    run_ingest(full_lake, wanted=[Partition.parse(key)])
    run_derive(full_lake)
    assert plan_backfill_now(full_lake).message == "nothing is missing"
    with open_context(full_lake) as context:
        assert context.ledger.attempts.all() == {}


def test_a_clock_that_jumps_back_does_not_block_a_partition_forever(full_lake: Settings) -> None:
    file_of(full_lake, "binance:ETH-USDT|2023-11-01").unlink()
    plan_backfill_now(at_time(full_lake, "2024-01-20T00:00:00Z"))
    assert len(plan_backfill_now(full_lake).blocks) == 1


def test_an_open_breaker_stops_its_venue_and_costs_no_attempt(full_lake: Settings) -> None:
    file_of(full_lake, "binance:ETH-USDT|2023-11-01").unlink()
    with open_context(full_lake) as context:
        now = context.clock()
        for _ in range(30):
            context.ledger.venues.record("binance", False, now)
        found = context.bind(BacklogFinder).plan_backfill(9, (), {})
        assert found.blocks == []
        assert found.waiting == {"wait for binance, whose circuit breaker is open": 1}
        assert context.ledger.attempts.all() == {}
        assert [refresh.corners for refresh in context.bind(RefreshPlanner).plan(())] == [None]


def test_a_venue_that_is_down_costs_no_attempt(full_lake: Settings, universe: Universe) -> None:
    key = "binance:ETH-USDT|2023-11-01"
    file_of(full_lake, key).unlink()
    plan_backfill_now(full_lake)
    gone = universe(
        "http://127.0.0.1:9/binance",
        symbols="[BTC/USDT, ETH/USDT]",
        since="2023-10-30",
        now="2024-01-10T00:00:00Z",
    )
    (failed,) = run_ingest(gone, wanted=[Partition.parse(key)])
    assert isinstance(failed.error, VenueDown)
    with open_context(full_lake) as context:
        assert [attempt.attempts for attempt in context.ledger.attempts.all().values()] == [0]


def test_months_before_the_lookback_are_not_requested(settings: Settings) -> None:
    automation = settings.automation.model_copy(update={"lookback_days": 20})
    short = settings.model_copy(update={"automation": automation})
    assert block_keys(plan_backfill_now(short)) == [
        "binance:BTC-USDT|2023-12-01..binance:ETH-USDT|2023-12-01"
    ]


def test_long_histories_become_runs_of_a_bounded_size(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    settings = universe(
        sandbox[1],
        symbols="[A/USDT, B/USDT, C/USDT]",
        since="2022-01-01",
        now="2024-01-10T00:00:00Z",
    )
    found = plan_backfill_now(settings, room=100)
    assert all(len(block.months) <= MONTHS_A_RUN for block in found.blocks)
    assert all(len(block.partitions) <= PARTITIONS_A_RUN for block in found.blocks)
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


def test_a_month_without_a_wanted_bar_is_not_requested(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    """The afternoon of the last day of October holds no complete 1d bar."""
    settings = universe(
        sandbox[1], since="2023-10-31T12:00:00", now="2024-01-10T00:00:00Z", extra="base: 1d"
    )
    assert block_keys(plan_backfill_now(settings)) == [
        "binance:BTC-USDT|2023-11-01..binance:BTC-USDT|2023-12-01"
    ]


def test_a_new_symbol_is_requested_and_a_removed_one_is_not(
    full_lake: Settings, sandbox: Any, universe: Universe
) -> None:
    more = universe(
        sandbox[1], symbols="[BTC/USDT, SOL/USDT]", since="2023-10-30", now="2024-01-10T00:00:00Z"
    )
    assert block_keys(plan_backfill_now(more)) == [
        "binance:SOL-USDT|2023-10-01..binance:SOL-USDT|2023-12-01"
    ]
    wanted = Window(at("2023-11-01"), at("2023-12-01"))
    # the stored bars of a removed symbol can be read
    with open_context(more) as context:
        eth = context.bind(BarReader).find_market("binance:ETH-USDT")
        assert (
            context.bind(BarReader)
            .read(eth, M1, wanted)
            .equals(generate_bars("ETHUSDT", "1m", wanted))
        )
        assert context.bind(BarReader).read(eth, TIMEFRAMES["1d"], wanted).height == 30
        with pytest.raises(BadInput, match="is not in"):
            context.bind(BarReader).find_market("binance:XRP-USDT")


# --------------------------------------------------------------------------------- refresh_open
def plan_refreshes(settings: Settings, busy: Any = ()) -> list[tuple[str, str] | str]:
    with open_context(settings) as context:
        return [
            (r.corners[0].key, r.corners[1].key) if r.corners else r.message
            for r in context.bind(RefreshPlanner).plan(busy)
        ]


JANUARY = ("binance:BTC-USDT|2024-01-01", "binance:ETH-USDT|2024-01-01")


def test_the_open_month_is_one_run_per_venue_and_only_after_a_bar_has_closed(
    full_lake: Settings,
) -> None:
    assert plan_refreshes(full_lake) == ["binance: no bar has closed since the last refresh"]
    assert plan_refreshes(at_time(full_lake, "2024-01-10T00:00:59Z")) == [
        "binance: no bar has closed since the last refresh"
    ]
    assert plan_refreshes(at_time(full_lake, "2024-01-10T00:01:00Z")) == [JANUARY]
    assert plan_refreshes(at_time(full_lake, "2024-01-10T00:01:00Z"), busy={JANUARY[1]}) == [
        "binance: a run is under way"
    ]


def test_the_month_before_is_refreshed_for_one_hour_more(full_lake: Settings) -> None:
    early, late = (
        plan_refreshes(at_time(full_lake, moment))
        for moment in ("2024-02-01T00:30:00Z", "2024-02-01T01:00:00Z")
    )
    february = "binance:ETH-USDT|2024-02-01"
    assert early == [(JANUARY[0], february)]
    assert late == [("binance:BTC-USDT|2024-02-01", february)]
    assert block_keys(plan_backfill_now(at_time(full_lake, "2024-02-01T00:30:00Z"))) == []
    assert block_keys(plan_backfill_now(at_time(full_lake, "2024-02-01T01:00:00Z"))) == [
        "..".join(JANUARY)
    ]


def test_a_venue_whose_span_has_ended_is_not_refreshed(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    settings = universe(
        sandbox[1], since="2023-11-28", until="2023-12-01", now="2024-01-10T00:00:00Z"
    )
    assert plan_refreshes(settings) == ["binance: nothing is wanted after 2023-12-01"]


def test_an_open_month_without_its_object_is_refreshed(full_lake: Settings) -> None:
    file_of(full_lake, JANUARY[0]).unlink()
    assert plan_refreshes(full_lake) == [JANUARY]


def test_s3_is_listed_at_intervals_and_lost_objects_are_found(
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
    real = S3Objects._list_objects
    monkeypatch.setattr(
        S3Objects,
        "_list_objects",
        lambda self, prefix: (listed.append(prefix), real(self, prefix))[1],
    )
    with open_context(settings) as context:
        assert (
            context.bind(BacklogFinder).plan_backfill(4, set(), {}).message == "nothing is missing"
        )
    assert "raw/ohlcv_1m" in listed
    with open_context(settings) as context:
        lost = Partition.parse("binance:BTC-USDT|2023-11-01")
        context.storage.lake.delete(raw_table(M1), lost)
        listed.clear()
        assert (
            context.bind(BacklogFinder).plan_backfill(4, set(), {}).message == "nothing is missing"
        )
        context.bind(CoverageReporter).daily(raw_table(M1))
    assert listed == []
    with open_context(at_time(settings, "2024-01-10T00:11:00Z")) as context:
        assert [
            p.key
            for block in context.bind(BacklogFinder).plan_backfill(4, set(), {}).blocks
            for p in block.partitions
        ] == [lost.key]
