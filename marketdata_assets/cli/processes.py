"""Dagster as processes of ours: its home, its workers, and the services that are started again when
they die. Imports no Dagster.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import yaml

from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.settings.universe import PREFIX, Settings
from marketdata_assets.storage.s3_client import get_endpoint_url

ROOT = Path(__file__).resolve().parents[2]
POSTGRES, BROKER = PREFIX + "DAGSTER_POSTGRES", PREFIX + "DAGSTER_BROKER"
"""Where dagster.yaml finds the URLs that may hold passwords: in the environment of our processes, in
no file.
"""
PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Before a service that died is started again: seconds after the first, second, ... death that came
right after its start.
"""
_QUICK = 20.0
_LOOK = 0.5
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Three allocators (glibc, jemalloc in polars, Arrow's) each keep what was freed; giving it back
# saves 100 MB a process.
_LEAN = {
    "MALLOC_ARENA_MAX": "2",
    "_RJEM_MALLOC_CONF": "dirty_decay_ms:1000,muzzy_decay_ms:0",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def dagster_environment(settings: Settings) -> dict[str, str]:
    """The environment of a Dagster process: its home lies in the state folder, so that nothing is left
    elsewhere.
    """
    home = settings.state / "dagster"
    write_file(home / "dagster.yaml", _instance_config(settings))
    services = {POSTGRES: _with_driver(settings.database), BROKER: settings.broker}
    ours = {
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "PYTHONWARNINGS": "ignore",
    }
    return {**_LEAN, **os.environ, **ours, **{name: url for name, url in services.items() if url}}


def write_file(file: Path, text: str) -> None:
    """Replace a file in Dagster's home whole, as another process may be reading it. Raises
    StoreFailed.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.name}.{os.getpid()}")
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        raise StoreFailed(
            f"{file.parent} cannot be written: {error.strerror}; mend the folder or set another `state:`"
        ) from None


def _instance_config(settings: Settings) -> str:
    """Our dagster.yaml with what the universe says of storage, workers and logs; or the file that
    somebody names instead.
    """
    if instead := os.environ.get(PREFIX + "DAGSTER_YAML"):
        try:
            return Path(instead).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"environment {PREFIX}DAGSTER_YAML: {instead} cannot be read ({type(error).__name__})"
            ) from None
    text = (ROOT / "dagster.yaml").read_text(encoding="utf-8")
    changes: dict[str, Any] = {}
    if settings.database:
        url = {"postgres_url": {"env": POSTGRES}}
        changes["run_storage"] = _part("dagster_postgres.run_storage", "PostgresRunStorage", url)
        changes["schedule_storage"] = _part(
            "dagster_postgres.schedule_storage", "PostgresScheduleStorage", url
        )
        changes["event_log_storage"] = _part(
            "marketdata_assets.dagster_ext.event_log_postgres", "PooledPostgresEventLogStorage", url
        )
    if settings.broker:
        changes["run_launcher"] = _part(
            "marketdata_assets.dagster_ext.celery_runs", "WorkerRunLauncher", _CELERY
        )
    if settings.lake.startswith("s3://"):
        changes["compute_logs"] = _part(
            "dagster_aws.s3.compute_log_manager", "S3ComputeLogManager", _s3_logs(settings.lake)
        )
    if not changes:
        return text
    config = yaml.safe_load(text) | changes
    if settings.broker:
        config["run_monitoring"] |= {
            "start_timeout_seconds": 900
        }  # a run may wait for a free worker
        config["run_retries"] = {
            "enabled": True,
            "max_retries": 3,
            "retry_on_asset_or_op_failure": False,
        }  # of killed workers
        config["concurrency"]["runs"] = {
            "max_concurrent_runs": 16,
            "tag_concurrency_limits": [{**_HISTORY, "limit": 14}],
        }
    return yaml.safe_dump(config, sort_keys=False)


_CELERY = {"broker": {"env": BROKER}, "backend": "disabled://"}
_HISTORY = {"key": "marketdata/kind", "value": "missed"}


def _part(module: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"module": module, "class": name, "config": config}


def _s3_logs(lake: str) -> dict[str, Any]:
    """What runs print lies beside the lake, so that the UI shows it wherever they ran."""
    parts = urlsplit(lake)
    where = get_endpoint_url()
    place = {
        "bucket": parts.netloc,
        "prefix": f"{parts.path.strip('/')}/run_logs".lstrip("/"),
        "skip_empty_files": True,
    }
    return (
        {**place, "endpoint_url": where, "use_ssl": where.startswith("https://")}
        if where
        else place
    )


def _with_driver(url: str | None) -> str | None:
    """SQLAlchemy 2.1 would take another driver than the one that Dagster brings."""
    return url and "postgresql+psycopg2://" + url.partition("://")[2]


# --------------------------------------------------------------------------------- children
def start(
    arguments: list[str], environment: dict[str, str], **options: Any
) -> subprocess.Popen[str]:
    """A child in a session of its own that ends when we do, however we end."""
    command = [sys.executable, "-m", *arguments]
    options |= {"env": environment, "start_new_session": True, "preexec_fn": _die_with_parent}
    child: subprocess.Popen[str] = subprocess.Popen(command, text=True, **options)
    return child


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(*processes: subprocess.Popen[str], patience: float = 15.0) -> None:
    """End children and all that they started: all are asked at once, then whoever is left is made
    to.
    """
    for process in processes:
        _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + patience
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def answer_of(arguments: list[str], settings: Settings) -> dict[str, Any]:
    """The one JSON object that a child prints. Raises StoreFailed with its last line when it fails."""
    child = start(
        arguments, dagster_environment(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = child.communicate()
    if child.returncode:
        raise StoreFailed(
            f"{arguments[0]} failed: {(err.strip().splitlines() or ['no message'])[-1]}"
        )
    found: dict[str, Any] = json.loads(out)
    return found


def _signal_group(group: int, kind: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, kind)


def _children(pid: int) -> set[int]:
    """The children of a process, dead ones that nobody has buried included."""
    found = set[int]()
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found |= {int(child) for child in (task / "children").read_text().split()}
    return found


# --------------------------------------------------------------------------------- services
@dataclass(slots=True)
class Service:
    """A child that is started again when it dies, after growing pauses when it dies right after its
    start.
    """

    name: str
    arguments: list[str]
    two_processes: bool = False
    """Whether it works through a child of its own, without which it lives on but serves nobody."""
    process: subprocess.Popen[str] | None = None
    _begun: float = 0.0
    _due: float = 0.0
    _quick_deaths: int = 0
    _hollow: int = 0

    def begin(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start it now."""
        self._begun, self._hollow = time.monotonic(), -1
        self.process = start(self.arguments, environment)
        return self.process

    def tend(self, environment: dict[str, str], say: Callable[[str], None]) -> None:
        """Notice when it has died, and start it again when its pause is over."""
        if self.process is not None and self._dead(self.process):
            self._bury(self.process, say)
        if self.process is None and time.monotonic() >= self._due:
            self.begin(environment)

    def _dead(self, process: subprocess.Popen[str]) -> bool:
        if process.poll() is not None:
            return True
        if (
            self.two_processes
        ):  # -1 until its child has been seen; twice without is dead, as a look may miss it
            alone = not _children(process.pid)
            self._hollow = 0 if not alone else self._hollow + (self._hollow >= 0)
        return self._hollow > 1

    def _bury(self, process: subprocess.Popen[str], say: Callable[[str], None]) -> None:
        code = process.poll()
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        self.process = None
        self._quick_deaths = (
            self._quick_deaths + 1 if time.monotonic() - self._begun < _QUICK else 0
        )
        how = (
            "lost its own child"
            if code is None
            else f"ended with code {code}"
            if code >= 0
            else f"was killed by signal {-code}"
        )
        if self._quick_deaths > len(PAUSES):
            raise StoreFailed(
                f"{self.name} {how}, {self._quick_deaths} times in a row right after its start; its messages stand above"
            )
        pause = PAUSES[max(0, self._quick_deaths - 1)]
        self._due = time.monotonic() + pause
        say(f"{self.name} {how}; starting it again" + (f" in {pause:g} s" if pause else ""))


@dataclass(slots=True)
class Supervisor:
    """Services that live until the block ends, and nothing of theirs after it. One for a state
    folder.
    """

    environment: dict[str, str]
    say: Callable[[str], None]
    services: list[Service] = field(default_factory=list)
    _strangers: set[int] = field(default_factory=set)

    def __enter__(self) -> Supervisor:
        """What our children leave behind when they are killed becomes ours to bury, instead of the
        machine's.
        """
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._strangers = _children(os.getpid())
        return self

    def __exit__(self, *_: object) -> None:
        stop(*(service.process for service in self.services if service.process is not None))
        for kind, looks in ((signal.SIGTERM, 50), (signal.SIGKILL, 20)):
            for pid in self._heirs():
                with suppress(ProcessLookupError):
                    os.kill(pid, kind)
            while looks and self._heirs():
                looks -= 1
                threading.Event().wait(0.1)

    def begin(self, service: Service) -> subprocess.Popen[str]:
        """Start a service; from now on it is looked after."""
        self.services.append(service)
        return service.begin(self.environment)

    def tend(self, look: Callable[[], None] = lambda: None) -> NoReturn:
        """Start again whatever dies, until we are interrupted, one cannot be started, or `look`,
        called all the time, raises.
        """
        while True:
            look()
            for service in self.services:
                service.tend(self.environment, self.say)
            self._heirs()
            threading.Event().wait(_LOOK)

    def _heirs(self) -> set[int]:
        """Living processes that our dead children left to us, such as runs of a daemon that was
        killed; the dead are buried.
        """
        known = {service.process.pid for service in self.services if service.process is not None}
        heirs = _children(os.getpid()) - self._strangers - known
        return {pid for pid in heirs if os.waitpid(pid, os.WNOHANG) == (0, 0)}


@contextmanager
def only_one(environment: dict[str, str], what: str) -> Iterator[None]:
    """Hold the state folder: two daemons on it would do everything twice. `what` is what the second
    one reads of us.
    """
    home = Path(environment["DAGSTER_HOME"])
    with (home / "dev.lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read() or "another `marketdata dev`"
            raise BadInput(
                f"{holder} already serves {home.parent}; end that one first, or set another `state:`"
            ) from None
        lock.truncate(0)
        lock.write(f"{what} (process {os.getpid()})")
        lock.flush()
        yield
