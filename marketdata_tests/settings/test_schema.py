"""`marketdata schema`: the committed copy, README and what `load_settings` takes are one thing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from marketdata_assets.cli.main import app
from marketdata_assets.errors import BadInput
from marketdata_assets.settings.load import load_settings

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = json.loads((ROOT / "data/universe.schema.json").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = next(b for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "venues:" in b)
OK = "venues: {binance: {symbols: [BTC/USDT], since: 2024-01-01}}\n"


class DatesAsText(yaml.SafeLoader):
    """Reads YAML as editors do: a date is a text."""


DatesAsText.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def errors(text: str) -> list[str]:
    """What an editor underlines."""
    checker = jsonschema.Draft202012Validator(COMMITTED)
    values = yaml.load(text, Loader=DatesAsText)
    return [error.message for error in checker.iter_errors(values)]


def properties(part: dict[str, Any] = COMMITTED, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that a person may write, by its path; `*` is a name that the person chooses."""
    part = COMMITTED["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
    for name, value in part.get("properties", {}).items():
        yield f"{path}{name}", value
        yield from properties(value, f"{path}{name}.")
    if isinstance(part.get("additionalProperties"), dict):
        yield from properties(part["additionalProperties"], f"{path}*.")


def keys(value: Any, known: set[str], path: str = "") -> Iterator[str]:
    """The keys of a YAML value, written as in `properties`."""
    for name, inside in value.items() if isinstance(value, dict) else ():
        here = f"{path}{name}" if f"{path}{name}" in known or not path else f"{path}*"
        if not here.endswith("*"):
            yield here
        yield from keys(inside, known, f"{here}.")


def test_the_committed_copy_is_what_the_command_prints():
    done = CliRunner().invoke(app, ["schema"])
    assert done.exit_code == 0
    assert done.stdout == (ROOT / "data/universe.schema.json").read_text(encoding="utf-8")


def test_every_key_is_described_and_no_other_is_allowed():
    found = dict(properties())
    assert len(found) > 35
    assert [path for path, value in found.items() if len(value.get("description", "")) < 15] == []
    objects = [COMMITTED, *(d for d in COMMITTED["$defs"].values() if d["type"] == "object")]
    assert [one["additionalProperties"] for one in objects] == [False] * 9
    assert "null" not in json.dumps(COMMITTED)
    assert found["timeframes"]["items"]["enum"][::5] == ["1s", "30m", "8h", "1M"]
    assert (found["venues.*.base"]["default"], found["rollups"]["default"]) == ("1m", "duckdb")
    assert found["timeframes"]["default"][::8] == ["1m", "1w"]


def test_readme_and_the_schema_have_the_same_keys():
    known = {path for path, _ in properties()}
    written = set(keys(yaml.safe_load(BLOCK), known))
    assert written - known == set()
    # what excludes another key stands in its comment
    assert {
        path for path in known - written if f" {path.rpartition('.')[2]}:" not in BLOCK
    } == set()


def test_readme_s_universe_loads(tmp_path: Path):
    file = tmp_path / "universe.yaml"
    file.write_text(BLOCK, encoding="utf-8")
    settings = load_settings({"MARKETDATA_UNIVERSE": str(file), "MARKETDATA_NOW": "2024-06-01"})
    assert [m.key for m in settings.markets][-1] == "kraken:BTC-USDT"
    assert settings.broker is not None


@pytest.mark.parametrize("text", [BLOCK, (ROOT / "data/universe.yaml").read_text(encoding="utf-8")])
def test_an_editor_accepts_what_we_ship(text: str):
    assert errors(text) == []


def test_the_shipped_universe_names_its_schema():
    first = (ROOT / "data/universe.yaml").read_text(encoding="utf-8").splitlines()[0]
    name = first.removeprefix("# yaml-language-server: $schema=")
    assert (ROOT / "data" / name).is_file()


@pytest.mark.parametrize(
    "text",
    [
        "lake: x\n",
        OK + "rollup: duckdb\n",
        OK + "rollups: csv\n",
        OK + "timeframes: [7m]\n",
        OK + "timeframes: 5m\n",
        OK + "automation: {refresh_minutes: 60}\n",
        OK + "retention: {raw/ohlcv_2m: 5}\n",
        OK + "freshness: {1m: {warn: 5}}\n",
        OK + "cold: {after_days: 365}\n",
        OK + "cold: {after_days: 365, lake: s3://a/b, storage_class: STANDARD}\n",
        OK.replace("2024-01-01", "yesterday"),
        OK.replace("[BTC/USDT]", "[]"),
        OK.replace("[BTC/USDT]", "[BTC/USDT, BTC/USDT]"),
        OK.replace("symbols", "symbol"),
        "venues: {}\n",
    ],
)
def test_an_editor_underlines_what_is_refused(tmp_path: Path, text: str):
    assert errors(text) != []
    file = tmp_path / "universe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput):
        load_settings({"MARKETDATA_UNIVERSE": str(file)})
