"""Bad answers for a partition that is stored: each once before good ones, and each for ever.

Half of the span is stored; the other half is requested while the exchange answers badly. Once: the
partition ends exactly as the truth. For ever: not one stored bar changes, and the error, the gap or
the quarantine names what came.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import socket
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
from aiohttp import web

from marketdata_assets.errors import VenueDown, VenueRefused
from marketdata_assets.flows.fetch.open_partition import IngestResult
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources import ccxt_rest
from marketdata_assets.sources.sandbox.bars import generate_bars, generate_klines
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_tests.conftest import SANDBOX_NOW, Universe
from marketdata_tests.steps import (
    SkippingClock,
    assert_bars,
    bar_requests,
    coinbase,
    lake_files,
    logged_requests,
    ms,
    quarantined,
    run_ingest,
    serving,
    stored_bars,
    window,
)

pytestmark = pytest.mark.server

SINCE, HALF, UNTIL = "2024-01-07", "2024-01-08T12:00:00", "2024-01-09T12:00:00"
WANTED = window(SINCE, UNTIL)
MINUTE = 60_000
GAP = ms("2024-01-09T03:00")
FIRST_PAGE, LAST_PAGE = 0, -1

Rows = list[list[Any]]
Answer = Rows | web.StreamResponse
Bad = Callable[[web.Request, Rows], Any]


# ------------------------------------------------------------ answers that are refused


def text(body: str | bytes, status: int = 200, **headers: str) -> Bad:
    """Any body, whatever was requested."""
    content = body.encode() if isinstance(body, str) else body

    def answer(_: web.Request, __: Rows) -> web.Response:
        return web.Response(
            body=content, status=status, headers={"Content-Type": "application/json", **headers}
        )

    return answer


HTML = (
    "<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head>"
    "<body><h1>Bad Gateway</h1></body></html>"
)


def truncated(_: web.Request, rows: Rows) -> web.Response:
    whole = json.dumps(rows)
    return web.Response(text=whole[: len(whole) * 6 // 10], content_type="application/json")


async def short_read(request: web.Request, rows: Rows) -> web.StreamResponse:
    """The length of the whole, the first half, and the end of the connection."""
    whole = json.dumps(rows).encode()
    response = web.StreamResponse(
        headers={"Content-Type": "application/json", "Content-Length": str(len(whole))}
    )
    await response.prepare(request)
    await response.write(whole[: len(whole) // 2])
    assert request.transport is not None
    request.transport.close()
    return response


def reset(request: web.Request, _: Rows) -> web.Response:
    """A TCP reset before any byte."""
    assert request.transport is not None
    request.transport.get_extra_info("socket").setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    request.transport.abort()
    return web.Response()


def gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


async def hang(request: web.Request, _: Rows) -> web.Response:
    """Not a byte until the client gives up."""
    while not gone(request):
        await asyncio.sleep(0.01)
    return web.Response()


async def drip(request: web.Request, rows: Rows) -> web.StreamResponse:
    """A good answer byte by byte: no single read ever takes long, and the whole takes minutes."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for byte in json.dumps(rows).encode():
        if gone(request):
            break
        await response.write(bytes([byte]))
        await asyncio.sleep(0.01)
    return response


@cache
def bomb(megabytes: int) -> bytes:
    """A list whose blanks are `megabytes` long, gzipped."""
    packer = zlib.compressobj(wbits=31)
    parts = [
        packer.compress(b"["),
        *(packer.compress(b" " * 2**20) for _ in range(megabytes)),
        packer.compress(b"]"),
    ]
    return b"".join((*parts, packer.flush()))


def gzip_bomb(_: web.Request, __: Rows) -> web.Response:
    return web.Response(
        body=bomb(48), headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}
    )


def broken_gzip(_: web.Request, rows: Rows) -> web.Response:
    packed = bytearray(gzip.compress(json.dumps(rows).encode()))
    packed[20:60] = bytes(40)
    return web.Response(
        body=bytes(packed), headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}
    )


def error_body(code: int, msg: str, status: int = 200, **headers: str) -> Bad:
    return text(json.dumps({"code": code, "msg": msg}), status, **headers)


# ------------------------------------------------------------ rows that are too few or broken


def each(change: Callable[[list[Any]], Any]) -> Bad:
    """Every row changed."""
    return lambda _, rows: [change(list(row)) for row in rows]


def put(position: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    """The row with another value; a callable value makes it from the one that was there."""

    def change(row: list[Any]) -> list[Any]:
        row[position] = value(row[position]) if callable(value) else value
        return row

    return change


def moved(move: Callable[[int], int]) -> Callable[[list[Any]], list[Any]]:
    """The row at another time."""
    return lambda row: [move(row[0]), *row[1:6], move(row[6]), *row[7:]]


OPEN_TIME, OPEN, HIGH, LOW, CLOSE, VOLUME, CLOSE_TIME, QUOTE, TRADES, TAKER, TAKER_QUOTE = range(11)


def as_dict(row: list[Any]) -> dict[str, Any]:
    return {
        "openTime": row[0],
        "open": row[1],
        "high": row[2],
        "low": row[3],
        "close": row[4],
        "volume": row[5],
    }


def five_minutes(request: web.Request, _: Rows) -> Rows:
    query = request.query
    return generate_klines(
        query["symbol"],
        "5m",
        int(query["startTime"]),
        end=int(query["endTime"]),
        limit=1000,
        now=SANDBOX_NOW,
    )


# ------------------------------------------------------------ rows that are added or believable


def other_symbol(request: web.Request, _: Rows) -> Rows:
    query = request.query
    return generate_klines(
        "ETHUSDT",
        query["interval"],
        int(query["startTime"]),
        end=int(query["endTime"]),
        limit=1000,
        now=SANDBOX_NOW,
    )


def other_window(request: web.Request, _: Rows) -> Rows:
    """The bars of another week, as a cache would answer."""
    start, end = (int(request.query[name]) - 70 * 86_400_000 for name in ("startTime", "endTime"))
    return generate_klines(
        request.query["symbol"],
        request.query["interval"],
        start,
        end=end,
        limit=1000,
        now=SANDBOX_NOW,
    )


def future_row(_: web.Request, rows: Rows) -> Rows:
    """Good rows, and one of tomorrow."""
    return [*rows, moved(lambda t: t + 2 * 86_400_000)(list(rows[-1]))]


def forming_row(_: web.Request, rows: Rows) -> Rows:
    """Good rows, and the one that is open at the exchange's clock."""
    return [
        *rows,
        *generate_klines(
            "BTCUSDT", "1m", SANDBOX_NOW, end=SANDBOX_NOW + 1, limit=1, now=SANDBOX_NOW + 30_000
        ),
    ]


def twice(_: web.Request, rows: Rows) -> Rows:
    return [row for row in rows for _ in range(2)]


def contradicting(_: web.Request, rows: Rows) -> Rows:
    """The bars in the middle twice, with another close."""
    at, several = len(rows) // 2, rows[len(rows) // 2 :][:3]
    return [
        *rows[:at],
        *(put(CLOSE, row[OPEN])(list(row)) for row in several if row[OPEN] != row[CLOSE]),
        *rows[at:],
    ]


def shuffled(_: web.Request, rows: Rows) -> Rows:
    return rows[1::2] + rows[::2]


def swapped(row: list[Any]) -> list[Any]:
    """Open and close changed places: a bar that breaks no rule."""
    row[OPEN], row[CLOSE] = row[CLOSE], row[OPEN]
    return row


# ------------------------------------------------------------ all faults


class Fault(NamedTuple):
    """A bad answer. `message`: what names it when it comes for ever, in the error or among the
    reasons.
    """

    name: str
    bad: Bad
    message: str


REFUSED_WHOLE = (
    Fault("html", text(HTML, **{"Content-Type": "text/html"}), "not JSON"),
    Fault("html_as_json", text(HTML), "not JSON"),
    Fault("empty_body", text(""), "not JSON: it is empty"),
    Fault("blank_body", text("  \n"), "not JSON"),
    Fault("null", text("null"), "not JSON|holds nothing"),
    Fault("empty_object", text("{}"), "holds nothing"),
    Fault("json_string", text('"maintenance"'), "not JSON"),
    Fault("json_number", text("17"), "not JSON"),
    Fault("nan_literal", text("[[NaN]]"), "not JSON"),
    Fault("not_utf8", text(b"[[\xff\xfe\x00]]"), "not JSON"),
    Fault("two_documents", text("[][]"), "not JSON"),
    Fault("deep_nesting", text("[" * 100_000), "not JSON"),
    Fault("huge_number", text("[[" + "9" * 5000 + "]]"), "column|not JSON"),
    Fault("truncated_json", truncated, "cut short or broken"),
    Fault("short_read", short_read, "connection broke"),
    Fault("gzip_bomb", gzip_bomb, "larger than 32 MiB"),
    Fault("broken_gzip", broken_gzip, "connection broke|HTTP 200"),
    Fault(
        "error_200",
        error_body(-1001, "Internal error; unable to process your request."),
        "Internal error",
    ),
    Fault("error_200_unknown", error_body(-9876, "something strange"), "something strange"),
    Fault("wrapped", lambda _, rows: web.json_response({"data": rows}), "list of klines"),
    Fault(
        "text_rows", lambda _, rows: web.json_response([str(row) for row in rows]), "list of klines"
    ),
    Fault("null_rows", lambda _, rows: web.json_response([None for _ in rows]), "list of klines"),
    Fault("dict_rows", each(as_dict), "list of klines"),
    Fault("short_rows", each(lambda row: row[:6]), "columns instead of 12"),
    Fault("empty_rows", each(lambda _: []), "columns instead of 12"),
    Fault("extra_column", each(lambda row: [*row, "new"]), "columns instead of 12"),
    Fault("one_short_row", lambda _, rows: [*rows[:-1], rows[-1][:11]], "columns instead of 12"),
    Fault("rotated_columns", each(lambda row: [*row[1:], row[0]]), "column open_time"),
    Fault("reversed_columns", each(lambda row: row[::-1]), "column open_time"),
    Fault(
        "numbers_for_text",
        each(lambda row: [row[0], *map(float, row[1:6]), *row[6:]]),
        "column open",
    ),
    Fault(
        "one_number_for_text",
        lambda _, rows: [*rows[:-1], put(CLOSE, 42000)(rows[-1])],
        "column close",
    ),
    Fault("text_for_numbers", each(lambda row: [str(row[0]), *row[1:]]), "column open_time"),
    Fault("text_for_trades", each(put(TRADES, str)), "column trades"),
    Fault("fraction_of_trades", each(put(TRADES, 1.5)), "column trades"),
    Fault("true_for_trades", each(put(TRADES, True)), "column trades"),
    Fault("time_beyond_int64", each(put(OPEN_TIME, 10**19)), "column open_time"),
    Fault("list_for_price", each(put(HIGH, ["1"])), "column high"),
    Fault("no_close_time", each(put(CLOSE_TIME, None)), "column close_time|close times"),
    Fault("wrong_timeframe", five_minutes, "not 1m bars"),
    Fault("micros_for_ms", each(moved(lambda t: t * 1000)), "not 1m bars"),
    Fault("http_403", text(HTML, 403, **{"Content-Type": "text/html"}), "HTTP 403"),
    Fault("http_451", error_body(0, "Service unavailable.", 451), "HTTP 451"),
    Fault("http_500", error_body(-1000, "An unknown error occurred.", 500), "HTTP 500"),
    Fault("http_502_html", text(HTML, 502, **{"Content-Type": "text/html"}), "HTTP 502"),
    Fault("http_503", error_body(-1008, "Server is currently overloaded.", 503), "HTTP 503"),
    Fault("http_504", text("", 504), "deadline|HTTP 504"),
    Fault("http_520", text("error code: 520", 520), "HTTP 520"),
    Fault("reset", reset, "connection broke"),
)
"""The whole answer is refused and asked for again."""

REFUSALS = (
    Fault(
        "http_401",
        error_body(-2015, "Invalid API-key, IP, or permissions for action.", 401),
        "Invalid API-key|HTTP 401",
    ),
    Fault("http_404", text("not here", 404), "HTTP 404"),
    Fault("http_400_symbol", error_body(-1121, "Invalid symbol.", 400), "Invalid symbol"),
)
"""The venue's final no: not asked again in this run."""

SLOW = (Fault("hang", hang, "deadline"), Fault("slow_drip", drip, "deadline"))

WAITS = (
    Fault("http_429", error_body(-1003, "Too many requests.", 429, **{"Retry-After": "7"}), "429"),
    Fault("http_429_bare", error_body(-1003, "Too many requests.", 429), "429"),
    Fault("http_418", error_body(-1003, "IP banned.", 418, **{"Retry-After": "120"}), "418"),
)

BROKEN_ROW = (
    Fault("null_open_time", each(put(OPEN_TIME, None)), "null"),
    Fault("null_price", each(put(CLOSE, None)), "null"),
    Fault("null_volume", each(put(VOLUME, None)), "null"),
    Fault("nan", each(put(HIGH, "NaN")), "not_a_number"),
    Fault("empty_text", each(put(OPEN, "")), "not_a_number"),
    Fault("infinity", each(put(HIGH, "Infinity")), "not_a_number"),
    Fault("negative_infinity", each(put(LOW, "-inf")), "not_a_number"),
    Fault("words", each(put(LOW, "n/a")), "not_a_number"),
    Fault("thousands_separators", each(put(QUOTE, "1,234,567.00")), "not_a_number"),
    Fault("hexadecimal", each(put(VOLUME, "0x10")), "not_a_number"),
    Fault("too_large", each(put(HIGH, "1" + "0" * 40)), "not_a_number"),
    Fault("too_precise", each(put(VOLUME, "1.0000000000001")), "too_precise"),
    Fault("zero_price", each(put(LOW, "0.00000000")), "non_positive_price"),
    Fault("negative_price", each(put(CLOSE, lambda price: "-" + price)), "non_positive_price"),
    Fault("negative_volume", each(put(TAKER, "-1.00000000")), "negative_volume"),
    Fault("negative_trades", each(put(TRADES, -1)), "negative_volume"),
    Fault(
        "high_below_low", each(lambda row: [row[0], row[1], "1.00", "2.00", *row[4:]]), "high_below"
    ),
    Fault("low_above_close", each(put(LOW, lambda low: str(Decimal(low) + 100_000))), "low_above"),
    Fault("quote_of_another_price", each(put(QUOTE, "0.00000001")), "vwap_outside"),
    Fault(
        "more_taken_than_traded",
        each(put(TAKER, lambda taken: str(Decimal(taken) + 10**6))),
        "taker_above_total",
    ),
)
"""Rows in the right form that break a rule."""

MISPLACED = (
    Fault("off_grid", each(moved(lambda t: t + 28_789)), "off_grid"),
    Fault("shifted_half_a_minute", each(moved(lambda t: t + 30_000)), "off_grid"),
    Fault("seconds_for_ms", each(moved(lambda t: t // 1000)), "outside_window"),
    Fault(
        "year_50000",
        each(lambda row: [row[0] * 1000, *row[1:6], row[0] * 1000 + 59_999, *row[7:]]),
        "outside_window|not_a_number",
    ),
    Fault(
        "before_christ",
        each(lambda row: [-row[0] * 100, *row[1:6], 59_999 - row[0] * 100, *row[7:]]),
        "outside_window|not_a_number",
    ),
    Fault(
        "time_that_wraps", each(moved(lambda t: t + (2**64 // 1000))), "outside_window|not_a_number"
    ),
    Fault("other_window", other_window, "outside_window"),
    Fault("next_day", each(moved(lambda t: t + 2 * 86_400_000)), "outside_window"),
)
"""Rows that say they are of another time."""

INCOMPLETE = (
    Fault("empty_list", lambda _, __: [], "unanswered"),
    Fault(
        "gap",
        lambda _, rows: [row for row in rows if not GAP <= row[0] < GAP + 30 * MINUTE],
        "no_bars",
    ),
    Fault("first_half_missing", lambda _, rows: rows[len(rows) // 2 :], "no_bars|unanswered"),
    Fault("last_half_missing", lambda _, rows: rows[: len(rows) // 2], "no_bars|unanswered"),
    Fault("all_but_one_missing", lambda _, rows: rows[5:6], "no_bars|unanswered"),
)
"""Good rows, too few of them."""

ADDED = (
    Fault("future_row", future_row, "outside_window"),
    Fault("forming_row", forming_row, "outside_window"),
)
"""Good rows, and one that is not a bar of the page."""

HARMLESS = (
    Fault("identical_rows", twice, ""),
    Fault("descending", lambda _, rows: rows[::-1], ""),
    Fault("shuffled", shuffled, ""),
)
"""All the bars, told badly."""

BELIEVABLE = (
    Fault("contradicting_rows", contradicting, "conflict"),
    Fault("wrong_symbol", other_symbol, "replaced"),
    Fault("open_and_close_swapped", each(swapped), "replaced"),
)
"""Rows that break no rule; only other answers show that they are wrong."""


# ------------------------------------------------------------ the stage


@dataclass
class Stage:
    """A universe whose first half is stored, and an exchange that can be made to answer badly."""

    exchange: SandboxExchange
    settings: Settings
    clock: SkippingClock = field(default_factory=SkippingClock)

    def plant(self, bad: Bad, times: int | None = None, page: int | None = None) -> None:
        """Answer badly so many times (None: for ever), on one page only if `page` is given."""
        left = [times]
        pages = {FIRST_PAGE: ms(HALF) - 3 * MINUTE, LAST_PAGE: ms(HALF) + 995 * MINUTE}

        async def tamper(request: web.Request, rows: Rows) -> Answer | None:
            if request.query.get("startTime") == "0" or left[0] == 0:
                return None
            if page is not None and request.query["startTime"] != str(pages[page]):
                return None
            if left[0] is not None:
                left[0] -= 1
            answer = bad(request, rows)
            return await answer if asyncio.iscoroutine(answer) else answer

        self.exchange.tamper = tamper

    def ingest(self, **limits: Any) -> IngestResult:
        self.exchange.requests.clear()
        (done,) = run_ingest(self.settings, self.clock.policy(**limits))
        return done

    @property
    def requests(self) -> int:
        return len(bar_requests(self.exchange))

    @property
    def reasons(self) -> str:
        return " ".join(row["reasons"] for row in quarantined(self.settings))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the first half of the span is stored."""
    folder = tmp_path_factory.mktemp("half")
    exchange = SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9)
    with serve_in_thread(exchange) as url, pytest.MonkeyPatch.context() as patch:
        from marketdata_tests.conftest import universe

        make = universe.__wrapped__(folder, patch)
        (done,) = run_ingest(make(url, since=SINCE, until=HALF))
        assert done.complete
        assert done.bars.height == 36 * 60 - 80
    return folder


@pytest.fixture
def stage(half: Path, tmp_path: Path, universe: Universe) -> Iterator[Stage]:
    exchange = SandboxExchange(now=lambda: SANDBOX_NOW, weight_limit=10**9)
    for name in ("lake", "state"):
        shutil.copytree(half / name, tmp_path / name)
    with serve_in_thread(exchange) as url:
        yield Stage(exchange, universe(url, since=SINCE, until=UNTIL))


def ids(faults: Sequence[Fault]) -> Any:
    """One test per fault."""
    return pytest.mark.parametrize(
        "fault", [pytest.param(fault, id=fault.name) for fault in faults]
    )


def is_truth(stage: Stage) -> None:
    assert_bars(stored_bars(stage.settings), generate_bars("BTCUSDT", "1m", WANTED))


def old_bars(settings: Settings) -> pl.DataFrame:
    return stored_bars(settings).filter(pl.col("open_time") < window(SINCE, HALF).end)


# ------------------------------------------------------------ once


@ids([*REFUSED_WHOLE, *BROKEN_ROW, *MISPLACED, *INCOMPLETE])
def test_once(stage: Stage, fault: Fault) -> None:
    """Each page is bad at first, then good: after one run the partition is the truth, and every row
    is accounted for.
    """
    stage.plant(fault.bad, times=2)
    done = stage.ingest()
    assert done.error is None
    assert done.complete
    assert done.account.is_balanced
    is_truth(stage)
    assert stage.requests <= 10


@ids([*WAITS, *ADDED, *HARMLESS, *BELIEVABLE])
@pytest.mark.parametrize("page", [FIRST_PAGE, LAST_PAGE], ids=["first", "last"])
def test_once_on_one_page(stage: Stage, fault: Fault, page: int) -> None:
    """The other page and the adjacent stored bar contradict it."""
    stage.plant(fault.bad, times=1, page=page)
    done = stage.ingest()
    assert done.error is None
    assert done.complete
    assert done.account.is_balanced
    is_truth(stage)
    assert stage.requests <= 8


@ids(REFUSALS)
def test_a_refusal_once(stage: Stage, fault: Fault) -> None:
    """A final no ends this run and changes nothing; the next run makes the partition the truth."""
    before = lake_files(stage.settings)
    stage.plant(fault.bad, times=1)
    assert isinstance(stage.ingest().error, VenueRefused)
    assert lake_files(stage.settings) == before
    assert stage.ingest().error is None
    is_truth(stage)


@ids(SLOW)
def test_slow_once(stage: Stage, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is for the whole answer: a drip that never pauses long is given up as well."""
    monkeypatch.setattr(ccxt_rest, "CcxtSource", partial(ccxt_rest.CcxtSource, deadline=2.0))
    stage.plant(fault.bad, times=1)
    done = stage.ingest()
    assert done.error is None
    assert done.retries == 1
    is_truth(stage)


@pytest.mark.parametrize(("status", "pause"), [(429, 7), (418, 120)])
def test_no_request_is_sent_before_the_time_is_up(stage: Stage, status: int, pause: int) -> None:
    """Nine pages: the first ones in flight are answered with a wait; by the clock no request comes
    too early.
    """
    begun, early = stage.clock.now, [0]
    longer = {
        name: venue.model_copy(update={"since": window("2024-01-01", UNTIL).start})
        for name, venue in stage.settings.venues.items()
    }
    settings = stage.settings.model_copy(update={"venues": longer})

    async def wait(request: web.Request, _: Rows) -> web.Response | None:
        if stage.clock.now - begun >= pause or request.query.get("startTime") == "0":
            return None
        early[0] += 1
        return web.json_response(
            {"code": -1003, "msg": "Slow down."}, status=status, headers={"Retry-After": str(pause)}
        )

    stage.exchange.tamper = wait
    (done,) = run_ingest(settings, stage.clock.policy())
    assert done.error is None
    assert 1 <= early[0] <= 8
    assert done.retries == early[0]
    assert done.seconds_waited >= pause
    assert_bars(stored_bars(settings), generate_bars("BTCUSDT", "1m", window("2024-01-01", UNTIL)))


# ------------------------------------------------------------ for ever


def always(
    stage: Stage, fault: Fault, **limits: Any
) -> tuple[IngestResult, dict[str, bytes], pl.DataFrame]:
    """What comes of it, and what was stored before."""
    before, old = lake_files(stage.settings), old_bars(stage.settings)
    stage.plant(fault.bad)
    return stage.ingest(**limits), before, old


def heals(stage: Stage) -> None:
    """On the next day the exchange is well again: one run, and all is the truth."""
    stage.exchange.tamper = None
    assert stage.ingest().error is None
    is_truth(stage)


def named(found: str, fault: Fault) -> bool:
    return any(part in found for part in fault.message.split("|"))


@ids(REFUSED_WHOLE)
def test_always_refused(stage: Stage, fault: Fault) -> None:
    """The venue counts as down after six attempts a page; the files are unchanged, and the error
    says why.
    """
    done, before, _ = always(stage, fault)
    assert lake_files(stage.settings) == before
    assert type(done.error) is VenueDown
    assert done.error.exit_code == 3
    assert named(str(done.error), fault), str(done.error)
    # aiohttp itself asks once more when a kept connection is reset
    assert 6 <= stage.requests <= (24 if fault.name == "reset" else 12)
    assert not done.complete
    assert_bars(done.bars, generate_bars("BTCUSDT", "1m", window(SINCE, HALF)))
    heals(stage)


@ids(REFUSALS)
def test_always_a_refusal(stage: Stage, fault: Fault) -> None:
    done, before, _ = always(stage, fault)
    assert lake_files(stage.settings) == before
    assert type(done.error) is VenueRefused
    assert named(str(done.error), fault), str(done.error)
    assert 1 <= stage.requests <= 2


@ids(SLOW)
def test_always_slow(stage: Stage, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ccxt_rest, "CcxtSource", partial(ccxt_rest.CcxtSource, deadline=0.5))
    done, before, _ = always(stage, fault, attempts=2)
    assert lake_files(stage.settings) == before
    assert 1 <= stage.requests <= 4  # a busy machine may send the first one too late
    assert type(done.error) is VenueDown
    assert named(str(done.error), fault), str(done.error)


@ids(WAITS)
def test_always_answered_with_a_wait(stage: Stage, fault: Fault) -> None:
    """After fifteen minutes (policy.longest_wait) the venue counts as down; requests never follow
    each other at once.
    """
    enough = Fault(
        fault.name,
        lambda request, rows: (fault if stage.requests < 100 else REFUSALS[1]).bad(request, rows),
        fault.message,
    )
    done, before, _ = always(stage, enough)
    assert lake_files(stage.settings) == before
    assert type(done.error) is VenueDown
    assert named(str(done.error), fault), str(done.error)
    assert stage.requests < 100


@ids([*BROKEN_ROW, *MISPLACED])
def test_always_broken(stage: Stage, fault: Fault) -> None:
    """No row is used, the files are unchanged, and every row is in quarantine with its reason."""
    done, before, _ = always(stage, fault)
    assert lake_files(stage.settings) == before
    assert done.error is None
    assert done.account.is_balanced
    assert done.account.stored == 0
    assert done.account.quarantined == done.account.received > 1000
    assert named(stage.reasons, fault), stage.reasons[:200]
    assert sum(gap.bars for gap in done.gaps if gap.reason != "no_bars") == 24 * 60
    assert stage.requests <= 12


HEALED = ("null_open_time", "infinity", "off_grid", "seconds_for_ms", "other_window")


@ids([fault for fault in (*BROKEN_ROW, *MISPLACED) if fault.name in HEALED])
def test_a_bad_day_heals_on_the_next(stage: Stage, fault: Fault) -> None:
    """What was rejected all through one run is requested again in the next, and used when it is
    good.
    """
    always(stage, fault)
    heals(stage)


@ids([fault for fault in BROKEN_ROW if fault.name != "null_open_time"])
def test_always_one_broken_row(stage: Stage, fault: Fault) -> None:
    """All bars but the one are stored; for that one there is a gap, and the row as it came."""
    at = ms("2024-01-09T03:14")

    def one(request: web.Request, rows: Rows) -> Any:
        return [fault.bad(request, [row])[0] if row[0] == at else row for row in rows]

    done, _, old = always(stage, Fault(fault.name, one, fault.message))
    assert done.error is None
    assert done.account.is_balanced
    good = generate_bars("BTCUSDT", "1m", WANTED)
    assert_bars(stored_bars(stage.settings), good.filter(pl.col("open_time").dt.epoch("ms") != at))
    assert old_bars(stage.settings).equals(old)
    assert [(gap.bars, gap.reason) for gap in done.gaps if gap.reason != "no_bars"] == [
        (1, "quarantined")
    ]
    (row,) = quarantined(stage.settings)
    assert row["open_time"] == "2024-01-09T03:14:00Z"
    assert row["seen"] >= 1
    assert named(row["reasons"], fault)
    assert row["fetch_id"]
    assert row["source"] == "binance"
    assert set(row["fields"]) == set(good.columns)
    assert stage.requests <= 6


@pytest.mark.parametrize("position", [QUOTE, TRADES, TAKER, TAKER_QUOTE])
def test_a_null_where_the_venue_documents_a_number(stage: Stage, position: int) -> None:
    """Null is for what a venue never gives; where it gives a number, null is broken."""
    done, before, _ = always(stage, Fault("null", each(put(position, None)), "null"))
    assert lake_files(stage.settings) == before
    assert done.error or "null" in stage.reasons


@ids(INCOMPLETE)
def test_always_too_few(stage: Stage, fault: Fault) -> None:
    """No stored bar changes or goes; what is stored is true, and each missing bar has its gap."""
    done, before, old = always(stage, fault)
    bars, good = stored_bars(stage.settings), generate_bars("BTCUSDT", "1m", WANTED)
    assert done.error is None
    assert done.account.is_balanced
    assert old_bars(stage.settings).equals(old)
    assert bars.join(good, on=good.columns, how="anti").is_empty()
    assert bars["open_time"].n_unique() == bars.height
    assert bars.height + sum(gap.bars for gap in done.gaps) == WANTED.count(done.timeframe)
    assert any(
        named(gap.reason, fault)
        for gap in done.gaps
        if gap.window.start >= window(HALF, UNTIL).start
    )
    assert all(gap.evidence for gap in done.gaps)
    assert stage.requests <= 40
    if fault.name == "empty_list":
        assert lake_files(stage.settings) == before
        heals(stage)


@ids(ADDED)
def test_always_a_row_too_many(stage: Stage, fault: Fault) -> None:
    """The good bars are stored, the strange row is not."""
    done, _, _ = always(stage, fault)
    assert done.error is None
    assert done.account.is_balanced
    assert done.complete
    is_truth(stage)
    assert named(stage.reasons, fault)
    assert stage.requests <= 4


@ids(HARMLESS)
def test_always_harmless(stage: Stage, fault: Fault) -> None:
    done, _, _ = always(stage, fault)
    assert done.error is None
    assert done.account.is_balanced
    assert done.complete
    assert done.account.quarantined == 0
    is_truth(stage)
    assert stage.requests == 2


def test_always_contradicting_rows(stage: Stage) -> None:
    """Bars of which every answer gives two variants are stored where answers to other requests
    agree; the other variants are in quarantine.
    """
    done, _, old = always(stage, BELIEVABLE[0])
    bars, good = stored_bars(stage.settings), generate_bars("BTCUSDT", "1m", WANTED)
    assert done.error is None
    assert done.account.is_balanced
    assert old_bars(stage.settings).equals(old)
    assert bars.join(good, on=good.columns, how="anti").is_empty()
    disputed = good.join(bars, on="open_time", how="anti")
    assert disputed.height <= 12
    rows = quarantined(stage.settings)
    assert {row["reasons"] for row in rows} == {"conflict"}
    assert {row["open_time"][:16] for row in rows} >= {
        moment.strftime("%Y-%m-%dT%H:%M") for moment in disputed["open_time"]
    }
    assert stage.requests <= 16


@ids(BELIEVABLE[1:])
def test_always_believable(stage: Stage, fault: Fault) -> None:
    """Answers that contradict the stored bar at their edge are not used for the bars beyond it."""
    done, before, _ = always(stage, fault)
    assert lake_files(stage.settings) == before
    assert stage.reasons or done.error


# ------------------------------------------------------------ what is logged, and memory


def test_the_memory_stays_small(stage: Stage) -> None:
    """An answer of 256 MiB, packed into 256 KiB, is dropped after the first 32."""
    packed = bomb(256)
    stage.plant(text(packed, **{"Content-Encoding": "gzip"}), times=1)
    tracemalloc.start()
    try:
        done = stage.ingest()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert done.error is None
    assert done.retries == 1
    assert len(packed) < 2**19
    assert peak < 120 * 2**20
    is_truth(stage)


def test_failures_are_logged(stage: Stage) -> None:
    """Each failed request is in the fetch log with its outcome, also when the run succeeded."""
    stage.plant(text(HTML), times=3)
    stage.ingest()
    assert logged_requests(stage.settings)["garbled"] == 3


def test_answers_with_other_columns_are_logged(stage: Stage) -> None:
    """Also those whose rows have another form."""
    stage.plant(each(lambda row: row[:6]), times=3)
    assert stage.ingest().error is None
    assert logged_requests(stage.settings)["garbled"] == 3


def test_errors_about_other_columns_name_the_venue(stage: Stage) -> None:
    stage.plant(each(lambda row: row[:6]))
    assert str(stage.ingest().error).startswith("binance: ")


def test_a_failed_run_logs_all_its_requests(stage: Stage) -> None:
    """The fetch log of a run that failed holds every request that the exchange saw."""
    before = sum(logged_requests(stage.settings).values())
    stage.plant(error_body(-1000, "An unknown error occurred.", 500), page=FIRST_PAGE)
    done = stage.ingest()
    assert type(done.error) is VenueDown
    assert sum(logged_requests(stage.settings).values()) - before == done.requests == stage.requests


# ------------------------------------------------------------ through fetch_ohlcv

GENERIC = window("2024-01-05", "2024-01-05T10:00")
KNOWN_END = "2024-01-05T04:00"


def candle(second: int) -> list[Any]:
    """Coinbase's order: time, low, high, open, close, volume; numbers and no text."""
    cents = 4_200_000 + second // 60 % 977 * 7
    return [
        second,
        (cents - 150) / 100,
        (cents + 250) / 100,
        cents / 100,
        (cents + 99) / 100,
        second // 60 % 31 / 8,
    ]


def candles(request: web.Request) -> Rows:
    """Both ends inclusive, newest first."""
    start, end = (ms(request.query[name].removesuffix("Z")) // 1000 for name in ("start", "end"))
    return [candle(second) for second in range(start, end + 1, 60)][::-1]


def true_candles(first: str, end: str) -> list[tuple[Any, ...]]:
    """open_time, open, high, low, close, volume."""
    rows = [candle(second) for second in range(ms(first) // 1000, ms(end) // 1000, 60)]
    return [(row[0] * 1000, *(Decimal(str(row[i])) for i in (3, 2, 1, 4, 5))) for row in rows]


def stored_candles(settings: Settings) -> list[tuple[Any, ...]]:
    bars = stored_bars(settings, "coinbaseexchange%3ABTC-USD")
    return bars.select(
        pl.col("open_time").dt.epoch("ms"), "open", "high", "low", "close", "volume"
    ).rows()


_GENERIC = [
    "html",
    "empty_body",
    "null",
    "empty_object",
    "json_string",
    "deep_nesting",
    "truncated_json",
    "short_read",
    "gzip_bomb",
    "http_500",
    "http_502_html",
    "reset",
]
WHOLE_GENERIC = (
    *(fault for fault in REFUSED_WHOLE if fault.name in _GENERIC),
    Fault(
        "message_200",
        text('{"message": "service unavailable"}'),
        "service unavailable|no list|HTTP 200|shape",
    ),
)
ROWS_GENERIC = (
    Fault("null_price", each(put(4, None)), "null"),
    Fault("empty_text", each(put(3, "")), "null|not_a_number"),
    Fault("words", each(put(1, "n/a")), "not_a_number"),
    Fault("nan_text", each(put(2, "NaN")), "not_a_number"),
    Fault("infinity", each(put(2, "Infinity")), "not_a_number"),
    Fault("negative_volume", each(put(5, -1.5)), "negative_volume"),
    Fault("zero_price", each(put(1, 0)), "non_positive_price"),
    Fault("high_below_low", each(lambda row: [row[0], row[2], row[1], *row[3:]]), "high_below"),
    Fault("short_rows", each(lambda row: row[:4]), "null"),
    Fault("dict_rows", each(lambda row: {"time": row[0], "low": row[1]}), "null"),
    Fault("true_for_price", each(put(3, True)), "null|not_a_number"),
    Fault("list_for_price", each(put(3, [1])), "null|not_a_number"),
    Fault("nan_literal", text("[[NaN, NaN, NaN, NaN, NaN, NaN]]"), "null"),
    Fault("wrapped", lambda _, rows: web.json_response({"candles": rows}), "null"),
    Fault("text_rows", lambda _, rows: web.json_response([str(row) for row in rows]), "null"),
    Fault("null_rows", lambda _, rows: web.json_response([None for _ in rows]), "null"),
    Fault("off_grid", each(put(0, lambda t: t + 28)), "off_grid"),
)


@pytest.fixture
def generic(universe: Universe) -> Iterator[tuple[Settings, list[Bad | None]]]:
    """A venue of `fetch_ohlcv` with four of ten hours stored, and its answers about the rest."""
    how: list[Any] = [None]

    def answer(request: web.Request) -> Any:
        found = how[0](request, candles(request)) if how[0] else candles(request)
        return web.json_response(found) if isinstance(found, list) else found

    with serving(coinbase(answer, "2024-01-06T00:00:30")) as url:
        known = universe(
            url,
            "[BTC/USD]",
            since="2024-01-05",
            until=KNOWN_END,
            now="2024-01-07",
            venue="coinbaseexchange",
        )
        assert run_ingest(known)[0].complete
        yield (
            universe(
                url,
                "[BTC/USD]",
                since="2024-01-05",
                until="2024-01-05T10:00",
                now="2024-01-07",
                venue="coinbaseexchange",
            ),
            how,
        )


@ids([*WHOLE_GENERIC, *ROWS_GENERIC])
def test_fetch_ohlcv(generic: tuple[Settings, list[Bad | None]], fault: Fault) -> None:
    """For ever: the files are unchanged and the fault is named. Each page once: the partition is
    the truth.
    """
    settings, how = generic
    before = lake_files(settings)
    how[0] = fault.bad
    (done,) = run_ingest(settings)
    assert lake_files(settings) == before
    assert done.account.is_balanced
    if fault in WHOLE_GENERIC:
        assert type(done.error) is VenueDown
        assert named(str(done.error), fault), str(done.error)
    else:
        assert done.error is None
        assert named(" ".join(row["reasons"] for row in quarantined(settings)), fault)
    shutil.rmtree(settings.state)
    left = [2]

    def twice_only(request: web.Request, rows: Rows) -> Any:
        left[0] -= 1
        return fault.bad(request, rows) if left[0] >= 0 else rows

    how[0] = twice_only
    (done,) = run_ingest(settings)
    assert done.error is None
    assert done.account.is_balanced
    assert stored_candles(settings) == true_candles("2024-01-05", "2024-01-05T10:00")


def test_one_answer_from_another_day_stops_nothing(
    generic: tuple[Settings, list[Bad | None]],
) -> None:
    """The first of five pages is answered with bars of two days later.

    All pages are requested, and all stored bars are true.
    """
    settings, how = generic
    shorter = {
        name: venue.model_copy(update={"until": window(SINCE, "2024-01-05T22:00").end})
        for name, venue in settings.venues.items()
    }
    settings = settings.model_copy(update={"venues": shorter})
    left = [1]

    def later(_: web.Request, rows: Rows) -> Rows:
        left[0] -= 1
        return [put(0, lambda t: t + 2 * 86_400)(row) for row in rows] if left[0] == 0 else rows

    how[0] = later
    (done,) = run_ingest(settings)
    assert done.error is None
    assert stored_candles(settings) == true_candles("2024-01-05", "2024-01-05T22:00")


@ids(BELIEVABLE[1:])
def test_always_believable_about_earlier_days(stage: Stage, fault: Fault) -> None:
    """The universe grows to earlier days: the stored bars are the witnesses on the other side."""
    earlier = {
        name: venue.model_copy(
            update={"since": window("2024-01-05", UNTIL).start, "until": window(SINCE, HALF).end}
        )
        for name, venue in stage.settings.venues.items()
    }
    stage.settings = stage.settings.model_copy(update={"venues": earlier})
    done, before, _ = always(stage, fault)
    assert lake_files(stage.settings) == before
    assert stage.reasons or done.error


def test_a_retry_after_that_is_no_date(stage: Stage) -> None:
    """Dates that no calendar has count as no header at all, and the run continues."""
    for header in (
        "Fri, 31 Dec 9999 23:59:59 -9999",
        "Fri, 31 Dec 99999 23:59:59 GMT",
        "1e400",
        "٣",
    ):
        stage.plant(
            error_body(-1003, "Too many requests.", 429, **{"Retry-After": header}), times=1
        )
        done = stage.ingest()
        assert done.error is None or type(done.error) is VenueDown
