"""The ledger: what all processes share of a venue, and what an ingest writes, in full or never."""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketdata_assets.errors import StoreFailed
from marketdata_assets.ledger.fetches import to_log
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.records import (
    IngestFailure,
    IngestRecord,
    LoggedFetch,
    PartitionState,
    RowAccount,
)
from marketdata_assets.ledger.venues import BREAKER_FIRST, BREAKER_LIMIT, BREAKER_LONGEST
from marketdata_assets.model.gap import PROMPT_ATTEMPTS, Gap, GapCause, GapReason
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.quality.split import REJECTED_SCHEMA
from marketdata_assets.sources.base import Request
from marketdata_tests.samples import (
    BTC,
    ETH,
    FEBRUARY,
    JANUARY,
    MINUTE,
    START,
    at,
    kill,
    outcomes,
    start_python,
)

pytestmark = pytest.mark.server

TABLE = raw_table(TIMEFRAMES["1m"])
NOW = at("2024-02-01T12:00")
T0 = 1_700_000_000.0
FRESH_VENUES = map("venue{}".format, itertools.count())
"""A name nobody has used yet, for examples that share a ledger."""


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Where a ledger lies: a state folder, and the URL of a database or nothing."""
    return str(tmp_path / "state"), request.getfixturevalue(
        "database"
    ) if request.param == "postgres" else ""


Open = Callable[[], Ledger]


@pytest.fixture
def another(place: tuple[str, str]) -> Open:
    """Opens the same ledger once more, as another process would."""
    return lambda: Ledger(Path(place[0]), place[1] or None)


@pytest.fixture
def ledger(another: Open) -> Ledger:
    return another()


# --------------------------------------------------------------------------------- the limiter
def most_in_a_minute(sent: Sequence[float]) -> int:
    """The most requests in any window of 60 s: one that begins with a request holds the most."""
    sent = sorted(sent)
    return max(bisect_left(sent, moment + 60) - i for i, moment in enumerate(sent))


def queue(ledger: Ledger, venue: str, limit: int, arrivals: Sequence[float]) -> list[float]:
    """When each of these callers sends its request: at its turn, or at once when its turn has
    passed.
    """
    return [max(now, ledger.venues.reserve(venue, now, limit)) for now in arrivals]


CROWDS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.001, 0.3, 1.0, 20.0, 59.0, 61.0, 300.0]), st.integers(1, 120)
    ),
    min_size=1,
    max_size=8,
)
"""How long nobody comes, and how many then come at once."""


@settings(max_examples=50)
@given(st.integers(1, 100), CROWDS)
def test_no_minute_ever_sees_more_than_the_limit(
    ledger: Ledger, limit: int, crowds: list[tuple[float, int]]
):
    """Bursts, trickles and long rests, in simulated time."""
    moments = itertools.accumulate((pause for pause, _ in crowds), initial=T0)
    arrivals = [
        now for now, (_, size) in zip(list(moments)[1:], crowds, strict=True) for _ in range(size)
    ]
    sent = queue(ledger, next(FRESH_VENUES), limit, arrivals)
    assert most_in_a_minute(sent) <= limit
    assert sent == sorted(sent)


def test_the_limit_is_the_only_bottleneck(ledger: Ledger):
    """At Binance's 3000 a minute, 1003 requests in a row (a million bars) take what the limit
    dictates and at most 15 % more.
    """
    sent = queue(ledger, "binance", 3000, [T0] * 1003)
    assert sent[-1] - T0 <= 1.15 * 1003 / 3000 * 60
    assert most_in_a_minute(queue(ledger, "binance", 3000, [T0] * 3500)) <= 3000


def test_a_rest_is_not_saved_up(ledger: Ledger):
    """After an hour of silence the burst is what it was at first: at most a second's worth."""
    first = queue(ledger, "binance", 600, [T0] * 30)
    later = queue(ledger, "binance", 600, [T0 + 3600] * 30)
    assert [turn - T0 for turn in first] == pytest.approx(
        [turn - T0 - 3600 for turn in later], abs=1e-5
    )
    assert sum(turn < T0 + 0.001 for turn in first) <= 10
    assert first[-1] > T0 + 1.9


def test_without_a_limit_nobody_waits(ledger: Ledger):
    assert [ledger.venues.reserve("binance", T0, None) for _ in range(100)] == [T0] * 100


def test_venues_do_not_wait_for_each_other(ledger: Ledger):
    queue(ledger, "binance", 60, [T0] * 50)
    assert ledger.venues.reserve("kraken", T0, 60) <= T0


RESERVE = """
import sys
from pathlib import Path
from marketdata_assets.ledger.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), sys.argv[2] or None)
print("open", flush=True)
sys.stdin.readline()
print(*(repr(ledger.venues.reserve("binance", float(sys.argv[3]), 120)) for _ in range(100)))
"""


def test_all_processes_of_an_instance_stand_in_one_queue(
    ledger: Ledger, another: Open, place: tuple[str, str]
):
    """Two processes and two ledgers of this one, 400 requests at the same moment, 120 a minute: not
    two alike in any.
    """
    others = [start_python(RESERVE, *place, str(T0)) for _ in range(2)]
    for other in others:
        assert other.stdout.readline() == "open\n"
    for other in others:
        other.stdin.write("go\n")
        other.stdin.flush()
    other = another()
    sent = [max(T0, second.venues.reserve("binance", T0, 120)) for second in [ledger, other] * 100]
    for other in others:
        said, errors = other.communicate()
        assert not other.returncode, errors
        sent += [max(T0, float(turn)) for turn in said.split()]
    assert len(sent) == 400
    assert most_in_a_minute(sent) <= 120
    assert max(sent) - T0 < 1.15 * 400 / 120 * 60


# --------------------------------------------------------------------------------- pauses and the b
def test_a_pause_holds_for_everybody_and_never_shrinks(ledger: Ledger, another: Open):
    assert ledger.venues.health("binance").paused_until == 0
    ledger.venues.pause("binance", T0 + 60)
    ledger.venues.pause("binance", T0 + 10)
    assert another().venues.health("binance").paused_until == pytest.approx(T0 + 60, abs=0.5)
    assert ledger.venues.health("kraken").paused_until == 0


def fail(ledger: Ledger, times: int, now: float = T0) -> None:
    """So many failures in a row."""
    for _ in range(times):
        ledger.venues.record("binance", False, now)


def test_the_breaker_opens_after_so_many_failures_in_a_row(ledger: Ledger, another: Open):
    fail(ledger, BREAKER_LIMIT - 1)
    assert ledger.venues.broken_until("binance", T0) == 0
    fail(ledger, 1)
    assert ledger.venues.broken_until("binance", T0) == T0 + BREAKER_FIRST
    assert another().venues.broken_until("binance", T0 + 1) == pytest.approx(
        T0 + BREAKER_FIRST, abs=0.5
    )
    assert ledger.venues.broken_until("kraken", T0) == 0


def test_one_success_between_failures_keeps_it_closed(ledger: Ledger):
    for _ in range(5):
        fail(ledger, BREAKER_LIMIT - 1)
        ledger.venues.record("binance", True, T0)
    assert ledger.venues.broken_until("binance", T0) == 0


def test_failures_of_requests_still_under_way_do_not_open_it_for_longer(ledger: Ledger):
    fail(ledger, BREAKER_LIMIT + 7)
    assert ledger.venues.broken_until("binance", T0) == T0 + BREAKER_FIRST


def test_half_open_lets_one_caller_try(ledger: Ledger, another: Open):
    fail(ledger, BREAKER_LIMIT)
    later = T0 + BREAKER_FIRST
    assert ledger.venues.broken_until("binance", later - 0.001) == later
    assert ledger.venues.broken_until("binance", later) == 0
    assert another().venues.broken_until("binance", later) > later
    # the one who tried never came back: after a while another may
    assert ledger.venues.broken_until("binance", later + BREAKER_FIRST) == 0


def test_a_try_that_succeeds_closes_it(ledger: Ledger):
    fail(ledger, BREAKER_LIMIT)
    assert ledger.venues.broken_until("binance", T0 + BREAKER_FIRST) == 0
    ledger.venues.record("binance", True, T0 + BREAKER_FIRST + 1)
    assert ledger.venues.broken_until("binance", T0 + BREAKER_FIRST + 1) == 0
    fail(ledger, BREAKER_LIMIT - 1, T0 + 100)
    assert ledger.venues.broken_until("binance", T0 + 100) == 0
    fail(ledger, 1, T0 + 100)
    assert ledger.venues.broken_until("binance", T0 + 100) == T0 + 100 + BREAKER_FIRST


def test_each_try_that_fails_opens_it_for_longer(ledger: Ledger):
    now, stays = T0, []
    fail(ledger, BREAKER_LIMIT)
    for _ in range(7):
        until = ledger.venues.broken_until("binance", now)
        stays.append(until - now)
        now = until
        assert ledger.venues.broken_until("binance", now) == 0
        ledger.venues.record("binance", False, now)
    assert stays == [30.0, 60.0, 120.0, 240.0, 480.0, BREAKER_LONGEST, BREAKER_LONGEST]


# --------------------------------------------------------------------------------- locks
HOLD = """
import sys
from pathlib import Path
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.partition import Partition
ledger = Ledger(Path(sys.argv[1]), sys.argv[2] or None)
with ledger.lock("binance:BTC-USDT|2024-01-01", wait=True) as got:
    print(got, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "end", [lambda process: process.communicate("let go\n"), kill], ids=["let go", "killed"]
)
def test_a_partition_is_held_against_other_processes(
    ledger: Ledger, place: tuple[str, str], end: Callable[[Any], None]
):
    holder = start_python(HOLD, *place)
    assert holder.stdout.readline() == "True\n"
    with ledger.lock(JANUARY.key, wait=False) as got:
        assert got is False
    with (
        ledger.lock(FEBRUARY.key, wait=False) as january,
        ledger.lock(Partition(ETH, JANUARY.month).key, wait=False) as eth,
    ):
        assert january is eth is True
    end(holder)
    with ledger.lock(
        JANUARY.key
    ) as got:  # it waits: PostgreSQL takes a moment to see that a client is gone
        assert got is True


def test_whoever_waits_for_a_partition_gets_it(ledger: Ledger, place: tuple[str, str]):
    with ledger.lock(JANUARY.key) as got:
        assert got
        waiter = start_python(HOLD, *place)
    assert waiter.stdout.readline() == "True\n"
    kill(waiter)


def test_a_partition_is_held_against_other_threads_and_given_up_after_an_exception(ledger: Ledger):
    got: list[bool] = []

    def attempt() -> None:
        with ledger.lock(JANUARY.key, wait=False) as mine:
            got.append(mine)

    def thread() -> None:
        other = threading.Thread(target=attempt)
        other.start()
        other.join()

    def hold() -> None:
        with ledger.lock(JANUARY.key):
            thread()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hold()
    thread()
    assert got == [False, True]


# --------------------------------------------------------------------------------- one ingest, writ
GAP = Gap(Window(START, START + 5 * MINUTE), 5, GapReason.NO_BARS, 2, "asked twice")
FETCH = LoggedFetch(JANUARY.month, T0, 0.25, "answered", 200, 1000, None)
STATE = PartitionState(
    start=START,
    through=START + timedelta(days=3),
    newest=START + timedelta(days=3) - MINUTE,
    is_complete=False,
    rows=4315,
    bytes=9000,
    digest="d1",
    rollup_source_digest=None,
    attempts=1,
    failures=0,
    error=None,
)
REJECTED = (
    0,
    START + 7 * MINUTE,
    "off_grid unclosed",
    '{"open_time":"1704067200000","close":"1.50"}',
)


def rejected(*rows: Any) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=REJECTED_SCHEMA, orient="row")


def entry(**changes: Any) -> IngestRecord:
    """One ingest of January with one gap, one request and one rejected row."""
    parts = {
        "state": STATE,
        "account": RowAccount(4320, 4315, 4, 1),
        "gaps": [GAP],
        "fetches": [FETCH],
        "rejected": rejected(REJECTED),
    }
    return IngestRecord(
        **{"table": TABLE, "partition": JANUARY, **parts, "answers": [0], "now": NOW, **changes}
    )


def everything(ledger: Ledger, partition: Partition = JANUARY) -> list[Any]:
    """All that can be read of a partition."""
    asked = Window(START - timedelta(days=1), at("2025-01-01"))
    return [
        ledger.partitions.get(TABLE, partition),
        ledger.gaps.of(TABLE, partition),
        ledger.quarantine.rows(partition.market, asked),
        ledger.partitions.accounts(),
        outcomes(ledger),
    ]


def test_what_is_committed_is_read(ledger: Ledger, another: Open):
    ledger.partitions.commit(entry())
    other = another()
    assert other.partitions.get(TABLE, JANUARY) == STATE
    assert other.partitions.of_market(TABLE, BTC) == {"2024-01-01": STATE}
    assert other.gaps.of(TABLE, JANUARY) == [GAP]
    assert outcomes(other) == [("answered", "", 1)]
    counts = {"received": 4320, "stored": 4315, "identical": 4, "quarantined": 1}
    assert other.partitions.accounts() == [
        {
            "table": "raw/ohlcv_1m",
            "market": "binance:BTC-USDT",
            "month": "2024-01-01",
            "rows": 4315,
            **counts,
        }
    ]
    assert [
        other.partitions.get(TABLE, FEBRUARY),
        other.gaps.of(TABLE, FEBRUARY),
        other.partitions.of_market(TABLE, ETH),
    ] == [None, [], {}]


def test_the_next_ingest_replaces_state_and_gaps_of_its_partition_alone(ledger: Ledger):
    other = Partition(ETH, JANUARY.month)
    ledger.partitions.commit(entry())
    ledger.partitions.commit(entry(partition=other))
    later = Gap(
        Window(START + 9 * MINUTE, START + 10 * MINUTE),
        1,
        GapReason.UNANSWERED,
        1,
        "nobody knows",
    )
    done = replace(
        STATE,
        through=JANUARY.month.end,
        newest=None,
        is_complete=True,
        rows=0,
        bytes=99,
        digest="d2",
        rollup_source_digest="d1",
        attempts=2,
    )
    ledger.partitions.commit(
        entry(state=done, gaps=[later], rejected=rejected(), account=RowAccount(10, 10, 0, 0))
    )
    assert (ledger.partitions.get(TABLE, JANUARY), ledger.gaps.of(TABLE, JANUARY)) == (
        done,
        [later],
    )
    assert (ledger.partitions.get(TABLE, other), ledger.gaps.of(TABLE, other)) == (STATE, [GAP])
    assert outcomes(ledger) == [("answered", "", 3)]
    assert len(ledger.quarantine.rows(None, JANUARY.month)) == 2


@pytest.mark.parametrize(
    "broken",
    [
        {"rejected": rejected(REJECTED, (0, START, None, "{}"))},
        {
            "gaps": [
                GAP,
                replace(GAP, window=Window(START + MINUTE, START + 2 * MINUTE), reason=None),
            ]
        },
        {"state": replace(STATE, rows=None)},
        {"answers": [5]},
        {"account": object()},
    ],
    ids=[
        "a rejected row without a reason",
        "a gap without a reason",
        "a state without rows",
        "an answer without a request",
        "no account",
    ],
)
def test_an_ingest_is_written_down_whole_or_not_at_all(ledger: Ledger, broken: dict[str, Any]):
    ledger.partitions.commit(entry())
    before = everything(ledger)
    with pytest.raises((StoreFailed, IndexError, TypeError)):
        ledger.partitions.commit(
            entry(**{"fetches": [FETCH, FETCH], "gaps": [], "state": STATE, **broken})
        )
    assert everything(ledger) == before
    ledger.partitions.commit(entry(gaps=[]))
    assert ledger.gaps.of(TABLE, JANUARY) == []


def test_a_failure_keeps_what_is_stored(ledger: Ledger):
    """Attempts and failures count up, the error is named; state, gaps and quarantine stay as they
    were.
    """
    ledger.partitions.commit(entry())
    before = everything(ledger)
    refused = FETCH._replace(outcome="retry", status=502, rows=None, error="HTTP 502")
    for _ in range(2):
        ledger.partitions.record_failure(
            IngestFailure(TABLE, JANUARY, JANUARY.month, "the venue is down", [refused], NOW)
        )
    after = everything(ledger)
    assert after[0] == replace(STATE, attempts=3, failures=2, error="the venue is down")
    assert after[1:4] == before[1:4]
    assert after[4] == [("retry", "HTTP 502", 2), ("answered", "", 1)]
    ledger.partitions.commit(entry())
    assert ledger.partitions.get(TABLE, JANUARY) == STATE


def test_a_first_ingest_that_fails_has_asked_for_nothing(ledger: Ledger):
    ledger.partitions.record_failure(
        IngestFailure(
            TABLE, JANUARY, Window(START, JANUARY.month.end), "the venue is down", [], NOW
        )
    )
    nothing = replace(STATE, through=START, newest=None, rows=0, bytes=None, digest=None)
    assert ledger.partitions.get(TABLE, JANUARY) == replace(
        nothing, failures=1, error="the venue is down"
    )
    assert ledger.partitions.accounts() == []


def test_rollups_are_remembered_by_the_digest_they_were_made_of(ledger: Ledger):
    ledger.partitions.commit(entry())
    ledger.partitions.commit(entry(partition=FEBRUARY))
    ledger.partitions.set_rollup_source(TABLE, JANUARY, "d1")
    assert [ledger.partitions.get(TABLE, p).rollup_source_digest for p in (JANUARY, FEBRUARY)] == [
        "d1",
        None,
    ]
    ledger.partitions.clear_rollup_sources()
    assert ledger.partitions.get(TABLE, JANUARY) == STATE


def test_a_market_is_listed_where_it_was_told(ledger: Ledger, another: Open):
    assert ledger.markets.first_bar(BTC) is None
    ledger.markets.set_first_bar(BTC, at("2017-08-17T04:00"), "told twice")
    assert another().markets.first_bar(BTC) == at("2017-08-17T04:00")
    assert ledger.markets.first_bar(Market("kraken", "BTC/USDT")) is None


@pytest.mark.parametrize(
    ("reason", "answers", "cause", "settled"),
    [
        ("no_bars", 1, "", True),
        ("quarantined", PROMPT_ATTEMPTS - 1, "", False),
        ("quarantined", PROMPT_ATTEMPTS, "", True),
        ("unanswered", PROMPT_ATTEMPTS - 1, "", False),
        ("unanswered", PROMPT_ATTEMPTS, "", True),
        ("unanswered", 1, "delisted", True),
    ],
)
def test_a_gap_is_settled_by_evidence_or_by_asking_often_enough(
    reason: str, answers: int, cause: str, settled: bool
):
    known = GapCause(cause) if cause else None
    gap = replace(GAP, reason=GapReason(reason), answers=answers, cause=known)
    assert gap.is_settled is settled
    assert gap.is_due(NOW) is not settled  # as long as no time is set
    assert replace(gap, next_request=NOW).is_due(NOW)
    assert not replace(gap, next_request=NOW + timedelta(seconds=1)).is_due(NOW)
    # written while our clock was wrong by a year
    assert replace(gap, next_request=NOW + timedelta(days=365)).is_due(NOW)


def test_requests_become_rows_of_the_fetch_log():
    requests = [
        Request("bars", T0, 0.5, "wait", 429, None, "slow down"),
        Request("bars", T0 + 1, 0.1, "answered", 200, 7),
    ]
    assert to_log(requests, JANUARY.month) == [
        LoggedFetch(JANUARY.month, T0, 0.5, "wait", 429, None, "slow down"),
        LoggedFetch(JANUARY.month, T0 + 1, 0.1, "answered", 200, 7, None),
    ]


@pytest.mark.parametrize(
    ("parts", "balanced"),
    [((4320, 4315, 4, 1), True), ((4320, 4315, 4, 0), False), ((0, 0, 0, 0), True)],
)
def test_an_account_sums(parts: tuple[int, int, int, int], balanced: bool):
    assert RowAccount(*parts).is_balanced is balanced


# --------------------------------------------------------------------------------- quarantine
def test_a_rejected_row_keeps_its_fields_and_where_it_came_from(ledger: Ledger):
    ledger.partitions.commit(entry(fetches=[FETCH, FETCH], answers=[1]))
    (found,) = ledger.quarantine.rows(BTC, JANUARY.month)
    assert found == {
        "id": found["id"],
        "table": "raw/ohlcv_1m",
        "market": "binance:BTC-USDT",
        "month": "2024-01-01",
        "open_time": "2024-01-01T00:07:00Z",
        "reasons": "off_grid unclosed",
        "fields": {"open_time": "1704067200000", "close": "1.50"},
        "source": "binance",
        "fetch_id": 2,
        "seen": 1,
        "first_seen": "2024-02-01T12:00:00Z",
        "last_seen": "2024-02-01T12:00:00Z",
        "replayed_at": None,
    }


@pytest.mark.parametrize(
    "open_time", [START + 7 * MINUTE, None], ids=["with a time", "without a time"]
)
def test_the_same_row_is_kept_once_and_counted(ledger: Ledger, open_time: Any):
    same = (0, open_time, "null", '{"close":null}')
    ledger.partitions.commit(entry(rejected=rejected(same, same)))
    ledger.partitions.commit(entry(rejected=rejected(same), now=NOW + timedelta(days=1)))
    (found,) = ledger.quarantine.rows(BTC, JANUARY.month)
    assert (found["seen"], found["fetch_id"]) == (3, 2)
    assert (found["first_seen"], found["last_seen"]) == (
        "2024-02-01T12:00:00Z",
        "2024-02-02T12:00:00Z",
    )


def test_rows_that_differ_in_anything_are_kept_each(ledger: Ledger):
    rows = [
        (0, START, "null", '{"a":"1"}'),
        (0, START, "null", '{"a":"2"}'),
        (0, START, "unclosed", '{"a":"1"}'),
    ]
    ledger.partitions.commit(
        entry(
            rejected=rejected(
                *rows, (0, START + MINUTE, "null", '{"a":"1"}'), (0, None, "null", '{"a":"1"}')
            )
        )
    )
    ledger.partitions.commit(
        entry(partition=Partition(ETH, JANUARY.month), rejected=rejected(rows[0]))
    )
    assert [r["seen"] for r in ledger.quarantine.rows(None, JANUARY.month)] == [1] * 6


def test_quarantine_is_read_by_market_and_window(ledger: Ledger):
    """Half-open, by moments and not by text: the fraction of a second counts."""
    half = timedelta(milliseconds=500)
    times = [START, START + half, START + MINUTE - half, START + MINUTE, START + MINUTE + half]
    ledger.partitions.commit(
        entry(
            rejected=rejected(
                *((0, moment, "off_grid", json.dumps({"n": i})) for i, moment in enumerate(times))
            )
        )
    )
    ledger.partitions.commit(entry(partition=Partition(ETH, JANUARY.month)))

    def found(start: Any, end: Any, **options: Any) -> list[int]:
        return [
            r["fields"]["n"] for r in ledger.quarantine.rows(BTC, Window(start, end), **options)
        ]

    assert found(START, START + MINUTE) == [0, 1, 2]
    assert found(START + half, START + MINUTE + half) == [1, 2, 3]
    assert found(START, START + 2 * MINUTE, limit=2) == [0, 1]
    everybodys = ledger.quarantine.rows(None, Window(START, START + 8 * MINUTE))
    assert [r["market"] for r in everybodys] == [BTC.key] * 5 + [ETH.key]


# --------------------------------------------------------------------------------- a store that ref
@pytest.fixture
def blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """A ledger whose file another program holds, and whose patience is over at once."""
    monkeypatch.setattr("marketdata_assets.ledger.sqlite.TIMEOUT", 0.0)
    impatient = Ledger(tmp_path / "state")
    with sqlite3.connect(tmp_path / "state/ledger.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        yield impatient
        other.execute("ROLLBACK")
    other.close()


@pytest.mark.parametrize(
    "act",
    [
        lambda ledger: ledger.partitions.commit(entry()),
        lambda ledger: ledger.venues.reserve("binance", T0, 60),
        lambda ledger: ledger.venues.pause("binance", T0),
        lambda ledger: ledger.partitions.record_failure(
            IngestFailure(TABLE, JANUARY, JANUARY.month, "x", [], NOW)
        ),
    ],
)
def test_a_file_that_somebody_holds_is_told(blocked: Ledger, act: Callable[[Ledger], Any]):
    with pytest.raises(
        StoreFailed,
        match=r"ledger\.db cannot be written \(database is locked\); "
        r"mend the folder or set another `state:`",
    ):
        act(blocked)


def test_places_that_cannot_be_are_told(tmp_path: Path):
    """As root no permission bites: below a regular file, in a folder's place, over text."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder/ledger.db").mkdir(parents=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/ledger.db").write_text("hello\n" * 1000)
    for name in ("file/state", "folder", "text"):
        with pytest.raises(
            StoreFailed, match=r"ledger\.db cannot be .*; mend the folder or set another `state:`"
        ) as caught:
            Ledger(tmp_path / name)
        assert caught.value.exit_code == 3


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path):
    ledger = Ledger(tmp_path / "state")
    shutil.rmtree(tmp_path / "state/locks")
    with pytest.raises(StoreFailed, match="cannot be locked"), ledger.lock(JANUARY.key):
        pass
