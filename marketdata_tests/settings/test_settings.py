"""The universe: every key is read, and every mistake is one line that names the file, the line and
the fix.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import time
import traceback
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.fields import ccxt_venues
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.parts import Automation
from marketdata_assets.settings.universe import Settings, Universe
from marketdata_tests.samples import BTC, at

CANARY = "CANARY7e57"
SMALL = "venues: {binance: {symbols: [BTC/USDT], since: 2024-01-01}}"
FULL = """\
venues:
  binance:
    symbols: [BTC/USDT, ETH/USDT]
    since: 2024-01-01
    until: 2024-03-01
    base: 5m
    reference: [1d, 1h]
    base_url: http://127.0.0.1:18080/binance/
    ws_url: ws://127.0.0.1:18080/ws
    requests_per_minute: 3000
  kraken:
    symbols:
      - BTC/USD
      - BTC/USD:USD
    since: 2023-02-01T12:00:00Z
timeframes: [1w, 1h, 15m, 5m]
lake: s3://bucket/prefix/
rollups: parquet
duckdb: {folder}/market.duckdb
state: {folder}/state
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """`load(text, LAKE=..., NOW=...)`: settings from such a file and such MARKETDATA_ variables,
    and nothing else.
    """

    def loader(text: str | None, **variables: str) -> Settings:
        file = tmp_path / "universe.yaml"
        if text is not None:
            file.write_text(text, encoding="utf-8")
        return load_settings(
            {
                "MARKETDATA_UNIVERSE": str(file),
                **{f"MARKETDATA_{k}": v for k, v in variables.items()},
            }
        )

    return loader


# --------------------------------------------------------------------------------- what is read
def test_every_key_is_read(load: Any, tmp_path: Path):
    settings = load(FULL.replace("{folder}", str(tmp_path)), NOW="2024-06-01T12:00:00Z")
    binance, kraken = settings.venues.values()
    assert (binance.name, binance.symbols) == ("binance", ("BTC/USDT", "ETH/USDT"))
    assert (binance.since, binance.until) == (at("2024-01-01"), at("2024-03-01"))
    assert [tf.name for tf in binance.fetched_timeframes] == ["5m", "1h", "1d"]
    assert (binance.base_url, binance.ws_url) == (
        "http://127.0.0.1:18080/binance",
        "ws://127.0.0.1:18080/ws",
    )
    assert binance.requests_per_minute == 3000
    assert (kraken.symbols, kraken.since, kraken.until) == (
        ("BTC/USD", "BTC/USD:USD"),
        at("2023-02-01T12:00"),
        None,
    )
    assert (kraken.base.name, kraken.reference, kraken.base_url, kraken.requests_per_minute) == (
        "1m",
        (),
        None,
        None,
    )
    assert [tf.name for tf in settings.timeframes] == ["5m", "15m", "1h", "1w"]
    assert (settings.lake, settings.rollups) == ("s3://bucket/prefix", "parquet")
    assert (settings.duckdb, settings.state) == (tmp_path / "market.duckdb", tmp_path / "state")
    assert settings.now() == at("2024-06-01T12:00")


def test_what_is_not_written_has_the_documented_default(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    settings = load(SMALL)
    assert [tf.name for tf in settings.timeframes] == [
        "1m",
        "5m",
        "15m",
        "30m",
        "1h",
        "4h",
        "12h",
        "1d",
        "1w",
    ]
    assert settings.lake == str(tmp_path / "data/lake")
    assert (settings.rollups, settings.duckdb, settings.state) == (
        "duckdb",
        tmp_path / "data/market.duckdb",
        tmp_path / "data/state",
    )
    assert settings.clock is None


def test_the_default_file_lies_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/universe.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    assert [m.key for m in load_settings({}).markets] == ["binance:BTC-USDT"]


@pytest.mark.parametrize(
    ("variable", "text", "attribute", "value"),
    [
        ("LAKE", "s3://other/place", "lake", "s3://other/place"),
        ("LAKE", "/tmp/a b/lake", "lake", "/tmp/a b/lake"),
        ("ROLLUPS", "parquet", "rollups", "parquet"),
        ("DUCKDB", "/tmp/other.duckdb", "duckdb", Path("/tmp/other.duckdb")),
        ("STATE", "/tmp/state", "state", Path("/tmp/state")),
        ("TIMEFRAMES", "[1d, 5m]", "timeframes", (TIMEFRAMES["5m"], TIMEFRAMES["1d"])),
        ("LAKE", "", "lake", "/file/lake"),
    ],
)
def test_a_variable_wins_over_the_file(
    load: Any, variable: str, text: str, attribute: str, value: Any
):
    assert (
        getattr(
            load(SMALL + "\nlake: /file/lake\nrollups: duckdb\n", **{variable: text}), attribute
        )
        == value
    )


def test_automation_and_its_defaults(load: Any):
    assert load(SMALL).automation == Automation(
        refresh_minutes=5, lookback_days=None, runs=4, attempts=3, cooldown_minutes=2
    )
    written = load(
        SMALL
        + "\nautomation: {refresh_minutes: 1, lookback_days: 30, runs: 9}\nretention_days: 3\n"
    )
    assert written.automation == Automation(
        refresh_minutes=1, lookback_days=30, runs=9, attempts=3, cooldown_minutes=2
    )
    assert written.retention_days == 3


def test_what_counts_as_late(load: Any):
    usual = load(SMALL)
    strict = load(SMALL, FRESHNESS="{1m: {warn: 2, error: 5}}")

    def limits(settings: Settings, name: str) -> tuple[timedelta, timedelta]:
        found = settings.limits(TIMEFRAMES[name])
        return found.warn, found.error

    assert limits(usual, "1m") == (timedelta(minutes=10), timedelta(minutes=60))
    assert limits(usual, "30m") == (timedelta(minutes=30), timedelta(minutes=90))
    assert limits(usual, "4h") == (timedelta(hours=4), timedelta(hours=12))
    assert limits(strict, "1m") == (timedelta(minutes=2), timedelta(minutes=5))
    assert limits(strict, "4h") == limits(usual, "4h")


def test_a_clock_that_runs(load: Any):
    begun = datetime.now(UTC)
    clock = load(SMALL, NOW=f"2024-06-01T12:00:00Z x3600 since {begun.isoformat()}").clock
    passed, real = clock.now() - at("2024-06-01T12:00"), datetime.now(UTC) - begun
    assert timedelta(0) < passed <= real * 3600


def test_secrets_are_read_and_shown_nowhere(load: Any):
    database, broker = f"postgresql://user:{CANARY}@host/db", f"redis://:{CANARY}@host:6379/0"
    alerts = f"[slack://{CANARY}, mailto://{CANARY}]"
    settings = load(SMALL, DATABASE=database, BROKER=broker, ALERTS=alerts)
    assert settings.database.get_secret_value() == database
    assert settings.broker.get_secret_value() == broker
    assert [url.get_secret_value() for url in settings.alerts] == [
        f"slack://{CANARY}",
        f"mailto://{CANARY}",
    ]
    shown = (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump()))
    assert [CANARY in text for text in shown] == [False] * 4
    assert json.loads(settings.model_dump_json())["alerts"] == ["**********"] * 2


def test_the_settings_can_be_written_as_json(load: Any, tmp_path: Path):
    settings = load(
        FULL.replace("{folder}", str(tmp_path)),
        FRESHNESS="{1m: {warn: 2, error: 5}}",
        CONSOLIDATE="{BTC/USD: [kraken, bitstamp]}",
        VENUES="{kraken: {symbols: [BTC/USD], since: 2023-01-01}, "
        "bitstamp: {symbols: [BTC/USD], since: 2023-01-01}}",
        COLD="{after_days: 365, storage_class: STANDARD_IA}",
    )
    found = json.loads(settings.model_dump_json())
    assert found["venues"]["kraken"]["since"] == "2023-01-01T00:00:00Z"
    assert found["timeframes"] == ["5m", "15m", "1h", "1w"]
    assert found["freshness"] == {"1m": {"warn": 2, "error": 5}}
    assert found["consolidate"] == {"BTC/USD": ["kraken", "bitstamp"]}
    assert found["cold"]["storage_class"] == "STANDARD_IA"


def test_an_alias_repeats_a_value(load: Any):
    settings = load(
        "venues:\n"
        "  binance: {symbols: &pairs [BTC/USDT, ETH/USDT], since: 2024-01-01}\n"
        "  kraken: {symbols: *pairs, since: 2024-01-01}\n"
    )
    assert [m.key for m in settings.markets] == [
        "binance:BTC-USDT",
        "binance:ETH-USDT",
        "kraken:BTC-USDT",
        "kraken:ETH-USDT",
    ]


def test_nothing_is_wanted_of_a_contract_that_has_ended(load: Any, monkeypatch: pytest.MonkeyPatch):
    settings = load(venue("symbols: ['BTC/USDT:USDT-240329', 'BTC/USDT']", SINCE), NOW="2024-06-01")
    dated, spot = settings.markets
    assert settings.span(dated).end == at("2024-03-30")
    assert settings.span(spot).end == at("2024-06-01")


def test_a_change_is_a_copy_and_its_markets_are_new(load: Any):
    settings = load(SMALL)
    assert settings.markets == (BTC,)
    with pytest.raises(ValidationError, match="frozen"):
        settings.lake = "/elsewhere"
    venues = {
        name: venue.model_copy(update={"entries": ("ETH/USDT",)})
        for name, venue in settings.venues.items()
    }
    changed = settings.model_copy(update={"venues": venues})
    assert [m.key for m in changed.markets] == ["binance:ETH-USDT"]
    assert changed.market("binance:ETH-USDT").symbol == "ETH/USDT"
    assert settings.markets == (BTC,)


def test_venues_come_from_a_variable_too(load: Any):
    settings = load(
        "lake: /file/lake\n", VENUES="{kraken: {symbols: [BTC/USD], since: 2023-01-01}}"
    )
    assert [m.key for m in settings.markets] == ["kraken:BTC-USD"]


def test_the_settings_answer_for_their_markets(load: Any, tmp_path: Path):
    settings = load(FULL.replace("{folder}", str(tmp_path)), NOW="2024-02-10")
    usd = Market("kraken", "BTC/USD")
    assert [m.key for m in settings.markets] == [
        "binance:BTC-USDT",
        "binance:ETH-USDT",
        "kraken:BTC-USD",
        "kraken:BTC-USD_USD",
    ]
    assert settings.market("binance:BTC-USDT") == BTC
    assert settings.span(BTC) == Window(at("2024-01-01"), at("2024-02-10"))
    assert [tf.name for tf in settings.rollup_timeframes_of(BTC)] == [
        "15m",
        "1h",
        "1w",
    ]  # its base is 5m
    assert [tf.name for tf in settings.rollup_timeframes_of(usd)] == ["5m", "15m", "1h", "1w"]
    assert [tf.name for tf in settings.raw_timeframes] == ["1m", "5m", "1h", "1d"]
    assert [tf.name for tf in settings.rollup_timeframes] == ["5m", "15m", "1h", "1w"]
    wanted = Window(at("2023-12-01"), at("2024-01-15"))
    assert [p.key for p in settings.partitions([BTC, usd], wanted)] == [
        "binance:BTC-USDT|2024-01-01",
        "kraken:BTC-USD|2023-12-01",
        "kraken:BTC-USD|2024-01-01",
    ]
    with pytest.raises(
        BadInput,
        match=r"binance:BTC-USD.* is not in .*universe.yaml; did you mean binance:BTC-USDT\?",
    ):
        settings.market("binance:BTC-USD")


def test_the_known_venues_are_ccxts_own():
    spec = importlib.util.find_spec("ccxt")
    assert spec is not None
    tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
    lists = [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "exchanges"
    ]
    assert ccxt_venues() == sorted(ast.literal_eval(lists[0]))


# --------------------------------------------------------------------------------- what is refused
def venue(*lines: str) -> str:
    """A universe of binance with these lines from line 3 on."""
    return "venues:\n  binance:\n" + "".join(f"    {line}\n" for line in lines)


SYMBOLS, SINCE = "symbols: [BTC/USDT]", "since: 2024-01-01"
OK = venue(SYMBOLS, SINCE)
REFUSED: dict[str, tuple[str, int, str]] = {
    "unknown key at the top": (
        OK + "rollup: duckdb\n",
        5,
        "unknown key 'rollup'; did you mean 'rollups'?",
    ),
    "unknown key, nothing near": (
        OK + "zzz: 1\n",
        5,
        "known keys: venues, timeframes, lake, rollups, duckdb, state",
    ),
    "unknown key over several lines": (
        "venuess:\n  binance:\n    since: 2024-01-01\n",
        1,
        "did you mean 'venues'?",
    ),
    "unknown key in a venue": (
        venue(SYMBOLS, "sinze: 2024-01-01"),
        4,
        "unknown key 'sinze'; did you mean 'since'?",
    ),
    "a secret's key": (venue(SYMBOLS, SINCE, "apiKey: x"), 5, "unknown key 'apiKey'"),
    "unknown venue": (
        OK.replace("binance", "binanse"),
        2,
        "unknown venue 'binanse'; did you mean 'binance'?",
    ),
    "hostile venue": (OK.replace("binance", "../../etc"), 2, "unknown venue '../../etc'"),
    "bad date": (
        venue(SYMBOLS, "since: 2024-02-30"),
        4,
        "'2024-02-30' is not a date such as 2024-03-01",
    ),
    "no date": (venue(SYMBOLS, "since: yesterday"), 4, "'yesterday' is not a date"),
    "empty date": (venue(SYMBOLS, "since:"), 4, "one value is expected here"),
    "reversed dates": (
        venue(SYMBOLS, SINCE, "until: 2023-01-01"),
        5,
        "until 2023-01-01T00:00:00Z is not after since 2024-01-01T00:00:00Z; swap",
    ),
    "equal dates": (venue(SYMBOLS, SINCE, "until: 2024-01-01"), 5, "is not after since"),
    "future since": (
        venue(SYMBOLS, "since: 2031-01-01"),
        4,
        "lies in the future (now 2024-06-01T00:00:00Z)",
    ),
    "no since": (venue(SYMBOLS), 2, "`since:` is missing; write it, such as `since: 2024-01-01`"),
    "no symbols": (
        venue(SINCE),
        2,
        "`symbols:` is missing; write it, such as `symbols: [BTC/USDT]`",
    ),
    "empty symbols": (venue("symbols: []", SINCE), 3, "at least one symbol such as BTC/USDT"),
    "symbols as text": (venue("symbols: BTC/USDT", SINCE), 3, "a list such as [a, b]"),
    "bad symbol": (
        venue("symbols:", "  - BTC/USDT", "  - BTCUSDT", SINCE),
        5,
        "'BTCUSDT' is not a unified symbol such as BTC/USDT",
    ),
    "hostile symbol": (venue("symbols: ['../../etc/passwd']", SINCE), 3, "is not a unified symbol"),
    "injected symbol": (
        venue('symbols: ["BTC\'; DROP TABLE x"]', SINCE),
        3,
        "is not a unified symbol",
    ),
    "symbol twice": (
        venue("symbols: [BTC/USDT, ETH/USDT, BTC/USDT]", SINCE),
        3,
        "BTC/USDT is written twice",
    ),
    "key twice": (OK + "lake: a\nlake: b\n", 6, "'lake' is written twice"),
    "key twice in a venue": (venue(SYMBOLS, SINCE, SINCE), 5, "'since' is written twice"),
    "bad base": (venue(SYMBOLS, SINCE, "base: 2m"), 5, "'2m' is not one of 1s, 1m, 3m"),
    "a timeframe that is nearly one": (
        venue(SYMBOLS, SINCE, "base: 15min"),
        5,
        "timeframe '15min' is not one of 1s, 1m, 3m, 5m, 15m, 30m, 1h, 2h, "
        "4h, 6h, 8h, 12h, 1d, 3d, 1w, 1M; "
        "did you mean '15m'?",
    ),
    "base is a list": (venue(SYMBOLS, SINCE, "base: [1m]"), 5, "one value is expected here"),
    "name in a venue": (venue(SYMBOLS, SINCE, "name: x"), 5, "unknown key 'name'"),
    "clock at the top": (OK + "clock: 2024-01-01\n", 5, "unknown key 'clock'"),
    "source at the top": (OK + "source: x\n", 5, "unknown key 'source'"),
    "merge key": (OK + "<<: {lake: x}\n", 5, "unknown key '<<'"),
    "a date and text": (venue(SYMBOLS, "since: 2024-01-01 noon"), 4, "is not a date"),
    "a date in year 0": (venue(SYMBOLS, "since: 0000-01-01"), 4, "is not a date"),
    "a date as a list": (venue(SYMBOLS, "since: [2024-01-01]"), 4, "one value is expected here"),
    "a date as lines": (venue(SYMBOLS, "since: {day: 1}"), 4, "one value is expected here"),
    "symbol is a list": (venue("symbols: [[BTC/USDT]]", SINCE), 3, "one value is expected here"),
    "a rate with a part": (
        venue(SYMBOLS, SINCE, "requests_per_minute: 1.5"),
        5,
        "a whole number of requests per minute, from 1 to 1000000, is expected here",
    ),
    "a rate of 5000 digits": (
        venue(SYMBOLS, SINCE, "requests_per_minute: " + "9" * 4000),
        5,
        "a whole number of requests per minute",
    ),
    "a rate as a list": (
        venue(SYMBOLS, SINCE, "requests_per_minute: [1]"),
        5,
        "a whole number of requests per minute",
    ),
    "a venue as a list": (
        "venues:\n  binance: [BTC/USDT]\n",
        2,
        "`key: value` lines are expected here",
    ),
    "automation as text": (OK + "automation: all\n", 5, "`key: value` lines are expected here"),
    "retention of nothing": (OK + "retention: {raw/ohlcv_1m: 0}\n", 5, "a whole number of days"),
    "retention of a century": (
        OK + "retention: {raw/ohlcv_1m: 1000000000}\n",
        5,
        "a whole number of days, from 1 to 36500, is expected here",
    ),
    "retention of a table that is nearly one": (
        OK + "retention:\n  raw/ohlc_1m: 5\n",
        6,
        "did you mean 'raw/ohlcv_1m'?",
    ),
    "retention as a list": (OK + "retention: [5]\n", 5, "`key: value` lines are expected here"),
    "delta without timeframes": (
        OK + "delta: {location: /x}\n",
        5,
        "`timeframes:` is missing; write it, such as `timeframes: [1m, 1h]`",
    ),
    "delta in the lake": (
        OK + "lake: /lake\ndelta: {location: /lake/delta, timeframes: [1m]}\n",
        6,
        "/lake/delta is the lake or lies in it; give it a place of its own",
    ),
    "a state folder with a question mark": (
        OK + "state: /data/what?/state\n",
        5,
        "/data/what?/state has ? in it, and Dagster makes URLs",
    ),
    "a state folder with percent": (
        OK + "state: /data/a%20b\n",
        5,
        "has % in it",
    ),
    "cold in the lake": (
        OK + "lake: s3://a/b\ncold: {after_days: 31, lake: s3://a/b}\n",
        6,
        "s3://a/b is the lake or lies in it",
    ),
    "cold both ways": (
        OK + "cold: {after_days: 31, lake: s3://a/b, storage_class: STANDARD_IA}\n",
        5,
        "`{after_days: 365, lake: s3://bucket/prefix}` or",
    ),
    "cold in no way": (OK + "cold: {after_days: 31}\n", 5, "storage_class: STANDARD_IA}` is"),
    "cold too soon": (
        OK + "cold: {after_days: 30, lake: s3://a/b}\n",
        5,
        "a whole number of days, from 31 to 36500",
    ),
    "a storage class that is nearly one": (
        OK + "lake: s3://a/b\ncold: {after_days: 31, storage_class: STANDARD_AI}\n",
        6,
        "'STANDARD_AI' is not one of STANDARD, STANDARD_IA, ONEZONE_IA, INTELLIGENT_TIERING, "
        "GLACIER_IR, REDUCED_REDUNDANCY; did you mean 'STANDARD_IA'?",
    ),
    "a storage class without S3": (
        OK + "lake: /lake\ncold: {after_days: 31, storage_class: STANDARD_IA}\n",
        6,
        "storage classes are for a lake in S3; name another `lake:` instead",
    ),
    "a series of one venue": (
        OK + "consolidate: {BTC/USDT: [binance]}\n",
        5,
        "at least two venues are expected here, the preferred one first",
    ),
    "a series of a venue that is nearly one": (
        OK + "consolidate: {BTC/USDT: [binance, binanse]}\n",
        5,
        "'binanse' is not a venue of this universe; it has binance; did you mean 'binance'?",
    ),
    "an alert that is a list": (OK + "alerts: [[x]]\n", 5, "one value is expected here"),
    "an empty alert": (OK + "alerts:\n  - ''\n", 6, "one value is expected here"),
    "a database that is none": (
        OK + "database: mysql://host/db\n",
        5,
        "a URL such as postgresql://user@host:5432/name is expected here",
    ),
    "a broker that is none": (OK + "broker: kafka://host\n", 5, "a URL such as redis://host"),
    "a home that is none": (OK + "state: ~nobody-here/x\n", 5, "write the whole path"),
    "a path with a zero": (OK + 'state: "a\\0b"\n', 5, "printable characters is expected here"),
    "a very long value": (OK + "lake: " + "x" * 5000 + "\n", 5, "at most 4096"),
    "a key that is a list": (OK + "[lake]: x\n", 5, "one value is expected here"),
    "key twice in an alias": (
        OK + "automation: &a {runs: 1, runs: 2}\n",
        5,
        "'runs' is written twice; keep one",
    ),
    "bad reference": (venue(SYMBOLS, SINCE, "reference: [1h, 1D]"), 5, "'1D' is not one of"),
    "reference is the base": (
        venue(SYMBOLS, SINCE, "reference: [1m]"),
        5,
        "1m is the base already",
    ),
    "bad timeframe": (OK + "timeframes:\n  - 5m\n  - 7m\n", 7, "'7m' is not one of"),
    "no rate": (
        venue(SYMBOLS, SINCE, "requests_per_minute: fast"),
        5,
        "a whole number of requests per minute",
    ),
    "rate of nothing": (
        venue(SYMBOLS, SINCE, "requests_per_minute: 0"),
        5,
        "a whole number of requests per minute",
    ),
    "negative rate": (
        venue(SYMBOLS, SINCE, "requests_per_minute: -3"),
        5,
        "a whole number of requests per minute",
    ),
    "base_url is a path": (
        venue(SYMBOLS, SINCE, "base_url: /tmp/x"),
        5,
        "a URL that begins with http:// or https://",
    ),
    "base_url is a file": (
        venue(SYMBOLS, SINCE, "base_url: file:///etc/passwd"),
        5,
        "a URL that begins with http:// or https://",
    ),
    "base_url without a host": (
        venue(SYMBOLS, SINCE, "base_url: http://"),
        5,
        "a URL that begins with http:// or https://",
    ),
    "base_url with half a host": (
        venue(SYMBOLS, SINCE, "base_url: 'http://[::1'"),
        5,
        "a URL that begins with http:// or https://",
    ),
    "base_url with no port": (
        venue(SYMBOLS, SINCE, "base_url: http://host:port/"),
        5,
        "a URL that begins with http:// or https://",
    ),
    "ws_url over http": (
        venue(SYMBOLS, SINCE, "ws_url: http://host/"),
        5,
        "a URL that begins with ws:// or wss://",
    ),
    "bad rollups": (OK + "rollups: csv\n", 5, "'csv' is not one of duckdb, parquet"),
    "lake elsewhere": (OK + "lake: gs://bucket\n", 5, "a folder or s3://bucket/prefix"),
    "lake without a bucket": (OK + "lake: s3://\n", 5, "a folder or s3://bucket/prefix"),
    "lake is a list": (OK + "lake: [a]\n", 5, "one value is expected here"),
    "no venue": ("venues: {}\n", 1, "at least one venue"),
    "venues as a list": ("venues: [binance]\n", 1, "`key: value` lines are expected here"),
    "a venue without lines": (
        "lake: x\nvenues:\n  binance:\n",
        3,
        "`key: value` lines are expected here",
    ),
    "a list": ("- binance\n", 1, "`key: value` lines are expected here"),
    "plain text": ("hello\n", 1, "`key: value` lines are expected here"),
    "broken YAML": (OK + "lake: [a\nstate: b\n", 6, "not valid YAML"),
    "a tab": ("venues:\n\tbinance: 1\n", 2, "not valid YAML"),
    "two documents": (OK + "---\nlake: x\n", 5, "not valid YAML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_names_file_line_and_fix(load: Any, tmp_path: Path, case: str):
    text, line, reason = REFUSED[case]
    with pytest.raises(BadInput) as refused:
        load(text, NOW="2024-06-01")
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'universe.yaml'} line {line}: ")
    assert reason in message
    assert "\n" not in message
    assert refused.value.exit_code == 2


def test_the_same_universe_without_a_mistake_is_taken(load: Any):
    assert load(OK, NOW="2024-06-01").markets == (BTC,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no universe file; write one or name it in MARKETDATA_UNIVERSE"),
        ("", "it is empty"),
        ("# only a comment\n", "it is empty"),
        (
            "lake: x\n",
            "`venues:` is missing; write it, such as "
            "`venues: {binance: {symbols: [BTC/USDT], since: 2024-01-01}}`",
        ),
        ("a: \x07\n", "not valid YAML"),
    ],
)
def test_a_file_that_says_nothing_is_named(
    load: Any, tmp_path: Path, text: str | None, reason: str
):
    with pytest.raises(BadInput) as refused:
        load(text)
    assert str(refused.value).startswith(f"{tmp_path / 'universe.yaml'}: {reason}")
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it cannot be read (Is a directory)"),
        (b"\xff\xfe\x00", "it cannot be read as text; save it as UTF-8"),
        ("lake: Zürich\n".encode("latin-1"), "it cannot be read as text; save it as UTF-8"),
        (OK.encode("utf-16"), "it cannot be read as text; save it as UTF-8"),
        (OK.encode() + b"#" * 2**20, "it has more than 1048576 bytes; name a smaller file"),
        (b"lake: " + b"[" * 2**19, "more than 20 lists are inside each other"),
        (b"lake: " + b"{a: " * 2**17, "more than 20 lists are inside each other"),
    ],
)
def test_a_file_that_is_no_universe_is_named(tmp_path: Path, content: bytes | None, reason: str):
    file = tmp_path / "universe.yaml"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(BadInput) as refused:
        load_settings({"MARKETDATA_UNIVERSE": str(file)})
    assert str(refused.value) == f"{file}: {reason}"
    assert refused.value.exit_code == 2


def test_a_device_without_end_is_not_read_to_its_end():
    with pytest.raises(BadInput, match=r"/dev/zero: it cannot be read \(it is a device or a pipe"):
        load_settings({"MARKETDATA_UNIVERSE": "/dev/zero"})


LAUGHS = "[&a0 [x, x], " + ", ".join(
    f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)
)


@pytest.mark.parametrize(
    "text",
    [
        f"timeframes: {LAUGHS}]",  # 9 ** 29 values
        f"alerts: {LAUGHS}]",
        "timeframes: &a [*a]",  # a list that is its own element
        "automation: &a {runs: *a}",
        "consolidate: &a {BTC/USDT: *a}",
    ],
)
def test_aliases_without_end_are_one_line_and_cost_nothing(load: Any, tmp_path: Path, text: str):
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(BadInput) as refused:
        load(f"{OK}{text}\n")
    spent, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(refused.value) == (
        f"{tmp_path / 'universe.yaml'} line 5: more than 20 lists inside each other or "
        "200000 values are here, aliases included; write fewer"
    )
    assert peak < 50e6
    assert spent < 20  # traced; a second without


@pytest.mark.parametrize(
    "text",
    [
        "venues: {" + ", ".join(f"v{n}: {{}}" for n in range(20_000)) + "}",
        OK + "retention: {" + ", ".join(f"raw/{n}: 1" for n in range(20_000)) + "}",
        venue(f"symbols: [{', '.join(f'bad{n}' for n in range(20_000))}]", SINCE),
    ],
)
def test_many_mistakes_are_one_line_and_quick(load: Any, text: str):
    begun = time.process_time()
    with pytest.raises(
        BadInput, match=r" line \d: (unknown venue 'v0'|table 'raw/0'|symbol 'bad0')"
    ):
        load(text)
    assert time.process_time() - begun < 10


@pytest.mark.parametrize(
    ("text", "variables", "reason"),
    [
        # both wrong: the file first, by its lines, then the variables in the order of the keys
        (
            OK.replace("2024-01-01", "never") + "rollups: csv\n",
            {"STATE": "[]", "CORRECTIONS": "{x: 1}"},
            "universe.yaml line 4: 'never'",
        ),
        (
            "retention_days: 0\n" + OK + "rollups: csv\n",
            {"STATE": "[]"},
            "universe.yaml line 1: a whole number of days",
        ),
        (OK, {"RETENTION_DAYS": "0", "STATE": "[]", "LAKE": "[]"}, "MARKETDATA_LAKE line 1: one"),
        (OK, {"RETENTION_DAYS": "0", "STATE": "[]"}, "MARKETDATA_STATE line 1: one value"),
        # a variable wins over the file, so what is wrong there does not matter
        (
            OK + "rollups: csv\nlake: []\n",
            {"ROLLUPS": "parquet"},
            "universe.yaml line 6: one value",
        ),
        # what is not YAML comes before what is wrong in it
        (OK + "rollups: csv\n", {"STATE": "["}, "MARKETDATA_STATE line 1: not valid YAML"),
        (OK + "rollups: [\n", {"STATE": "["}, "universe.yaml line 6: not valid YAML"),
    ],
)
def test_the_first_of_several_mistakes_is_named(
    load: Any, text: str, variables: dict[str, str], reason: str
):
    for _ in range(3):
        with pytest.raises(BadInput) as refused:
            load(text, **variables)
        assert reason in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "text", "reason"),
    [
        (
            "ROLLUPS",
            "csv",
            "environment MARKETDATA_ROLLUPS line 1: 'csv' is not one of duckdb, parquet",
        ),
        ("TIMEFRAMES", "[5m", "environment MARKETDATA_TIMEFRAMES line 1: not valid YAML"),
        (
            "VENUES",
            "{binance: {symbols: [BTC/USDT]}}",
            "environment MARKETDATA_VENUES line 1: `since:` is missing; write it",
        ),
        ("VENUES", "a:\n  b: 1\n", "environment MARKETDATA_VENUES line 1: unknown venue 'a'"),
        ("NOW", "today", "environment MARKETDATA_NOW: 'today' is not a date"),
        ("NOW", "2024-01-01 x60 since today", "environment MARKETDATA_NOW: 'today' is not a date"),
        (
            "NOW",
            "2024-01-01 x1.2.3 since 2024-01-01",
            "environment MARKETDATA_NOW: a speed such as",
        ),
        ("NOW", f"2024-01-01 x{'9' * 400} since 2024-01-01", "environment MARKETDATA_NOW: a speed"),
        ("NOW", "9999-01-01 x9999 since 2024-01-01", "environment MARKETDATA_NOW: a speed such as"),
        ("LAKE", "\udcff", "environment MARKETDATA_LAKE: not valid YAML"),
        ("LAKE", "# nothing", "environment MARKETDATA_LAKE: it is empty"),
        (
            "AUTOMATION",
            "{refresh_minutes: 60}",
            "environment MARKETDATA_AUTOMATION line 1: a whole number of minutes, from 1 to 59",
        ),
        (
            "AUTOMATION",
            "{attemps: 3}",
            "environment MARKETDATA_AUTOMATION line 1: unknown key 'attemps'; "
            "did you mean 'attempts'?",
        ),
        (
            "AUTOMATION",
            "{attempts: 0}",
            "environment MARKETDATA_AUTOMATION line 1: a whole number of attempts, from 1",
        ),
        (
            "FRESHNESS",
            "{2m: {warn: 1, error: 2}}",
            "environment MARKETDATA_FRESHNESS line 1: timeframe '2m' is not one of 1s, 1m, 3m, 5m",
        ),
        (
            "FRESHNESS",
            "{1m: {warn: 5}}",
            "environment MARKETDATA_FRESHNESS line 1: `error:` is missing; "
            "write it, such as `error: 60`",
        ),
        (
            "FRESHNESS",
            "{1m: {warn: 5, error: 4}}",
            "environment MARKETDATA_FRESHNESS line 1: `error:` is less than `warn:`",
        ),
        (
            "RETENTION_DAYS",
            "-1",
            "environment MARKETDATA_RETENTION_DAYS line 1: a whole number of days",
        ),
        (
            "ALERTS",
            "slack",
            "environment MARKETDATA_ALERTS line 1: a list such as [a, b] is expected here",
        ),
    ],
)
def test_a_mistake_in_a_variable_names_the_variable(
    load: Any, variable: str, text: str, reason: str
):
    with pytest.raises(BadInput) as refused:
        load(SMALL, **{variable: text})
    assert str(refused.value).startswith(reason)


@pytest.mark.parametrize(
    "lines",
    [
        f"base_url: https://user:{CANARY}@api.binance.com",
        f"base_url: https://{CANARY}@api.binance.com/",
        f"base_url: https://api.binance.com/?apiKey={CANARY}",
        f"base_url: https://api.binance.com/#{CANARY}",
        f"base_url: https://user:{CANARY}@host:port/",
        f"base_url: 'https://user:{CANARY}@[::1'",
        f"base_url: ftp://user:{CANARY}@host/",
        f'base_url: "https://user:{CANARY}@host',
        f"ws_url: wss://host/ws?listenKey={CANARY}",
        f"base_ulr: https://user:{CANARY}@host/",
    ],
)
def test_a_secret_is_refused_without_being_repeated(load: Any, lines: str):
    with pytest.raises(BadInput) as refused:
        load(venue(SYMBOLS, SINCE, lines))
    assert " line " in str(refused.value)
    assert CANARY not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    "lake",
    [
        f"s3://AKIA:{CANARY}@bucket/prefix",
        f"s3://bucket/prefix?key={CANARY}",
        f"https://user:{CANARY}@host",
    ],
)
def test_a_secret_in_the_lakes_place_is_refused(load: Any, lake: str):
    for settings in ((OK + f"lake: {lake}\n", {}), (OK, {"LAKE": lake})):
        with pytest.raises(BadInput) as refused:
            load(settings[0], **settings[1])
        assert CANARY not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("database", f"mysql://user:{CANARY}@host/db"),
        ("database", f"postgresql://user:{CANARY}@host:port/db"),
        ("database", f"postgresql://user:{CANARY}@[::1"),
        ("database", f"[postgresql://user:{CANARY}@host/db]"),
        ("database", f"{{postgresql://user: {CANARY}, postgresql://user: {CANARY}}}"),
        ("broker", f"kafka://:{CANARY}@host"),
        ("broker", f"*{CANARY}"),
        ("broker", f"!{CANARY}!x y"),
        ("broker", f"'redis://:{CANARY}@host"),
        ("broker", f'"redis://:{CANARY}\\@host"'),
        ("alerts", f"slack://{CANARY}"),
        ("alerts", f"[[slack://{CANARY}]]"),
        ("alerts", f"[{{slack: {CANARY}}}]"),
        ("alerts", f"{{slack://{CANARY}: 1, slack://{CANARY}: 2}}"),
        ("alerts", f"[&{CANARY} a, &{CANARY} b, [*x]]"),
        ("alerts", f"[slack://{CANARY * 1000}]"),
    ],
)
def test_the_value_of_a_secret_key_is_never_repeated(load: Any, key: str, value: str):
    for text, variables in ((f"{OK}{key}: {value}\n", {}), (OK, {key.upper(): value})):
        with pytest.raises(BadInput) as refused:
            load(text, **variables)
        assert " line " in str(refused.value)
        assert CANARY not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("key", ["database", "broker"])
def test_a_password_belongs_into_the_environment(load: Any, key: str):
    url = {"database": f"postgresql://u:{CANARY}@h/d", "broker": f"redis://:{CANARY}@h/0"}[key]
    with pytest.raises(BadInput) as refused:
        load(f"{OK}{key}: {url}\n")
    assert str(refused.value).endswith(
        "universe.yaml line 5: a password does not belong in this file; "
        f"give the whole URL in MARKETDATA_{key.upper()} instead"
    )
    assert CANARY not in "".join(traceback.format_exception(refused.value))
    assert load(OK, **{key.upper(): url})


def test_pydantic_s_own_error_repeats_no_secret():
    venues = {"binance": {"symbols": ["BTC/USDT"], "since": "2024-01-01"}}
    with pytest.raises(ValidationError) as refused:
        Universe.model_validate({"venues": venues, "database": CANARY, "alerts": [[CANARY]]})
    assert refused.value.error_count() == 2
    assert CANARY not in str(refused.value)
    assert CANARY not in repr(refused.value)


@pytest.mark.server
def test_nothing_is_read_from_the_environment_at_import():
    code = (
        "import os, sys\n"
        "class Closed(dict):\n"
        "    def get(self, key, default=None):\n"
        "        return sys.exit(key) if key.startswith('MARKETDATA_') else default\n"
        "    __getitem__ = get\n"
        "os.environ = Closed()\n"
        "import marketdata_assets.settings.load\n"
        "assert not {'ccxt', 'dagster', 'polars'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
