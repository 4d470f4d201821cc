"""The universe: every key is read, and every mistake is one line that names the file, the line and the
fix.
"""

from __future__ import annotations

import ast
import importlib.util
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import (
    Automation,
    Limits,
    Settings,
    ccxt_venues,
    load_settings,
)
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
    """`load(text, LAKE=..., NOW=...)`: settings from such a file and such MARKETDATA_ variables, and
    nothing else.
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
    assert [tf.name for tf in binance.fetched] == ["5m", "1h", "1d"]
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
    assert usual.limits(TIMEFRAMES["1m"]) == Limits(timedelta(minutes=10), timedelta(minutes=60))
    assert usual.limits(TIMEFRAMES["4h"]) == Limits(timedelta(hours=4), timedelta(hours=12))
    strict = load(SMALL, FRESHNESS="{1m: {warn: 2, error: 5}}")
    assert strict.limits(TIMEFRAMES["1m"]) == Limits(timedelta(minutes=2), timedelta(minutes=5))
    assert strict.limits(TIMEFRAMES["4h"]) == usual.limits(TIMEFRAMES["4h"])


def test_a_clock_that_runs(load: Any):
    begun = datetime.now(UTC)
    clock = load(SMALL, NOW=f"2024-06-01T12:00:00Z x3600 since {begun.isoformat()}").clock
    passed, real = clock.now() - at("2024-06-01T12:00"), datetime.now(UTC) - begun
    assert timedelta(0) < passed <= real * 3600


def test_secrets_of_alerts_are_not_shown(load: Any):
    settings = load(SMALL, ALERTS=f"[slack://{CANARY}]")
    assert settings.alerts == (f"slack://{CANARY}",)
    assert CANARY not in repr(settings)


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
    assert [tf.name for tf in settings.rolled(BTC)] == ["15m", "1h", "1w"]  # its base is 5m
    assert [tf.name for tf in settings.rolled(usd)] == ["5m", "15m", "1h", "1w"]
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
    "no since": (venue(SYMBOLS), 2, "venue binance needs `since:`"),
    "no symbols": (venue(SINCE), 2, "venue binance needs `symbols:`"),
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
    "bad base": (venue(SYMBOLS, SINCE, "base: 3m"), 5, "'3m' is not one of 1m 5m 15m"),
    "bad reference": (venue(SYMBOLS, SINCE, "reference: [1h, 1M]"), 5, "'1M' is not one of"),
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
    text, line, says = REFUSED[case]
    with pytest.raises(BadInput) as refused:
        load(text, NOW="2024-06-01")
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'universe.yaml'} line {line}: ")
    assert says in message
    assert "\n" not in message
    assert refused.value.exit_code == 2


def test_the_same_universe_without_a_mistake_is_taken(load: Any):
    assert load(OK, NOW="2024-06-01").markets == (BTC,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no universe file; write one or name it in MARKETDATA_UNIVERSE"),
        ("", "it is empty"),
        ("# only a comment\n", "it is empty"),
        ("lake: x\n", "there are no venues; write at least `venues:"),
        ("a: \x07\n", "not valid YAML"),
    ],
)
def test_a_file_that_says_nothing_is_named(load: Any, tmp_path: Path, text: str | None, says: str):
    with pytest.raises(BadInput) as refused:
        load(text)
    assert str(refused.value).startswith(f"{tmp_path / 'universe.yaml'}: {says}")
    assert refused.value.exit_code == 2


def test_a_folder_or_bytes_are_no_universe(tmp_path: Path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "bytes"):
        with pytest.raises(BadInput, match="it cannot be read"):
            load_settings({"MARKETDATA_UNIVERSE": str(path)})


@pytest.mark.parametrize(
    ("variable", "text", "says"),
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
            "environment MARKETDATA_VENUES line 1: venue binance needs `since:`",
        ),
        ("VENUES", "a:\n  b: 1\n", "environment MARKETDATA_VENUES line 1: unknown venue 'a'"),
        ("NOW", "today", "environment MARKETDATA_NOW: 'today' is not a date"),
        ("NOW", "2024-01-01 x60 since today", "environment MARKETDATA_NOW: 'today' is not a date"),
        (
            "AUTOMATION",
            "{refresh_minutes: 60}",
            "environment MARKETDATA_AUTOMATION line 1: a whole number of minutes, from 1 to 59",
        ),
        (
            "AUTOMATION",
            "{attemps: 3}",
            "environment MARKETDATA_AUTOMATION line 1: unknown key 'attemps'; did you mean 'attempts'?",
        ),
        (
            "AUTOMATION",
            "{attempts: 0}",
            "environment MARKETDATA_AUTOMATION line 1: a whole number of attempts, 1 or more",
        ),
        (
            "FRESHNESS",
            "{2m: {warn: 1, error: 2}}",
            "environment MARKETDATA_FRESHNESS line 1: unknown key '2m'",
        ),
        (
            "FRESHNESS",
            "{1m: {warn: 5}}",
            "environment MARKETDATA_FRESHNESS line 1: `{warn: minutes, error: minutes}` is expected here",
        ),
        (
            "FRESHNESS",
            "{1m: {warn: 5, error: 4}}",
            "environment MARKETDATA_FRESHNESS line 1: `{warn: minutes, error: minutes}`",
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
def test_a_mistake_in_a_variable_names_the_variable(load: Any, variable: str, text: str, says: str):
    with pytest.raises(BadInput) as refused:
        load(SMALL, **{variable: text})
    assert str(refused.value).startswith(says)


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
