"""How the cause of a parity difference is written: windows, amounts and lists in few words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from marketdata_assets.model.bar import number_text
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, iso

MAX_LISTED = 5
"""How many bars or windows a message lists; `windows` of a cause holds all of them."""


def format_windows(windows: Iterable[Window], base: Timeframe) -> str:
    """Return the open time of each single base bar, `start/end` of more, with spaces between."""
    return " ".join(format_window(window, base) for window in windows)


def format_window(window: Window, base: Timeframe) -> str:
    """Return the open time of a single base bar, `start/end` of more."""
    start = iso(window.start)
    return start if window.count(base) == 1 else f"{start}/{iso(window.end)}"


def format_amounts(amounts: Mapping[str, Any]) -> str:
    """Return `volume 1.5, trades 3`."""
    return ", ".join(f"{name} {number_text(amount)}" for name, amount in amounts.items())


def format_list(parts: Sequence[str], what: str, *, separator: str = ", ") -> str:
    """Return the first parts, and how many more `what` there are."""
    left = len(parts) - MAX_LISTED
    more = [f"and {left} more {what}"] if left > 0 else []
    return separator.join([*parts[:MAX_LISTED], *more])
