"""Opens the universe of a command and turns its options into markets, windows and partitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from marketdata_assets.errors import BadInput
from marketdata_assets.model.window import Window, format_time

if TYPE_CHECKING:
    from marketdata_assets.context import Context
    from marketdata_assets.model.market import Market
    from marketdata_assets.model.partition import Partition
    from marketdata_assets.settings.universe import Settings


@contextmanager
def load_context(*, for_reading: bool = False) -> Iterator[Context]:
    """Open the universe that the environment names, and close it at the end.

    A command that only reads works `for_reading`, also where the state folder cannot be written.

    Raises BadInput for a mistake in the universe, StoreFailed for a store that cannot be opened.
    """
    from marketdata_assets.context import open_context
    from marketdata_assets.flows.operate.universe import load_universe

    with open_context(load_universe(for_reading=for_reading), for_reading=for_reading) as context:
        yield context


def select_markets(settings: Settings, keys: Sequence[str] | None) -> list[Market]:
    """Return the markets with these keys, or all of the universe. Raises BadInput."""
    return [settings.market(key) for key in keys] if keys else list(settings.markets)


def select_window(settings: Settings, start: datetime | None, end: datetime | None) -> Window:
    """Return the window `[start, end)`; by default from the universe's first day until now.

    Raises BadInput when the window is empty or begins in the future, by our clock.
    """
    now = settings.now()
    window = Window(start or settings.since, end or now)
    if start and start > now:
        raise BadInput(
            f"--start {format_time(start)} lies in the future; it is now {format_time(now)}"
        )
    if not window:
        raise BadInput(
            f"the window {format_time(window.start)} .. {format_time(window.end)} is empty; "
            "--start must come before --end"
        )
    return window


def select_partitions(
    settings: Settings, keys: Sequence[str] | None, *, start: datetime | None, end: datetime | None
) -> list[Partition]:
    """Return the partitions of these markets that the universe wants and the window touches."""
    window = select_window(settings, start, end)
    return settings.partitions(select_markets(settings, keys), window)
