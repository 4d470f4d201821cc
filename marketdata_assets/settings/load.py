"""Reads the universe from its YAML file and the environment, once, at a door.

The file is `data/universe.yaml`, or the one in `MARKETDATA_UNIVERSE`. Each top-level key may also
come from `MARKETDATA_<KEY>`, written as the same YAML, which wins over the file. `MARKETDATA_NOW`
sets a clock for tests. Nothing is read from the environment at import. Relative paths count from
the current folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from marketdata_assets.errors import BadInput
from marketdata_assets.model.window import format_time, parse_time
from marketdata_assets.settings.fields import FAULT
from marketdata_assets.settings.parts import Clock
from marketdata_assets.settings.universe import Settings, Universe
from marketdata_assets.system import read_bounded

DEFAULT_FILE = "data/universe.yaml"
PREFIX = "MARKETDATA_"
MOST_BYTES = 1 << 20
"""Of the universe's file."""
MOST_VALUES, MOST_NESTED = 200_000, 20
"""Values under one key, and lists and mappings inside each other, all aliases followed."""
SECRET_KEYS = ("database", "broker", "alerts", "web")
"""The keys of which an error repeats nothing."""
_LINES = "`key: value` lines are expected here"
_SHAPES = {
    "tuple_type": "a list such as [a, b] is expected here",
    "model_type": _LINES,
    "dict_type": _LINES,
    "mapping_type": _LINES,
}
"""Our words for pydantic's errors about the shape of a value."""
_CLOCK = re.compile(r"(?P<start>\S+) x(?P<speed>[0-9.]+) since (?P<since>\S+)")


class UniverseEntry(NamedTuple):
    """One top-level key of the universe: what stands under it, and where that is written."""

    node: yaml.Node
    place: str
    line: int
    rank: int = 0
    """0 in the file; in the environment by the order of the keys."""

    def find_line(self, *path: str | int) -> int:
        """The line, from 1, of the last key or list element of the path that is written."""
        node, line = self.node, self.line
        for part in path:
            if isinstance(node, yaml.MappingNode):
                pairs = {key.value.strip(): (value, key) for key, value in node.value}
            elif isinstance(node, yaml.SequenceNode):
                pairs = {index: (value, value) for index, value in enumerate(node.value)}
            else:
                break
            if part not in pairs:
                break
            node, at = pairs[part]
            line = at.start_mark.line + 1
        return line

    def fail(self, message: str, *path: str | int) -> BadInput:
        """An error that names the line of this path."""
        return BadInput(f"{self.place} line {self.find_line(*path)}: {message}")


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read, check and return the universe. Raises BadInput: one line that names the file or the
    variable, the line and the fix.
    """
    env = os.environ if environ is None else environ
    path = Path(env.get(PREFIX + "UNIVERSE") or DEFAULT_FILE)
    entries = _read_file(path)
    for rank, key in enumerate(Universe.model_fields, 1):
        if text := env.get(PREFIX + key.upper()):
            place = f"environment {PREFIX}{key.upper()}"
            node = _compose(text, place)
            entries[key] = UniverseEntry(node, place, _line_of(node), rank)
    clock = _read_clock(env.get(PREFIX + "NOW"))
    values = {key: _read_values(key, entry) for key, entry in entries.items()}
    try:
        universe = Universe.model_validate(values)
    except ValidationError as error:
        raise _first_problem(error, entries, path) from None
    settings = Settings.model_construct(**dict(universe), clock=clock, source=str(path))
    _check_passwords(settings, entries)
    _check_dates(settings, entries["venues"])
    return settings


def _first_problem(
    error: ValidationError, entries: Mapping[str, UniverseEntry], path: Path
) -> BadInput:
    """What stands first: the file's problems by their lines, then those of the variables."""
    found = []
    for problem in error.errors(include_url=False, include_input=False):
        context = problem.get("ctx", {}) if problem["type"] == FAULT else {}
        message = context.get("message") or _SHAPES.get(problem["type"], problem["msg"])
        key, *rest = (*problem["loc"], *context.get("at", ())) or ("",)
        if entry := entries.get(str(key)):
            found.append((entry.rank, entry.find_line(*rest), entry.fail(message, *rest)))
        else:
            found.append((0, 0, BadInput(f"{path}: {message}")))
    return min(found, key=lambda each: each[:2])[2]


def _check_passwords(settings: Settings, entries: Mapping[str, UniverseEntry]) -> None:
    for key, secret in (("database", settings.database), ("broker", settings.broker)):
        if secret and not entries[key].rank and urlsplit(secret.get_secret_value()).password:
            raise entries[key].fail(
                "a password does not belong in this file; "
                f"give the whole URL in {PREFIX}{key.upper()} instead"
            )


def _check_dates(settings: Settings, entry: UniverseEntry) -> None:
    now = settings.now()
    for name, venue in settings.venues.items():
        if venue.since >= now:
            message = (
                f"since {format_time(venue.since)} lies in the future (now {format_time(now)})"
            )
            raise entry.fail(message, name, "since")


def _read_clock(text: str | None) -> Clock | None:
    """`2024-01-10T00:00Z` stands still; `2024-01-10T00:00Z x60 since 2026-11-20T12:00Z` runs."""
    if not text:
        return None
    place, moving = f"environment {PREFIX}NOW", _CLOCK.fullmatch(text)
    try:
        if not moving:
            return Clock(start=parse_time(text))
        start, since = parse_time(moving["start"]), parse_time(moving["since"])
        clock = Clock(start=start, speed=float(moving["speed"]), since=since)
        clock.now()
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None
    except (ValueError, OverflowError):
        raise BadInput(
            f"{place}: a speed such as x60, with which the clock stays in the calendar, is expected"
        ) from None
    return clock


# --------------------------------------------------------------------------------- YAML with lines
def _read_file(path: Path) -> dict[str, UniverseEntry]:
    place = str(path)
    try:
        node = _compose(read_bounded(path, MOST_BYTES).decode(), place)
    except FileNotFoundError:
        raise BadInput(
            f"{place}: there is no universe file; write one or name it in {PREFIX}UNIVERSE"
        ) from None
    except UnicodeDecodeError:
        raise BadInput(f"{place}: it cannot be read as text; save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{place}: it cannot be read ({error.strerror})") from None
    return {
        name.value.strip(): UniverseEntry(value, place, _line_of(name))
        for name, value in _read_pairs(node, place).values()
    }


def _line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _compose(text: str, place: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        # the words that the parser quotes may be parts of a secret
        problem = re.sub(r"'[^'<]{2,}'", "...", str(error.problem))
        raise BadInput(f"{place} line {line}: not valid YAML ({problem})") from None
    except yaml.YAMLError:
        raise BadInput(f"{place}: not valid YAML") from None
    except RecursionError:
        raise BadInput(f"{place}: more than {MOST_NESTED} lists are inside each other") from None
    if node is None:
        raise BadInput(f"{place}: it is empty")
    return node


def _read_pairs(
    node: yaml.Node, place: str, *, hide_keys: bool = False
) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The key and value nodes of a mapping, by the keys' text. Raises BadInput for a key that is
    written twice; with `hide_keys` it does not repeat it, as it may be a secret.
    """
    if not isinstance(node, yaml.MappingNode):
        raise BadInput(f"{place} line {_line_of(node)}: {_LINES}")
    found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        name = key.value.strip() if isinstance(key, yaml.ScalarNode) else ""
        if not name:
            raise BadInput(f"{place} line {_line_of(key)}: one value is expected here")
        if name in found:
            shown = "a key" if hide_keys else repr(name[:100])
            raise BadInput(f"{place} line {_line_of(key)}: {shown} is written twice; keep one")
        found[name] = key, value
    return found


def _read_values(key: str, entry: UniverseEntry) -> Any:
    """What stands under a key, as mappings, lists and texts. Raises BadInput for a key that is
    written twice, and where aliases have no end.
    """
    count = 0

    def read(node: yaml.Node, depth: int) -> Any:
        nonlocal count
        count += 1
        if depth > MOST_NESTED or count > MOST_VALUES:
            raise entry.fail(
                f"more than {MOST_NESTED} lists inside each other or {MOST_VALUES} values are here,"
                " aliases included; write fewer"
            )
        if isinstance(node, yaml.MappingNode):
            pairs = _read_pairs(node, entry.place, hide_keys=key in SECRET_KEYS)
            return {name: read(value, depth + 1) for name, (_, value) in pairs.items()}
        if isinstance(node, yaml.SequenceNode):
            return [read(value, depth + 1) for value in node.value]
        return str(node.value).strip()

    return read(entry.node, 1)
