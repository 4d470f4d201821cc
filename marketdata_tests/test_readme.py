"""README is true: every path, command and make target it names exists, and its test command is what
CI runs.
"""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from marketdata_assets.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_path_exists() -> None:
    paths = set(
        re.findall(r"`((?:marketdata_assets|marketdata_tests|bench|data)/[\w./]+\.\w+)`", README)
    )
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_command_exists_and_is_named() -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"`marketdata (\w+)", README)) == commands


def test_make_targets_and_ci() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", README, re.M)) | set(
        re.findall(r"`make (\w+)", README)
    )
    assert targets >= {"demo", "test", "dev"}
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_the_lock_names_no_registry() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert lock.count("==") > 100
    assert not re.search(r"https?:|file:|--index|--find-links|@", lock)
