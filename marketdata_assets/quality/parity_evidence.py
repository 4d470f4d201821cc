"""What is known about the base bars behind a parity difference, and the cause that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window


class Absence(NamedTuple):
    """A window without bars, and why."""

    window: Window
    reason: str


class DifferenceCause(NamedTuple):
    """What a difference comes from, and the windows of base bars behind it."""

    message: str
    windows: tuple[Window, ...] = ()


class FinerComparison(NamedTuple):
    """What `compare_bars` found of a timeframe between the base and the traced one."""

    timeframe: Timeframe
    bars: pl.DataFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityEvidence:
    """What is known of the base bars that bars of `timeframe` are made of."""

    base: Timeframe
    timeframe: Timeframe
    bars: pl.DataFrame
    """The base bars (model.bar.BAR_SCHEMA, sorted)."""
    absences: Sequence[Absence]
    """Why base bars are not there."""
    native_absences: Sequence[Absence]
    """Why the venue's own bars of `timeframe` are not there."""
    revisions: pl.DataFrame
    """Base bars that were replaced (model.bar.HISTORY_COLUMNS)."""
    finer: FinerComparison | None
    """The finest timeframe between, where the venue's own bars of one are stored."""
