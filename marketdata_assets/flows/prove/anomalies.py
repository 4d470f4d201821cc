"""Anomalies: find them in what an ingest stored, record them, and let a person set their state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.flows.fetch.open_partition import IngestResult
from marketdata_assets.ledger.anomalies import AnomalyRecord
from marketdata_assets.ledger.checks import CheckFailure
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.anomaly import AnomalySeverity, AnomalyState
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.finding import Row
from marketdata_assets.model.intervals import opens_inside
from marketdata_assets.model.partition import Partition, adjacent_partition, partitions_of
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window, format_time, month_of
from marketdata_assets.quality.anomalies import CONTEXT, REACH, find_anomalies
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

ANOMALIES = "anomalies"
"""The name of the check."""


def find_partition_anomalies(
    settings: Settings, ledger: Ledger, lake: Lake, *, result: IngestResult
) -> list[AnomalyRecord]:
    """Find the anomalies of a partition, with the bars of the adjacent months, and record them.

    Those of the last bars of the month before are found once more: the first bars after them say
    more about them.
    """
    table, partition = raw_table(result.timeframe), result.partition
    month, width = partition.month, result.timeframe.width
    earlier, later = adjacent_partition(partition, -1), adjacent_partition(partition, +1)
    window_before = Window(month.start - CONTEXT * width, month.start)
    window_after = Window(month.end, month.end + CONTEXT * width)
    before = _read_inside(ledger, lake, table, partition=earlier, window=window_before)
    after = _read_inside(ledger, lake, table, partition=later, window=window_after)
    judged = Window(month.start - REACH * width if before.height else month.start, month.end)
    bars = pl.concat([before, result.bars, after])
    found = find_anomalies(bars, result.timeframe, judged)
    return ledger.anomalies.settle(table, partition.market, judged, found=found, now=settings.now())


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
