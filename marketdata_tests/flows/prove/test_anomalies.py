"""Anomalies: planted ones are found, real bars pass, and an entry keeps its state until mended."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner, Result

from marketdata_assets.cli.main import app
from marketdata_assets.context import open_context
from marketdata_assets.defs.jobs import build_definitions
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.ingest import Ingester
from marketdata_assets.flows.prove.anomalies import set_anomaly_state
from marketdata_assets.flows.prove.raw_checks import RawAuditor
from marketdata_assets.ledger.anomalies import GONE
from marketdata_assets.model.anomaly import Anomaly, AnomalySeverity, AnomalyState
from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES, PRICES
from marketdata_assets.model.finding import Finding
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, month_of
from marketdata_assets.quality.anomalies import CONTEXT, REACH, find_anomalies
from marketdata_assets.quality.anomaly_rules import RULES
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.listings import LISTINGS
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_tests.conftest import IMPATIENT, Universe, needs_shared
from marketdata_tests.samples import BTC, ETH, MINUTE, dump, real_bars
from marketdata_tests.steps import at, ms, partitions, raw_file, window

TF = TIMEFRAMES["1m"]
EVER = window("1970-01-01", "2100-01-01")
DAYS = window("2024-01-01", "2024-01-05")
SPOT = 2000
"""The row at which errors are planted, in the middle of quiet bars."""

Rows = list[dict[str, Any]]


def found(bars: pl.DataFrame, judged: Window = EVER) -> list[tuple[str, datetime, datetime, int]]:
    return [(one.kind, one.start, one.end, one.bars) for one in find_anomalies(bars, TF, judged)]


def planted(
    bars: pl.DataFrame, change: Callable[[Rows], None], first: int = SPOT, count: int = 40
) -> pl.DataFrame:
    """The bars after `change` has worked on some of them as Python values."""
    rows = bars[first : first + count].to_dicts()
    change(rows)
    return pl.concat([bars[:first], pl.DataFrame(rows, schema=BAR_SCHEMA), bars[first + count :]])


def scale(row: dict[str, Any], factor: str, *names: str) -> None:
    """Prices times a factor, high and low around them."""
    row |= {name: (row[name] * Decimal(factor)).quantize(Decimal("1e-12")) for name in names}
    row |= {"high": max(row[name] for name in PRICES), "low": min(row[name] for name in PRICES)}


def all_prices(factor: str, bars: int = 1) -> Callable[[Rows], None]:
    return lambda rows: [scale(row, factor, *PRICES) for row in rows[:bars]] and None


def one_price(name: str, factor: str) -> Callable[[Rows], None]:
    return lambda rows: scale(rows[0], factor, name)


def swap(rows: Rows) -> None:
    """A body of 0.4 %, the bar beside it moved along; then open and close change places."""
    for row in rows[1:]:
        scale(row, "1.004", *PRICES)
    rows[0] |= {"close": rows[1]["open"]}
    scale(rows[0], "1", "close")
    rows[0] |= {"open": rows[0]["close"], "close": rows[0]["open"]}


def freeze(bars: int, *names: str) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for row in rows[1:bars]:
            row |= {name: rows[0][name] for name in names}

    return change


def times(factor: int, *names: str) -> Callable[[Rows], None]:
    return lambda rows: rows[0].update({name: rows[0][name] * factor for name in names})


VOLUMES = ("volume", "quote_volume", "taker_buy_volume", "taker_buy_quote_volume")
ERRORS: dict[str, tuple[Callable[[Rows], None], str, int, AnomalySeverity]] = {
    "all prices up 1 %": (all_prices("1.01"), "spike", 1, AnomalySeverity.MEDIUM),
    "all prices down 3 %": (all_prices("0.97"), "spike", 1, AnomalySeverity.HIGH),
    "all prices ten times": (all_prices("10"), "spike", 1, AnomalySeverity.CRITICAL),
    "decimal point moved": (all_prices("0.01"), "spike", 1, AnomalySeverity.CRITICAL),
    "five bars up 3 %": (all_prices("1.03", 5), "spike", 5, AnomalySeverity.HIGH),
    "close up 1 %": (one_price("close", "1.01"), "spike", 1, AnomalySeverity.MEDIUM),
    "close of another market": (one_price("close", "0.07"), "spike", 1, AnomalySeverity.CRITICAL),
    "open down 3 %": (one_price("open", "0.97"), "spike", 1, AnomalySeverity.HIGH),
    "open and close swapped": (swap, "swapped", 1, AnomalySeverity.LOW),
    "high up 3 %": (one_price("high", "1.03"), "wick", 1, AnomalySeverity.HIGH),
    "low down 10 %": (one_price("low", "0.9"), "wick", 1, AnomalySeverity.HIGH),
    "prices stand for 12 bars": (freeze(12, *PRICES), "frozen", 12, AnomalySeverity.MEDIUM),
    "five equal bars": (freeze(5, *COLUMN_NAMES[1:]), "frozen", 5, AnomalySeverity.MEDIUM),
    "a thousand times the volume": (times(1000, *VOLUMES), "volume", 1, AnomalySeverity.MEDIUM),
    "many times the volume and the trades": (
        times(10_000, *VOLUMES, "trades"),
        "volume",
        1,
        AnomalySeverity.MEDIUM,
    ),
    "prices moved without volume": (
        times(0, *VOLUMES, "trades"),
        "untraded",
        1,
        AnomalySeverity.MEDIUM,
    ),
    "volume without trades": (times(0, "trades"), "untraded", 1, AnomalySeverity.MEDIUM),
}


def judge_error(name: str, bars: pl.DataFrame, first: int) -> None:
    change, kind, count, severity = ERRORS[name]
    anomalies = find_anomalies(planted(bars, change, first), TF, EVER)
    (one,) = [a for a in anomalies if a.kind == kind]
    begins, ends = bars["open_time"][first], bars["open_time"][first + count - 1] + MINUTE
    assert (one.start, one.end, one.bars) == (begins, ends, count)
    assert one.severity == severity or kind == "volume"
    assert float(one.evidence["size"]) >= float(one.evidence["limit"])
    # nothing else, but a jump out of prices that stood, or a second look at the same bar
    assert all(a.kind in (kind, "jump") or a.start == begins for a in anomalies)


@pytest.mark.parametrize("name", ERRORS)
def test_planted_in_bars_of_the_sandbox(name: str) -> None:
    bars = generate_bars("BTCUSDT", "1m", DAYS)
    assert found(bars) == []
    judge_error(name, bars, SPOT)


@needs_shared
@pytest.mark.parametrize("name", ERRORS)
def test_planted_in_real_bars(name: str) -> None:
    """A quiet Sunday of Binance, and a minute in which the market ran after Silvergate and SVB."""
    bars = real_bars("ETHUSDT", "1m", "2023-02-01_2023-04-30")
    calm = bars.filter(pl.col("open_time").is_between(at("2023-02-11"), at("2023-02-14")))
    judge_error(name, calm, SPOT)


def test_every_rule_has_an_error_and_every_error_a_rule() -> None:
    assert {kind for _, kind, *_ in ERRORS.values()} | {"jump", "move"} == set(RULES)


def test_prices_that_leave_and_stay_are_a_jump() -> None:
    bars = generate_bars("BTCUSDT", "1m", DAYS)
    gone = planted(bars, all_prices("1.03", 10**6), SPOT, 1000)
    opens = bars["open_time"]
    expected = [("jump", opens[i - 1], opens[i] + MINUTE, 2) for i in (SPOT, SPOT + 1000)]
    assert found(gone) == expected
    assert {one.severity for one in find_anomalies(gone, TF, EVER)} == {AnomalySeverity.HIGH}


def test_a_move_over_the_limit_is_told_whatever_the_market_does() -> None:
    """A crash of 15 % within a minute, from which the next bars go on: no gap, no wick, and still a
    word.
    """

    def crash(rows: Rows) -> None:
        for row in rows[1:]:
            scale(row, "0.85", *PRICES)
        rows[0]["close"] = rows[1]["open"]
        scale(rows[0], "1", "close")

    bars = generate_bars("BTCUSDT", "1m", DAYS)
    crashed = planted(bars, crash, SPOT, bars.height - SPOT)
    start = bars["open_time"][SPOT]
    assert found(crashed) == [("move", start, start + MINUTE, 1)]


def test_the_newest_bar_waits_for_the_next_and_few_bars_for_more() -> None:
    bars = generate_bars("BTCUSDT", "1m", DAYS)
    spiked = planted(bars, all_prices("1.03"))
    assert found(spiked[: SPOT + 1]) == []
    start = bars["open_time"][SPOT]
    assert found(spiked[: SPOT + 2]) == [("spike", start, start + MINUTE, 1)]
    for few in (0, 1, 2, 5):
        assert found(spiked[SPOT - 1 : SPOT - 1 + few]) == []


def test_many_of_one_kind_are_one_entry() -> None:
    """Two markets in one file, bar by bar, so that gaps are usual: one entry, not a thousand."""

    def mix(rows: Rows) -> None:
        for row in rows[::2]:
            scale(row, "0.07", *PRICES)

    bars = generate_bars("BTCUSDT", "1m", DAYS)
    (one,) = find_anomalies(planted(bars, mix, SPOT, 1000), TF, EVER)
    assert (one.kind, one.severity, one.start, one.bars) == (
        "move",
        AnomalySeverity.CRITICAL,
        bars["open_time"][SPOT],
        1000,
    )


# --------------------------------------------------------------------------------- what is real
@pytest.mark.parametrize("symbol", LISTINGS)
def test_the_sandbox_stays_quiet(symbol: str) -> None:
    """Coarse ticks, quiet stretches, holes and a halt."""
    assert found(generate_bars(symbol, "1m", window("2024-01-01", "2024-02-01"))) == []


def other_venue(venue: str, symbol: str) -> pl.DataFrame:
    """Three weeks of March 2023 of a venue that gives fewer columns."""
    rows = dump(venue, symbol, "1m", "2023-03-01_2023-03-21")
    rows = rows.rename({"count": "trades"} if "count" in rows.columns else {})
    given = [
        pl.col(n).cast(pl.String).cast(BAR_SCHEMA[n])
        if n in rows.columns
        else pl.lit(None, BAR_SCHEMA[n]).alias(n)
        for n in COLUMN_NAMES[1:]
    ]
    opens = (
        pl.from_epoch("time", time_unit="s")
        .dt.replace_time_zone("UTC")
        .cast(BAR_SCHEMA["open_time"])
        .alias("open_time")
    )
    return rows.select(opens, *given)


@needs_shared
@pytest.mark.parametrize("symbol", ["BTCUSDT", "ETHUSDT"])
def test_real_march_2023_stays_quiet(symbol: str) -> None:
    """SVB, USDC off its peg, and the halt of the 24th with its 72 bars without volume: 44,560 bars,
    not one word.
    """
    bars = real_bars(symbol, "1m", "2023-02-01_2023-04-30")
    march = month_of(at("2023-03-01"))
    month = bars.filter(pl.col("open_time").is_between(march.start, march.end, closed="left"))
    assert month.height == 44_640 - 80
    assert found(bars, march) == found(month) == []


@needs_shared
@pytest.mark.parametrize(
    ("venue", "symbol"),
    [("coinbase_exchange", "BTC-USD"), ("coinbase_exchange", "BTC-USDT"), ("kraken", "XBTUSD")],
)
def test_thinner_venues_stay_quiet(venue: str, symbol: str) -> None:
    bars = other_venue(venue, symbol)
    assert bars.height > 20_000
    assert found(bars) == []


@needs_shared
def test_months_together_or_one_by_one_say_the_same() -> None:
    """Errors lie around the end of February.

    With the adjacent bars of each month, both months find what the whole file finds.
    """
    bars = real_bars("BTCUSDT", "1m", "2023-02-01_2023-04-30").filter(
        pl.col("open_time") < at("2023-04-01")
    )
    border = bars["open_time"].search_sorted(at("2023-03-01"))
    places = [border - 300, border - 61, border - 1, border, border + 17, border + 200]
    for place in places:
        bars = planted(bars, all_prices("1.02"), place, 1)
    expected = [
        (bars["open_time"][place], 1) for place in places if place not in (border - 1, border)
    ]
    expected.insert(2, (bars["open_time"][border - 1], 2))
    whole = [(start, count) for _, start, _, count in found(bars)]
    assert whole == expected
    each: list[tuple[datetime, int]] = []
    for month in (month_of(at("2023-02-01")), month_of(at("2023-03-01"))):
        context = CONTEXT * MINUTE
        near = bars.filter(
            pl.col("open_time").is_between(
                month.start - context, month.end + context, closed="left"
            )
        )
        each += [(start, count) for _, start, _, count in found(near, month)]
        after = [
            (start, count)
            for _, start, _, count in found(near, Window(month.start - REACH * MINUTE, month.end))
        ]
        assert after == [
            (start, count)
            for start, count in whole
            if month.start - REACH * MINUTE <= start < month.end
        ]
    assert each == whole


# --------------------------------------------------------------------------------- the entries
RAW = raw_table(TF)
JANUARY = window("2024-01-01", "2024-02-01")
NOON, LATER = at("2024-01-05T12:00"), at("2024-01-06")


def anomaly(kind: str = "spike", start: datetime = NOON, **changes: Any) -> Anomaly:
    one = Anomaly(
        kind,
        AnomalySeverity.HIGH,
        start,
        start + MINUTE,
        1,
        {"says": "100 before, 110 in it", "size": "0.1", "limit": "0.0025"},
    )
    return one._replace(**changes)


@pytest.mark.usefixtures("either_database")
def test_entries_keep_their_state(universe: Universe) -> None:
    settings = universe("http://127.0.0.1:1")
    with open_context(settings) as context:
        store = context.ledger.anomalies

        def settle(
            *found: Anomaly, now: datetime = LATER
        ) -> dict[str, tuple[AnomalyState, str | None]]:
            entries = store.settle(RAW, BTC, JANUARY, found=found, now=now)
            assert entries == [
                e for e in store.find(JANUARY, BTC, RAW) if e.anomaly.start >= JANUARY.start
            ]
            return {e.anomaly.kind: (e.state, e.note) for e in entries}

        spike, wick, frozen = (
            anomaly(),
            anomaly("wick"),
            anomaly("frozen", bars=12, end=NOON + 12 * MINUTE),
        )
        assert settle(spike, wick, frozen) == dict.fromkeys(
            ("spike", "wick", "frozen"), (AnomalyState.OPEN, None)
        )
        ids = {entry.anomaly.kind: entry.id for entry in store.find(EVER)}
        assert store.find(EVER, ETH) == store.find(EVER, table=raw_table(TIMEFRAMES["1h"])) == []
        assert [entry.anomaly for entry in store.find(EVER)] == [frozen, spike, wick]

        store.mark(ids["wick"], AnomalyState.ACKNOWLEDGED, note="a real crash", now=LATER)
        assert settle(spike, wick, frozen)["wick"] == (AnomalyState.ACKNOWLEDGED, "a real crash")
        # the run goes on, the spike's bar is mended, and what a person said stays
        longer = frozen._replace(bars=30, end=NOON + 30 * MINUTE, severity=AnomalySeverity.CRITICAL)
        mended = {
            "spike": (AnomalyState.RESOLVED, GONE),
            "wick": (AnomalyState.ACKNOWLEDGED, "a real crash"),
            "frozen": (AnomalyState.OPEN, None),
        }
        assert settle(longer) == mended
        assert next(e.anomaly for e in store.find(EVER) if e.id == ids["frozen"]) == longer
        assert settle(longer, now=at("2024-01-07")) == mended
        assert {entry.changed_at for entry in store.find(EVER)} == {LATER}
        # it comes back, and a person's `resolved` is not taken back by the next run
        assert settle(spike, longer)["spike"] == (AnomalyState.OPEN, None)
        store.mark(ids["spike"], AnomalyState.RESOLVED, note=None, now=LATER)
        assert settle(spike, longer)["spike"] == (AnomalyState.RESOLVED, None)
        assert {entry.anomaly.kind: entry.id for entry in store.find(EVER)} == ids

        # another market, another window
        store.settle(RAW, ETH, JANUARY, found=[spike], now=LATER)
        assert settle(spike, longer)["spike"] == (AnomalyState.RESOLVED, None)
        assert store.settle(RAW, BTC, window("2024-02-01", "2024-03-01"), found=[], now=LATER) == []
        assert [entry.state for entry in store.find(EVER, ETH)] == [AnomalyState.OPEN]


def test_an_unknown_number_is_bad_input(universe: Universe) -> None:
    with (
        open_context(universe("http://127.0.0.1:1")) as context,
        pytest.raises(BadInput, match="no anomaly 7"),
    ):
        set_anomaly_state(
            context.settings, context.ledger, 7, state=AnomalyState.RESOLVED, note=None
        )


# --------------------------------------------------------------------------------- from the venue t
def test_base_bars_have_the_check_and_references_not(universe: Universe) -> None:
    graph = (
        build_definitions(universe("http://127.0.0.1:1", extra="reference: [1h]"))
        .get_repository_def()
        .asset_graph
    )
    assert [
        key.asset_key.to_user_string() for key in graph.asset_check_keys if key.name == "anomalies"
    ] == ["raw/ohlcv_1m"]


def check(settings: Settings) -> list[Finding]:
    """Ingest and audit all partitions; the finding of each, in order."""
    findings: list[Finding] = []
    with open_context(settings, policy=IMPATIENT) as context:
        for done in context.bind(Ingester).ingest(TF, partitions(settings)):
            assert done.error is None
            assert done.account.quarantined == 0
            findings += context.bind(RawAuditor).audit(done)
    return [finding for finding in findings if finding.check == "anomalies"]


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["anomalies", *arguments])


def unboxed(output: str) -> str:
    """Return what the command line prints in a box of several lines as one line."""
    return re.sub(r"[\s│]+", " ", output)


def listed(*arguments: str) -> Any:
    done = command("--format", "json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def red(settings: Settings) -> list[str]:
    with open_context(settings) as context:
        return [
            check.message for check in context.ledger.checks.failed() if check.name == "anomalies"
        ]


def spike(symbol: str, moments: Sequence[str], factor: str = "1.05") -> Callable[..., Any]:
    """The exchange says these minutes' prices too high, always the same."""
    wrong = {ms(moment) for moment in moments}

    async def tamper(request: Any, rows: list[list[Any]]) -> list[list[Any]]:
        if request.query["symbol"] == symbol and request.query["interval"] == "1m":
            for row in rows:
                if row[0] in wrong:
                    row[1:5] = [f"{Decimal(text) * Decimal(factor):.8f}" for text in row[1:5]]
                    row[7], row[10] = (f"{Decimal(row[i]) * Decimal(factor):.8f}" for i in (7, 10))
        return rows

    return tamper


@pytest.mark.parametrize(
    ("volume", "trades", "severity"),
    [
        (1, 1, AnomalySeverity.HIGH),
        (400, 400, AnomalySeverity.MEDIUM),
        (400, 1, AnomalySeverity.HIGH),
        (1, 400, AnomalySeverity.HIGH),
    ],
)
def test_a_move_that_was_really_traded_is_a_warning(
    volume: int, trades: int, severity: AnomalySeverity
) -> None:
    """A flash crash of 10 % in a minute that comes back: volume and trades have to rise with it."""

    def flash(rows: Rows) -> None:
        scale(rows[0], "0.88", "low")
        scale(rows[0], str(volume), *VOLUMES)
        rows[0]["trades"] *= trades

    bars = generate_bars("BTCUSDT", "1m", DAYS)
    found = find_anomalies(planted(bars, flash, SPOT), TF, EVER)
    assert [one.severity for one in found if one.kind != "volume"] == [severity]


def test_the_first_bars_of_a_listing_are_no_anomaly() -> None:
    """A new market looks for its price: 0.5 to 1.6 in its first minutes."""
    bars = generate_bars("BTCUSDT", "1m", DAYS)
    wild = bars
    for row in (0, 5, 20):
        wild = planted(wild, all_prices("1.6"), row)
        wild = planted(wild, one_price("low", "0.5"), row + 2)
    late = planted(wild, all_prices("1.6"), SPOT)
    listed = bars["open_time"][0]
    assert find_anomalies(wild, TF, EVER) != []
    assert find_anomalies(wild, TF, EVER, listed=listed) == []
    assert [one.start for one in find_anomalies(late, TF, EVER, listed=listed)] == [
        bars["open_time"][SPOT]
    ]


def test_a_spike_from_the_venue_to_the_person_and_back(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    """The check and the command show a spike with its exact bars.

    It is acknowledged, reopened, and resolved when the venue mends it.
    """
    exchange, url = sandbox
    settings = universe(url, since="2023-12-30", until="2024-01-03", now="2024-01-10T00:00:00Z")
    last, other = "2023-12-31T23:59:00Z", "2024-01-02T10:00:00Z"
    exchange.tamper = spike("BTCUSDT", [last, other])
    december, january = check(settings)
    assert december.passed  # the bar after the last one had not come yet
    assert (january.passed, january.blocking) == (False, False)
    assert january.message == "2 anomalies are open, 2 of them high or critical"
    assert [
        (row["kind"], row["severity"], row["state"], row["start"], row["bars"])
        for row in january.rows
    ] == [
        ("spike", "high", "open", last, 1),
        ("spike", "high", "open", other, 1),
    ]
    assert red(settings) == [january.message]
    assert all(
        not finding.passed for finding in check(settings)
    )  # now December knows of its last bar, too

    assert command().exit_code == 0
    assert command("--open").exit_code == 1
    rows = listed()
    assert [(row["market"], row["start"]) for row in rows] == [
        ("binance:BTC-USDT", last),
        ("binance:BTC-USDT", other),
    ]
    (bar,) = rows[1]["bars"]
    true = generate_bars("BTCUSDT", "1m", Window(at(other), at(other) + MINUTE)).row(0, named=True)
    assert bar["open"] == f"{(true['open'] * Decimal('1.05')).normalize():f}"
    assert bar["trades"] == true["trades"]
    assert listed("--start", "2024-01-02") == rows[1:]
    assert (
        listed("--severity", "low", "--severity", "critical")
        == listed("--market", "binance:BTC-USDT", "--state", "resolved")
        == []
    )
    assert "spike" in command().output

    first, second = (str(row["id"]) for row in rows)
    assert command("--acknowledge", second, "--note", "it is real").exit_code == 0
    assert [(row["state"], row["note"]) for row in listed("--state", "all")] == [
        ("open", None),
        ("acknowledged", "it is real"),
    ]
    assert command("--resolve", first).exit_code == 0
    assert red(settings) == []
    assert [finding.numbers for finding in check(settings)] == [
        {"open": 0, "acknowledged": 0, "resolved": 1, "alarming": 0},
        {"open": 0, "acknowledged": 1, "resolved": 1, "alarming": 0},
    ]
    assert command("--reopen", first).exit_code == 0
    assert command("--reopen", second).exit_code == 0
    assert len(red(settings)) == 2

    exchange.tamper = None
    for month in ("2023-12", "2024-01"):
        raw_file(settings, month).unlink()
    assert all(finding.passed for finding in check(settings))
    assert [(row["state"], row["note"]) for row in listed("--state", "all")] == [
        ("resolved", GONE)
    ] * 2
    assert listed("--state", "all")[1]["bars"][0]["open"] == f"{true['open'].normalize():f}"
    assert red(settings) == []


@needs_shared
def test_a_spike_that_no_row_rule_can_see(replay: Callable[..., Any], universe: Universe) -> None:
    """Coinbase gives no quote volume, so that ten times the price is no contradiction.

    The real bars around it are quiet.
    """
    exchange = replay("2023-03-04T00:00:30Z")
    exchange.admin(fault="spike", count=1, match="candles", params={"factor": 10, "n": 1})
    settings = universe(
        f"{exchange.url}/coinbase",
        "[BTC/USD]",
        since="2023-03-03",
        until="2023-03-04",
        now="2023-03-05",
        venue="coinbaseexchange",
    )
    (finding,) = check(settings)
    assert not finding.passed
    (row,) = listed()
    assert (row["kind"], row["severity"], row["bars_found"]) == ("spike", "critical", 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--acknowledge", "7"], "there is no anomaly 7"),
        (["--resolve", "1", "--reopen", "1"], "at a time"),
        (["--note", "x"], "--note belongs to"),
        (["--state", "closed"], "not one of 'open', 'acknowledged', 'resolved', 'all'"),
        (["--severity", "huge"], "not one of low, medium, high, critical"),
        (["--market", "binance:NO-PE"], "not in"),
        (["--format", "xml"], "'table', 'json'"),
    ],
)
def test_bad_words(universe: Universe, arguments: list[str], words: str) -> None:
    universe("http://127.0.0.1:1", now="2024-01-10")
    done = command(*arguments)
    assert getattr(done.exception, "exit_code", done.exit_code) == BadInput.exit_code
    assert words in f"{done.exception} {unboxed(done.output)}"
