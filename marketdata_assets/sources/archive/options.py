"""What a person states about files to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from zoneinfo import available_timezones

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import BAR_COLUMNS, COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import Timeframe

REQUIRED = tuple(column.name for column in BAR_COLUMNS if not column.optional)


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What a person states about the files; None: their names and contents decide.

    `columns`: by column of a bar, the name in the file's header, or its place counted from 1; for
    `open_time`, also two of them with `+` between. `unit`: one of `times.UNITS` or `times.ISO`.
    `delimiter` stands between the cells, `decimal` before the fraction of a number. `time_zone` is
    that of times which name none, as the IANA database calls it.
    """

    market: Market | None = None
    timeframe: Timeframe | None = None
    columns: Mapping[str, str] | None = None
    unit: str | None = None
    delimiter: str = ","
    decimal: str = "."
    time_zone: str = "UTC"


def parse_columns(text: str) -> dict[str, str]:
    """Return the mapping of `open_time=ts,open=o,...`. Raises BadInput."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    found = {name.strip(): theirs.strip() for name, _, theirs in pairs}
    unknown = [name for name in found if name not in COLUMN_NAMES or not found[name]]
    if unknown or len(found) < len(pairs):
        raise BadInput(
            f"--columns {text}: write `column=its name in the file`, each once, "
            f"of {', '.join(COLUMN_NAMES)}"
        )
    if missing := [name for name in REQUIRED if name not in found]:
        raise BadInput(f"--columns {text}: {', '.join(missing)} must be named as well")
    return found


def parse_delimiter(text: str) -> str:
    """Return the character between the cells: one, or `tab`. Raises BadInput."""
    found = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(found) != 1 or found.isalnum() or found in "\"'\n\r.":
        raise BadInput(f"--delimiter {text!r}: one character such as ';' is expected, or tab")
    return found


def parse_decimal(text: str) -> str:
    """Return the character before a fraction: a point or a comma. Raises BadInput."""
    if text not in (".", ","):
        raise BadInput(f"--decimal {text!r}: '.' or ',' is expected")
    return text


def parse_time_zone(text: str) -> str:
    """Return the name of a time zone. Raises BadInput with the nearest name."""
    names = available_timezones()
    if text in names:
        return text
    near = get_close_matches(text, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise BadInput(f"--time-zone {text!r} is no time zone such as UTC, EST or Europe/Berlin{hint}")
