"""Anomalies: find them in what an ingest stored, record them, and let a person set their state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

import polars as pl

from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.flows.fetch.open_partition import IngestResult
from marketdata_assets.ledger.anomalies import AnomalyRecord
from marketdata_assets.ledger.checks import CheckFailure
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.anomaly import Anomaly, AnomalySeverity, AnomalyState
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.finding import Row
from marketdata_assets.model.intervals import opens_inside
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, adjacent_partition, partitions_of
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window, format_time, month_of
from marketdata_assets.quality.anomalies import CONTEXT, REACH, find_anomalies
from marketdata_assets.quality.anomaly_rules import RULES
from marketdata_assets.quality.traded_bars import corroborate
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

ANOMALIES = "anomalies"
"""The name of the check."""
AGREEMENT = Decimal("0.8")
"""The share of our way from low to high that other bars have to cover as well."""


def find_partition_anomalies(
    settings: Settings, ledger: Ledger, lake: Lake, *, result: IngestResult
) -> list[AnomalyRecord]:
    """Find the anomalies of a partition, with the bars of the adjacent months, and record them.

    Those of the last bars of the month before are found once more: the first bars after them say
    more about them.
    """
    table, partition = raw_table(result.timeframe), result.partition
    month, shift = partition.month, result.timeframe.shift
    earlier, later = adjacent_partition(partition, -1), adjacent_partition(partition, +1)
    window_before = Window(shift(month.start, -CONTEXT), month.start)
    window_after = Window(month.end, shift(month.end, CONTEXT))
    before = _read_inside(ledger, lake, table, partition=earlier, window=window_before)
    after = _read_inside(ledger, lake, table, partition=later, window=window_after)
    judged = Window(shift(month.start, -REACH) if before.height else month.start, month.end)
    bars = pl.concat([before, result.bars, after])
    first = ledger.markets.first_bar(partition.market)
    found = find_anomalies(bars, result.timeframe, judged, listed=first)
    others = _Witnesses(settings, ledger, lake, table, partition=partition)
    found = [others.corroborate(one) for one in found]
    return ledger.anomalies.settle(table, partition.market, judged, found=found, now=settings.now())


@dataclass(frozen=True, slots=True)
class _Witnesses:
    """Bars that show whether a price of one partition was real: the venue's own coarser ones, and
    those of other venues' markets with the same symbol.
    """

    settings: Settings
    ledger: Ledger
    lake: Lake
    table: Table
    partition: Partition

    def corroborate(self, anomaly: Anomaly) -> Anomaly:
        """Return the anomaly as a warning where another bar reached its prices as well."""
        is_grave = anomaly.severity > AnomalySeverity.MEDIUM
        if not is_grave or not RULES[anomaly.kind].is_of_price:
            return anomaly
        window = Window(anomaly.start, anomaly.end)
        ours = self._extremes(self.table, self.partition.market, window)
        for name, table, market in self._tables():
            start = table.timeframe.shift(table.timeframe.floor(window.start), -1)
            around = Window(start, window.end)
            theirs = self._extremes(table, market, around)
            if ours and theirs and _reaches(theirs, ours):
                return corroborate(anomaly, f"{name} reached these prices as well")
        return anomaly

    def _tables(self) -> Iterator[tuple[str, Table, Market]]:
        market, timeframe = self.partition.market, self.table.timeframe
        for name, venue in self.settings.venues.items():
            if name == market.venue:
                for coarser in venue.reference:
                    if coarser.width > timeframe.width:
                        yield f"the venue's own {coarser.name} bar", raw_table(coarser), market
            elif market.symbol in venue.symbols and timeframe in venue.fetched_timeframes:
                yield f"{name}:{market.symbol}", self.table, Market(name, market.symbol)

    def _extremes(
        self, table: Table, market: Market, window: Window
    ) -> tuple[Decimal, Decimal] | None:
        """Return the lowest and the highest price of the bars that open in a window."""
        frames = [
            _read_inside(self.ledger, self.lake, table, partition=partition, window=window)
            for partition in partitions_of(market, window)
        ]
        bars = pl.concat(frames)
        if bars.is_empty():
            return None
        low, high = bars.select(pl.col("low").min(), pl.col("high").max()).row(0)
        return low, high


def _reaches(theirs: tuple[Decimal, Decimal], ours: tuple[Decimal, Decimal]) -> bool:
    """Return whether other bars went at least AGREEMENT of the way between our prices."""
    low, high = max(theirs[0], ours[0]), min(theirs[1], ours[1])
    return high - low >= AGREEMENT * (ours[1] - ours[0])


def needs_attention(record: AnomalyRecord) -> bool:
    """Return whether a person should look: nobody has yet, and it is high or critical."""
    is_open = record.state == AnomalyState.OPEN
    return is_open and record.anomaly.severity >= AnomalySeverity.HIGH


def summarize(records: Sequence[AnomalyRecord]) -> str:
    """Return the message of the check for the anomalies of a partition."""
    waiting = sum(record.state == AnomalyState.OPEN for record in records)
    alarming = sum(map(needs_attention, records))
    return f"{waiting} anomalies are open, {alarming} of them high or critical"


def read_anomalous_bars(
    lake: Lake, records: Iterable[AnomalyRecord]
) -> Iterator[tuple[AnomalyRecord, pl.DataFrame]]:
    """Yield each record with its bars as they are stored now. Raises Damaged."""
    read: dict[tuple[Table, Partition], pl.DataFrame | None] = {}
    for record in records:
        window = Window(record.anomaly.start, record.anomaly.end)
        keys = [(record.table, partition) for partition in partitions_of(record.market, window)]
        read = {key: read[key] if key in read else lake.read(*key) for key in keys}
        frames = [frame for frame in read.values() if frame is not None]
        yield record, pl.concat([empty_bars(), *frames]).filter(opens_inside(window))


def set_anomaly_state(
    settings: Settings, ledger: Ledger, number: int, *, state: AnomalyState, note: str | None
) -> AnomalyRecord:
    """Set the state of an anomaly; return it. Raises BadInput for an unknown number.

    Its check changes in the ledger at once, in the UI with the next run.
    """
    if ledger.anomalies.get(number) is None:
        raise BadInput(
            f"there is no anomaly {number}; `marketdata anomalies --state all` lists their numbers"
        )
    now = settings.now()
    ledger.anomalies.mark(number, state, note=note, now=now)
    record = ledger.anomalies.get(number)
    assert record is not None, "records are never deleted"
    partition = Partition(record.market, month_of(record.anomaly.start))
    records = ledger.anomalies.find(partition.month, record.market, record.table)
    failure = None
    if any(map(needs_attention, records)):
        failure = CheckFailure(blocking=False, message=summarize(records))
    ledger.checks.set(record.table, partition, {ANOMALIES: failure}, now=now)
    return record


def as_row(record: AnomalyRecord) -> Row:
    """Return an anomaly as a row of a table."""
    anomaly = record.anomaly
    return {
        "id": record.id,
        "kind": anomaly.kind,
        "severity": anomaly.severity.label,
        "state": record.state.value,
        "start": format_time(anomaly.start),
        "end": format_time(anomaly.end),
        "bars": anomaly.bars,
        "what": anomaly.evidence["says"],
    }


def _read_inside(
    ledger: Ledger, lake: Lake, table: Table, *, partition: Partition, window: Window
) -> pl.DataFrame:
    """Return the stored bars that open inside a window; none where they are lost or damaged."""
    state = ledger.partitions.get(table, partition)
    if state is None or state.bytes is None:
        return empty_bars()
    try:
        bars = lake.read(table, partition, inside=window)
    except Damaged:
        return empty_bars()
    return empty_bars() if bars is None else bars.filter(opens_inside(window))
