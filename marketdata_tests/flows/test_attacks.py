"""What is changed behind our back: each attack is noticed by whoever reads next, and heals without
more requests than it takes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput, BarsMissing, Damaged, MarketDataError
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.flows.fetch.plan import BackfillPlanner, PlannedPartition
from marketdata_assets.flows.prove.gaps import GapExplainer
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.coverage import Coverage, CoverageReporter
from marketdata_assets.model.gap import Gap
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import to_ms
from marketdata_assets.quality.split import REJECTED_SCHEMA
from marketdata_assets.reader import open_reader
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars, generate_klines
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_assets.storage.parquet import intact_revision
from marketdata_tests.conftest import Universe
from marketdata_tests.steps import (
    assert_bars,
    bar_requests,
    partitions,
    raw_file,
    run_derive,
    run_ingest,
    stored_bars,
    window,
)

pytestmark = pytest.mark.server

BTC, HOUR = Market("binance", "BTC/USDT"), TIMEFRAMES["1h"]
DAY = window("2024-01-07", "2024-01-08")
BARS = 1440


class Stored(NamedTuple):
    """One market-day with its rollups, and the exchange that it came from."""

    settings: Settings
    exchange: SandboxExchange


@pytest.fixture
def stored(sandbox: tuple[SandboxExchange, str], universe: Universe) -> Stored:
    settings = universe(
        sandbox[1], since="2024-01-07", until="2024-01-08", now="2024-01-10", rollups="parquet"
    )
    return fill(settings, sandbox[0])


def fill(settings: Settings, exchange: SandboxExchange) -> Stored:
    run_ingest(settings)
    run_derive(settings)
    exchange.requests.clear()
    return Stored(settings, exchange)


def read(settings: Settings, timeframe: str) -> pl.DataFrame:
    with open_context(settings) as context:
        return context.bind(BarReader).read(BTC, TIMEFRAMES[timeframe], DAY)


def plan(settings: Settings) -> list[PlannedPartition]:
    with open_context(settings) as context:
        return context.bind(BackfillPlanner).plan(partitions(settings))


def present(settings: Settings) -> int:
    with open_context(settings) as context:
        return context.bind(CoverageReporter).report([BTC])[0].present


def raised(settings: Settings, timeframe: str) -> type[MarketDataError] | None:
    """Return the error that each way to read these bars raises; it is the same one."""
    found: set[type[MarketDataError] | None] = set()
    with open_reader() as reader:
        ways: list[Callable[[], object]] = [
            lambda: read(settings, timeframe),
            lambda: reader.bars(BTC.key, timeframe).collect(),
            lambda: reader.sql(
                f"SELECT * FROM {'raw' if timeframe == '1m' else 'rollup'}.ohlcv_{timeframe}"
            ),
        ]
        for way in ways:
            try:
                way()
                found.add(None)
            except MarketDataError as error:
                found.add(type(error))
            except pl.exceptions.ComputeError as error:  # raised while a lazy frame is collected
                found.add(Damaged if "Damaged" in str(error) else BarsMissing)
    (only,) = found
    return only


def rollup_file(settings: Settings, timeframe: str = "1h") -> Path:
    (file,) = Path(settings.lake).glob(f"rollup/ohlcv_{timeframe}/*/month=2024-01/data.parquet")
    return file


def rewrite(file: Path, *, with_metadata: bool) -> None:
    """Multiply all closes by 1.0003, as another tool would: with or without our metadata."""
    table = pq.read_table(file)
    field = table.schema.field("close")
    closes = pl.Series(table["close"]).cast(pl.Decimal(38, 12)) * pl.Series(["1.0003"]).cast(
        pl.Decimal(8, 4)
    )
    changed = closes.cast(pl.Decimal(38, field.type.scale)).to_arrow().cast(field.type)
    table = table.set_column(
        table.schema.get_field_index("close"), field, pa.chunked_array([changed])
    )
    pq.write_table(table if with_metadata else table.replace_schema_metadata(), file)


# ---------------------------------------------------------------- objects of the lake
@pytest.mark.parametrize("with_metadata", [True, False])
def test_bars_that_another_tool_rewrote_are_refused_and_fetched_again(
    stored: Stored, with_metadata: bool
) -> None:
    settings, truth = stored.settings, stored_bars(stored.settings)
    rewrite(raw_file(settings), with_metadata=with_metadata)
    assert raised(settings, "1m") is Damaged
    assert present(settings) == 0
    assert [task.bars for task in plan(settings)] == [BARS]
    (done,) = run_ingest(settings)
    assert done.complete
    assert "changed from outside" in (done.note or "")
    assert_bars(stored_bars(settings), truth)
    assert present(settings) == BARS


def test_an_object_from_before_a_correction_that_is_put_back_undoes_nothing(
    stored: Stored,
) -> None:
    settings, file = stored.settings, raw_file(stored.settings)
    shutil.copy2(file, file.with_name("backup"))
    rewrite(file, with_metadata=True)
    run_ingest(settings)
    shutil.copy2(file.with_name("backup"), file)  # its time and size are the earlier ones
    assert raised(settings, "1m") is Damaged
    assert [task.bars for task in plan(settings)] == [BARS]


def test_a_lost_object_is_no_empty_answer(stored: Stored) -> None:
    raw_file(stored.settings).unlink()
    assert raised(stored.settings, "1m") is BarsMissing
    with pytest.raises(BarsMissing, match="not there any more; `marketdata backfill`"):
        read(stored.settings, "1m")
    assert present(stored.settings) == 0


def test_a_lake_that_was_copied_is_proven_by_its_content(stored: Stored) -> None:
    """Other times, inodes and order: everything is read once, and nothing is fetched."""
    for file in Path(stored.settings.lake).rglob("data.parquet"):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
        os.utime(file, (1, 1))
    assert plan(stored.settings) == []
    assert present(stored.settings) == BARS
    assert [raised(stored.settings, timeframe) for timeframe in ("1m", "1h")] == [None, None]
    assert bar_requests(stored.exchange) == []


def test_what_another_host_of_ours_wrote_is_adopted(stored: Stored, tmp_path: Path) -> None:
    """Two hosts with ledgers of their own on one lake: the one that is behind believes the bars."""
    mine = stored.settings
    other = mine.model_copy(update={"state": tmp_path / "other"})
    assert run_ingest(other)[0].complete
    assert read(other, "1m").height == BARS
    file, revision = raw_file(mine), intact_revision(raw_file(mine).read_bytes())
    shutil.copy(file, tmp_path / "first")
    rewrite(file, with_metadata=True)
    run_ingest(other)
    assert intact_revision(file.read_bytes()) == (revision or 0) + 1
    assert read(mine, "1m").height == BARS
    before = len(bar_requests(stored.exchange))
    (done,) = run_ingest(mine)
    assert (done.complete, done.note) == (True, None)
    assert len(bar_requests(stored.exchange)) == before
    assert_bars(stored_bars(mine), generate_bars("BTCUSDT", "1m", DAY))
    shutil.copy(tmp_path / "first", file)
    assert raised(mine, "1m") is Damaged


def test_an_older_ledger_beside_a_newer_lake_adopts_it_and_the_reverse_is_refused(
    stored: Stored, tmp_path: Path
) -> None:
    settings, lake = stored.settings, Path(stored.settings.lake)
    shutil.copytree(settings.state, tmp_path / "old-state")
    shutil.copytree(lake, tmp_path / "old-lake")
    rewrite(raw_file(settings), with_metadata=True)
    run_ingest(settings)  # a newer object: the same bars, one revision later
    older = settings.model_copy(update={"state": tmp_path / "old-state"})
    assert read(older, "1m").height == BARS
    shutil.rmtree(lake)
    shutil.copytree(tmp_path / "old-lake", lake)
    assert raised(settings, "1m") is Damaged
    run_ingest(settings)
    assert raised(settings, "1m") is None


# ---------------------------------------------------------------- rollups
def test_a_link_in_the_lake_is_what_it_leads_to(stored: Stored, tmp_path: Path) -> None:
    """To the object itself, on another disk: it is read. To another market's: it is refused."""
    settings, file = stored.settings, raw_file(stored.settings)
    truth, moved = read(settings, "1m"), tmp_path / "elsewhere.parquet"
    shutil.move(file, moved)
    file.symlink_to(moved)
    assert_bars(read(settings, "1m"), truth)
    file.unlink()
    file.symlink_to(rollup_file(settings, "1h"))
    assert raised(settings, "1m") == Damaged
    assert present(settings) == 0
    run_ingest(settings)
    assert_bars(read(settings, "1m"), truth)
    assert not file.is_symlink()


def test_contexts_leave_no_file_open(stored: Stored) -> None:
    """Many ticks in one process: what each opens it closes, whatever it read."""

    def work() -> None:
        with open_context(stored.settings) as context:
            context.bind(BarReader).read(BTC, TIMEFRAMES["1m"], DAY)
            context.bind(CoverageReporter).report([BTC])
        raised(stored.settings, "1h")

    work()
    before = psutil.Process().num_fds()
    for _ in range(20):
        work()
    assert psutil.Process().num_fds() <= before


@pytest.mark.parametrize("attack", ["rewritten", "wiped", "other month"])
def test_rollups_in_the_lake_that_were_changed_are_made_again_without_a_request(
    stored: Stored, attack: str
) -> None:
    settings, truth = stored.settings, read(stored.settings, "1h")
    file = rollup_file(settings)
    if attack == "rewritten":
        rewrite(file, with_metadata=True)
    elif attack == "wiped":
        file.unlink()
    else:
        shutil.copy(rollup_file(settings, "4h"), file)
    assert raised(settings, "1h") in (Damaged, BarsMissing)
    with pytest.raises((Damaged, BarsMissing), match="`marketdata backfill` makes it again"):
        read(settings, "1h")
    assert [(task.bars, task.reason) for task in plan(settings)] == [
        (0, "rollups are not up to date")
    ]
    run_derive(settings)
    assert_bars(read(settings, "1h"), truth)
    assert (plan(settings), bar_requests(stored.exchange)) == ([], [])


@pytest.mark.parametrize("attack", ["older", "wiped", "no database", "damaged"])
def test_a_warehouse_that_is_not_the_ledgers_is_made_again_without_a_request(
    sandbox: tuple[SandboxExchange, str], universe: Universe, attack: str
) -> None:
    settings = universe(sandbox[1], since="2024-01-07", until="2024-01-08", now="2024-01-10")
    stored, file = fill(settings, sandbox[0]), settings.duckdb
    truth = read(settings, "1h")
    if attack == "older":
        with duckdb.connect(str(file)) as connection:
            connection.execute("DELETE FROM rollup.ohlcv_1h WHERE open_time > '2024-01-07 09:30Z'")
            connection.execute("UPDATE marketdata.sources SET source = 'of last week'")
    elif attack == "wiped":
        file.unlink()
    elif attack == "no database":
        file.write_text("no database")
    else:
        content = bytearray(file.read_bytes())
        content[8192:] = bytes(len(content) - 8192)
        file.write_bytes(bytes(content))
    assert raised(settings, "1h") is BarsMissing
    assert [task.bars for task in plan(settings)] == [0]
    run_derive(settings)
    assert_bars(read(settings, "1h"), truth)
    assert (plan(settings), bar_requests(stored.exchange)) == ([], [])


# ---------------------------------------------------------------- SQL
NO_QUERIES = (
    "",
    "COPY (SELECT 1) TO '{lake}/x.parquet'",
    "COPY (PIVOT raw.ohlcv_1m ON market USING count(*)) TO '{lake}/x.csv'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{lake}/x.parquet'",
    "SELECT 1; COPY (SELECT 1) TO '{lake}/x.parquet'",
    "ATTACH '{lake}/x.duckdb'",
    "EXPORT DATABASE '{lake}/x'",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_text('{lake}/../universe.yaml')",
    "SET enable_external_access = true",
    "CREATE TABLE x AS SELECT 1",
    "INSTALL httpfs",
    "SELECT 1 AS a, 2 AS a",
    "no SQL",
)


def test_sql_reads_the_lake_and_nothing_else(stored: Stored) -> None:
    lake = stored.settings.lake
    before = sorted(Path(lake).rglob("*"))
    with open_reader() as reader:
        for query in NO_QUERIES:
            with pytest.raises(BadInput):
                reader.sql(query.format(lake=lake))
            assert sorted(Path(lake).rglob("*")) == before
        assert reader.sql("SELECT count(*) FROM raw.ohlcv_1m").item() == BARS
        assert reader.sql("EXPLAIN SELECT count(*) FROM raw.ohlcv_1m").height == 1
        highs = "(SELECT market, high FROM raw.ohlcv_1m)"
        pivoted = reader.sql(f"PIVOT {highs} ON market USING max(high)")
        assert pivoted.columns == [BTC.key]


def test_sql_does_everything_where_that_is_asked_for(stored: Stored, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with open_reader() as reader:
        reader.sql(f"COPY (SELECT * FROM raw.ohlcv_1m) TO '{out}'", unsafe=True)
    assert pl.read_parquet(out).height == BARS


# ---------------------------------------------------------------- claims that bars are not there
DAYS = window("2023-12-31", "2024-01-03")
CLAIMED = window("2024-01-02", "2024-01-03").start


class Claim:
    """An exchange that hides all bars before CLAIMED from some of its answers."""

    def __init__(self, universe: Universe, url: str) -> None:
        self.settings = universe(url, since="2023-12-31", until="2024-01-03", now="2024-01-10")
        self.lies: Callable[[Mapping[str, str]], bool] = lambda query: True
        """Whether the answer to a query is one of them."""

    async def tamper(self, request: web.Request, rows: list[list[Any]]) -> Any:
        if not self.lies(request.query):
            return None
        if request.query["startTime"] == "0":
            first = to_ms(CLAIMED)
            return generate_klines("BTCUSDT", "1m", first, end=first + 1, limit=1, now=first * 2)
        return [row for row in rows if row[0] >= to_ms(CLAIMED)]

    def run(self, hours: int = 0) -> None:
        """Ingest twice: what one partition shows about another one is looked at then."""
        for _ in range(2):
            run_ingest(self.later(hours))

    def later(self, hours: int) -> Settings:
        clock = self.settings.clock
        assert clock
        start = clock.start + timedelta(hours=hours)
        return self.settings.model_copy(update={"clock": clock.model_copy(update={"start": start})})

    @property
    def coverage(self) -> Coverage:
        with open_context(self.settings) as context:
            return context.bind(CoverageReporter).report([BTC])[0]

    @property
    def gaps(self) -> list[Gap]:
        with open_context(self.settings) as context:
            return [one.gap for one in context.bind(GapExplainer).list_gaps([BTC], DAYS)]


@pytest.fixture
def claim(universe: Universe) -> Iterator[Claim]:
    exchange = SandboxExchange(now=lambda: to_ms(CLAIMED) + 10 * 86_400_000, weight_limit=10**9)
    with serve_in_thread(exchange) as url:
        found = Claim(universe, url)
        exchange.tamper = found.tamper
        yield found


def is_whole(claim: Claim) -> bool:
    return claim.coverage.present == claim.coverage.expected == 3 * BARS and claim.gaps == []


def test_one_wrong_answer_makes_no_listing(claim: Claim) -> None:
    """The oldest bar is told wrong, however often it is asked for: pages before it say more."""
    claim.lies = lambda query: query["startTime"] == "0"
    claim.run()
    assert is_whole(claim)


@pytest.mark.parametrize("interval", ["1m", "1d"])
def test_each_kind_of_witness_is_heard(claim: Claim, interval: str) -> None:
    claim.lies = lambda query: query["startTime"] == "0" or query["interval"] != interval
    claim.run()
    assert claim.coverage.not_listed == 0


def test_a_listing_that_every_witness_claimed_is_asked_about_again(claim: Claim) -> None:
    claim.run()
    assert (claim.coverage.not_listed, claim.coverage.present) == (2 * BARS, BARS)
    (gap,) = claim.gaps
    assert (gap.kind, gap.window.end, gap.bars) == ("not_listed", CLAIMED, 2 * BARS)
    assert gap.next_request == claim.settings.now() + timedelta(hours=1)
    claim.run(hours=1)
    (gap,) = claim.gaps
    assert gap.next_request == claim.settings.now() + timedelta(hours=4)
    claim.lies = lambda query: False
    claim.run(hours=3)
    assert claim.coverage.not_listed == 2 * BARS
    claim.run(hours=4)
    assert is_whole(claim)


def test_a_claim_of_the_venue_is_reopened_by_hand(claim: Claim) -> None:
    claim.run()
    claim.lies = lambda query: query["startTime"] == "0"
    with open_context(claim.settings) as context:
        (listed,) = context.bind(GapExplainer).reopen(BTC, DAYS.start)
        assert listed.gap.bars == 2 * BARS
    claim.run()
    assert is_whole(claim)


def test_stored_bars_win_over_a_claim(claim: Claim) -> None:
    """An hour from elsewhere: what lies before it and after it is open, and requested again."""
    claim.run()
    hour = window("2024-01-01T12:00", "2024-01-01T13:00")
    with open_context(claim.settings) as context:
        partition = partitions(claim.settings)[1]
        PartitionStore(claim.settings, context.ledger, context.storage.lake).ingest_frame(
            TIMEFRAMES["1m"],
            partition,
            generate_bars("BTCUSDT", "1m", hour),
            rejected=pl.DataFrame(schema=REJECTED_SCHEMA),
            sources=["a file"],
        )
    found = claim.coverage
    assert (found.present, found.not_listed, found.unexplained) == (BARS + 60, 0, 2 * BARS - 60)
    claim.run()  # the venue still hides them: only what lies before the hour can be not listed
    assert (claim.coverage.present, claim.coverage.not_listed) == (BARS + 60, BARS + 12 * 60)
    claim.lies = lambda query: False
    claim.run(hours=5)
    assert is_whole(claim)
