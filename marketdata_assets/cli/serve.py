"""Servers for people: the Dagster UI with its daemon, and the demo's own exchange and universe."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from marketdata_assets.cli.processes import (
    BROKER,
    ROOT,
    Service,
    Supervisor,
    dagster_environment,
    only_one,
    start,
    stop,
    write_file,
)
from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.settings.fields import reveal_secret
from marketdata_assets.settings.load import PREFIX, load_settings
from marketdata_assets.settings.universe import Settings

_LOCATION = "marketdata_assets"
_STARTUP = 120
DEMO_MONTHS = 2


def serve_ui(settings: Settings, port: int, say: Callable[[str], None]) -> None:
    """Code server, web server and daemon until Ctrl-C; one that dies is started again."""
    environment, url = dagster_environment(settings), f"http://127.0.0.1:{port}"
    with only_one(environment, url):
        _check_free(port)
        code_port = _free_port()
        workspace = _workspace(Path(environment["DAGSTER_HOME"]), code_port)
        say(f"starting the UI at {url} (Ctrl-C ends it) ...")
        try:
            with Supervisor(environment, say) as supervisor:
                _await(lambda: _connect(code_port), supervisor.begin(_code_server(code_port)))
                web = Service(
                    "the web server",
                    ["dagster_webserver", "-w", workspace, "-h", "127.0.0.1", "-p", str(port)],
                )
                _await(lambda: _get(f"{url}/server_info"), supervisor.begin(web))
                # ours looks after runs that are processes of this machine; those of workers are
                # looked after by their launcher
                module = (
                    "dagster._daemon"
                    if settings.broker
                    else "marketdata_assets.dagster_ext.launcher"
                )
                supervisor.begin(Service("the daemon", [module, "run", "-w", workspace]))
                say(f"UI ready at {url}")
                supervisor.tend()
        except KeyboardInterrupt:
            say("stopped")


# --------------------------------------------------------------------------------- many machines
ROLES = ("web", "daemon", "worker")


def serve_role(
    settings: Settings, role: str, host: str, port: int, processes: int, say: Callable[[str], None]
) -> None:
    """One role of an instance that many machines share, until we are asked to end; it is started again
    when it dies.
    """
    environment = _shared_environment(settings)
    service = _role(settings, role, environment, host, port, processes)
    only = (
        _Only(Ledger(settings.state, reveal_secret(settings.database)))
        if role == "daemon"
        else None
    )
    with only or nullcontext(), Supervisor(environment, say) as supervisor:
        supervisor.begin(service)
        say(f"{service.name} starts")
        supervisor.tend(only.look if only else lambda: None)


class _Only:
    """Holds a lock in the database, as two daemons would ask for everything twice; takes it again when
    the server was restarted.
    """

    def __init__(self, database: Ledger) -> None:
        self._database, self._held, self._next = database, ExitStack(), 0.0

    def __enter__(self) -> Self:
        if not self._held.enter_context(self._database.lock("daemon", wait=False)):
            raise BadInput(
                "another daemon already serves this database; there must be one, as two would ask for everything twice"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def look(self) -> None:
        """Whether it is still held. Raises BadInput when somebody else was faster to take it again."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 5
        try:
            self._database.rows("SELECT 1")
        except StoreFailed:
            self._held.close()
            self.__enter__()


def check_role(settings: Settings, role: str, host: str, port: int) -> bool:
    """Whether the role that runs on this machine is alive."""
    environment = _shared_environment(settings)
    if role == "web":
        try:
            _get(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/server_info")  # noqa: S104 - asked, not bound
        except OSError:
            return False
        return True
    ping = ["inspect", "ping", "--destination", _node(settings), "--timeout", "10"]
    arguments = (
        ["dagster._daemon", "liveness-check"]
        if role == "daemon"
        else ["celery", "-A", "dagster_celery.app", *ping]
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return start(arguments, environment, **quiet).wait() == 0


def _shared_environment(settings: Settings) -> dict[str, str]:
    if not settings.database:
        raise BadInput(
            f"{settings.source}: there is no `database:`, which many machines need; on one, use `marketdata dev`"
        )
    environment = dagster_environment(settings)
    home = Path(environment["DAGSTER_HOME"])
    write_file(home / "dagster_celery_config.py", _CELERY_CONFIG)
    return environment | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
    }


_CELERY_CONFIG = """\
# Made by `marketdata serve`: the module that `celery -A dagster_celery.app` reads.
from marketdata_assets.dagster_ext.celery_runs import celery_config

globals().update(celery_config())
"""


def _role(
    settings: Settings, role: str, environment: dict[str, str], host: str, port: int, processes: int
) -> Service:
    workspace = str(ROOT / "workspace.yaml")
    if role == "web":
        return Service(
            "the web server", ["dagster_webserver", "-w", workspace, "-h", host, "-p", str(port)]
        )
    if role == "daemon":
        return Service("the daemon", ["dagster._daemon", "run", "-w", workspace])
    if BROKER not in environment:
        raise BadInput(
            "there is no `broker:`; a worker takes its runs from one, such as redis://host:6379/0"
        )
    how = [
        "--queues",
        "dagster",
        "--hostname",
        _node(settings),
        "--concurrency",
        str(processes),
        "-O",
        "fair",
        "--loglevel",
        "WARNING",
    ]
    return Service("the worker", ["celery", "-A", "dagster_celery.app", "worker", *how])


def _node(settings: Settings) -> str:
    """The worker of this state folder on this machine."""
    return f"{zlib.crc32(str(settings.state).encode()):08x}@{socket.gethostname()}"


# --------------------------------------------------------------------------------- one machine
def _workspace(home: Path, code_port: int) -> str:
    """Tell web server and daemon where our one code server is; alone, each would start its own."""
    file = home / "workspace.yaml"
    address = {"host": "127.0.0.1", "port": code_port, "location_name": _LOCATION}
    write_file(file, json.dumps({"load_from": [{"grpc_server": address}]}))  # JSON is YAML
    return str(file)


def _code_server(port: int) -> Service:
    """A door that can be reloaded and, behind it, the process with our code; that one ends when the
    door is silent.
    """
    where = [
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-m",
        f"{_LOCATION}.definitions",
        "--location-name",
        _LOCATION,
    ]
    how = [
        "--use-python-environment-entry-point",
        "--heartbeat-ttl",
        "10",
        "--log-level",
        "warning",
    ]
    return Service(
        "the code server", ["dagster", "code-server", "start", *where, *how], two_processes=True
    )


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise BadInput(f"port {port} is taken; choose another with --port") from None


def _await(probe: Callable[[], None], child: subprocess.Popen[str]) -> None:
    """Wait until a child of ours answers."""
    for _ in range(_STARTUP * 10):
        try:
            return probe()
        except OSError:
            pass
        try:
            child.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        raise StoreFailed("a server ended while starting; its messages stand above")
    raise StoreFailed(f"a server did not answer within {_STARTUP} s; its messages stand above")


def _get(url: str) -> None:
    with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - loopback, written here
        pass


def _connect(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


@contextmanager
def run_sandbox() -> Iterator[str]:
    """The sandbox exchange in a process of its own, on a free port; its base_url."""
    port = _free_port()
    child = start(
        ["marketdata_assets.cli.main", "sandbox", "--port", str(port)],
        dict(os.environ),
        stdout=subprocess.DEVNULL,
    )
    try:
        _await(lambda: _get(f"http://127.0.0.1:{port}/api/v3/ping"), child)
        yield f"http://127.0.0.1:{port}/binance"
    finally:
        stop(child)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def demo_universe(folder: Path, url: str) -> Settings:
    """Write the demo's universe (two markets, the last whole months and the open one) and read it as
    any other.
    """
    today = datetime.now(UTC).replace(day=1)
    since = today
    for _ in range(DEMO_MONTHS):
        since = (since - timedelta(days=1)).replace(day=1)
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "universe.yaml"
        file.write_text(
            _UNIVERSE.format(since=since.date(), url=url, folder=folder), encoding="utf-8"
        )
    except OSError as error:
        raise StoreFailed(
            f"{folder} cannot be written: {error.strerror}; choose another --folder"
        ) from None
    os.environ[PREFIX + "UNIVERSE"] = str(file)  # for the processes of Dagster that the demo starts
    return load_settings()


_UNIVERSE = """\
# Made by `marketdata demo`: two synthetic markets of the sandbox exchange.
venues:
  binance:
    symbols: [BTC/USDT, ETH/USDT]
    since: {since}
    reference: [1h]
    base_url: {url}
lake: {folder}/lake
rollups: duckdb
duckdb: {folder}/market.duckdb
state: {folder}/state
"""
