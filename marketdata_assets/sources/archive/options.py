"""What a person states about files to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import COLUMNS, NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe

REQUIRED = tuple(column.name for column in COLUMNS if not column.optional)


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What a person states about the files; None: their names and contents decide.

    `columns`: by column of a bar, the name in the file's header, or its place counted from 1.
    `unit`: one of `times.UNITS` or `times.ISO`.
    """

    market: Market | None = None
    timeframe: Timeframe | None = None
    columns: Mapping[str, str] | None = None
    unit: str | None = None


def parse_columns(text: str) -> dict[str, str]:
    """Return the mapping of `open_time=ts,open=o,...`. Raises BadInput."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    found = {name.strip(): theirs.strip() for name, _, theirs in pairs}
    unknown = [name for name in found if name not in NAMES or not found[name]]
    if unknown or len(found) < len(pairs):
        raise BadInput(
            f"--columns {text}: write `column=its name in the file`, each once, "
            f"of {', '.join(NAMES)}"
        )
    if missing := [name for name in REQUIRED if name not in found]:
        raise BadInput(f"--columns {text}: {', '.join(missing)} must be named as well")
    return found
