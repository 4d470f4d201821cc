"""Ingest, derive, plan, read and coverage, end to end on the sandbox exchange."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from aiohttp import web

from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput, Damaged, VenueDown, VenueRefused
from marketdata_assets.flows.derive.rollup import RollupBuilder
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.fetch.plan import BackfillPlanner, PlannedPartition
from marketdata_assets.flows.read.bars import BarReader
from marketdata_assets.flows.read.coverage import Coverage, CoverageReporter
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, month_of
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.listings import LISTINGS
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_assets.storage.parquet import split_pages
from marketdata_tests.conftest import Universe, universe
from marketdata_tests.steps import (
    SkippingClock,
    assert_bars,
    at,
    bar_requests,
    lake_files,
    logged_requests,
    ms,
    partitions,
    quarantined,
    raw_file,
    run_derive,
    run_ingest,
    stored_bars,
    window,
)

pytestmark = pytest.mark.server

MINUTE = TIMEFRAMES["1m"]
BTC = Market("binance", "BTC/USDT")
MONTHS = window("2024-01-01", "2024-03-01")
NOW = ms("2024-03-02")
Tamper = Callable[[web.Request, list[list[Any]]], Any]


@contextmanager
def exchange_at(
    now: int | list[int] = NOW, tamper: Any = None
) -> Iterator[tuple[SandboxExchange, str]]:
    """Run a sandbox exchange; a list as `now` holds a clock that the test moves."""
    exchange = SandboxExchange(
        now=lambda: now if isinstance(now, int) else now[0], weight_limit=10**9, tamper=tamper
    )
    with serve_in_thread(exchange) as url:
        yield exchange, url


def plan_tasks(settings: Settings) -> list[PlannedPartition]:
    with open_context(settings) as context:
        return context.bind(BackfillPlanner).plan(partitions(settings))


def report_coverage(settings: Settings) -> list[Coverage]:
    """Return the coverage of every market, after checking that its parts sum."""
    with open_context(settings) as context:
        found = context.bind(CoverageReporter).report(settings.markets)
    for one in found:
        parts = {name: n for name, n in one.as_dict().items() if name not in ("market", "expected")}
        assert sum(int(n) for n in parts.values()) == one.expected
        assert min(int(n) for n in parts.values()) >= 0
    return found


def read(settings: Settings, market: Market, timeframe: Timeframe, span: Window) -> pl.DataFrame:
    with open_context(settings) as context:
        return context.bind(BarReader).read(market, timeframe, span)


def true_bars(symbol: str, timeframe: Timeframe, span: Window) -> pl.DataFrame:
    """Return the true bars that lie completely inside the span."""
    bars = generate_bars(symbol, timeframe.name, span)
    return bars.filter(pl.col("open_time") + timeframe.width <= span.end)


def everything_is_true(settings: Settings, span: Window) -> None:
    """Compare all markets and timeframes, read from the lake and the rollups, with the truth."""
    for market in settings.markets:
        for timeframe in (MINUTE, *settings.rollup_timeframes_of(market)):
            found, expected = (
                read(settings, market, timeframe, span),
                true_bars(market.symbol.replace("/", ""), timeframe, span),
            )
            if expected.is_empty() and timeframe != MINUTE:
                assert found.is_empty()
            else:
                assert_bars(found, expected)


# --------------------------------------------------------------------------------- closed months


@dataclass
class TwoMonths:
    """Two closed months after one ingest, and the number of its bar requests."""

    exchange: SandboxExchange
    settings: Settings
    tasks: list[PlannedPartition]
    done: list[Any]
    bar_requests: int


@pytest.fixture(scope="module")
def two_months(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoMonths]:
    folder = tmp_path_factory.mktemp("two")
    with exchange_at() as (exchange, url), pytest.MonkeyPatch.context() as patch:
        settings = universe.__wrapped__(folder, patch)(
            url, "[BTC/USDT, ADA/USDT]", until="2024-03-01"
        )
        tasks = plan_tasks(settings)
        assert exchange.requests == []
        done = run_ingest(settings)
        request_count = len(bar_requests(exchange))
        run_derive(settings)
        yield TwoMonths(exchange, settings, tasks, done, request_count)


def test_two_months_are_exact(two_months: TwoMonths) -> None:
    """Every bar of every timeframe is true, and no bar is invented in the halt of the 8th."""
    everything_is_true(two_months.settings, MONTHS)
    for market in ("BTC", "ADA"):
        bars = stored_bars(two_months.settings, f"binance%3A{market}-USDT")
        assert bars.filter(
            pl.col("open_time").is_between(at("2024-01-08T02:00"), at("2024-01-08T03:19"))
        ).is_empty()


def test_every_row_is_accounted_for(two_months: TwoMonths) -> None:
    for done in two_months.done:
        account = done.account
        assert done.error is None
        assert done.complete
        assert account.is_balanced
        assert account.stored == done.bars.height
        assert account.received == account.stored + account.identical
        assert account.quarantined == 0


def test_every_missing_bar_has_its_evidence(two_months: TwoMonths) -> None:
    """The gaps are exactly the missing bars: `no_bars`, two answers, evidence with the request."""
    for done in two_months.done:
        expected = set(
            range(ms(str(done.wanted.start)[:19]), ms(str(done.wanted.end)[:19]), 60_000)
        )
        missing = expected - set(done.bars["open_time"].dt.epoch("ms").to_list())
        in_gaps: set[int] = set()
        for gap in done.gaps:
            assert (gap.reason, gap.answers >= 2, gap.is_settled) == ("no_bars", True, True)
            assert "asked [" in gap.evidence
            assert " rows" in gap.evidence
            assert gap.bars == gap.window.count(MINUTE)
            start, end = (ms(str(moment)[:19]) for moment in (gap.window.start, gap.window.end))
            in_gaps |= set(range(start, end, 60_000))
        assert in_gaps == missing
        assert len(missing) >= 80


def test_coverage_sums_and_counts_correctly(two_months: TwoMonths) -> None:
    for found, symbol in zip(
        report_coverage(two_months.settings), ("BTCUSDT", "ADAUSDT"), strict=True
    ):
        present = generate_bars(symbol, "1m", MONTHS).height
        assert (found.expected, found.present, found.unexplained) == (
            60 * 1440,
            present,
            60 * 1440 - present,
        )


def test_the_plan_predicts_bars_and_requests(two_months: TwoMonths) -> None:
    """The plan names partitions, bars and requests; gaps cost a few requests more."""
    assert [task.partition.key for task in two_months.tasks] == [
        done.partition.key for done in two_months.done
    ]
    assert [task.bars for task in two_months.tasks] == [
        done.bars.height + sum(gap.bars for gap in done.gaps) for done in two_months.done
    ]
    planned = sum(task.requests for task in two_months.tasks)
    gap_count = sum(len(done.gaps) for done in two_months.done)
    assert planned <= two_months.bar_requests <= planned + gap_count
    assert plan_tasks(two_months.settings) == []


def test_the_fetch_log_equals_the_requests_of_the_exchange(two_months: TwoMonths) -> None:
    assert logged_requests(two_months.settings) == {"answered": two_months.bar_requests}
    assert sum(done.requests for done in two_months.done) == two_months.bar_requests


def test_a_second_ingest_sends_no_request(two_months: TwoMonths) -> None:
    """No request of any kind is sent; the files and the accounts of rows stay equal."""
    before = lake_files(two_months.settings)
    two_months.exchange.requests.clear()
    for done, first in zip(run_ingest(two_months.settings), two_months.done, strict=True):
        assert (done.error, done.complete, done.requests) == (None, True, 0)
        assert done.bars.equals(first.bars)
        assert done.gaps == first.gaps
    assert [sum(derived.changed.values()) for derived in run_derive(two_months.settings)] == [0] * 4
    assert two_months.exchange.requests == []
    assert lake_files(two_months.settings) == before
    assert plan_tasks(two_months.settings) == []


def test_a_partition_outside_the_universe_sends_no_request(two_months: TwoMonths) -> None:
    """A month before `since` or after `until` changes nothing and invents no bar."""
    before = report_coverage(two_months.settings)
    two_months.exchange.requests.clear()
    months = [Partition(BTC, month_of(at(text))) for text in ("2023-11-01", "2024-04-01")]
    for done in run_ingest(two_months.settings, wanted=months):
        assert (done.error, done.bars.height, done.gaps, done.requests) == (None, 0, (), 0)
    assert two_months.exchange.requests == []
    assert report_coverage(two_months.settings) == before


# --------------------------------------------------------------------------------- the open month


def test_the_open_month_is_refreshed_in_place(universe: Universe) -> None:
    """Each refresh sends one request, stores new rows and builds the rollups that they close."""
    clock = [ms("2024-01-09T06:31:30")]
    with exchange_at(clock) as (exchange, url):
        settings = universe(url, since="2024-01-07", until="2024-02-01", now="2024-01-31")
        run_ingest(settings)
        run_derive(settings)
        for text, closed in (
            ("06:31:59", {}),
            ("06:32", {}),
            ("06:35:01", {"5m": 1}),
            ("06:45", {"5m": 2, "15m": 1}),
            ("08:00:10", {"5m": 15, "15m": 5, "30m": 3, "1h": 2, "4h": 1}),
        ):
            clock[0] = ms(f"2024-01-09T{text}")
            exchange.requests.clear()
            (done,) = run_ingest(settings)
            (derived,) = run_derive(settings)
            end = MINUTE.floor(at(f"2024-01-09T{text}"))
            assert_bars(
                stored_bars(settings), generate_bars("BTCUSDT", "1m", Window(at("2024-01-07"), end))
            )
            assert done.account.is_balanced
            assert not done.complete
            assert len(bar_requests(exchange)) == (0 if text == "06:31:59" else 1)
            # the last hour is fetched again
            assert done.account.received <= done.account.stored + 63
            assert {
                timeframe.name: rows for timeframe, rows in derived.changed.items() if rows
            } == closed
        everything_is_true(settings, window("2024-01-07", "2024-01-09T08:00"))
        assert exchange.requests[-1].path.endswith("klines")


@pytest.mark.parametrize(
    ("since", "until", "moments"),
    [
        (
            "2024-01-07T12:00",
            "2024-01-09",
            ["08T02:00:30", "08T02:40", "08T03:10", "08T03:20", "08T03:21", "08T05:00", "10T00:00"],
        ),
        (
            "2024-01-31T12:00",
            "2024-02-01T12:00",
            ["31T23:59:30", "32T00:00", "32T00:00:59", "32T00:01", "32T13:00"],
        ),
    ],
    ids=["halt", "month"],
)
def test_refreshes_across_a_halt_and_a_month_end(
    universe: Universe, since: str, until: str, moments: list[str]
) -> None:
    """The bars are exact after refreshes during a halt and around the end of a month."""
    clock = [0]
    with exchange_at(clock) as (_, url):
        for moment in moments:
            now = f"2024-01-{moment}" if moment[:2] != "32" else f"2024-02-01{moment[2:]}"
            settings = universe(url, since=since, until=until, now=now)
            clock[0] = ms(now)
            found = run_ingest(settings)
            run_derive(settings)
            assert all(done.error is None and done.account.is_balanced for done in found)
            assert report_coverage(settings)[0].unexplained <= 80
        assert all(done.complete for done in found)
        everything_is_true(settings, window(since, until))


def send_unfinished_bar(moment: int, times: int) -> Tamper:
    """Replace the bar of that moment by an unfinished one in the next `times` answers."""
    left = [times]

    async def tamper(request: web.Request, rows: list[list[Any]]) -> Any:
        if (
            request.query.get("startTime") == "0"
            or left[0] == 0
            or not any(row[0] == moment for row in rows)
        ):
            return None
        left[0] -= 1
        return [
            row
            if row[0] != moment
            else [*row[:4], row[1], "0.00001000", row[6], row[1][:4], 1, "0", "0", "0"]
            for row in rows
        ]

    return tamper


def test_a_bar_that_was_stored_wrong_is_replaced(universe: Universe) -> None:
    """The newest bar was unfinished: the next refresh sends one more request and replaces it."""
    clock, wrong = [ms("2024-01-09T06:35")], ms("2024-01-09T06:34")
    with exchange_at(clock) as (exchange, url):

        async def tamper(request: web.Request, rows: list[list[Any]]) -> Any:
            return [row if row[0] != wrong else [*row[:4], row[1], *row[5:]] for row in rows]

        exchange.tamper = tamper
        settings = universe(url, since="2024-01-09", until="2024-02-01", now="2024-01-31")
        run_ingest(settings)
        run_derive(settings)
        was = stored_bars(settings)["close"][-1]
        exchange.tamper = None
        clock[0] += 10 * 60_000
        exchange.requests.clear()
        (done,) = run_ingest(settings)
        run_derive(settings)
        assert done.account.is_balanced
        assert len(bar_requests(exchange)) == 2
        everything_is_true(settings, window("2024-01-09", "2024-01-09T06:45"))
        assert quarantined(settings) == []
        assert (done.replaced["open_time"].to_list(), done.replaced["close"].to_list()) == (
            [at("2024-01-09T06:34")],
            [was],
        )


def test_one_contradicting_answer_replaces_nothing(universe: Universe) -> None:
    """The stored bar and the second answer agree and outvote the first answer."""
    clock = [ms("2024-01-09T06:35")]
    with exchange_at(clock) as (exchange, url):
        settings = universe(url, since="2024-01-09", until="2024-02-01", now="2024-01-31")
        run_ingest(settings)
        clock[0] += 10 * 60_000
        exchange.tamper = send_unfinished_bar(ms("2024-01-09T06:34"), 1)
        (done,) = run_ingest(settings)
        assert done.account.is_balanced
        assert done.account.quarantined == 1
        assert_bars(
            stored_bars(settings),
            generate_bars("BTCUSDT", "1m", window("2024-01-09", "2024-01-09T06:45")),
        )


@pytest.mark.parametrize("back", ["2024-01-08T18:00", "1970-01-01", "2023-12-31"])
def test_a_clock_that_goes_back_removes_nothing(universe: Universe, back: str) -> None:
    """The exchange's clock is wrong once, which is told: bars and rollups stay, and the next run
    continues.
    """
    clock = [ms("2024-01-09T06:00")]
    with exchange_at(clock) as (_, url):
        settings = universe(url, since="2024-01-07", until="2024-02-01", now="2024-01-09T09:00")
        for text in ("2024-01-09T06:00", back):
            clock[0] = ms(text)
            (done,) = run_ingest(settings)
            assert f"its clock says {back[:10]}" in str(done.error) or text != back
            assert done.error is None or text == back
            run_derive(settings)
            everything_is_true(settings, window("2024-01-07", "2024-01-09T06:00"))
        clock[0] = ms("2024-01-09T09:00")
        run_ingest(settings)
        run_derive(settings)
        everything_is_true(settings, window("2024-01-07", "2024-01-09T09:00"))


# --------------------------------------------------------------------------------- listings


def test_before_the_listing_nothing_is_expected(universe: Universe) -> None:
    """SHIB is listed on 2021-05-10 at 11:30: the month before costs no bar request.

    The minutes before the listing count as `not_listed`.
    """
    assert str(LISTINGS["SHIBUSDT"].listed_at) == "2021-05-10 11:30:00+00:00"
    with exchange_at(ms("2021-07-01")) as (exchange, url):
        settings = universe(url, "[SHIB/USDT]", since="2021-04-01", until="2021-06-01")
        april, may = run_ingest(settings)
        run_derive(settings)
        span = window("2021-05-10", "2021-06-01")
        assert (april.error, april.bars.height, april.complete) == (None, 0, True)
        minutes = [seen.query for seen in bar_requests(exchange) if seen.query["interval"] == "1m"]
        starts = sorted({int(query["startTime"]) for query in minutes})
        assert starts[:2] == [ms("2021-05-10T11:30") - 999 * 60_000, ms("2021-05-10T11:30")]
        assert len(bar_requests(exchange)) <= 37 + len(may.gaps)  # four of them are witnesses
        (found,) = report_coverage(settings)
        present = generate_bars("SHIBUSDT", "1m", span).height
        early = (at("2021-05-10T11:30") - at("2021-04-01")) // timedelta(minutes=1)
        assert (found.present, found.not_listed, found.not_fetched) == (present, early, 0)
        assert found.unexplained == 61 * 1440 - present - early
        for timeframe in (MINUTE, *settings.rollup_timeframes_of(settings.markets[0])):
            bars = read(
                settings, settings.markets[0], timeframe, window("2021-04-01", "2021-06-01")
            )
            assert_bars(bars, true_bars("SHIBUSDT", timeframe, window("2021-04-01", "2021-06-01")))
        exchange.requests.clear()
        run_ingest(settings)
        assert [seen for seen in exchange.requests if seen.path.endswith("klines")] == []
        assert plan_tasks(settings) == []


def test_one_bad_answer_about_the_listing_is_corrected(universe: Universe) -> None:
    """The first answer is empty: the next run sends the request again and finds the listing."""
    bad = [1]

    async def tamper(request: web.Request, rows: list[list[Any]]) -> Any:
        if request.query.get("startTime") == "0" and bad[0]:
            bad[0] -= 1
            return []
        return None

    with exchange_at(ms("2021-07-01"), tamper) as (_, url):
        settings = universe(url, "[SHIB/USDT]", since="2021-05-09", until="2021-05-12")
        for _ in range(4):
            run_ingest(settings)
        (found,) = report_coverage(settings)
        assert found.not_listed == 1440 + 11 * 60 + 30


# --------------------------------------------------------------------------------- gaps


@pytest.mark.parametrize("edge", ["02:00", "02:01", "02:40", "03:19", "03:20", "03:21"])
def test_a_halt_at_the_edge_of_a_page(universe: Universe, edge: str) -> None:
    """The first page ends before, in, or after the halt: one run explains the halt in each case."""
    since = at(f"2024-01-08T{edge}") - 998 * MINUTE.width
    with exchange_at() as (exchange, url):
        settings = universe(url, since=since.isoformat(), until="2024-01-08T12:00")
        (done,) = run_ingest(settings)
        assert done.complete
        assert [(gap.window, gap.reason) for gap in done.gaps] == [
            (window("2024-01-08T02:00", "2024-01-08T03:20"), "no_bars")
        ]
        assert_bars(
            stored_bars(settings),
            generate_bars("BTCUSDT", "1m", Window(since, at("2024-01-08T12:00"))),
        )
        assert len(bar_requests(exchange)) <= 4


def remove_bars(first: str, end: str, times: list[int]) -> Tamper:
    """Remove the bars of that span from the next `times[0]` answers."""
    a, b = ms(first), ms(end)

    async def tamper(request: web.Request, rows: list[list[Any]]) -> Any:
        if times[0] == 0 or not any(a <= row[0] < b for row in rows):
            return None
        times[0] -= 1
        return [row for row in rows if not a <= row[0] < b]

    return tamper


def test_an_unanswered_gap_is_fetched_in_three_runs(universe: Universe) -> None:
    """The end of the span is never returned, so its bars may exist; the third run is the last."""
    with exchange_at(tamper=remove_bars("2024-01-05T20:00", "2024-02-01", [10**6])) as (
        exchange,
        url,
    ):
        settings = universe(url, since="2024-01-05", until="2024-01-06")
        request_counts, found = [], []
        for _ in range(5):
            exchange.requests.clear()
            (done,) = run_ingest(settings)
            request_counts.append(len(bar_requests(exchange)))
            found.append([(gap.bars, gap.reason, gap.answers, done.complete) for gap in done.gaps])
            assert_bars(
                stored_bars(settings),
                generate_bars("BTCUSDT", "1m", window("2024-01-05", "2024-01-05T20:00")),
            )
        assert found == [[(240, "unanswered", n, n == 3)] for n in (1, 2, 3, 3, 3)]
        assert all(1 <= n <= 10 for n in request_counts[:3])  # and beyond the span for a neighbor
        assert request_counts[3:] == [0, 0]
        (one,) = report_coverage(settings)
        assert (one.present, one.unexplained, one.not_fetched) == (1200, 240, 0)
        assert plan_tasks(settings)[0].reason == "rollups are not up to date"


def test_an_unanswered_gap_is_filled_when_it_is_answered(universe: Universe) -> None:
    left = [10**6]
    with exchange_at(tamper=remove_bars("2024-01-05T20:00", "2024-02-01", left)) as (_, url):
        settings = universe(url, since="2024-01-05", until="2024-01-06")
        assert not run_ingest(settings)[0].complete
        assert plan_tasks(settings)[0].bars == 240
        left[0] = 0
        assert run_ingest(settings)[0].complete
        assert_bars(
            stored_bars(settings),
            generate_bars("BTCUSDT", "1m", window("2024-01-05", "2024-01-06")),
        )


def test_a_gap_that_two_answers_confirm_is_not_fetched_again(universe: Universe) -> None:
    """Two answers return both neighbors and nothing between; the second run sends no request."""
    with exchange_at(tamper=remove_bars("2024-01-05T10:00", "2024-01-05T10:30", [10**6])) as (
        exchange,
        url,
    ):
        settings = universe(url, since="2024-01-05", until="2024-01-06")
        (done,) = run_ingest(settings)
        (gap,) = done.gaps
        assert (gap.window, gap.bars, gap.reason) == (
            window("2024-01-05T10:00", "2024-01-05T10:30"),
            30,
            "no_bars",
        )
        assert "1410 rows" in gap.evidence or "2 rows" in gap.evidence
        assert len(bar_requests(exchange)) <= 4
        exchange.requests.clear()
        run_ingest(settings)
        assert exchange.requests == []


def test_a_gap_that_the_second_answer_fills_is_no_gap(universe: Universe) -> None:
    with exchange_at(tamper=remove_bars("2024-01-05T10:00", "2024-01-05T10:30", [1])) as (_, url):
        settings = universe(url, since="2024-01-05", until="2024-01-06")
        (done,) = run_ingest(settings)
        assert (done.complete, done.gaps) == (True, ())
        assert_bars(
            stored_bars(settings),
            generate_bars("BTCUSDT", "1m", window("2024-01-05", "2024-01-06")),
        )


@pytest.mark.parametrize("times", [1, 2])
def test_an_empty_answer_for_a_whole_span_is_not_final(universe: Universe, times: int) -> None:
    """An empty page is fetched twice more in the same run: bars beyond the span show the rest."""
    with exchange_at(tamper=remove_bars("2024-01-05", "2024-01-06", [times])) as (_, url):
        settings = universe(url, since="2024-01-05", until="2024-01-05T12:00")
        assert run_ingest(settings)[0].complete
        assert_bars(
            stored_bars(settings),
            generate_bars("BTCUSDT", "1m", window("2024-01-05", "2024-01-05T12:00")),
        )


# --------------------------------------------------------------------------------- damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """Flip all bits of one byte in the middle of the data."""
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF
    file.write_bytes(bytes(content))


def lake_pages(settings: Settings) -> dict[str, bytes]:
    """Return the rows of every object as they are encoded: all but the footer, which counts the
    objects that its partition has had.
    """
    files = lake_files(settings).items()
    return {name: body[: split_pages(body)] for name, body in files if "damaged" not in name}


def other_columns(file: Path) -> None:
    pl.DataFrame({"a": [1, 2]}).write_parquet(file)


def fewer_rows(file: Path) -> None:
    """Restore a good file from an older backup."""
    pl.read_parquet(file.read_bytes()).head(100).write_parquet(file)


BREAK: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "truncated": truncate,
    "emptied": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("open_time,open\n2024-01-05,1\n"),
    "other_columns": other_columns,
    "fewer_rows": fewer_rows,
    "zeroes": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("damage", [*BREAK, "flipped"])
def test_a_damaged_file_is_repaired(universe: Universe, damage: str) -> None:
    """The plan and the coverage show the damage, and one ingest restores the same bytes."""
    with exchange_at() as (_, url):
        settings = universe(url, since="2024-01-07", until="2024-01-09", now="2024-01-10")
        run_ingest(settings)
        run_derive(settings)
        good = lake_pages(settings)
        (flip if damage == "flipped" else BREAK[damage])(raw_file(settings))
        assert plan_tasks(settings)[0].bars == 2 * 1440
        (lost,) = report_coverage(settings)
        assert (lost.present, lost.not_fetched) == (0, 2 * 1440)
        (done,) = run_ingest(settings)
        assert done.error is None
        assert done.complete
        assert lake_pages(settings) == good
        assert_bars(
            stored_bars(settings),
            generate_bars("BTCUSDT", "1m", window("2024-01-07", "2024-01-09")),
        )
        assert (done.note is None) is (damage == "deleted")
        assert report_coverage(settings)[0].not_fetched == 0
        run_derive(settings)
        assert plan_tasks(settings) == []


def test_a_damaged_file_is_quarantined_while_the_venue_is_down(universe: Universe) -> None:
    """The damaged bytes are kept, the error is the venue's, and a later run repairs the file."""

    async def down(_: web.Request, __: Any) -> web.Response:
        return web.Response(status=503)

    with exchange_at() as (exchange, url):
        settings = universe(url, since="2024-01-07", until="2024-01-09")
        run_ingest(settings)
        file = raw_file(settings)
        truncate(file)
        rest = file.read_bytes()
        exchange.tamper = down
        assert type(run_ingest(settings)[0].error) is VenueDown
        assert rest in lake_files(settings).values()
        assert report_coverage(settings)[0].not_fetched == 2 * 1440
        exchange.tamper = None
        assert run_ingest(settings)[0].complete
        assert_bars(
            stored_bars(settings),
            generate_bars("BTCUSDT", "1m", window("2024-01-07", "2024-01-09")),
        )


# --------------------------------------------------------------------------------- concurrency

OTHER = """
import json, sys
from marketdata_assets.settings.load import load_settings
from marketdata_tests.steps import run_ingest
settings = load_settings()
print("started", flush=True)
found = run_ingest(settings)
rows = [[done.requests, done.bars.height, done.complete, str(done.error)] for done in found]
print(json.dumps(rows))
"""


def test_a_partition_is_locked_against_other_processes(universe: Universe) -> None:
    """The second process waits while the first one fetches, and then it sends no request."""
    go = threading.Event()

    async def slow(request: web.Request, _: Any) -> None:
        while request.query.get("startTime") != "0" and not go.is_set():
            await asyncio.sleep(0.005)

    with exchange_at(tamper=slow) as (exchange, url):
        settings = universe(url, since="2024-01-07", until="2024-01-08T12:00")
        mine: list[Any] = []
        first = threading.Thread(target=lambda: mine.extend(run_ingest(settings)))
        first.start()
        command = [sys.executable, "-W", "error", "-c", OTHER]
        with subprocess.Popen(
            command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True
        ) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "started\n"
            assert mine == []
            go.set()
            first.join()
            theirs = json.loads(second.stdout.read())
        assert second.returncode == 0
        rows = 36 * 60 - 80
        assert [(done.requests > 0, done.bars.height, done.complete) for done in mine] == [
            (True, rows, True)
        ]
        assert theirs == [[0, rows, True, "None"]]
        assert len(bar_requests(exchange)) == mine[0].requests
        assert_bars(
            stored_bars(settings),
            generate_bars("BTCUSDT", "1m", window("2024-01-07", "2024-01-08T12:00")),
        )


def test_four_threads_fetch_each_page_once(universe: Universe) -> None:
    """Each thread returns complete partitions, no matter which thread fetched them."""
    with exchange_at() as (exchange, url):
        settings = universe(url, "[BTC/USDT, ETH/USDT]", since="2024-01-05", until="2024-01-07")
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.append(run_ingest(settings))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [[(done.error, done.complete) for done in one] for one in found] == [
            [(None, True)] * 2
        ] * 4
        pages = [(seen.query["symbol"], seen.query["startTime"]) for seen in bar_requests(exchange)]
        assert len(pages) == len(set(pages)) == sum(done.requests for one in found for done in one)
        everything = window("2024-01-05", "2024-01-07")
        assert_bars(stored_bars(settings), generate_bars("BTCUSDT", "1m", everything))
        assert_bars(
            stored_bars(settings, "binance%3AETH-USDT"), generate_bars("ETHUSDT", "1m", everything)
        )


def test_an_ingest_that_stops_early_leaves_nothing_locked(universe: Universe) -> None:
    """The caller stops after the first of three partitions; the next run fetches the others."""
    with exchange_at() as (_, url):
        settings = universe(
            url, "[BTC/USDT, ETH/USDT, ADA/USDT]", since="2024-01-05", until="2024-01-06"
        )
        with open_context(settings, policy=SkippingClock().policy()) as context:
            results = context.bind(Ingester).ingest(MINUTE, partitions(settings))
            assert next(results).complete
            results.close()
        assert [done.complete for done in run_ingest(settings)] == [True] * 3


@pytest.mark.parametrize("kind", ["unknown_symbol", "refused", "garbled"])
def test_one_market_that_fails_does_not_stop_the_others(universe: Universe, kind: str) -> None:
    """The market in the middle fails, the other two are stored, and the plan shows the failure."""

    async def tamper(request: web.Request, _: Any) -> web.Response | None:
        if request.query["symbol"] != "ETHUSDT" or kind == "unknown_symbol":
            return None
        return (
            web.json_response({"code": -1121, "msg": "Invalid symbol."}, status=400)
            if kind == "refused"
            else web.Response(text="<html>")
        )

    symbol, error = {
        "unknown_symbol": ("NOPE/USDT", BadInput),
        "refused": ("ETH/USDT", VenueRefused),
        "garbled": ("ETH/USDT", VenueDown),
    }[kind]
    with exchange_at(tamper=tamper) as (_, url):
        settings = universe(
            url, f"[BTC/USDT, {symbol}, ADA/USDT]", since="2024-01-05", until="2024-01-05T12:00"
        )
        before, failed, after = run_ingest(settings)
        run_derive(settings)
        assert type(failed.error) is error
        assert (before.complete, failed.complete, after.complete) == (True, False, True)
        for name in ("BTC", "ADA"):
            assert_bars(
                stored_bars(settings, f"binance%3A{name}-USDT"),
                generate_bars(f"{name}USDT", "1m", window("2024-01-05", "2024-01-05T12:00")),
            )
        (task,) = plan_tasks(settings)
        assert task.partition.market.symbol == symbol
        assert task.reason.startswith("failed: binance")
        assert [found.not_fetched for found in report_coverage(settings)] == [0, 720, 0]
        with open_context(settings) as context:
            state = context.ledger.partitions.get(raw_table(MINUTE), failed.partition)
        assert state is not None
        failures = int(
            error is not VenueDown
        )  # a venue that is down is no failure of the partition
        assert (state.attempts, state.failures, state.error) == (1, failures, str(failed.error))


# --------------------------------------------------------------------------------- other universes


def test_a_universe_that_grows_on_both_sides_fetches_only_new_bars(universe: Universe) -> None:
    """With an earlier `since` and a later `until` only the new bars are fetched."""
    with exchange_at() as (exchange, url):
        run_ingest(universe(url, since="2024-01-05T06:00", until="2024-01-05T18:00"))
        exchange.requests.clear()
        settings = universe(url, since="2024-01-05", until="2024-01-06")
        (done,) = run_ingest(settings)
        run_derive(settings)
        assert done.complete
        assert done.account.stored == 720
        assert len(bar_requests(exchange)) <= 2
        everything_is_true(settings, window("2024-01-05", "2024-01-06"))
        assert report_coverage(settings)[0].present == 1440


@pytest.mark.parametrize(
    ("since", "until"),
    [
        ("2024-01-06", "2024-01-07"),
        ("2024-01-08", "2024-01-10"),
        ("2024-01-06T12:00", "2024-01-12"),
    ],
)
def test_coverage_counts_only_the_wanted_span(universe: Universe, since: str, until: str) -> None:
    """The 5th to the 8th are stored; a universe with another span counts its own bars and gaps."""
    with exchange_at() as (_, url):
        run_ingest(universe(url, since="2024-01-05", until="2024-01-09"))
        settings = universe(url, since=since, until=until)
        (found,) = report_coverage(settings)
        there = window("2024-01-05", "2024-01-09") & window(since, until)
        present = generate_bars("BTCUSDT", "1m", there).height
        assert found.expected == window(since, until).count(MINUTE)
        assert (found.present, found.unexplained) == (present, there.count(MINUTE) - present)
        assert found.not_fetched == found.expected - there.count(MINUTE)


def test_months_can_be_ingested_in_any_order(universe: Universe) -> None:
    """February's first week begins in January, so it is built after January's ingest."""
    with exchange_at() as (_, url):
        settings = universe(url, since="2024-01-20", until="2024-02-12")
        january, february = partitions(settings)
        for partition in (february, january):
            run_ingest(settings, wanted=[partition])
            with open_context(settings) as context:
                list(context.bind(RollupBuilder).build([partition]))
        everything_is_true(settings, window("2024-01-20", "2024-02-12"))
        assert plan_tasks(settings) == []


def test_a_late_bar_changes_the_week_of_the_next_month(universe: Universe) -> None:
    """The last hours of January are still missing when February's first week is built."""
    with exchange_at(tamper=remove_bars("2024-01-31T20:00", "2024-03-01", [10**6])) as (
        exchange,
        url,
    ):
        settings = universe(url, since="2024-01-29", until="2024-02-05")
        january, february = partitions(settings)
        assert [gap.reason for gap in run_ingest(settings, wanted=[january])[0].gaps] == [
            "unanswered"
        ]
        exchange.tamper = None
        run_ingest(settings, wanted=[february])
        run_derive(settings)
        week = TIMEFRAMES["1w"]
        assert (
            read(settings, BTC, week, window("2024-01-29", "2024-02-05"))["bars_present"].to_list()[
                0
            ]
            < 7 * 1440 - 200
        )
        assert run_ingest(settings, wanted=[january])[0].complete
        with open_context(settings) as context:
            list(context.bind(RollupBuilder).build([january]))
        everything_is_true(settings, window("2024-01-29", "2024-02-05"))


@pytest.mark.parametrize("rollups", ["duckdb", "parquet"])
def test_a_base_of_1h_fetches_no_minutes(universe: Universe, rollups: str) -> None:
    """`base: 1h` fetches no minutes, but coverage counts minutes; references are native bars."""
    with exchange_at() as (exchange, url):
        settings = universe(
            url,
            since="2024-01-01",
            until="2024-02-01",
            extra="base: 1h\nreference: [1d]",
            rollups=rollups,
        )
        for timeframe in ("1h", "1d"):
            (done,) = run_ingest(settings, timeframe=timeframe)
            assert done.complete
            assert done.account.is_balanced
            assert_bars(
                stored_bars(settings, timeframe=timeframe),
                generate_bars("BTCUSDT", timeframe, window("2024-01-01", "2024-02-01")),
            )
        run_derive(settings)
        assert {seen.query["interval"] for seen in bar_requests(exchange)} == {"1h", "1d"}
        for timeframe in settings.rollup_timeframes_of(BTC):
            assert_bars(
                read(settings, BTC, timeframe, window("2024-01-01", "2024-02-01")),
                true_bars("BTCUSDT", timeframe, window("2024-01-01", "2024-02-01")),
            )
        (found,) = report_coverage(settings)
        hours = generate_bars("BTCUSDT", "1h", window("2024-01-01", "2024-02-01")).height
        assert (found.expected, found.present, found.unexplained) == (
            31 * 1440,
            hours * 60,
            (31 * 24 - hours) * 60,
        )
        with pytest.raises(BadInput, match="1m"):
            read(settings, BTC, MINUTE, window("2024-01-01", "2024-02-01"))


# --------------------------------------------------------------------------------- the plan


def test_the_plan_names_a_reason_for_each_state(universe: Universe) -> None:
    """Missing, open, failed, deleted, no rollups: each state has a reason and a number of bars."""
    clock = [ms("2024-01-09T06:00")]
    with exchange_at(clock) as (exchange, url):
        settings = universe(url, since="2024-01-09", until="2024-01-20", now="2024-01-09T06:00")
        assert [(task.bars, task.requests, task.reason) for task in plan_tasks(settings)] == [
            (360, 1, "missing")
        ]
        run_ingest(settings)
        assert [(task.bars, task.reason) for task in plan_tasks(settings)] == [
            (0, "rollups are not up to date")
        ]
        run_derive(settings)
        assert plan_tasks(settings) == []
        clock[0] = ms("2024-01-09T07:00")
        settings = universe(url, since="2024-01-09", until="2024-01-20", now="2024-01-09T07:00")
        (task,) = plan_tasks(settings)
        assert (task.bars, task.requests) == (60, 1)
        assert "open" in task.reason

        async def refuse(_: web.Request, __: Any) -> web.Response:
            return web.Response(status=404)

        exchange.tamper = refuse
        run_ingest(settings)
        assert plan_tasks(settings)[0].reason.startswith("failed: binance: HTTP 404")
        exchange.tamper = None
        run_ingest(settings)
        run_derive(settings)
        assert plan_tasks(settings) == []
        raw_file(settings).unlink()
        assert [task.bars for task in plan_tasks(settings)] == [420]
        run_ingest(settings)
        run_derive(settings)
        settings.duckdb.unlink()
        assert [(task.bars, task.reason) for task in plan_tasks(settings)] == [
            (0, "rollups are not up to date")
        ]


# --------------------------------------------------------------------------------- swapped objects


def test_objects_that_were_swapped_are_not_read_and_are_fetched_again(universe: Universe) -> None:
    """Each says whose it is. A reader that finds it out is enough for the next backfill."""
    with exchange_at() as (_, url):
        settings = universe(
            url,
            symbols="[BTC/USDT, ETH/USDT]",
            since="2024-01-07",
            until="2024-01-08",
            now="2024-01-10",
        )
        run_ingest(settings)
        run_derive(settings)
        good = lake_pages(settings)
        first, second = sorted(Path(settings.lake).glob("raw/ohlcv_1m/*/month=2024-01/*.parquet"))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        with pytest.raises(Damaged, match="holds raw/ohlcv_1m binance:ETH-USDT 2024-01; `marketd"):
            read(settings, BTC, TIMEFRAMES["1m"], window("2024-01-07", "2024-01-08"))
        assert [task.bars for task in plan_tasks(settings)] == [1440, 1440]
        assert all(done.complete for done in run_ingest(settings))
        assert lake_pages(settings) == good


def test_a_reader_that_finds_damage_is_enough_for_the_next_backfill(universe: Universe) -> None:
    """One bit that a disk flips changes neither size nor time, so only who reads it can notice."""
    with exchange_at() as (_, url):
        settings = universe(url, since="2024-01-07", until="2024-01-08", now="2024-01-10")
        run_ingest(settings)
        before = raw_file(settings).stat()
        flip(raw_file(settings))
        os.utime(raw_file(settings), ns=(before.st_atime_ns, before.st_mtime_ns))
        assert all(task.bars == 0 for task in plan_tasks(settings))
        with pytest.raises(Damaged, match="`marketdata backfill` fetches it again"):
            read(settings, BTC, TIMEFRAMES["1m"], window("2024-01-07", "2024-01-08"))
        assert [task.bars for task in plan_tasks(settings)] == [1440]
        run_ingest(settings)
        assert_bars(
            stored_bars(settings),
            generate_bars("BTCUSDT", "1m", window("2024-01-07", "2024-01-08")),
        )
