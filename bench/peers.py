"""Measures our package and the alternatives of a trading desk on the same bars: Markdown tables.

    python bench/peers.py [--only rollup,bytes,pipeline,replace,queries,fetch,dagster]
        [--rounds 3] [--quick] [--out FILE] [--save] [--compare]

The peers (pandas, DuckDB, Polars, Delta Lake, Iceberg, ArcticDB, ccxt, freqtrade) and our package
are installed, pinned, into two virtual environments in the user's cache folder (MARKETDATA_BENCH
names another one), and the data is created there once. Every measurement is a separate process. The
contenders take turns, and the tables show medians over all turns. No bench asserts a time. The
bench checks whether the digits are kept, and the table shows it: a speed that loses a digit does
not count. `--quick` uses two markets instead of twenty. `--save` stores the ratios in
bench/results.json and writes docs/performance.md; `--compare` (`make bench`) says which ratios are
worse than the stored ones, and ends with 1 if any is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from results import regressions, save

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(
    os.environ.get("MARKETDATA_BENCH")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "marketdata-bench"
)
MAIN = ["pandas==3.1.1", "deltalake==1.6.6", "pyiceberg[sql-sqlite,pyarrow]==0.12.0"]
OTHER = [
    "arcticdb==6.28.2",
    "freqtrade==2026.9",
    "pandas==2.3.3",
    "polars==2.1.0",
    "pyarrow==26.0.1",
]
"""ArcticDB needs pandas 2."""
Found = dict[str, dict[str, Any]]


# --------------------------------------------------------------------------------- environments
def python_of(name: str) -> str:
    """Return the interpreter of a virtual environment, which is created when it is missing."""
    wanted = {
        "main": ["--constraint", str(ROOT / "requirements.lock"), "--editable", str(ROOT), *MAIN],
        "other": OTHER,
    }[name]
    place, stamp = CACHE / f"venv-{name}", CACHE / f"venv-{name}" / ".installed"
    python = place / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != repr(wanted):
        print(f"installing {name} into {place}", file=sys.stderr, flush=True)
        uv = shutil.which("uv") or shutil.which(str(ROOT / ".venv" / "bin" / "uv"))
        make = (
            [uv, "venv", "--quiet", "--clear", "--python", sys.executable]
            if uv
            else [sys.executable, "-m", "venv", "--clear"]
        )
        install = (
            [uv, "pip", "install", "--quiet", "--python", str(python)]
            if uv
            else [str(python), "-m", "pip", "install", "--quiet"]
        )
        subprocess.run([*make, str(place)], check=True)
        subprocess.run([*install, *wanted], check=True)
        stamp.write_text(repr(wanted))
    return str(python)


def run_in_venv(venv: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'bench'}{os.pathsep}{ROOT}",
        "MARKETDATA_BENCH": str(CACHE),
        "DAGSTER_DISABLE_TELEMETRY": "1",
    }
    command = [python_of(venv), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# --------------------------------------------------------------------------------- measuring
def contenders(sections: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return section, name and environment of each contender, in the order of the tables."""
    code = "import json; from peers_work import CONTENDERS; "
    code += "print(json.dumps([(c.section, c.name, c.venv) for c in CONTENDERS]))"
    done = run_in_venv("main", "-c", code)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [
        (section, name, venv)
        for section, name, venv in json.loads(done.stdout)
        if section in sections
    ]


def run_turn(
    section: str, name: str, venv: str, folder: Path, rounds: int, quick: bool
) -> Found | str:
    """Run one process; return what it measured, or the reason why it failed."""
    script = str(ROOT / "bench" / "peers_work.py")
    done = run_in_venv(venv, script, section, name, str(folder), str(rounds), str(int(quick)))
    if done.returncode:
        return (done.stderr.strip() or "it ended without a message").splitlines()[-1][:200]
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def combine_turns(turns: list[Found | str]) -> Found | str:
    """Combine all turns of a contender."""
    good = [t for t in turns if not isinstance(t, str)]
    if not good:
        return str(turns[0])
    return {
        op: {
            "values": [t[op]["value"] for t in good],
            **{k: _median_of(k, op, good) for k in ("wall", "cpu", "rss")},
        }
        for op in good[0]
    }


def _median_of(key: str, op: str, turns: list[Found]) -> float:
    numbers = (
        [t[op][key] for t in turns] if key == "rss" else [n for t in turns for n in t[op][key]]
    )
    return statistics.median(numbers) if numbers else 0.0


# --------------------------------------------------------------------------------- tables
class Section(NamedTuple):
    """A table: title, goal, header, and a function for the cells of one contender beside ours."""

    title: str
    goal: str
    header: tuple[str, ...]
    cells: Callable[[Found, Found, int], list[str]]


def _throughput(found: Found, ours: Found, bars: int) -> list[str]:
    run = found["run"]
    measured = found.get("exact") or found.get("size")
    last = measured["values"][0] if measured else ""
    rate, cpu = bars / run["wall"] / 1e6, bars / run["cpu"] / 1e6
    size = f"{last / 1e6:.0f} MB" if isinstance(last, int) else last
    ratio = run["wall"] / ours["run"]["wall"], run["cpu"] / ours["run"]["cpu"]
    return [
        f"{rate:.1f}",
        f"{run['cpu']:.2f}",
        f"{cpu:.1f}",
        f"{run['rss']:.0f}",
        f"{ratio[0]:.2f}",
        f"{ratio[1]:.2f}",
        str(size),
    ]


def _bytes(found: Found, ours: Found, _: int) -> list[str]:
    cells = []
    for name, op in found.items():
        value, mine = op["values"][0], ours[name]["values"][0]
        kept = (
            "every digit"
            if not value["lost"]
            else f"{value['lost'] / value['of']:.2%} of values lose digits"
        )
        cells += [f"{value['bytes']:.1f}", f"{value['bytes'] / mine['bytes']:.2f}", kept]
    return [*cells, str(op["values"][0]["values"])]


def _replace(found: Found, ours: Found, _: int) -> list[str]:
    run = found["run"]
    exact = found["exact"]["values"][0] if "exact" in found else ""
    return [
        f"{run['wall'] * 1000:.1f}",
        f"{run['cpu'] * 1000:.1f}",
        f"{run['wall'] / ours['run']['wall']:.2f}",
        exact,
    ]


def _queries(found: Found, ours: Found, _: int) -> list[str]:
    return [f"{op['wall'] * 1000:.1f} ({op['values'][0]:,} rows)" for op in found.values()]


def _fetch(found: Found, ours: Found, _: int) -> list[str]:
    cells = []
    for op in found.values():
        rate, limit, cpu, million = (
            statistics.median(v[k] for v in op["values"])
            for k in ("rate", "limit", "cpu", "cpu_per_million")
        )
        cells += [f"{rate / 1000:.1f} k", f"{limit:.0%}", f"{cpu:.0%}", f"{million:.1f}"]
    return cells


def _dagster(found: Found, ours: Found, _: int) -> list[str]:
    def cost(of: Found, key: str) -> float:
        return (of["job"][key] - of["flows"][key]) / of["partitions"]["values"][0] * 1000

    each = found["job"]["wall"] / found["partitions"]["values"][0] * 1000
    return [
        f"{each:.1f}",
        f"{cost(found, 'wall'):.1f}",
        f"{cost(found, 'cpu'):.1f}",
        f"{cost(found, 'wall') / cost(ours, 'wall'):.2f}",
    ]


_RATES = ("M bars/s", "CPU s", "M bars / CPU s", "extra RSS, MB", "time x ours", "CPU x ours")
_FETCHED = ("bars/s", "of the limit", "of a core", "CPU s per million bars")
SECTIONS = {
    "rollup": Section(
        "Rollup: 8 timeframes, nine columns, in memory",
        "30 M bars/s, at most 50 MB extra; "
        "6x DuckDB and Polars each-from-1m, 2x pandas hierarchical",
        (*_RATES, "digits"),
        _throughput,
    ),
    "bytes": Section(
        "Bytes per bar, nine real columns",
        "at most zstd floats' bytes, every digit kept",
        ("BTC", "x ours", "digits", "SOL", "x ours", "digits", "values per bar"),
        _bytes,
    ),
    "pipeline": Section(
        "Read, validate, roll up, write",
        "7 M bars/s, at most 100 MB extra",
        (*_RATES, "rollups written, on disk"),
        _throughput,
    ),
    "replace": Section(
        "Replace one market-day",
        "30 ms in all nine tables; Delta 63 ms for one",
        ("ms", "CPU ms", "x ours", "digits"),
        _replace,
    ),
    "queries": Section(
        "Queries, warm, ms",
        "market-day 2.5, stored 1h year 2, cross-section 10, newest of all 2",
        (
            "market-day 1m",
            "market-year 1m",
            "market-year stored 1h",
            "an hour of all markets",
            "newest bar of all",
        ),
        _queries,
    ),
    "fetch": Section(
        "Fetch over loopback; the limit is 50,000 bars/s",
        "90 % of the limit at 50 ms latency, under 10 % of a core",
        (*(f"{h}, 50 ms" for h in _FETCHED), *(f"{h}, 0 ms" for h in _FETCHED)),
        _fetch,
    ),
    "dagster": Section(
        "Dagster's overhead per partition, ms",
        "15 ms; default 183 to 243",
        ("all", "beyond the flows", "beyond the flows, CPU", "x ours"),
        _dagster,
    ),
}


def table(section: str, results: dict[str, Found | str], bars: int) -> str:
    """Return one section as Markdown; a contender that failed shows the reason."""
    about = SECTIONS[section]
    lines = [
        f"## {about.title}",
        "",
        f"Goal: {about.goal}",
        "",
        "| | " + " | ".join(about.header) + " |",
    ]
    lines.append("|---" * (len(about.header) + 1) + "|")
    ours = next((r for r in results.values() if not isinstance(r, str)), None)
    for name, found in results.items():
        cells = (
            [found] if isinstance(found, str) or ours is None else about.cells(found, ours, bars)
        )
        lines.append(f"| {name} | " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of each contender, and rounds in each turn"
    )
    parser.add_argument("--quick", action="store_true", help="two markets instead of twenty")
    parser.add_argument("--out", type=Path, help="a file to which the tables are appended")
    parser.add_argument("--save", action="store_true", help="store the ratios, write the docs")
    parser.add_argument("--compare", action="store_true", help="compare with the stored ratios")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    return options


def prepare(quick: bool) -> tuple[Path, int]:
    """Create the data once; return its folder and the number of bars."""
    prepared = run_in_venv("main", "-c", f"from peers_data import prepare; print(prepare({quick}))")
    if prepared.returncode:
        raise SystemExit(prepared.stderr)
    folder = Path(prepared.stdout.strip().splitlines()[-1])
    for abandoned in folder.glob("scratch-*"):  # turns that were stopped leave these
        shutil.rmtree(abandoned, ignore_errors=True)
    code = f"from peers_data import count; print(count({str(folder)!r}))"
    return folder, int(run_in_venv("main", "-c", code).stdout)


def run_section(
    section: str, everyone: list[tuple[str, str, str]], folder: Path, options: argparse.Namespace
) -> dict[str, Found | str]:
    mine = [c for c in everyone if c[0] == section]
    turns: dict[str, list[Found | str]] = {name: [] for _, name, _ in mine}
    for _ in range(1 if section == "bytes" else options.rounds):
        for _, name, venv in mine:
            print(f"{section}: {name}", file=sys.stderr, flush=True)
            turns[name].append(run_turn(section, name, venv, folder, options.rounds, options.quick))
    return {name: combine_turns(t) for name, t in turns.items()}


def main() -> None:
    options = parse_options()
    folder, bars = prepare(options.quick)
    everyone = contenders(options.only)
    results, tables = {}, {}
    for section in options.only:
        results[section] = run_section(section, everyone, folder, options)
        tables[section] = table(section, results[section], bars)
        print(tables[section], flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(tables[section] + "\n")
    if options.save:
        save(tables, results)
    if options.compare and (worse := regressions(results)):
        raise SystemExit("\n".join(worse))


if __name__ == "__main__":
    main()
