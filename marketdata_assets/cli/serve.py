"""Servers for people: the Dagster UI with its daemon, on one machine or in roles on many."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Self

from marketdata_assets.cli.dagster_home import BROKER, ROOT, dagster_environment, write_file
from marketdata_assets.cli.ports import (
    check_port_free,
    connect,
    find_free_port,
    get_url,
    reload_location,
    wait_until_ready,
)
from marketdata_assets.cli.supervisor import Service, Supervisor, hold_state_folder
from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.settings.fields import reveal_secret
from marketdata_assets.settings.universe import Settings
from marketdata_assets.system import start_module

_LOCATION = "marketdata_assets"
_DAEMON = "marketdata_assets.dagster_ext.daemon"
_WEB_SERVER = "marketdata_assets.dagster_ext.webserver"
_CELERY = ["celery", "-A", "dagster_celery.app"]
_CODE_SERVER_TTL_SECONDS = 10
_LOCK_CHECK_SECONDS = 5
SELECTION_CHECK_SECONDS = 15


# --------------------------------------------------------------------------------- one machine
def serve_ui(settings: Settings, port: int, report: Callable[[str], None]) -> None:
    """Serve the UI until Ctrl-C, with a code server and the daemon; restart what dies."""
    environment, url = dagster_environment(settings), f"http://127.0.0.1:{port}"
    with hold_state_folder(environment, url):
        check_port_free(port)
        code_port = find_free_port()
        workspace = _write_workspace(Path(environment["DAGSTER_HOME"]), code_port)
        report(f"starting the UI at {url} (Ctrl-C ends it) ...")
        try:
            with Supervisor(environment, report) as supervisor:
                code_server = supervisor.start(_code_server(code_port))
                wait_until_ready(lambda: connect(code_port), code_server)
                web_server = supervisor.start(_web_server(workspace, "127.0.0.1", port))
                wait_until_ready(lambda: get_url(f"{url}/server_info"), web_server)
                supervisor.start(_daemon(workspace))
                report(f"UI ready at {url}")
                supervisor.run(_SelectionWatch(settings, url, report).check)
        except KeyboardInterrupt:
            report("stopped")


class _SelectionWatch:
    """Makes the web server load our code again where patterns mean other markets than before.

    The daemon does so by itself, once a minute.
    """

    def __init__(self, settings: Settings, url: str, report: Callable[[str], None]) -> None:
        self._settings, self._url, self._report = settings, url, report
        self._has_patterns = any(venue.patterns for venue in settings.venues.values())
        self._seen = self._newest() if self._has_patterns else 0
        self._next_check = 0.0

    def check(self) -> None:
        """Look at the ledger, every SELECTION_CHECK_SECONDS."""
        if not self._has_patterns or time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + SELECTION_CHECK_SECONDS
        if (newest := self._newest()) == self._seen:
            return
        try:
            reload_location(self._url, _LOCATION)
        except OSError:
            return  # the web server starts again; the next check tries once more
        self._seen = newest
        self._report("patterns of the universe mean other markets now; the code was loaded again")

    def _newest(self) -> int:
        ledger = Ledger(self._settings.state, reveal_secret(self._settings.database))
        try:
            return ledger.instruments.newest_selection()
        finally:
            ledger.close()


def _write_workspace(home: Path, code_port: int) -> str:
    """Write the address of the code server, or web server and daemon would each start one."""
    file = home / "workspace.yaml"
    address = {"host": "127.0.0.1", "port": code_port, "location_name": _LOCATION}
    write_file(file, json.dumps({"load_from": [{"grpc_server": address}]}))  # JSON is YAML
    return str(file)


def _code_server(port: int) -> Service:
    """A process that the UI can reload; behind it, its child holds our code.

    The child ends by itself when the process in front has been silent for a while.
    """
    address = ["-h", "127.0.0.1", "-p", str(port)]
    code = ["-m", f"{_LOCATION}.definitions", "--location-name", _LOCATION]
    ttl = ["--heartbeat-ttl", str(_CODE_SERVER_TTL_SECONDS)]
    options = ["--use-python-environment-entry-point", *ttl, "--log-level", "warning"]
    command = ["dagster", "code-server", "start", *address, *code, *options]
    return Service("the code server", command, needs_child=True)


def _web_server(workspace: str, host: str, port: int) -> Service:
    command = [_WEB_SERVER, "-w", workspace, "-h", host, "-p", str(port)]
    return Service("the web server", command)


def _daemon(workspace: str) -> Service:
    return Service("the daemon", [_DAEMON, "run", "-w", workspace])


# --------------------------------------------------------------------------------- many machines
class Role(StrEnum):
    """What one machine does for an instance that many machines share."""

    WEB = "web"
    DAEMON = "daemon"
    WORKER = "worker"


class RoleOptions(NamedTuple):
    """Where `web` listens, and how many runs a `worker` executes at once."""

    host: str
    port: int
    processes: int = 1


def serve_role(
    settings: Settings, role: Role, options: RoleOptions, *, report: Callable[[str], None]
) -> None:
    """Serve one role until the process is asked to end; restart it when it dies."""
    environment = _shared_environment(settings)
    service = _role_service(settings, role, options, environment=environment)
    lock, check = None, lambda: None
    if role == Role.DAEMON:
        lock = _DaemonLock(Ledger(settings.state, reveal_secret(settings.database)))
        check = lock.check
    elif role == Role.WEB:
        check = _SelectionWatch(settings, _local_url(options), report).check
    with lock or nullcontext(), Supervisor(environment, report) as supervisor:
        supervisor.start(service)
        report(f"{service.name} starts")
        supervisor.run(check)


def _local_url(options: RoleOptions) -> str:
    """Return where this machine reaches the web server that listens there."""
    host = "127.0.0.1" if options.host == "0.0.0.0" else options.host  # noqa: S104 - not bound
    return f"http://{host}:{options.port}"


def is_role_alive(settings: Settings, role: Role, options: RoleOptions) -> bool:
    """Whether the role that runs on this machine is alive."""
    environment = _shared_environment(settings)
    if role == Role.WEB:
        try:
            get_url(f"{_local_url(options)}/server_info")
        except OSError:
            return False
        return True
    ping = [*_CELERY, "inspect", "ping", "--destination", _worker_name(settings)]
    command = [_DAEMON, "liveness-check"] if role == Role.DAEMON else [*ping, "--timeout", "10"]
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return start_module(command, environment, **output).wait() == 0


class _DaemonLock:
    """A lock in the database, as two daemons would ask for everything twice."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._lock, self._next_check = ledger, ExitStack(), 0.0

    def __enter__(self) -> Self:
        if not self._lock.enter_context(self._ledger.lock("daemon", wait=False)):
            raise BadInput(
                "another daemon already serves this database; there must be one, as two would ask "
                "for everything twice"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def check(self) -> None:
        """Acquire the lock again after a restart of the server; BadInput where that fails."""
        if time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + _LOCK_CHECK_SECONDS
        try:
            self._ledger.check_connection()
        except StoreFailed:
            self._lock.close()
            self.__enter__()


def _shared_environment(settings: Settings) -> dict[str, str]:
    if not settings.database:
        raise BadInput(
            f"{settings.source}: there is no `database:`, which many machines need; on one, use "
            "`marketdata dev`"
        )
    environment = dagster_environment(settings)
    home = Path(environment["DAGSTER_HOME"])
    write_file(home / "dagster_celery_config.py", _CELERY_CONFIG)
    path = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
    return environment | {"PYTHONPATH": path}


_CELERY_CONFIG = """\
# Written by `marketdata serve`: the module that `celery -A dagster_celery.app` reads.
from marketdata_assets.dagster_ext.celery_runs import celery_config

globals().update(celery_config())
"""


def _role_service(
    settings: Settings, role: Role, options: RoleOptions, *, environment: dict[str, str]
) -> Service:
    workspace = str(ROOT / "workspace.yaml")
    match role:
        case Role.WEB:
            return _web_server(workspace, options.host, options.port)
        case Role.DAEMON:
            return _daemon(workspace)
        case Role.WORKER:
            if BROKER not in environment:
                raise BadInput(
                    "there is no `broker:`; a worker takes its runs from one, such as "
                    "redis://host:6379/0"
                )
            return _worker(settings, options.processes)


def _worker(settings: Settings, processes: int) -> Service:
    name = ["--hostname", _worker_name(settings), "--queues", "dagster"]
    options = ["--concurrency", str(processes), "-O", "fair", "--loglevel", "WARNING"]
    return Service("the worker", [*_CELERY, "worker", *name, *options])


def _worker_name(settings: Settings) -> str:
    """Return the name of the worker of this state folder on this machine."""
    return f"{zlib.crc32(str(settings.state).encode()):08x}@{socket.gethostname()}"
