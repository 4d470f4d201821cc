"""The command as a person uses it: as a process, judged by its exit code and what it prints."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from typer.main import get_command

from marketdata_assets.cli.main import app
from marketdata_assets.context import open_context
from marketdata_assets.flows.operate.alerts import AlertCenter
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import every_table
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_tests.conftest import Universe
from marketdata_tests.samples import earlier_object
from marketdata_tests.steps import run_derive, run_ingest

pytestmark = pytest.mark.server

SPAN = Window(parse_time("2023-12-01"), parse_time("2024-01-10"))


def marketdata(
    *arguments: str, timeout: int = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "marketdata_assets.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr + done.stdout
    return done


def text_of(done: subprocess.CompletedProcess[str]) -> str:
    """All that it printed, on one line: a table may wrap anywhere."""
    return re.sub(r"\s+", " ", done.stderr + done.stdout)


def lake_digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.parquet")}


def bar_requests(exchange: SandboxExchange) -> int:
    return sum("klines" in seen.path for seen in exchange.requests)


@pytest.fixture
def backfilled(sandbox: tuple[SandboxExchange, str], universe: Universe) -> None:
    """Two markets over 40 days, planned and then fetched; the plan's numbers hold."""
    exchange, url = sandbox
    universe(
        url,
        symbols="[BTC/USDT, SHIB/USDT]",
        since="2023-12-01",
        extra="reference: [1h]",
        now="2024-01-10T00:00:00Z",
    )
    plan = json.loads(marketdata("plan", "--format", "json").stdout)
    assert plan["partitions"] == 4
    done = marketdata("backfill")
    assert done.returncode == 0, text_of(done)
    assert abs(bar_requests(exchange) - plan["requests"]) <= 0.15 * plan["requests"] + 10


@pytest.mark.usefixtures("backfilled")
def test_the_main_job(sandbox: tuple[SandboxExchange, str], tmp_path: Path) -> None:
    files, before = lake_digests(tmp_path / "lake"), bar_requests(sandbox[0])
    second = marketdata("backfill")
    assert (second.returncode, bar_requests(sandbox[0]) - before) == (0, 0)
    assert "nothing to do" in text_of(second)
    assert lake_digests(tmp_path / "lake") == files

    for row in json.loads(marketdata("coverage", "--format", "json").stdout):
        parts = [value for name, value in row.items() if name not in ("market", "expected")]
        assert (row["expected"], row["not_fetched"]) == (sum(parts), 0)
    assert json.loads(marketdata("quarantine", "list", "--format", "json").stdout) == []

    csv_text = marketdata("bars", "binance:SHIB-USDT", "1m", "--format", "csv").stdout
    table = list(csv.DictReader(io.StringIO(csv_text)))
    expected = generate_bars("SHIBUSDT", "1m", SPAN)
    times = expected["open_time"].dt.strftime("%Y-%m-%dT%H:%M:%SZ").to_list()
    assert [row["open_time"] for row in table] == times
    assert [row["open"] for row in table] == [f"{v.normalize():f}" for v in expected["open"]]
    fractions = [row for row in table if "." in row["close"]]
    assert not any(row["close"].endswith(("0", ".")) or "E" in row["volume"] for row in fractions)

    days, out = generate_bars("BTCUSDT", "1d", SPAN), tmp_path / "day.parquet"
    arguments = ("bars", "binance:BTC-USDT", "1d", "--format")
    assert marketdata(*arguments, "parquet", "--out", str(out)).returncode == 0
    assert pl.read_parquet(out).height == days.height
    as_json = json.loads(marketdata(*arguments, "json").stdout)
    assert [row["trades"] for row in as_json] == days["trades"].to_list()

    names = {"lake", "state", "market.duckdb", "universe.yaml", "day.parquet"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.usefixtures("backfilled")
def test_a_lake_of_an_earlier_release_is_rewritten_by_one_command(
    sandbox: tuple[SandboxExchange, str], tmp_path: Path
) -> None:
    """No bar changes, nothing is requested, and the ledger knows the new objects."""
    settings = load_settings()
    with open_context(settings) as context:
        for table in every_table():
            for key in context.lake.list_sizes(table):
                partition = Partition.from_stored_key(key)
                file = tmp_path / "lake" / table.path(partition)
                file.write_bytes(earlier_object(file.read_bytes()))
                context.ledger.objects.note_rewritten(table, partition, file.stat().st_size)
                context.ledger.objects.remove(table, partition)
    for types in (tmp_path / "lake").rglob("*.json"):
        types.unlink()
    old, before = lake_digests(tmp_path / "lake"), bar_requests(sandbox[0])
    arguments = ("bars", "binance:SHIB-USDT", "1m", "--format", "csv")
    bars = marketdata(*arguments).stdout
    done = marketdata("rewrite", "--format", "json")
    assert done.returncode == 0, text_of(done)
    found = {row["table"]: (row["objects"], row["rewritten"]) for row in json.loads(done.stdout)}
    assert found.keys() == {"raw/ohlcv_1m", "raw/ohlcv_1h", "parity/ohlcv_1h"}
    assert all(rewritten >= objects == 4 for objects, rewritten in found.values())
    new = lake_digests(tmp_path / "lake")
    assert new.keys() == old.keys()
    assert not set(new.values()) & set(old.values())
    for table_folder in found:
        files = (tmp_path / "lake" / table_folder).rglob("*.parquet")
        assert (
            len({pq.read_schema(file).to_string(show_schema_metadata=False) for file in files}) == 1
        )
    assert marketdata(*arguments).stdout == bars
    again = marketdata("backfill")
    assert "nothing to do" in text_of(again)
    assert (again.returncode, bar_requests(sandbox[0]) - before) == (0, 0)
    assert "0 objects rewritten" in text_of(marketdata("rewrite"))


@pytest.fixture
def stored(sandbox: tuple[SandboxExchange, str], universe: Universe) -> Settings:
    return universe(sandbox[1], since="2024-01-01", until="2024-01-03", now="2024-01-10T00:00:00Z")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["bars", "binance:BTC-USD", "1m"], 2, "did you mean binance:BTC-USDT?"),
        (["bars", "../../etc/passwd", "1m"], 2, "not in"),
        (["bars", "BTC'; DROP TABLE x", "1m"], 2, "not in"),
        (["bars", "", "1m"], 2, "not in"),
        (["bars", "binance:₿-USDT", "1m"], 2, "not in"),
        (["bars", "binance:BTC-USDT", "7m"], 2, "1s 1m 3m 5m 15m 30m 1h 2h"),
        (["bars", "binance:BTC-USDT", "1m", "--start", "yesterday"], 2, "not a date such as"),
        (
            ["bars", "binance:BTC-USDT", "1m", "--start", "2024-01-02", "--end", "2024-01-01"],
            2,
            "--start must come before --end",
        ),
        (["backfill", "--start", "2031-01-01"], 2, "lies in the future"),
        (["backfill", "--market", "binance:DOGE-USDT"], 2, "not in"),
        (
            ["bars", "binance:BTC-USDT", "1m", "--format", "xml"],
            2,
            "'xml' is not one of 'table', 'csv', 'json', 'parquet'",
        ),
        (["bars", "binance:BTC-USDT", "1m", "--format", "parquet"], 2, "needs --out"),
        (["quarantine", "list", "--market", "x"], 2, "not in"),
        (["coverage", "--market", "x:y"], 2, "not in"),
        (["parked", "--market", "x:y"], 2, "not in"),
        (["alerts", "--format", "xml"], 2, "'xml' is not one of 'table', 'json'"),
        (["prune", "--days", "-1"], 2, "'--days': Input should be greater than or equal to 0"),
        (["bars"], 2, "Missing argument 'MARKET'. (see `marketdata bars --help`)"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["quarantine", "list", "--nonsense"], 2, "(see `marketdata quarantine list --help`)"),
    ],
)
def test_bad_input_is_one_line_of_standard_error(
    stored: Settings, arguments: list[str], code: int, words: str
) -> None:
    done = marketdata(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_missing_and_broken_universe(tmp_path: Path) -> None:
    done = marketdata("plan", MARKETDATA_UNIVERSE=str(tmp_path / "none.yaml"))
    assert (done.returncode, "there is no universe file" in text_of(done)) == (2, True)
    (tmp_path / "u.yaml").write_text(
        "venues:\n  binnance: {symbols: [BTC/USDT], since: 2024-01-01}\n"
    )
    done = marketdata("plan", MARKETDATA_UNIVERSE=str(tmp_path / "u.yaml"))
    assert done.returncode == 2
    assert re.search(
        r"u\.yaml line 2: unknown venue 'binnance'; did you mean 'binance", text_of(done)
    )


def test_symbol_unknown_to_the_venue(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    universe(sandbox[1], symbols="[BTC/USDC]", since="2024-01-01", until="2024-01-03")
    done = marketdata("backfill")
    assert done.returncode == 2
    assert "has no symbol BTC/USDC; did you mean BTC/USDT?" in text_of(done)


def test_venue_down_is_exit_3(universe: Universe) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        universe(
            f"http://127.0.0.1:{probe.getsockname()[1]}/binance",
            since="2024-01-01",
            until="2024-01-03",
        )
        done = marketdata("backfill")
    assert done.returncode == 3
    assert "binance" in text_of(done)
    assert "cannot be reached" in text_of(done)


class _Website(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<html>welcome</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_base_url_that_is_no_exchange(universe: Universe) -> None:
    with HTTPServer(("127.0.0.1", 0), _Website) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        universe(f"http://127.0.0.1:{server.server_port}", since="2024-01-01", until="2024-01-03")
        done = marketdata("backfill")
        server.shutdown()
    assert done.returncode == 3
    assert "the answer is not JSON: it is text" in text_of(done)


def test_lake_that_cannot_be_written(
    sandbox: tuple[SandboxExchange, str], universe: Universe, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    universe(
        sandbox[1], since="2024-01-01", until="2024-01-03", lake=str(tmp_path / "file" / "lake")
    )
    done = marketdata("backfill")
    assert done.returncode == 3
    assert "mend the folder or set another `lake:`" in text_of(done)


def test_state_that_cannot_be_written(
    sandbox: tuple[SandboxExchange, str], universe: Universe, tmp_path: Path
) -> None:
    universe(sandbox[1], since="2024-01-01", until="2024-01-03")
    (tmp_path / "file").write_text("in the way")
    done = marketdata("backfill", MARKETDATA_STATE=str(tmp_path / "file" / "state"))
    assert done.returncode == 3
    assert "set another `state:`" in text_of(done)


HOLD = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1])
connection.execute("CREATE TABLE t (i INT)")
print("held", flush=True)
sys.stdin.readline()
"""


def test_duckdb_held_by_another_process_is_waited_for(
    sandbox: tuple[SandboxExchange, str], universe: Universe, tmp_path: Path
) -> None:
    settings = universe(sandbox[1], since="2024-01-01", until="2024-01-03")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(settings.duckdb)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    backfill = subprocess.Popen(
        [sys.executable, "-m", "marketdata_assets.cli.main", "backfill"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(
        (tmp_path / "lake").rglob("data.parquet")
    ):  # the raw bars are there: the rollups wait
        assert backfill.poll() is None
        threading.Event().wait(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        backfill.wait(1)
    holder.communicate("go\n", timeout=30)
    _, errors = backfill.communicate(timeout=120)
    assert backfill.returncode == 0, errors
    assert (
        len(marketdata("bars", "binance:BTC-USDT", "1h", "--format", "csv").stdout.splitlines())
        == 49
    )


def test_two_backfills_at_once_are_one(
    sandbox: tuple[SandboxExchange, str], universe: Universe
) -> None:
    exchange, url = sandbox
    universe(url, since="2024-01-01", until="2024-01-09")
    command = [sys.executable, "-m", "marketdata_assets.cli.main", "backfill"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    pages = [
        seen.query["startTime"]
        for seen in exchange.requests
        if "klines" in seen.path and seen.query.get("startTime") != "0"
    ]
    days = marketdata("bars", "binance:BTC-USDT", "1d", "--format", "csv").stdout.splitlines()
    assert len(days) == 9
    # nothing is fetched twice, except for gaps that are requested again
    assert len(pages) <= 1.5 * (8 * 1440 / 998) + 4


def test_no_secret_anywhere(
    sandbox: tuple[SandboxExchange, str], universe: Universe, tmp_path: Path
) -> None:
    canary = "CANARY-5f1c9a"
    universe(sandbox[1], symbols="[BTC/USDT, NOPE/USDT]", since="2024-01-01", until="2024-01-02")
    secrets = dict.fromkeys(
        ("AWS_SECRET_ACCESS_KEY", "BINANCE_APIKEY", "BINANCE_SECRET", "MARKETDATA_API_KEY"), canary
    )
    texts = [text_of(marketdata("backfill", **secrets))]
    file = tmp_path / "universe.yaml"
    file.write_text(file.read_text().replace("/binance", f"/binance?apikey={canary}"))
    texts.append(text_of(marketdata("backfill", **secrets)))
    file.write_text(file.read_text().replace("http://", f"http://user:{canary}@"))
    texts.append(text_of(marketdata("backfill", **secrets)))
    file.unlink()
    assert not [text for text in texts if canary in text]
    assert not [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and canary.encode() in path.read_bytes()
    ]


def test_health_alerts_parked_and_prune(stored: Settings) -> None:
    healthy = json.loads(marketdata("health", "--format", "json").stdout)
    assert [(h["subject"], h["status"]) for h in healthy] == [
        ("daemon", "unhealthy"),
        ("binance", "healthy"),
        ("binance:BTC-USDT", "unhealthy"),
    ]
    assert marketdata("backfill").returncode == 0
    partition = Partition.parse("binance:BTC-USDT|2024-01-01")
    with open_context(stored) as context:
        context.ledger.heartbeats.record("daemon", stored.now())
        assert marketdata("health").returncode == 0
        context.ledger.attempts.add([(partition, "x")], stored.now())
        context.ledger.attempts.park([(partition, "failed: HTTP 403")], stored.now())
        context.bind(AlertCenter).update_incidents(
            context.bind(AlertCenter).find_problems(),
            lambda key: False,
        )
    assert marketdata("health").returncode == 1
    (alert,) = json.loads(marketdata("alerts", "--open", "--format", "json").stdout)
    assert (alert["title"], alert["severity"], alert["recovered"]) == (
        "binance:BTC-USDT|2024-01-01 is parked",
        "error",
        None,
    )
    assert "1 incidents, 1 of them open" in text_of(marketdata("alerts"))
    (parked,) = json.loads(marketdata("parked", "--format", "json").stdout)
    assert (parked["partition"], parked["attempts"], parked["reason"]) == (
        partition.key,
        1,
        "failed: HTTP 403",
    )
    assert "0 partitions are parked" in text_of(marketdata("parked", "--start", "2024-01-03"))
    assert "1 partitions unparked" in text_of(marketdata("parked", "--unpark"))
    assert json.loads(marketdata("parked", "--format", "json").stdout) == []
    would = json.loads(marketdata("prune", "--days", "0", "--dry-run").stdout)
    assert would["dry_run"]
    assert (would["runs"], would["logs"], would["fetches"] > 0) == (1, 1, True)
    done = json.loads(marketdata("prune", "--days", "0").stdout)
    assert {**done, "dry_run": True, "reclaimed_bytes": 0} == {**would, "reclaimed_bytes": 0}
    assert json.loads(marketdata("prune", "--days", "0").stdout)["runs"] == 0


def test_a_wrong_alert_url_is_an_error_at_the_start(stored: Settings) -> None:
    done = marketdata("dev", MARKETDATA_ALERTS="[nonsense://CANARY-5f1c9a]")
    assert done.returncode == 2
    assert "alert URL 1 (scheme nonsense)" in text_of(done)
    assert "CANARY" not in text_of(done)


def leaf_commands(group: Any, path: str = "marketdata") -> Iterator[tuple[str, Any]]:
    """Yield the commands below a group, each by the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaf_commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_every_command_and_option_has_help_and_a_row_in_readme() -> None:
    commands = dict(leaf_commands(get_command(app)))
    assert len(commands) > 20
    table = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    rows = set(re.findall(r"^\| `(marketdata(?: [a-z]+)+)", table, re.M))
    assert rows == set(commands)
    texts = {path: command.help for path, command in commands.items()}
    for path, command in commands.items():
        texts |= {f"{path} {p.name}": p.help for p in command.params if p.name != "help"}
    assert [name for name, text in texts.items() if not (text or "").strip().endswith(".")] == []


def test_help_lists_every_command_and_exits_with_0() -> None:
    done = marketdata("--help", COLUMNS="100")
    listed = re.findall(r"^[│ ]+([a-z]+) {2,}", done.stdout, re.M)
    assert (done.returncode, set(listed)) == (0, set(get_command(app).commands))
    assert marketdata("bars", "--help").returncode == 0
    assert marketdata().returncode == 2


_LIBRARIES = (
    *("aiohttp", "alembic", "apprise", "boto3", "ccxt", "dagster", "deltalake", "duckdb", "numpy"),
    *("pandas", "pandera", "polars", "pyarrow", "pydantic", "sqlalchemy", "yaml"),
)
_ALWAYS = {"polars", "pydantic", "sqlalchemy", "yaml"}
_READING = _ALWAYS | {"numpy", "pyarrow"}
"""A command that opens objects; coverage opens those of months that are fetched in part."""


def test_every_command_imports_only_what_it_needs(stored: Settings) -> None:
    """A new name in this table makes a command start slower: see `python -X importtime`."""
    run_ingest(stored)
    run_derive(stored)
    needed = {
        "--help": set(),
        "coverage": _READING,
        "gaps": _ALWAYS,
        "health": _ALWAYS,
        "alerts": _ALWAYS,
        "plan": _ALWAYS | {"duckdb"},  # it asks what the warehouse holds
        "quarantine list": _ALWAYS,
        "bars binance:BTC-USDT 1m": _READING,
        "bars binance:BTC-USDT 1h": _READING | {"duckdb"},
    }
    code = (
        "import sys, marketdata_assets.cli.main as cli\n"
        "try: cli.main()\n"
        f"finally: print(*({set(_LIBRARIES)} & set(sys.modules)), file=sys.stderr)"
    )
    imported = {}
    for command in needed:
        line = [sys.executable, "-c", code, *command.split()]
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        imported[command] = set(done.stderr.splitlines()[-1].split())
    assert imported == needed
