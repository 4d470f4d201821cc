"""Anomalies: judge what an ingest has stored, keep the entries, and let a person say what became of
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.flows.fetch.ingest import Ingested
from marketdata_assets.ledger.anomalies import AnomalyRecord
from marketdata_assets.ledger.checks import CheckFailure
from marketdata_assets.model.anomaly import AnomalySeverity, AnomalyState
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.partition import Partition, neighbour, partitions_of
from marketdata_assets.model.table import Table, raw
from marketdata_assets.model.window import Window, iso, month_of
from marketdata_assets.quality.anomalies import CONTEXT, REACH, find_anomalies

CHECK = "anomalies"


def judge(toolbox: Toolbox, done: Ingested) -> list[AnomalyRecord]:
    """Find the anomalies of a partition, with the bars of the months beside it, and settle its
    entries.

    Those of the last bars of the month before are found once more: the first bars after them say
    more about them.
    """
    table, partition = raw(done.timeframe), done.partition
    month, width = partition.month, done.timeframe.width
    before = _beside(
        toolbox, table, neighbour(partition, -1), Window(month.start - CONTEXT * width, month.start)
    )
    after = _beside(
        toolbox, table, neighbour(partition, +1), Window(month.end, month.end + CONTEXT * width)
    )
    judged = Window(month.start - REACH * width if before.height else month.start, month.end)
    found = find_anomalies(pl.concat([before, done.bars, after]), done.timeframe, judged)
    return toolbox.ledger.anomalies.settle(
        table, partition.market, judged, found=found, now=toolbox.settings.now()
    )


def _beside(toolbox: Toolbox, table: Table, partition: Partition, window: Window) -> pl.DataFrame:
    """The stored bars of a neighbouring month that open inside the window; none where it is not stored
    or damaged.
    """
    state = toolbox.ledger.partitions.get(table, partition)
    if state is None or state.bytes is None:
        return empty_bars()
    try:
        bars = toolbox.lake.read(table, partition, since=window.start)
    except Damaged:
        return empty_bars()
    return empty_bars() if bars is None else bars.filter(_opens_in(window))


def _opens_in(window: Window) -> pl.Expr:
    return pl.col("open_time").is_between(window.start, window.end, closed="left")


def alarming(entry: AnomalyRecord) -> bool:
    """Whether a person should look: nobody has yet, and it would do harm."""
    return entry.state == AnomalyState.OPEN and entry.anomaly.severity >= AnomalySeverity.HIGH


def words(entries: Sequence[AnomalyRecord]) -> str:
    """What the check says of the entries of a partition."""
    waiting = sum(entry.state == AnomalyState.OPEN for entry in entries)
    return f"{waiting} anomalies are open, {sum(map(alarming, entries))} of them high or critical"


def bars_of(
    toolbox: Toolbox, entries: Iterable[AnomalyRecord]
) -> Iterator[tuple[AnomalyRecord, pl.DataFrame]]:
    """Each entry with its bars, as they are stored now; none where they are not stored any more.
    Raises Damaged.
    """
    read: dict[tuple[Table, Partition], pl.DataFrame | None] = {}
    for entry in entries:
        window = Window(entry.anomaly.start, entry.anomaly.end)
        keys = [(entry.table, partition) for partition in partitions_of(entry.market, window)]
        read = {key: read[key] if key in read else toolbox.lake.read(*key) for key in keys}
        frames = [frame for frame in read.values() if frame is not None]
        yield entry, pl.concat([empty_bars(), *frames]).filter(_opens_in(window))


def mark(toolbox: Toolbox, id: int, state: AnomalyState, note: str | None) -> AnomalyRecord:
    """Set what became of an entry; its check follows in the ledger at once, in the UI with the next
    run. Raises BadInput.
    """
    if toolbox.ledger.anomalies.get(id) is None:
        raise BadInput(
            f"there is no anomaly {id}; `marketdata anomalies --state all` lists their numbers"
        )
    now = toolbox.settings.now()
    toolbox.ledger.anomalies.mark(id, state, note=note, now=now)
    entry = toolbox.ledger.anomalies.get(id)
    assert entry is not None, "entries are never deleted"
    partition = Partition(entry.market, month_of(entry.anomaly.start))
    entries = toolbox.ledger.anomalies.find(partition.month, entry.market, entry.table)
    red = CheckFailure(False, words(entries)) if any(map(alarming, entries)) else None
    toolbox.ledger.checks.set(entry.table, partition, CHECK, failure=red, now=now)
    return entry


def row_of(entry: AnomalyRecord) -> dict[str, str | int]:
    """An entry as a row of a table."""
    one = entry.anomaly
    return {
        "id": entry.id,
        "kind": one.kind,
        "severity": one.severity.word,
        "state": entry.state.value,
        "start": iso(one.start),
        "end": iso(one.end),
        "bars": one.bars,
        "what": one.evidence["says"],
    }
