"""A state folder that cannot be written: whoever only reads reads a copy of its ledger, with the
commits that are still in the WAL; whoever writes gets one line.
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from marketdata_assets.errors import StoreFailed
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.sqlite import is_writable
from marketdata_tests.samples import at, read_sql, run_sql, start_python

pytestmark = pytest.mark.server

HERE = Path(__file__).parents[1]
EXPECTED = json.loads((HERE / "version_3" / "expected.json").read_text())
Run = Callable[..., subprocess.CompletedProcess[str]]

WRITE = """
import os, sys
from pathlib import Path
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.window import parse_time
Ledger(Path(sys.argv[1])).heartbeats.record("marker", parse_time("2024-01-09T23:00:00Z"))
os._exit(0)
"""


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A lake, a warehouse and a ledger that release 14cedaa wrote."""
    folder = tmp_path / "desk"
    shutil.copytree(HERE / "version_3", folder)
    with lzma.open(folder / "market.duckdb.xz") as packed:
        (folder / "market.duckdb").write_bytes(packed.read())
    (folder / "state").mkdir()
    db = sqlite3.connect(folder / "state/ledger.db")
    db.executescript((folder / "ledger.sql").read_text())
    db.close()
    return folder


def leave_wal(desk: Path) -> None:
    """A process of this release writes, and is killed before its commits reach the file."""
    writer = start_python(WRITE, str(desk / "state"))
    writer.communicate()
    assert (desk / "state/ledger.db-wal").stat().st_size > 0
    file = sqlite3.connect(f"file:{desk}/state/ledger.db?immutable=1", uri=True)
    assert file.execute("SELECT version FROM schema_version").fetchall() == [(3,)]
    file.close()


@pytest.fixture
def run(desk: Path, tmp_path: Path) -> Iterator[Run]:
    """Runs Python in the desk's folder, with the state folder read-only."""
    state, temporary = desk / "state", tmp_path / "temporary"
    temporary.mkdir()
    prefix: list[str] = []
    (state / "locks").mkdir(exist_ok=True)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    unshare = ["unshare", "--mount", "sh", "-c", mount, str(state)]
    is_root = os.geteuid() == 0
    if is_root:
        if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
            pytest.skip("root without the right to mount cannot make a folder read-only")
        prefix = unshare

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        if not is_root:
            _set_modes(state, 0o555, 0o444)
        names = {"UNIVERSE": "universe.yaml", "NOW": "2024-01-10T00:00:00Z"}
        done = subprocess.run(
            [*prefix, sys.executable, *arguments],
            cwd=desk,
            env={
                **os.environ,
                **{f"MARKETDATA_{name}": value for name, value in names.items()},
                "TMPDIR": str(temporary),
                "PYTHONPATH": str(HERE.parent),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert list(temporary.iterdir()) == [], "the copy is removed"
        return done

    yield python
    if not is_root:
        _set_modes(state, 0o755, 0o644)


def _set_modes(state: Path, folder: int, file: int) -> None:
    state.chmod(0o755)
    for path in state.iterdir():
        path.chmod(folder if path.is_dir() else file)
    state.chmod(folder)


def printed(arguments: Sequence[str], text: str) -> Any:
    return list(csv.reader(text.splitlines())) if "csv" in arguments else json.loads(text)


DOORS = (
    "coverage",
    "gaps",
    "quarantine",
    "health",
    "anomalies",
    "alerts",
    "parked",
    "receipts",
    "corrections",
    "plan",
    "verify",
    "bars raw",
    "bars 1h as of before",
    "bars 1h",
    "all bars",
    "all rollups",
)


@pytest.mark.parametrize("door", [door for door in DOORS if door in EXPECTED])
def test_every_command_that_reads_needs_no_write_access(door: str, desk: Path, run: Run):
    leave_wal(desk)
    before = {path.name: path.read_bytes() for path in (desk / "state").iterdir() if path.is_file()}
    arguments, code = EXPECTED[door]["arguments"], EXPECTED[door]["exit_code"]
    done = run("-m", "marketdata_assets.cli.main", *arguments)
    assert done.returncode == code, done.stderr
    assert printed(arguments, done.stdout) == EXPECTED[door]["prints"]
    after = {path.name: path.read_bytes() for path in (desk / "state").iterdir() if path.is_file()}
    assert after == before


READ = """
import json
from pathlib import Path
from marketdata_assets import open_reader
from marketdata_assets.ledger.ledger import Ledger
with open_reader() as reader:
    bars = reader.bars("binance:BTC-USDT", "1h").collect()
    count = reader.sql("SELECT count(*) AS n FROM raw.ohlcv_1m").item()
ledger = Ledger(Path("state"), for_reading=True)
beat = ledger.heartbeats.last("marker")
print(json.dumps([bars.height, count, str(beat), ledger.is_read_only]))
"""


def test_python_reads_what_is_still_in_the_wal(desk: Path, run: Run):
    writable = json.loads(run_writable(desk))
    assert writable[2:] == ["None", False]
    start_python(WRITE, str(desk / "state")).communicate()
    done = run("-c", READ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [*writable[:2], "2024-01-09 23:00:00+00:00", True]


def run_writable(desk: Path) -> str:
    environment = {**os.environ, "MARKETDATA_UNIVERSE": "universe.yaml"}
    environment |= {"MARKETDATA_NOW": "2024-01-10T00:00:00Z", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", READ]
    return subprocess.run(
        command, cwd=desk, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_a_ledger_of_an_earlier_release_is_brought_forward_in_the_copy(desk: Path, run: Run):
    door = EXPECTED["coverage"]
    done = run("-m", "marketdata_assets.cli.main", *door["arguments"])
    assert json.loads(done.stdout) == door["prints"], done.stderr
    db = sqlite3.connect(desk / "state/ledger.db")
    assert db.execute("SELECT version FROM schema_version").fetchall() == [(3,)]
    db.close()


@pytest.mark.parametrize("command", [["backfill"], ["retire"], ["parked", "--unpark"]])
def test_a_command_that_writes_gets_one_line(command: list[str], desk: Path, run: Run):
    Ledger(desk / "state").close()
    done = run("-m", "marketdata_assets.cli.main", *command)
    assert done.returncode == 3
    line = "state/ledger.db cannot be read (the folder or the file is read-only); "
    line += "mend the folder or set another `state:`"
    assert "".join(done.stderr.split()).endswith("".join(line.split()))


# --------------------------------------------------------------------------------- in this process
@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marketdata_assets.ledger.sqlite.is_writable", lambda state: False)


@pytest.mark.usefixtures("frozen")
def test_a_copy_is_removed_when_it_is_closed_and_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    writer = Ledger(tmp_path / "state")
    writer.heartbeats.record("x", at("2024-01-01"))
    reader = Ledger(tmp_path / "state", for_reading=True)
    (copy,) = tmp_path.glob("marketdata-ledger-*")
    assert reader.is_read_only
    assert reader.heartbeats.last("x") == at("2024-01-01")
    with pytest.raises(
        StoreFailed, match=r"state/ledger\.db cannot be written \(it is read-only\)"
    ):
        reader.heartbeats.record("y", at("2024-01-01"))
    writer.heartbeats.record("x", at("2024-01-02"))
    assert reader.heartbeats.last("x") == at("2024-01-01")
    reader.close()
    assert not copy.exists()


@pytest.mark.usefixtures("frozen")
def test_where_there_is_no_ledger_the_copy_is_empty(tmp_path: Path):
    reader = Ledger(tmp_path / "state", for_reading=True)
    assert reader.partitions.accounts() == []
    assert not (tmp_path / "state").exists()
    reader.close()


@pytest.mark.usefixtures("frozen")
def test_a_file_that_changes_while_it_is_copied_is_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between the file and its WAL, a writer moves its commits from the WAL to the file, and adds
    others: only a copy of one moment has all of them.
    """
    writer = Ledger(tmp_path / "state")
    for number in range(20):
        writer.heartbeats.record(f"before {number}", at("2024-01-01"))
    real, copied = shutil.copyfile, []

    def copy(source: Path, target: Path) -> None:
        real(source, target)
        copied.append(source.name)
        if len(copied) == 1:
            with writer.database.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            writer.heartbeats.record("meanwhile", at("2024-01-02"))

    monkeypatch.setattr("shutil.copyfile", copy)
    reader = Ledger(tmp_path / "state", for_reading=True)
    assert copied == ["ledger.db", "ledger.db-wal"] * 2
    assert len(read_sql(reader, "SELECT name FROM beats WHERE name LIKE 'before%'")) == 20
    assert reader.heartbeats.last("meanwhile") == at("2024-01-02")
    reader.close()


@pytest.mark.usefixtures("frozen")
def test_a_file_that_never_rests_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    writer = Ledger(tmp_path / "state")
    real = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        real(source, target)
        run_sql(writer, "INSERT INTO beats VALUES (:name, 'x')", name=os.urandom(4).hex())
        with writer.database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    monkeypatch.setattr("shutil.copyfile", copy)
    with pytest.raises(StoreFailed, match=r"ledger\.db is written to all the time"):
        Ledger(tmp_path / "state", for_reading=True)
    assert list(tmp_path.glob("marketdata-ledger-*")) == []


def test_a_folder_that_can_be_written_is_not_copied(tmp_path: Path):
    assert is_writable(tmp_path / "not/there/yet")
    reader = Ledger(tmp_path / "state", for_reading=True)
    assert not reader.is_read_only
    reader.heartbeats.record("x", at("2024-01-01"))
