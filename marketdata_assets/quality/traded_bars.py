"""Bars that were traded, what is usual around each of them, and how an anomaly in them is told.

Prices are logarithms in the measures, so that sizes are shares of the price.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.model.anomaly import Anomaly, AnomalySeverity
from marketdata_assets.model.bar import PRICES, format_number
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.quality.anomaly_rules import RULES

AROUND, LONG_AROUND = 60, 240
"""So many traded bars before and after show what prices, and what volume, usually do."""
MIN_RISE = 5
"""Volume and trades that rise so many times above the larger of their medians before and after show
that prices really moved."""


class TradedBars(NamedTuple):
    """Bars with their measures (`measure`) and row numbers in the column `i`."""

    frame: pl.DataFrame
    timeframe: Timeframe

    def at(self, i: int, column: str) -> str:
        """Return a value as text; `nothing` beyond both ends."""
        return format_number(self.frame[column][i]) if 0 <= i < self.frame.height else "nothing"

    def describe(self, first: int, last: int) -> str:
        """Return the prices before, in and after the bars from row `first` to row `last`."""
        inside = f"{self.at(first, 'open')} to {self.at(last, 'close')} in it"
        before, after = self.at(first - 1, "close"), self.at(last + 1, "open")
        return f"{before} before, {inside}, {after} after"

    def anomaly(
        self, kind: str, first: int, last: int, *, size: float, limit: float, message: str
    ) -> Anomaly:
        """Return the anomaly in the bars from row `first` to row `last`."""
        first, opens = max(0, first), self.frame["open_time"]
        found = Anomaly(
            kind,
            RULES[kind].severity(size),
            start=opens[first],
            end=self.timeframe.shift(opens[last], 1),
            bars=last - first + 1,
            evidence={"says": message, "size": f"{size:.6g}", "limit": f"{limit:.6g}"},
        )
        witness = self._volume_of(first, last) if RULES[kind].is_of_price else None
        return corroborate(found, witness) if witness else found

    def _volume_of(self, first: int, last: int) -> str | None:
        """Return how far volume and trades rose with the prices; None where they did not."""
        bars = self.frame[first : last + 1]
        sides = (self.frame[max(0, first - AROUND) : first], self.frame[last + 1 :][:AROUND])
        rises = []
        for column in ("volume", "trades"):
            usual = [float(side[column].median() or 0) for side in sides if side.height]  # type: ignore[arg-type]
            most = bars[column].max()
            if most is not None and any(usual):
                rises.append(f"{float(most) / max(usual):.1f} times the usual {column}")  # type: ignore[arg-type]
                if float(most) < MIN_RISE * max(usual):  # type: ignore[arg-type]
                    return None
        return " and ".join(rises) or None

    def rows_beyond(self, size: pl.Expr, limit: pl.Expr) -> list[dict[str, Any]]:
        """Return the bars whose `size` is above their `limit`, with both as columns."""
        return (
            self.frame.lazy()
            .with_columns(size=size, limit=limit)
            .filter(pl.col("size") > pl.col("limit"))
            .collect()
            .to_dicts()
        )


def corroborate(anomaly: Anomaly, witness: str) -> Anomaly:
    """Return an anomaly that `witness` shows to be real: a warning, whatever its size is."""
    evidence = {**anomaly.evidence, "says": f"{anomaly.evidence['says']}; {witness}"}
    severity = min(anomaly.severity, AnomalySeverity.MEDIUM)
    return anomaly._replace(severity=severity, evidence=evidence)


def measure(traded: pl.DataFrame, timeframe: Timeframe) -> pl.DataFrame:
    """Add to bars with volume what the rules compare; prices are logarithms (`o`, `h`, `l`, `c`).

    `step`: bars since the one before. `gap`: from its close to this open; `away`: how far in one
    bar. What is usual here: `gaps` (the large ones, at least a tick), `ranges` from low to high,
    `usual` the larger of the two, `middle` volume. `i`: the row.
    """
    logs = {name[0]: pl.col(name).cast(pl.Float64).log() for name in PRICES}
    step = pl.col("open_time").diff() / timeframe.width
    frame = traded.lazy().with_columns(**logs, v=pl.col("volume").cast(pl.Float64), step=step)
    frame = frame.with_columns(
        range=pl.col("h") - pl.col("l"),
        body=pl.col("c") - pl.col("o"),
        gap=pl.when(pl.col("step") <= AROUND).then(pl.col("o") - pl.col("c").shift(1)),
    )
    tick = pl.col("range").filter(pl.col("range") > 0).min().fill_null(0.0)
    frame = frame.with_columns(away=(pl.col("gap").abs() / pl.col("step").sqrt()).fill_null(0.0))
    frame = add_usual(frame, gaps=("away", 0.9), ranges=("range", 0.5), middle=("v", 0.5))
    frame = frame.with_columns(gaps=pl.max_horizontal("gaps", tick)).with_columns(
        usual=pl.max_horizontal("gaps", "ranges")
    )
    return frame.with_row_index("i").collect()


def add_usual(frame: pl.LazyFrame, bars: int = AROUND, **wanted: tuple[str, float]) -> pl.LazyFrame:
    """Add quantiles (column, share) of the bars before each, or of those after where larger.

    They are null where there are hardly any bars.
    """
    before = {
        new: pl.col(name).rolling_quantile(
            share, "nearest", window_size=bars, min_samples=bars // 6
        )
        for new, (name, share) in wanted.items()
    }
    return frame.with_columns(**before).with_columns(
        pl.max_horizontal(pl.col(new).shift(1), pl.col(new).shift(-bars)) for new in wanted
    )
