"""Dagster's home in the state folder: its dagster.yaml, and the environment of its processes.

Imports no Dagster.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from marketdata_assets.errors import BadInput, StoreFailed
from marketdata_assets.settings.fields import reveal_secret
from marketdata_assets.settings.load import PREFIX
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.s3_client import get_endpoint_url
from marketdata_assets.system import make_private_folder, start_module

ROOT = Path(__file__).resolve().parents[2]
OWN_DAGSTER_YAML = PREFIX + "DAGSTER_YAML"
"""The variable that names a file which replaces our dagster.yaml."""
POSTGRES, BROKER = PREFIX + "DAGSTER_POSTGRES", PREFIX + "DAGSTER_BROKER"
"""Variables of our processes that hold URLs for dagster.yaml: no file holds their passwords."""
WEB_GUARD = PREFIX + "WEB_GUARD"
"""The variable of the web server with the universe's `web:` as JSON."""
_EXTENSIONS = "marketdata_assets.dagster_ext"
# Three allocators (glibc, jemalloc in polars, Arrow's) each keep what was freed; giving it back
# saves 100 MB a process.
_ALLOCATORS = {
    "MALLOC_ARENA_MAX": "2",
    "_RJEM_MALLOC_CONF": "dirty_decay_ms:1000,muzzy_decay_ms:0",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def dagster_environment(settings: Settings) -> dict[str, str]:
    """Write Dagster's home into the state folder; return the environment of a Dagster process.

    Raises StoreFailed where the folder cannot be written.
    """
    home = settings.state / "dagster"
    with suppress(OSError):  # the next line says what is wrong
        make_private_folder(settings.state)
    write_file(home / "dagster.yaml", _dagster_yaml(settings))
    services = {
        POSTGRES: _with_driver(reveal_secret(settings.database)),
        BROKER: reveal_secret(settings.broker),
    }
    web = {"hosts": settings.web.hosts, "token": reveal_secret(settings.web.token)}
    return {
        **_ALLOCATORS,
        **os.environ,
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "PYTHONWARNINGS": "ignore",
        WEB_GUARD: json.dumps(web),
        **{name: url for name, url in services.items() if url},
    }


def run_for_json(arguments: list[str], settings: Settings) -> dict[str, Any]:
    """Run `python -m ARGUMENTS` in Dagster's home, and return the JSON object that it prints.

    Raises StoreFailed with the last line of its errors where it fails.
    """
    environment = dagster_environment(settings)
    child = start_module(arguments, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = child.communicate()
    if child.returncode:
        last_line = (errors.strip().splitlines() or ["no message"])[-1]
        raise StoreFailed(f"{arguments[0]} failed: {last_line}")
    answer: dict[str, Any] = json.loads(output)
    return answer


def write_file(file: Path, text: str) -> None:
    """Replace a file as a whole, as another process may be reading it. Raises StoreFailed."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    except OSError as error:
        raise StoreFailed(
            f"{file.parent} cannot be written: {error.strerror}; mend the folder or set another "
            "`state:`"
        ) from None


def _dagster_yaml(settings: Settings) -> str:
    """Return our dagster.yaml with what the universe changes in it, or the user's own file."""
    if own := os.environ.get(OWN_DAGSTER_YAML):
        return _read_own(own)
    text = (ROOT / "dagster.yaml").read_text(encoding="utf-8")
    changes: dict[str, Any] = {}
    if settings.database:
        changes |= _postgres_storage()
    if settings.lake.startswith("s3://"):
        changes["compute_logs"] = _s3_logs(settings.lake)
    if not changes and not settings.broker:
        return text
    config = yaml.safe_load(text) | changes
    if settings.broker:
        _use_workers(config)
    return yaml.safe_dump(config, sort_keys=False)


def _read_own(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"environment {OWN_DAGSTER_YAML}: {file} cannot be read ({type(error).__name__})"
        ) from None


def _postgres_storage() -> dict[str, Any]:
    config = {"postgres_url": {"env": POSTGRES}}
    runs, schedules = "dagster_postgres.run_storage", "dagster_postgres.schedule_storage"
    events = f"{_EXTENSIONS}.event_log_postgres"
    return {
        "run_storage": _part(runs, "PostgresRunStorage", config),
        "schedule_storage": _part(schedules, "PostgresScheduleStorage", config),
        "event_log_storage": _part(events, "PooledPostgresEventLogStorage", config),
    }


def _s3_logs(lake: str) -> dict[str, Any]:
    """Keep what runs print beside the lake, so that the UI shows it wherever they ran."""
    parts = urlsplit(lake)
    config: dict[str, Any] = {
        "bucket": parts.netloc,
        "prefix": f"{parts.path.strip('/')}/run_logs".lstrip("/"),
        "skip_empty_files": True,
    }
    if url := get_endpoint_url():
        config |= {"endpoint_url": url, "use_ssl": url.startswith("https://")}
    return _part("dagster_aws.s3.compute_log_manager", "S3ComputeLogManager", config)


def _use_workers(config: dict[str, Any]) -> None:
    """Change a dagster.yaml so that Celery's workers execute runs."""
    celery = {"broker": {"env": BROKER}, "backend": "disabled://"}
    config["run_launcher"] = _part(f"{_EXTENSIONS}.celery_runs", "WorkerRunLauncher", celery)
    config["run_monitoring"]["start_timeout_seconds"] = 900  # a run may wait for a free worker
    config["run_retries"] = {  # of killed workers
        "enabled": True,
        "max_retries": 3,
        "retry_on_asset_or_op_failure": False,
    }
    history = {"key": "marketdata/kind", "value": "missed", "limit": 14}
    config["concurrency"]["runs"] = {
        "max_concurrent_runs": 16,
        "tag_concurrency_limits": [history],
    }


def _part(module: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"module": module, "class": name, "config": config}


def _with_driver(url: str | None) -> str | None:
    """Name the driver that Dagster installs; SQLAlchemy 2.1 would choose another one."""
    return url and "postgresql+psycopg2://" + url.partition("://")[2]
