"""Retention and cold storage: old months are removed or moved, and all other reads stay equal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from marketdata_assets import open_reader
from marketdata_assets.context import open_context
from marketdata_assets.defs.jobs import build_definitions
from marketdata_assets.errors import StoreFailed
from marketdata_assets.flows.fetch.plan import BackfillPlanner
from marketdata_assets.flows.operate.backfill import BacklogFinder
from marketdata_assets.flows.operate.retire import Retirer
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_tests.steps import at, mark_gaps_final, partitions, run_derive, run_ingest

MARKET = "binance:BTC-USDT"
MINUTES, HOURS, WEEKS = (TIMEFRAMES[name] for name in ("1m", "1h", "1w"))
LONG_AGO, LATER = "2023-12-02", "2025-01-01"

Stored = Callable[..., Settings]


@pytest.fixture
def stored(
    sandbox: Any, universe: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Stored:
    """Return a function that stores October and November 2023 and then loads the universe.

    `keys` are top-level keys of the universe, and `now` is the moment after the first ingest.
    """

    def make(
        now: str = LONG_AGO,
        rollups: str = "parquet",
        lake: str | None = None,
        derive: bool = True,
        **keys: str,
    ) -> Settings:
        settings = universe(
            sandbox[1], since="2023-10-01", until="2023-12-01", rollups=rollups, lake=lake
        )
        run_ingest(settings)
        if derive:
            run_derive(settings)
        for name, value in keys.items():
            monkeypatch.setenv(f"MARKETDATA_{name.upper()}", value)
        monkeypatch.setenv("MARKETDATA_NOW", now)
        return load_settings()

    return make


def retire_months(settings: Settings, dry_run: bool = False) -> list[tuple[str, str, str]]:
    with open_context(settings) as context:
        return [
            (r.table.name, r.partition.month_key[:7] if r.partition else "all", r.action)
            for r in context.bind(Retirer).retire(dry_run)
        ]


def bars(settings: Settings, timeframe: str) -> pl.DataFrame:
    with open_context(settings) as context:
        found = context.bind(BarReader).read(
            settings.market(MARKET),
            TIMEFRAMES[timeframe],
            Window(at("2020-01-01"), at("2026-01-01")),
        )
    with open_reader() as reader:
        assert_frame_equal(
            reader.bars(MARKET, timeframe, "2020-01-01", "2026-01-01").collect(), found
        )
    return found


@pytest.mark.parametrize("rollups", ["parquet", "duckdb"])
def test_raw_months_are_removed_and_every_rollup_stays(stored: Stored, rollups: str):
    """40 days before January 10 lie in December; December's first week needs November."""
    settings = stored("2024-01-10", rollups, retention="{raw/ohlcv_1m: 40}")
    before = {name: bars(settings, name) for name in ("1h", "1d", "1w")}
    dry = retire_months(settings, dry_run=True)
    assert dry == [("raw/ohlcv_1m", "2023-10", "removed"), ("raw/ohlcv_1m", "2023-11", "kept")]
    assert bars(settings, "1m").height > 60 * 1440 - 500
    assert retire_months(settings) == dry
    assert retire_months(settings) == dry[1:]
    assert bars(settings, "1m")["open_time"].min() == at("2023-11-01")
    for name, frame in before.items():
        assert_frame_equal(bars(settings, name), frame)


def test_removed_months_are_neither_missing_nor_fetched(stored: Stored):
    settings = stored("2024-02-15", retention="{raw/ohlcv_1m: 10}")
    assert retire_months(settings) == [
        ("raw/ohlcv_1m", "2023-10", "removed"),
        ("raw/ohlcv_1m", "2023-11", "removed"),
    ]
    assert partitions(settings) == []
    with open_context(settings) as context:
        assert [c.expected for c in context.bind(CoverageReporter).report(settings.markets)] == [0]
        assert context.bind(BackfillPlanner).plan(partitions(settings)) == []
        assert context.bind(BacklogFinder).plan_backfill(4, set(), {}).blocks == []
        daily = context.bind(CoverageReporter).daily(raw_table(MINUTES))
        assert set(daily.shares[MARKET]) == {None}
    assert bars(settings, "1h").height > 0


def test_a_month_without_rollups_stays(stored: Stored):
    settings = stored("2024-02-15", derive=False, retention="{raw/ohlcv_1m: 10}")
    assert {what for _, _, what in retire_months(settings)} == {"kept"}
    assert bars(settings, "1m").height > 60 * 1440 - 500


def test_a_month_that_a_run_holds_stays(stored: Stored):
    settings = stored("2024-02-15", retention="{raw/ohlcv_1m: 10}")
    with (
        open_context(settings) as context,
        open_context(settings) as other,
        context.ledger.lock(f"{MARKET}|2023-10-01"),
    ):
        retired = other.bind(Retirer).retire()
        found = [(r.partition.month_key[:7], r.action) for r in retired if r.partition]
    assert found == [("2023-10", "kept"), ("2023-11", "removed")]


@pytest.mark.parametrize("rollups", ["parquet", "duckdb"])
def test_a_rollup_can_be_removed_before_coarser_ones_and_is_not_rebuilt(
    stored: Stored, rollups: str
):
    settings = stored("2023-12-20", rollups, retention="{rollup/ohlcv_5m: 30}")
    hours = bars(settings, "1h")
    assert {(table, what) for table, _, what in retire_months(settings)} == {
        ("rollup/ohlcv_5m", "removed")
    }
    assert bars(settings, "5m")["open_time"].min() == at("2023-11-01")
    run_derive(settings)
    assert bars(settings, "5m")["open_time"].min() == at("2023-11-01")
    assert_frame_equal(bars(settings, "1h"), hours)
    with open_context(settings) as context:
        for minute in range(9):  # the sensor checks one rollup table per minute
            assert context.bind(BacklogFinder).plan_backfill(4, set(), {}).lost == {}, minute


def test_old_months_move_to_cold_storage_and_read_as_before(stored: Stored, tmp_path: Any):
    settings = stored("2023-12-20", cold=f"{{after_days: 31, lake: {tmp_path / 'cold'}}}")
    before = {name: bars(settings, name) for name in ("1m", "1h", "1w")}
    moved = retire_months(settings)
    assert {(month, what) for _, month, what in moved} == {("2023-10", "moved")}
    assert {table for table, *_ in moved} == {
        raw_table(MINUTES).name,
        *(rollup_table(tf).name for tf in settings.rollup_timeframes),
    }
    assert len(list((tmp_path / "cold").rglob("data.parquet"))) == len(moved)
    assert not list((tmp_path / "lake").glob("*/*/*/month=2023-10/*"))
    for name, frame in before.items():
        assert_frame_equal(bars(settings, name), frame)
    assert retire_months(settings) == []
    with open_context(settings) as context:
        assert context.bind(BacklogFinder).plan_backfill(4, set(), {}).lost == {}
    mark_gaps_final(settings)
    done = run_ingest(settings)
    assert sum(d.requests for d in done) == 0


def test_a_move_that_fails_leaves_the_object_in_place(stored: Stored, tmp_path: Any):
    (tmp_path / "cold").write_text("a file where the folder should be")
    settings = stored("2023-12-20", cold=f"{{after_days: 31, lake: {tmp_path / 'cold'}}}")
    with pytest.raises(StoreFailed):
        retire_months(settings)
    assert list((tmp_path / "lake").glob("raw/*/*/month=2023-10/data.parquet"))


def test_in_s3_old_months_change_their_storage_class_or_prefix(
    stored: Stored, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    settings = stored(
        "2023-12-20",
        lake=f"s3://{bucket}/lake",
        cold="{after_days: 31, storage_class: STANDARD_IA}",
    )
    before = bars(settings, "1h")
    assert {(month, what) for _, month, what in retire_months(settings)} == {("2023-10", "moved")}
    with open_context(settings) as context:
        assert sorted(context.storage.lake.list_storage_classes(raw_table(MINUTES)).values()) == [
            "STANDARD",
            "STANDARD_IA",
        ]
    assert retire_months(settings) == []
    assert_frame_equal(bars(settings, "1h"), before)
    monkeypatch.setenv("MARKETDATA_COLD", f"{{after_days: 31, lake: 's3://{bucket}/cold'}}")
    elsewhere = load_settings()
    assert {(month, what) for _, month, what in retire_months(elsewhere)} == {("2023-10", "moved")}
    assert_frame_equal(bars(elsewhere, "1h"), before)


def test_the_command_and_the_job_remove_the_same_months(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
):
    settings = stored("2024-02-15", retention="{raw/ohlcv_1m: 10}")
    command = [
        sys.executable,
        "-m",
        "marketdata_assets.cli.main",
        "retire",
        "--dry-run",
        "--format",
        "json",
    ]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [(row["partition"], row["what"]) for row in rows] == [
        (f"{MARKET}|2023-{month}-01", "removed") for month in (10, 11)
    ]
    job, wiped = build_definitions(settings).resolve_job_def("retire"), []
    monkeypatch.setattr(
        dg.DagsterInstance,
        "wipe_asset_partitions",
        lambda _, key, keys: wiped.append((key.to_user_string(), list(keys))),
    )
    for dry_run, remaining in ((True, 2), (False, 0)):
        with dg.DagsterInstance.ephemeral() as instance:
            assert job.execute_in_process(
                instance=instance, run_config={"ops": {"let_go": {"config": {"dry_run": dry_run}}}}
            ).success
        with open_context(settings) as context:
            assert len(context.storage.lake.list_sizes(raw_table(MINUTES))) == remaining
    assert wiped == [("raw/ohlcv_1m", [f"{MARKET}|2023-10-01", f"{MARKET}|2023-11-01"])]
