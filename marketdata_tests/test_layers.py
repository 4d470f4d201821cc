"""The house keeps its arrows: a room imports only rooms to its left, and every framework has one
home (DESIGN.md, section 3).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import marketdata_assets.errors

PACKAGE = "marketdata_assets"
ROOT = Path(marketdata_assets.errors.__file__).parent
MODULES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.rglob("*.py"))
}

_LOW = {"errors", "system", "retry", "network", "model"}
_TOOLS = {"quality", "transforms", "storage", "ledger", "notify", "charts"}
_JOINED = _LOW | {"settings", "venues", "sources"} | _TOOLS | {"context"}
_DOORS = _JOINED | {"flows", "dagster_ext"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "system": {"errors"},
    "retry": {"errors"},
    "network": {"errors"},
    "model": {"errors"},
    "settings": _LOW,
    "venues": {"errors", "model"},
    "sources": _LOW | {"settings", "venues"},
    **dict.fromkeys(_TOOLS, _LOW | {"venues"}),
    "context": _JOINED,
    "flows": _JOINED - {"context"},
    "dagster_ext": _JOINED | {"flows"},
    **dict.fromkeys(("defs", "cli", "reader"), _DOORS),
    "__init__": {"reader"},
    "definitions": _DOORS | {"defs"},
}
"""What each room may import, besides itself."""

STAGES = ("read", "fetch", "derive", "prove", "operate")
"""The folders of `flows`; each imports only itself and those before it."""

HOMES: dict[str, tuple[str, ...]] = {
    "dagster": ("defs/", "dagster_ext/", "definitions.py"),
    "dagster_duckdb": ("defs/",),
    "dagster_celery": ("dagster_ext/",),
    "dagster_postgres": ("dagster_ext/",),
    "celery": ("dagster_ext/",),
    "ccxt": ("sources/",),
    "aiohttp": ("sources/",),
    "aiohttp_socks": ("sources/",),
    "duckdb": ("storage/",),
    "deltalake": ("storage/",),
    "boto3": ("storage/",),
    "botocore": ("storage/",),
    "fsspec": ("storage/",),
    "sqlalchemy": ("ledger/", "dagster_ext/"),
    "alembic": ("ledger/migrations/",),
    "psycopg2": ("ledger/",),
    "pandera": ("quality/",),
    "pydantic": ("settings/", "defs/"),
    "yaml": ("settings/", "cli/dagster_home.py"),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "apprise": ("notify.py",),
    "psutil": ("system.py", "cli/supervisor.py"),
    "fcntl": ("system.py",),
}
"""The rooms and files that may import a framework."""
WARM_UPS = {("defs/backfill_worker.py", "ccxt.async_support")}
"""Imported by name and not used: so that the first range does not wait for it."""

CLOCKS = re.compile(r"(^|\.)(datetime\.(now|utcnow|today)|date\.today|time\.(time|time_ns|sleep))$")
ALLOWED_CLOCKS = {
    ("settings/universe.py", "datetime.now"): "our clock, unless MARKETDATA_NOW replaces it",
    ("settings/parts.py", "datetime.now"): "what MARKETDATA_NOW with a speed counts from",
    ("ledger/postgres.py", "time.time"): "how far the server's clock is ahead of ours",
    ("storage/cache.py", "time.time_ns"): "whether a file has just changed",
    ("storage/s3.py", "datetime.now"): "how old an unfinished upload is",
    ("defs/partitions.py", "datetime.now"): "how far a clock of our own is ahead of Dagster's",
    ("cli/demo.py", "datetime.now"): "the demo shows the months before today",
    ("sources/ccxt_rest.py", "datetime.now"): "for venues without a clock",
    ("sources/ccxt_rest.py", "time.time"): "when a request was sent, for the fetch log",
    ("sources/ccxt_errors.py", "time.time"): "a Retry-After may be a date",
    ("sources/guards.py", "time.time"): "the default of a clock that is a parameter",
    ("sources/sandbox/server.py", "time.time_ns"): "the exchange's clock, unless it is a parameter",
}


def imports(source: str, file: str) -> Iterator[str]:
    """The dotted name of everything a module imports, inside functions too; relative imports
    resolved.
    """
    folder = [PACKAGE, *Path(file).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [
                    *(folder[: len(folder) - node.level + 1] if node.level else []),
                    *filter(None, [node.module]),
                ]
            )
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            yield from (
                a.value
                for a in node.args[:1]
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def wrong_arrows(source: str, file: str) -> list[str]:
    """The imports that the house forbids to this file."""
    room, found = Path(file).parts[0].removesuffix(".py"), []
    for name in imports(source, file):
        top, _, rest = name.partition(".")
        if top == PACKAGE:
            target = rest.partition(".")[0]
            forbidden = target != room and target not in ARROWS[room]
        else:
            forbidden = (
                top in HOMES and not file.startswith(HOMES[top]) and (file, name) not in WARM_UPS
            )
        found += [f"{file} imports {name}"] if forbidden else []
    return found


def clocks(source: str) -> set[str]:
    """The clocks a module reads and the sleeps it sleeps, under their own names."""
    tree = ast.parse(source)
    aliases = {
        a.asname: a.name
        for n in ast.walk(tree)
        if isinstance(n, ast.Import)
        for a in n.names
        if a.asname
    }
    froms = {
        f"{n.module}.{a.name}"
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    }
    chains = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    full = {
        ".".join([aliases.get(first, first), *rest])
        for first, *rest in (chain.split(".") for chain in chains)
    }
    return {match.group(2) for name in full | froms if (match := CLOCKS.search(name))}


def test_every_room_is_in_the_table():
    assert {Path(file).parts[0].removesuffix(".py") for file in MODULES} <= set(ARROWS)


def test_no_arrow_points_right():
    assert [arrow for file, source in MODULES.items() for arrow in wrong_arrows(source, file)] == []


def test_every_module_has_a_docstring():
    assert [
        file for file, source in MODULES.items() if not ast.get_docstring(ast.parse(source))
    ] == []


def test_clocks_are_read_only_where_a_reason_is_written_down():
    assert {(file, clock) for file, source in MODULES.items() for clock in clocks(source)} == set(
        ALLOWED_CLOCKS
    )


def modules_imported(file: str) -> set[str]:
    """Return the modules of the package that a module imports, by file, inside functions too."""
    found = set()
    for name in imports(MODULES[file], file):
        top, _, path = name.replace(".", "/").partition("/")
        while top == PACKAGE and path:
            targets = [t for t in (f"{path}.py", f"{path}/__init__.py") if t in MODULES]
            if targets:
                found.add(targets[0])
                break
            path = path.rpartition("/")[0]
    return found - {file}


def test_no_modules_import_each_other_in_a_circle():
    graph = {file: modules_imported(file) for file in MODULES}
    while leaves := [file for file, targets in graph.items() if not targets & graph.keys()]:
        for file in leaves:
            del graph[file]
    assert sorted(graph) == []


def test_the_stages_of_flows_import_only_earlier_ones():
    stage_of = {
        file: STAGES.index(file.split("/")[1])
        for file in MODULES
        if file.startswith("flows/") and file.count("/") == 2
    }
    assert len(stage_of) > 30
    wrong = [
        f"{file} imports {target}"
        for file, stage in stage_of.items()
        for target in modules_imported(file) & stage_of.keys()
        if stage_of[target] > stage
    ]
    assert wrong == []


def test_the_private_api_of_dagster_is_imported_in_one_room_and_with_a_reason():
    for file, source in MODULES.items():
        private = [n for n in imports(source, file) if re.match(r"dagster\w*\.(.*\.)?_", n)]
        assert not private or file.startswith("dagster_ext/"), f"{file} imports {private}"


def definitions() -> Iterator[tuple[str, str]]:
    """Yield every name that the package, its tests and its benches define, with its file."""
    root = ROOT.parent
    for file in (
        p for room in (PACKAGE, "marketdata_tests", "bench") for p in (root / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield node.name, file.relative_to(root).as_posix()
            elif isinstance(node, ast.arg):
                yield node.arg, file.relative_to(root).as_posix()
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id, file.relative_to(root).as_posix()


OLD_WORDS = {
    "Tell",
    "tell",
    "tell_nobody",
    "says",
    "Told",
    "told",
    "TOLD_SCHEMA",
    "is_told",
    "take_in",
    "Beside",
    "beside",
    "filled",
    "left_of",
    "without",
    "holes",
    "merged",
    "_believe",
    "Look",
    "look",
    "_Inquiry",
    "_doubts",
    "_insisted",
    "Agreement",
    "Ask",
    "ask",
    "asks",
    "forget_asks",
    "Letter",
    "beat",
    "Outline",
    "rolled",
    "whole_at",
    "Habit",
    "Silence",
    "quiet",
    "Made",
    "made",
    "lacking",
    "come",
    "chill",
    "set_aside",
    "sweep",
    "second_looks",
    "_mourn",
    "_bury",
    "_heirs",
    "_hear",
    "toolbox",
    "Toolbox",
    "upkeep",
}
"""Words of a private dialect that the field's words have replaced."""


def test_no_name_is_of_the_old_dialect():
    assert sorted({(name, file) for name, file in definitions() if name in OLD_WORDS}) == []


def test_no_class_name_stands_twice():
    names = Counter(
        node.name
        for source in MODULES.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_only_doors_take_the_whole_context():
    takers = {
        f"{file}:{node.name}"
        for file, source in MODULES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.annotation and ast.unparse(argument.annotation).strip("'\"") == "Context"
    }
    assert len(takers) <= 20
    assert {taker.split("/")[0] for taker in takers} <= {"cli", "defs", "reader.py:__init__"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/bar.py", "from marketdata_assets.settings.universe import Settings"),
        ("model/bar.py", "from marketdata_assets import storage"),
        ("model/bar.py", "from ..ledger import ledger"),
        ("storage/parquet.py", "import marketdata_assets.quality.rules"),
        (
            "storage/parquet.py",
            "def read():\n    from marketdata_assets.sources.base import Source",
        ),
        (
            "storage/parquet.py",
            "import importlib\nimportlib.import_module('marketdata_assets.sources.base')",
        ),
        ("quality/rules.py", "from marketdata_assets.settings.universe import Settings"),
        ("context.py", "from marketdata_assets.flows.fetch.plan import BackfillPlanner"),
        ("flows/fetch/plan.py", "from marketdata_assets.cli.main import main"),
        ("cli/main.py", "from marketdata_assets.defs.assets import raw_asset"),
        ("defs/assets.py", "from marketdata_assets.definitions import defs"),
        ("flows/fetch/plan.py", "import dagster as dg"),
        ("cli/main.py", "def run():\n    from dagster import materialize"),
        ("flows/fetch/plan.py", "import ccxt.async_support as ccxt"),
        (
            "flows/read/bars.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import duckdb",
        ),
        ("defs/assets.py", "__import__('boto3')"),
    ],
)
def test_an_arrow_that_points_right_is_found(file: str, source: str):
    assert len(wrong_arrows(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "sources/ccxt_rest.py",
            "import ccxt\nfrom marketdata_assets.settings.universe import Venue",
        ),
        (
            "storage/warehouse.py",
            "import duckdb\nfrom .lake import Lake\nfrom marketdata_assets.errors import Damaged",
        ),
        (
            "definitions.py",
            "import dagster\nfrom marketdata_assets.defs.jobs import build_definitions",
        ),
        (
            "settings/load.py",
            "import yaml, dataclasses\nfrom marketdata_assets.errors import BadInput",
        ),
    ],
)
def test_an_arrow_that_points_left_is_let_through(file: str, source: str):
    assert wrong_arrows(source, file) == []


@pytest.mark.parametrize(
    ("source", "clock"),
    [
        ("from datetime import datetime, UTC\nnow = datetime.now(UTC)", "datetime.now"),
        ("import datetime as dt\nnow = dt.datetime.utcnow()", "datetime.utcnow"),
        ("import time\ndef wait(sleep=time.sleep): ...", "time.sleep"),
        ("import time as t\nt.sleep(1)", "time.sleep"),
        ("from time import time\nnow = time()", "time.time"),
        ("from datetime import date\ntoday = date.today()", "date.today"),
    ],
)
def test_a_clock_is_found(source: str, clock: str):
    assert clocks(source) == {clock}


def test_what_is_no_wall_clock_is_let_through():
    assert (
        clocks(
            "import time, asyncio\nbegun = time.monotonic() + time.perf_counter()\n"
            "settings.now()\nasyncio.sleep(0)"
        )
        == set()
    )
