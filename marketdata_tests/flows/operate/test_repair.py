"""Repairs and their receipts, the removal of invalid stored rows, and the replay of quarantine."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from marketdata_assets.cli.dagster_home import dagster_environment
from marketdata_assets.cli.main import app
from marketdata_assets.context import open_context
from marketdata_assets.defs.jobs import build_definitions
from marketdata_assets.errors import BadInput, MarketDataError
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.flows.fetch.replay import QuarantineReplayer
from marketdata_assets.flows.operate.repair import Repairer
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.ledger.records import IngestRecord, RowAccount
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.gap import Gap, GapReason
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.quality.clean import clean_bars
from marketdata_assets.quality.split import REJECTED_SCHEMA
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_tests.conftest import Universe
from marketdata_tests.samples import BTC, JANUARY, frame, minutes, row
from marketdata_tests.steps import (
    at,
    bar_requests,
    partitions,
    quarantined,
    run_derive,
    run_ingest,
    stored_bars,
    window,
)

MINUTE = TIMEFRAMES["1m"]
SPAN = window("2023-12-30", "2024-01-03")
TRUTH = generate_bars("BTCUSDT", "1m", SPAN)


@pytest.fixture
def stored(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> tuple[SandboxExchange, Settings]:
    """Fetch and roll up four days over the turn of a month."""
    exchange, url = sandbox
    settings = universe(url, since="2023-12-30", until="2024-01-03", now="2024-01-05")
    run_ingest(settings)
    run_derive(settings)
    exchange.requests.clear()
    return exchange, settings


def call(*arguments: str, code: int = 0) -> Any:
    """Run a command and return the JSON that it prints."""
    result = CliRunner().invoke(app, [*arguments, "--format", "json"])
    if isinstance(result.exception, MarketDataError):
        raise result.exception
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout)


def tamper_with(settings: Settings, change: Any) -> None:
    """Replace January's raw object as a foreign program could."""
    with open_context(settings) as context:
        bars = context.storage.lake.read(raw_table(MINUTE), JANUARY, with_provenance=True)
        assert bars is not None
        context.storage.lake.write(raw_table(MINUTE), JANUARY, change(bars))


def test_a_complete_span_needs_no_repair(stored: tuple[SandboxExchange, Settings]) -> None:
    exchange, _ = stored
    assert call("repair", "--dry-run") == {"requests": 0, "minutes": 0, "steps": []}
    assert exchange.requests == []


def test_a_repair_finds_corrections_and_writes_a_receipt(
    stored: tuple[SandboxExchange, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan sends no request; Dagster runs it; rows and hashes before and after are those of the
    bars.
    """
    exchange, settings = stored
    moment = at("2024-01-02T10:59")

    async def tamper(request: Any, rows: list[list[Any]]) -> Any:
        wrong = int(moment.timestamp() * 1000)
        return [
            [*r[:4], r[2], *r[5:]] if r[0] == wrong and request.query["interval"] == "1m" else r
            for r in rows
        ]

    exchange.tamper = tamper
    planned = call("repair", "--start", "2024-01-01", "--dry-run")
    assert [(step["what"], step["bars"]) for step in planned["steps"]] == [("ask again", 2880)]
    assert exchange.requests == []
    with open_context(settings) as context:
        before = {
            name: context.bind(BarReader).read(BTC, TIMEFRAMES[name], JANUARY.month)
            for name in ("1m", "1h")
        }
    monkeypatch.setenv("MARKETDATA_NOW", "2024-01-06")
    receipt = call("repair", "--start", "2024-01-01")
    assert len(bar_requests(exchange)) == receipt["requests"] > 0
    assert (receipt["corrected"], receipt["refused"], receipt["failed"], receipt["cleaned"]) == (
        1,
        0,
        [],
        [],
    )
    assert receipt["at"] == "2024-01-06T00:00:00Z"
    with open_context(settings) as context:
        for name, was in before.items():
            table = "raw/ohlcv_1m" if name == "1m" else f"rollup/ohlcv_{name}"
            (line,) = [t for t in receipt["tables"] if t["table"] == table]
            now = context.bind(BarReader).read(BTC, TIMEFRAMES[name], JANUARY.month)
            assert (line["rows_before"], line["rows_after"]) == (was.height, now.height)
            assert (line["hash_before"], line["hash_after"]) == (fingerprint(was), fingerprint(now))
            assert line["hash_before"] != line["hash_after"]
    (correction,) = call("corrections")
    assert (correction["open_time"], correction["corrected"]) == (
        "2024-01-02T10:59:00Z",
        "2024-01-06T00:00:00Z",
    )
    assert set(correction["changes"]) == {"close"}
    assert correction["changes"]["close"]["by"].startswith("+")
    assert [r["receipt"] for r in call("receipts")] == [receipt["receipt"]]
    assert call("receipts", str(receipt["receipt"]))["body"]["corrected"] == 1
    as_of = call(
        "bars",
        BTC.key,
        "1m",
        "--start",
        "2024-01-02T10:59",
        "--end",
        "2024-01-02T11:00",
        "--as-of",
        "2024-01-05T12:00",
    )
    assert Decimal(as_of[0]["close"]) == Decimal(correction["changes"]["close"]["was"])


@pytest.mark.parametrize(
    ("name", "found"), [("ask_again_every_night", 1), ("ask_again_every_month", 2)]
)
def test_a_refetch_schedule_finds_the_corrections_of_its_days(
    sandbox: tuple[SandboxExchange, str],
    universe: Universe,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    found: int,
) -> None:
    """The run that a schedule requests finds the corrections of its days and none before."""
    exchange, url = sandbox
    run_ingest(universe(url, since="2023-12-30", until="2024-01-03", now="2024-01-03T00:30"))
    corrected = {
        int(at(text).timestamp() * 1000) for text in ("2023-12-30T12:00", "2024-01-02T10:59")
    }

    async def tamper(request: Any, rows: list[list[Any]]) -> Any:
        return [
            [*r[:4], r[2], *r[5:]] if r[0] in corrected and request.query["interval"] == "1m" else r
            for r in rows
        ]

    exchange.tamper = tamper
    monkeypatch.setenv("MARKETDATA_NOW", "2024-01-03T01:40")
    settings = load_settings()
    for key, value in dagster_environment(settings).items():
        monkeypatch.setenv(key, value)
    definitions = build_definitions(settings)
    schedule = definitions.resolve_schedule_def(name)
    with dg.DagsterInstance.get() as instance:
        (request,) = schedule.evaluate_tick(dg.build_schedule_context(instance)).run_requests or ()
        result = definitions.resolve_job_def("repair").execute_in_process(
            request.run_config, instance=instance
        )
    assert result.success
    assert len(call("corrections")) == found


def test_a_repair_that_fails_reports_it_and_keeps_the_stored_bars(
    stored: tuple[SandboxExchange, Settings],
) -> None:
    exchange, settings = stored

    async def tamper(_: Any, rows: list[list[Any]]) -> Any:
        return [
            [
                r[0],
                *[str(Decimal(x) * 2) for x in r[1:5]],
                r[5],
                r[6],
                str(Decimal(r[7]) * 2),
                r[8],
                r[9],
                str(Decimal(r[10]) * 2),
                r[11],
            ]
            for r in rows
        ]

    exchange.tamper = tamper
    receipt = call("repair", "--start", "2024-01-01", code=1)
    assert "contradict the stored bars" in receipt["failed"][0]["says"]
    assert_frame_equal(stored_bars(settings), TRUTH, check_exact=True)


def test_bad_arguments_are_refused(stored: tuple[SandboxExchange, Settings]) -> None:
    with pytest.raises(BadInput, match="there is no receipt 99"):
        call("receipts", "99")
    with pytest.raises(BadInput, match="is not in"):
        call("repair", "--market", "binance:NO-SUCH")
    with pytest.raises(BadInput, match="is not a date"):
        call("repair", "--start", "yesterday")


# --------------------------------------------------------------------------------- clean-up
def test_invalid_stored_rows_are_removed_and_audited(
    stored: tuple[SandboxExchange, Settings],
) -> None:
    """Of identical rows one stays, of different ones none until the venue is requested again.

    Rows of another month and rows that break a rule are removed.
    """
    _, settings = stored
    disputed, broken = at("2024-01-01T05:00"), at("2024-01-01T06:00")

    def change(bars: pl.DataFrame) -> pl.DataFrame:
        doubled = bars.slice(100, 3)
        other = bars.filter(pl.col("open_time") == disputed).with_columns(
            pl.col("high").alias("close")
        )
        overlap = bars.head(2).with_columns(pl.col("open_time") - timedelta(days=1))
        negative = (
            pl.when(pl.col("open_time") == broken)
            .then(-pl.col("volume"))
            .otherwise("volume")
            .alias("volume")
        )
        return pl.concat([bars.with_columns(negative), doubled, other, overlap]).sort("open_time")

    tamper_with(settings, change)
    (step,) = [s for s in call("repair", "--dry-run")["steps"] if s["what"] == "clean"]
    assert (
        step["why"] == "3 rows stored twice, 2 rows: conflict, "
        "1 rows: negative_volume vwap_outside taker_above_total, 2 rows: overlap"
    )
    receipt = call("repair")
    assert [c["says"] for c in receipt["cleaned"]] == [step["why"]]
    assert receipt["stored"] == 2
    assert_frame_equal(stored_bars(settings), TRUTH, check_exact=True)
    found = quarantined(settings)
    assert (
        sorted(r["reasons"] for r in found)
        == ["conflict"] * 2 + ["negative_volume vwap_outside taker_above_total"] + ["overlap"] * 2
    )
    assert {r["source"] for r in found} == {"clean-up"}
    assert call("repair", "--dry-run")["steps"] == []
    with open_context(settings) as context:
        (sums,) = context.bind(CoverageReporter).report([BTC])
        assert (sums.present, sums.expected) == (TRUTH.height, SPAN.count(MINUTE))
        assert context.bind(PartitionStore).remove_invalid_rows(MINUTE, JANUARY) == ""


def test_clean_rows_stay_as_they_are() -> None:
    bars = frame(row(t) for t in minutes(50))
    cleaned = clean_bars(bars, MINUTE, JANUARY.month)
    assert cleaned.message == ""
    assert_frame_equal(cleaned.bars, bars, check_exact=True)


def test_a_damaged_object_is_quarantined_and_fetched_again(
    stored: tuple[SandboxExchange, Settings],
) -> None:
    _, settings = stored
    (file,) = Path(settings.lake).glob("raw/ohlcv_1m/*/month=2024-01/data.parquet")
    file.write_bytes(b"PAR1" + bytes(file.stat().st_size - 4))
    (step,) = [s for s in call("repair", "--dry-run")["steps"] if s["what"] == "clean"]
    assert "is damaged" in step["why"]
    receipt = call("repair")
    assert "set aside as" in receipt["cleaned"][0]["says"]
    assert_frame_equal(stored_bars(settings), TRUTH, check_exact=True)


# --------------------------------------------------------------------------------- replay
def quarantine(settings: Settings, bars: pl.DataFrame, reasons: str) -> None:
    """Reject these bars of January, as an earlier release with another rule would have; they are
    not stored then.
    """
    with open_context(settings) as context:
        stored = context.storage.lake.read(raw_table(MINUTE), JANUARY, with_provenance=True)
        state = context.ledger.partitions.get(raw_table(MINUTE), JANUARY)
        assert stored is not None
        assert state is not None
        written = context.storage.lake.write(
            raw_table(MINUTE), JANUARY, stored.join(bars, on="open_time", how="anti")
        )
        fields = pl.struct(
            pl.col("open_time").dt.epoch("ms").cast(pl.String),
            *(pl.col(n).cast(pl.String) for n in COLUMN_NAMES[1:]),
        ).struct.json_encode()
        refused = bars.select(
            pl.lit(-1, pl.Int64).alias("answer"),
            "open_time",
            pl.lit(reasons).alias("reasons"),
            fields.alias("fields"),
        )
        gaps = [
            Gap(Window(t, t + MINUTE.width), 1, GapReason.QUARANTINED, 3, "")
            for t in sorted(set(bars["open_time"]))
        ]
        kept = replace(state, bytes=written.bytes, digest=written.digest)
        entry = IngestRecord(
            raw_table(MINUTE),
            JANUARY,
            kept,
            RowAccount(bars.height, 0, 0, bars.height),
            gaps,
            [],
            refused.select(*REJECTED_SCHEMA),
            [],
            settings.now(),
        )
        context.ledger.partitions.commit(entry)


def test_rows_that_pass_the_rules_of_today_are_replayed(
    stored: tuple[SandboxExchange, Settings],
) -> None:
    """They are stored, rolled up, marked and counted in a receipt; no request is made."""
    exchange, settings = stored
    bars = TRUTH.filter(
        pl.col("open_time").is_between(at("2024-01-01T05:00"), at("2024-01-01T05:02"))
    )
    quarantine(settings, bars, "vwap_outside")
    run_derive(settings)
    assert [r["outcome"] for r in call("quarantine", "replay", "--dry-run")] == ["stored"] * 3
    assert stored_bars(settings).height == TRUTH.height - 3
    found = call("quarantine", "replay")
    assert [r["outcome"] for r in found] == ["stored"] * 3
    assert exchange.requests == []
    assert_frame_equal(stored_bars(settings), TRUTH, check_exact=True)
    with open_context(settings) as context:
        hours = context.bind(BarReader).read(BTC, TIMEFRAMES["1h"], JANUARY.month)
        assert hours.filter(pl.col("open_time") == at("2024-01-01T05:00"))[
            "bars_present"
        ].to_list() == [60]
    assert call("quarantine", "replay") == []
    assert {r["replayed_at"] for r in quarantined(settings)} == {"2024-01-05T00:00:00Z"}
    assert [r["kind"] for r in call("receipts")] == ["replay"]


def test_rows_that_break_a_rule_or_contradict_each_other_stay_in_quarantine(
    stored: tuple[SandboxExchange, Settings],
) -> None:
    _, settings = stored
    bars = TRUTH.filter(pl.col("open_time") == at("2024-01-01T05:00"))
    negative = TRUTH.filter(pl.col("open_time") == at("2024-01-01T05:01")).with_columns(
        -pl.col("volume")
    )
    other = bars.with_columns((pl.col("trades") + 1).alias("trades"))
    quarantine(settings, pl.concat([bars, other, negative]), "too_precise")
    quarantine(
        settings, TRUTH.filter(pl.col("open_time") == at("2024-01-01T05:02")), "outside_window"
    )
    with open_context(settings) as context:
        found = context.bind(QuarantineReplayer).replay([BTC], SPAN)
    assert (
        sorted(one.outcome for one in found)
        == ["negative_volume vwap_outside taker_above_total"] + ["several different rows"] * 2
    )
    assert stored_bars(settings).height == TRUTH.height - 3


def test_a_repair_is_planned_for_every_table(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    _, url = sandbox
    settings = universe(
        url, since="2024-01-01", until="2024-01-03", now="2024-01-05", extra="reference: [1h]"
    )
    with open_context(settings) as context:
        steps = context.bind(Repairer).plan(partitions(settings), None)
        assert [(s.what, s.bars) for s in steps] == [("fetch", 2880 + 48)]
        for name in ("1m", "1h"):
            assert all(
                done.complete
                for done in context.bind(Ingester).ingest(TIMEFRAMES[name], partitions(settings))
            )
        steps = context.bind(Repairer).plan(partitions(settings), SPAN)
        assert [(s.table, s.what, s.bars) for s in steps][:2] == [
            ("raw/ohlcv_1m", "ask again", 2880),
            ("raw/ohlcv_1h", "ask again", 48),
        ]
        assert [s.what for s in steps][2:] == ["roll up"]
