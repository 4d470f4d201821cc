"""Anomalies: judge what an ingest has stored, keep the entries, and let a person say what became of
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.flows.fetch.ingest import Ingested
from marketdata_assets.ledger.anomalies import Entry
from marketdata_assets.model.anomaly import AnomalySeverity, AnomalyState
from marketdata_assets.model.bar import empty_bars
from marketdata_assets.model.partition import Partition, adjacent_partition, partitions_of
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window, format_time, month_of
from marketdata_assets.quality.anomalies import CONTEXT, REACH, find_anomalies

CHECK = "anomalies"


def judge(toolbox: Toolbox, done: Ingested) -> list[Entry]:
    """Find the anomalies of a partition, with the bars of the months beside it, and settle its
    entries.

    Those of the last bars of the month before are found once more: the first bars after them say
    more about them.
    """
    table, partition = raw_table(done.timeframe), done.partition
    month, width = partition.month, done.timeframe.width
    before = _beside(
        toolbox,
        table,
        adjacent_partition(partition, -1),
        Window(month.start - CONTEXT * width, month.start),
    )
    after = _beside(
        toolbox,
        table,
        adjacent_partition(partition, +1),
        Window(month.end, month.end + CONTEXT * width),
    )
    judged = Window(month.start - REACH * width if before.height else month.start, month.end)
    found = find_anomalies(pl.concat([before, done.bars, after]), done.timeframe, judged)
    return toolbox.anomalies.settle(table, partition.market, judged, found, toolbox.settings.now())


def _beside(toolbox: Toolbox, table: Table, partition: Partition, window: Window) -> pl.DataFrame:
    """The stored bars of a neighbouring month that open inside the window; none where it is not stored
    or damaged.
    """
    state = toolbox.ledger.state(table, partition)
    if state is None or state.bytes is None:
        return empty_bars()
    try:
        bars = toolbox.lake.read(table, partition, since=window.start)
    except Damaged:
        return empty_bars()
    return empty_bars() if bars is None else bars.filter(_opens_in(window))


def _opens_in(window: Window) -> pl.Expr:
    return pl.col("open_time").is_between(window.start, window.end, closed="left")


def alarming(entry: Entry) -> bool:
    """Whether a person should look: nobody has yet, and it would do harm."""
    return entry.state == AnomalyState.OPEN and entry.anomaly.severity >= AnomalySeverity.HIGH


def words(entries: Sequence[Entry]) -> str:
    """What the check says of the entries of a partition."""
    waiting = sum(entry.state == AnomalyState.OPEN for entry in entries)
    return f"{waiting} anomalies are open, {sum(map(alarming, entries))} of them high or critical"


def bars_of(toolbox: Toolbox, entries: Iterable[Entry]) -> Iterator[tuple[Entry, pl.DataFrame]]:
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


def mark(toolbox: Toolbox, id: int, state: AnomalyState, note: str | None) -> Entry:
    """Set what became of an entry; its check follows in the ledger at once, in the UI with the next
    run. Raises BadInput.
    """
    if toolbox.anomalies.get(id) is None:
        raise BadInput(
            f"there is no anomaly {id}; `marketdata anomalies --state all` lists their numbers"
        )
    now = toolbox.settings.now()
    toolbox.anomalies.mark(id, state, note, now)
    entry = toolbox.anomalies.get(id)
    assert entry is not None, "entries are never deleted"
    partition = Partition(entry.market, month_of(entry.anomaly.start))
    entries = toolbox.anomalies.find(partition.month, entry.market, entry.table)
    red = (False, words(entries)) if any(map(alarming, entries)) else None
    toolbox.ledger.set_check(entry.table, partition, CHECK, red, now)
    return entry


def row_of(entry: Entry) -> dict[str, str | int]:
    """An entry as a row of a table."""
    one = entry.anomaly
    return {
        "id": entry.id,
        "kind": one.kind,
        "severity": one.severity.label,
        "state": entry.state.value,
        "start": format_time(one.start),
        "end": format_time(one.end),
        "bars": one.bars,
        "what": one.evidence["says"],
    }
