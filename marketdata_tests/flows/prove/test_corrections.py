"""Corrections: a venue restates closed bars; both revisions are kept and can be read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from aiohttp import web
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from marketdata_assets import open_reader
from marketdata_assets.cli.main import app
from marketdata_assets.context import Context, open_context
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.fetch.open_partition import IngestResult
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.flows.prove.corrections import Correction, list_corrections
from marketdata_assets.flows.read.as_of import AsOfReader
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.lock import DatasetLocker
from marketdata_assets.flows.read.verify import DatasetVerifier
from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import history_table, raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.quality.split import REJECTED_SCHEMA
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.lockfile import write_lock
from marketdata_assets.transforms.rollup import roll_up
from marketdata_tests.conftest import SANDBOX_NOW, Universe
from marketdata_tests.samples import BTC
from marketdata_tests.steps import (
    SkippingClock,
    at,
    bar_requests,
    coinbase,
    ms,
    partitions,
    quarantined,
    run_derive,
    serving,
    window,
)

pytestmark = pytest.mark.server

MINUTE = TIMEFRAMES["1m"]
ROLLUPS = ("5m", "1h", "1d")


@dataclass
class Stage:
    """A universe and an exchange that corrects its bars; `current` holds its present bars."""

    exchange: SandboxExchange
    settings: Settings
    span: Window
    patch: pytest.MonkeyPatch
    current: pl.DataFrame = field(init=False)

    def __post_init__(self) -> None:
        self.current = generate_bars("BTCUSDT", "1m", self.span)
        self.exchange.tamper = self.tamper

    async def tamper(self, request: web.Request, rows: list[list[Any]]) -> Any:
        if request.query["interval"] != "1m":
            return None
        now = {int(t.timestamp() * 1000): rest for t, *rest in self.current.rows()}
        return [
            row
            if row[0] not in now
            else [row[0], *map(str, now[row[0]][:5]), row[6], *self._rest(now[row[0]])]
            for row in rows
        ]

    @staticmethod
    def _rest(values: list[Any]) -> list[Any]:
        _, _, _, _, _, quote, trades, taker, taker_quote = values
        return [str(quote), trades, str(taker), str(taker_quote), "0"]

    def correct(self, opens: list[datetime], factor: str = "1.25") -> None:
        """Multiply all amounts of these bars by a factor and move the close to the high."""
        grown = [
            (pl.col(n) * Decimal(factor)).round(8).cast(BAR_SCHEMA[n]).alias(n)
            for n in BAR_SCHEMA
            if "volume" in n
        ]
        changed = self.current.filter(pl.col("open_time").is_in(opens)).with_columns(
            *grown, pl.col("high").alias("close")
        )
        self.current = pl.concat(
            [self.current.join(changed, on="open_time", how="anti"), changed]
        ).sort("open_time")

    def at(self, text: str) -> Settings:
        self.patch.setenv("MARKETDATA_NOW", text)
        return load_settings()

    def ingest(self, now: str, again: Window | None = None) -> list[IngestResult]:
        settings = self.at(now)
        self.exchange.requests.clear()
        with open_context(settings, policy=SkippingClock().policy()) as context:
            done = list(context.bind(Ingester).ingest(MINUTE, partitions(settings), again))
        run_derive(settings)
        return done


@pytest.fixture
def stage(universe: Universe, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """Four days around the turn of the year, which were first fetched on January 5."""
    exchange = SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9)
    with serve_in_thread(exchange) as url:
        settings = universe(url, since="2023-12-30", until="2024-01-03", now="2024-01-05")
        found = Stage(exchange, settings, window("2023-12-30", "2024-01-03"), monkeypatch)
        assert all(done.complete for done in found.ingest("2024-01-05"))
        yield found


def assert_reads(
    context: Context, expected: pl.DataFrame, span: Window, moment: datetime | None = None
) -> None:
    """Check all timeframes, now or as of a moment, against `expected` and its rollups."""
    rollups = roll_up(expected, MINUTE, [TIMEFRAMES[name] for name in ROLLUPS], whole=span)
    for timeframe, frame in {MINUTE: expected, **rollups}.items():
        if moment is None:
            found = context.bind(BarReader).read(BTC, timeframe, span)
        else:
            found = context.bind(AsOfReader).read(BTC, timeframe, span, moment=moment)
        assert_frame_equal(found, frame, check_exact=True)


def corrections(context: Context, span: Window, since: datetime | None = None) -> list[Correction]:
    """List the corrections of BTC."""
    lake = context.storage.lake
    return list(list_corrections(context.settings, lake, [BTC], window=span, since=since))


@pytest.mark.parametrize("rollups", ["duckdb", "parquet"])
def test_every_moment_reads_the_bars_that_were_known_then(
    stage: Stage, rollups: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bars are corrected, some of them twice; reads cover moments before, between and after."""
    monkeypatch.setenv("MARKETDATA_ROLLUPS", rollups)
    stage.ingest("2024-01-05T00:00:01")
    dice, first = random.Random(5), stage.current
    opens = first["open_time"].to_list()
    once = dice.sample(opens, 200)
    stage.correct(once)
    second = stage.current
    done = stage.ingest("2024-01-06", stage.span)
    assert sum(d.replaced.height for d in done) == 200
    assert all(d.account.is_balanced for d in done)
    stage.correct([*dice.sample(once, 50), *dice.sample(opens, 50)], "0.8")
    third = stage.current
    stage.ingest("2024-01-07", stage.span)
    assert quarantined(stage.settings) == []
    with open_context(stage.at("2024-01-08")) as context:
        assert_reads(context, third, stage.span)
        for moment, known in (
            ("2024-01-05T12:00", first),
            ("2024-01-06", second),
            ("2024-01-06T12:00", second),
            ("2024-01-07", third),
        ):
            assert_reads(context, known, stage.span, at(moment))
        assert_reads(
            context,
            third.filter(pl.col("open_time") < at("2024-01-02")),
            window("2023-12-30", "2024-01-02"),
            at("2024-01-08"),
        )
    with open_reader() as reader:
        found = reader.bars(BTC.key, "1m", as_of=at("2024-01-06")).collect()
        assert_frame_equal(found, second, check_exact=True)


def test_bars_without_a_correction_stay(stage: Stage) -> None:
    """Only the corrected bar and its rollups change; the other month keeps its bytes."""
    moment = at("2024-01-02T10:07")
    files = {
        p: p.read_bytes() for p in Path(stage.settings.lake).rglob("*month=2023-12*/*.parquet")
    }
    with open_context(stage.settings) as context:
        before = {
            name: context.bind(BarReader).read(BTC, TIMEFRAMES[name], stage.span)
            for name in ("1m", *ROLLUPS)
        }
    stage.correct([moment])
    (_, done) = stage.ingest("2024-01-06", stage.span)
    assert done.replaced["open_time"].to_list() == [moment]
    with open_context(stage.settings) as context:
        for name, was in before.items():
            now = context.bind(BarReader).read(BTC, TIMEFRAMES[name], stage.span)
            changed = now.join(was, on=now.columns, how="anti", nulls_equal=True)[
                "open_time"
            ].to_list()
            assert changed == [TIMEFRAMES[name].floor(moment)]
    assert files == {
        p: p.read_bytes() for p in Path(stage.settings.lake).rglob("*month=2023-12*/*.parquet")
    }
    assert files


def test_the_report_lists_both_values_and_both_times(stage: Stage) -> None:
    moment = at("2024-01-02T10:07")
    stage.correct([moment])
    stage.ingest("2024-01-06", stage.span)
    stage.correct([moment], "2")
    stage.ingest("2024-01-07", stage.span)
    with open_context(stage.settings) as context:
        found = corrections(context, stage.span)
        late = corrections(context, stage.span, since=at("2024-01-06T12:00"))
        assert corrections(context, window("2023-12-30", "2024-01-02")) == []
    first, second = found
    assert late == [second]
    assert (first.open_time, first.known_at, first.corrected_at) == (
        moment,
        at("2024-01-05"),
        at("2024-01-06"),
    )
    assert (second.known_at, second.corrected_at, second.source) == (
        at("2024-01-06"),
        at("2024-01-07"),
        "rest",
    )
    was, became = first.changes["volume"]
    assert became == (was * Decimal("1.25")).quantize(Decimal("1e-8"))
    assert second.changes["volume"] == (became, became * 2)
    assert "open" not in first.changes
    assert isinstance(first, Correction)


def test_the_last_hour_is_fetched_again_with_the_newest_bars(
    universe: Universe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refresh finds corrections of the last hour in the request that returns the new bars.

    Two neighbors that are both corrected are found as well.
    """
    clock = [ms("2024-01-02T10:00")]
    exchange = SandboxExchange(now=lambda: clock[0], weight_limit=10**9)
    with serve_in_thread(exchange) as url:
        settings = universe(url, since="2024-01-01", now="2024-01-02T10:00")
        stage = Stage(exchange, settings, window("2024-01-01", "2024-01-02T11:00"), monkeypatch)
        stage.ingest("2024-01-02T10:00")
        stage.correct([at("2024-01-02T09:20"), at("2024-01-02T09:21"), at("2024-01-02T08:00")])
        clock[0] = ms("2024-01-02T10:05")
        (done,) = stage.ingest("2024-01-02T10:05")
        assert done.replaced["open_time"].to_list() == [
            at("2024-01-02T09:20"),
            at("2024-01-02T09:21"),
        ]
        assert len(bar_requests(exchange)) == 2  # the second request confirms the correction
        assert done.bars.height == 34 * 60 + 5
        monkeypatch.setenv("MARKETDATA_CORRECTIONS", "{run_minutes: 0}")
        stage.correct([at("2024-01-02T09:30")])
        clock[0] = ms("2024-01-02T10:10")
        (done,) = stage.ingest("2024-01-02T10:10")
        assert done.replaced.is_empty()


def test_a_correction_that_breaks_a_rule_is_rejected_and_the_old_bar_stays(stage: Stage) -> None:
    moment, good = at("2024-01-02T10:07"), stage.current
    stage.current = good.with_columns(
        pl.when(pl.col("open_time") == moment)
        .then(-pl.col("volume"))
        .otherwise("volume")
        .alias("volume")
    )
    done = stage.ingest("2024-01-06", stage.span)
    assert all(
        d.account.is_balanced and d.error is None and d.replaced.is_empty() and d.complete
        for d in done
    )
    assert {
        (row["open_time"], row["reasons"].split()[0]) for row in quarantined(stage.settings)
    } == {("2024-01-02T10:07:00Z", "negative_volume")}
    with open_context(stage.settings) as context:
        assert_reads(context, good, stage.span)


def test_a_venue_that_contradicts_most_bars_is_rejected(stage: Stage) -> None:
    """A day of bars that all differ is rejected; half a day among four equal days is accepted."""
    good, day = stage.current, window("2024-01-01", "2024-01-02")
    stage.correct([t for t in good["open_time"] if day.start <= t < day.end])
    (_, done) = stage.ingest("2024-01-06", day)
    assert "contradict the stored bars of [2024-01-01T00:00:00Z, 2024-01-02T00:00:00Z)" in str(
        done.error
    )
    with open_context(stage.settings) as context:
        assert_reads(context, good, stage.span)
        assert context.storage.lake.read(history_table(MINUTE), done.partition) is None
    half = window("2024-01-01", "2024-01-01T12:00")
    stage.current = good
    stage.correct([t for t in good["open_time"] if half.start <= t < half.end])
    (_, done) = stage.ingest("2024-01-06", stage.span)
    assert (done.error, done.replaced.height) == (None, 720)


def test_as_of_before_the_first_fetch_is_refused(stage: Stage) -> None:
    with open_context(stage.at("2024-01-06")) as context:
        with pytest.raises(
            BadInput,
            match=r"nothing of binance:BTC-USDT in these months was known at 2024-01-04T00:00:00Z; "
            r"the first of it was",
        ):
            context.bind(AsOfReader).read(BTC, MINUTE, stage.span, moment=at("2024-01-04"))
        with pytest.raises(BadInput, match="lies in the future"):
            context.bind(AsOfReader).read(BTC, MINUTE, stage.span, moment=at("2024-01-07"))


def test_a_run_that_dies_between_history_and_bars_loses_and_doubles_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, first = at("2024-01-02T10:07"), stage.current
    stage.correct([moment])
    write = Lake.write

    def write_unless_raw(lake: Lake, table: Any, partition: Partition, frame: pl.DataFrame) -> Any:
        if table == raw_table(MINUTE):
            raise KeyboardInterrupt
        return write(lake, table, partition, frame)

    with monkeypatch.context() as patched:
        patched.setattr(Lake, "write", write_unless_raw)
        with pytest.raises(KeyboardInterrupt):
            stage.ingest("2024-01-06", stage.span)
    with open_context(stage.at("2024-01-07")) as context:
        assert corrections(context, stage.span) == []
        for moment_ in ("2024-01-05T12:00", "2024-01-06T12:00"):
            assert_reads(context, first, stage.span, at(moment_))
    stage.ingest("2024-01-07", stage.span)
    with open_context(stage.at("2024-01-08")) as context:
        found = corrections(context, stage.span)
        assert [correction.corrected_at for correction in found] == [at("2024-01-07")]
        assert_reads(context, first, stage.span, at("2024-01-06T12:00"))
        assert_reads(context, stage.current, stage.span)


def test_a_damaged_history_holds_no_correction_back(stage: Stage) -> None:
    """It is set aside, and keeps the revisions of before."""
    opens = [stage.span.start + i * MINUTE.width for i in range(3)]
    stage.correct(opens)
    stage.ingest("2024-01-06", again=stage.span)
    (history,) = Path(stage.settings.lake).glob("history/ohlcv_1m/*/month=2023-12/data.parquet")
    content = history.read_bytes()
    history.write_bytes(content[: len(content) // 2])
    stage.correct(opens, "1.5")
    assert all(done.error is None for done in stage.ingest("2024-01-07", again=stage.span))
    with open_context(stage.at("2024-01-07")) as context:
        assert_reads(context, stage.current, stage.span)
        assert len(corrections(context, stage.span)) == 3
    assert history.with_name("data.parquet.damaged").stat().st_size == len(content) // 2


def test_bars_of_a_file_are_ingested_next_to_those_of_the_venue(
    universe: Universe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New bars are stored with their source, different bars are rejected, no request is sent."""
    settings = universe(
        "http://127.0.0.1:1", since="2024-01-01", until="2024-01-02", now="2024-01-05"
    )
    day = window("2024-01-01", "2024-01-02")
    bars = generate_bars("BTCUSDT", "1m", day)
    (january,) = partitions(settings)
    empty = pl.DataFrame(schema=REJECTED_SCHEMA)
    with open_context(settings) as context:
        half = context.bind(PartitionStore).ingest_frame(
            MINUTE, january, bars.head(720), rejected=empty, sources=["a.zip"]
        )
        assert (half.account.stored, half.complete, half.wanted) == (
            720,
            False,
            window("2024-01-01", "2024-01-01T12:00"),
        )
        rest = bars.slice(700).filter(pl.col("open_time") != at("2024-01-01T20:00"))
        changed = rest.with_columns(
            pl.when(pl.col("open_time") == at("2024-01-01T11:50"))
            .then(pl.lit(7))
            .otherwise("trades")
            .alias("trades")
        )
        done = context.bind(PartitionStore).ingest_frame(
            MINUTE, january, changed, rejected=empty, sources=["b.csv"]
        )
        assert (
            done.account.received,
            done.account.stored,
            done.account.identical,
            done.account.quarantined,
        ) == (739, 719, 19, 1)
        assert done.complete
        assert [(gap.bars, gap.reason) for gap in done.gaps] == [(1, "no_bars")]
        assert "b.csv holds both neighbors" in done.gaps[0].evidence
        stored = context.storage.lake.read(raw_table(MINUTE), january, with_provenance=True)
        assert stored is not None
        assert stored.group_by("source").len().sort("source").rows() == [
            ("a.zip", 720),
            ("b.csv", 719),
        ]
        assert_frame_equal(
            stored.select(COLUMN_NAMES),
            bars.filter(pl.col("open_time") != at("2024-01-01T20:00")),
            check_exact=True,
        )
        again = context.bind(PartitionStore).ingest_frame(
            MINUTE, january, bars, rejected=empty, sources=["c.csv"]
        )
        assert (again.account.stored, again.account.identical, again.gaps) == (1, 1439, ())
        assert fingerprint(again.bars) == fingerprint(bars)
    ((row),) = quarantined(settings)
    assert (row["open_time"], row["reasons"], row["source"]) == (
        "2024-01-01T11:50:00Z",
        "disagrees",
        "b.csv",
    )


def test_columns_that_are_missing_in_a_file_are_no_disagreement(universe: Universe) -> None:
    settings = universe(
        "http://127.0.0.1:1", since="2024-01-01", until="2024-01-02", now="2024-01-05"
    )
    bars = generate_bars("BTCUSDT", "1m", window("2024-01-01", "2024-01-02"))
    (january,) = partitions(settings)
    empty = pl.DataFrame(schema=REJECTED_SCHEMA)
    fewer = bars.with_columns(pl.lit(None, BAR_SCHEMA["quote_volume"]).alias("quote_volume"))
    with open_context(settings) as context:
        context.bind(PartitionStore).ingest_frame(
            MINUTE, january, bars, rejected=empty, sources=["all.csv"]
        )
        done = context.bind(PartitionStore).ingest_frame(
            MINUTE, january, fewer, rejected=empty, sources=["fewer.csv"]
        )
    assert (done.account.identical, done.account.quarantined) == (1440, 0)
    assert_frame_equal(done.bars, bars, check_exact=True)


def test_bars_without_provenance_count_as_always_known(stage: Stage) -> None:
    with open_context(stage.at("2024-01-06")) as context:
        for partition in partitions(stage.settings):
            bars = context.storage.lake.read(raw_table(MINUTE), partition)
            assert bars is not None
            context.storage.lake.write(raw_table(MINUTE), partition, bars)
        assert_reads(context, stage.current, stage.span, at("2020-01-01") + timedelta(days=1))


@pytest.mark.parametrize("rollups", ["duckdb", "parquet"])
def test_a_locked_dataset_is_proved_and_read_after_corrections(
    stage: Stage, rollups: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three locks with corrections between them are proved, and each lock file reads its bars.

    The history proves the first two.
    """
    monkeypatch.setenv("MARKETDATA_ROLLUPS", rollups)
    stage.ingest("2024-01-05T00:00:01")
    locks, snapshots, dice = [], [], random.Random(5)
    for day in ("2024-01-05T00:00:02", "2024-01-06", "2024-01-07"):
        if locks:
            stage.correct(dice.sample(stage.current["open_time"].to_list(), 200))
            stage.ingest(day, stage.span)
        with open_context(stage.at(day)) as context:
            locks.append(
                context.bind(DatasetLocker).lock("pinned", stage.settings.markets, stage.span)
            )
            snapshots.append(stage.current)
    assert len({one.dataset_digest for one in locks}) == 3
    with open_context(stage.at("2024-01-08")) as context:
        for one in locks:
            found = context.bind(DatasetVerifier).verify(one)
            assert (found.proved, found.differences) == (len(one.partitions), [])
            assert bool(found.from_history) == (one is not locks[-1])
    for one, bars in zip(locks, snapshots, strict=True):
        write_lock(tmp_path / "pinned.lock.json", one)
        done = CliRunner().invoke(
            app,
            [
                "bars",
                BTC.key,
                "1m",
                "--as-of",
                str(tmp_path / "pinned.lock.json"),
                "--format",
                "csv",
            ],
        )
        closes = pl.read_csv(done.stdout_bytes, schema_overrides={"close": pl.String})[
            "close"
        ].cast(BAR_SCHEMA["close"])
        assert closes.equals(bars["close"])


def test_a_change_by_hand_is_not_proved_from_history(stage: Stage) -> None:
    with open_context(stage.at("2024-01-06")) as context:
        one = context.bind(DatasetLocker).lock("pinned", stage.settings.markets, stage.span)
        partition = partitions(stage.settings)[0]
        bars = context.storage.lake.read(raw_table(MINUTE), partition, with_provenance=True)
        assert bars is not None
        context.storage.lake.write(
            raw_table(MINUTE), partition, bars.with_columns(pl.col("high").alias("close"))
        )
        found = context.bind(DatasetVerifier).verify(one)
        assert [(d.table, d.kind) for d in found.differences] == [("raw/ohlcv_1m", "other content")]


def test_a_venue_and_a_file_with_other_columns_do_not_contradict_each_other(
    universe: Universe,
) -> None:
    """First the file alone has trade counts, then the API alone has quote volumes."""
    span, empty = window("2024-01-01", "2024-01-01T12:00"), pl.DataFrame(schema=REJECTED_SCHEMA)
    every = generate_bars("BTCUSDT", "1m", span)
    more = every.with_columns(
        pl.lit(None, BAR_SCHEMA[n]).alias(n) for n in COLUMN_NAMES if "quote" in n or "taker" in n
    )

    def candles(request: web.Request) -> web.Response:
        start, end = (at(request.query[n].removesuffix("Z")) for n in ("start", "end"))
        rows = more.filter(pl.col("open_time").is_between(start, end)).sort(
            "open_time", descending=True
        )
        answer = [
            [int(t.timestamp()), *map(float, (low, high, opened, close, volume))]
            for t, opened, high, low, close, volume, *_ in rows.rows()
        ]
        return web.json_response(answer)

    with serving(coinbase(candles, "2024-01-01T12:00:00")) as url:
        settings = universe(
            url,
            symbols="[BTC/USD]",
            since="2024-01-01",
            until="2024-01-01T12:00",
            venue="coinbaseexchange",
            now="2024-01-05",
        )
        (january,) = partitions(settings)
        with open_context(settings, policy=SkippingClock().policy()) as context:
            context.bind(PartitionStore).ingest_frame(
                MINUTE, january, more.head(600), rejected=empty, sources=["archive.csv"]
            )
            (done,) = context.bind(Ingester).ingest(MINUTE, [january], span)
    assert (done.error, done.complete, done.replaced.height) == (None, True, 0)
    assert done.account.is_balanced
    assert_frame_equal(done.bars.head(600), more.head(600), check_exact=True)
    assert done.bars["trades"].null_count() == 120
    exchange = SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9)
    with serve_in_thread(exchange) as url:
        settings = universe(url, since="2024-01-01", until="2024-01-01T12:00", now="2024-01-05")
        (january,) = partitions(settings)
        with open_context(settings, policy=SkippingClock().policy()) as context:
            context.bind(PartitionStore).ingest_frame(
                MINUTE, january, more.head(600), rejected=empty, sources=["archive.csv"]
            )
            (done,) = context.bind(Ingester).ingest(MINUTE, [january], span)
    assert (done.error, done.complete, done.replaced.height) == (None, True, 600)
    assert done.account.is_balanced
    assert_frame_equal(done.bars, every, check_exact=True)
