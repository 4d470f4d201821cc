"""Replay: rows in quarantine that pass the rules today become bars. Sends no request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import polars as pl

from marketdata_assets.flows.fetch.open_partition import wanted_window
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, parse_time, to_ms
from marketdata_assets.quality.split import (
    REJECTED_SCHEMA,
    SplitRows,
    add_request_columns,
    split_rows,
)
from marketdata_assets.settings.universe import Settings
from marketdata_assets.storage.lake import Lake

REPLAY = "replay"
"""The stored source of replayed bars, and the kind of the receipt."""
NO_LIMIT = 10**9
NOT_REPLAYABLE = {"outside_window", "unclosed", "conflict", "disagrees", "overlap"}
"""Reasons that are not about the row itself: it was not requested, came too early, or is
contradicted.
"""
_SENT_SCHEMA: dict[str, pl.DataType] = {
    **{name: pl.String() for name in COLUMN_NAMES},
    "open_time": pl.Int64(),
    "trades": pl.Int64(),
}


@dataclass(frozen=True, slots=True)
class ReplayedRow:
    """One row of quarantine that was judged again.

    `outcome` is `stored`, `identical`, `disagrees`, or the reasons that it still breaks.
    """

    id: int
    partition: Partition
    timeframe: Timeframe
    open_time: str
    reasons: str
    outcome: str


class _Place(NamedTuple):
    """Where rows belong, as the ledger stores it."""

    A bar that is stored stays as it is. Of several different rows of one open_time none is stored.
    What is stored or identical is marked as replayed and not judged again; the others stay as they
    are.
    """
    rows = [
        row
        for market in markets
        for row in toolbox.ledger.quarantined(market, window, limit=EVERY)
        if _can_be(row)
    ]
    found = [
        one
        for key, group in groupby(sorted(rows, key=_place), key=_place)
        for one in _replay(toolbox, key, list(group), dry_run)
    ]
    done = [one for one in found if one.outcome in ("stored", "identical")]
    if done and not dry_run:
        toolbox.ledger.set_replayed([one.id for one in done], toolbox.settings.now())
        bars = sum(one.outcome == "stored" for one in done)
        says = f"{len(done)} of {len(found)} refused rows pass the rules now, {bars} bars stored"
        body = {
            "rows": [
                {
                    "id": o.id,
                    "partition": o.partition.key,
                    "open_time": o.open_time,
                    "was": o.reasons,
                    "is": o.outcome,
                }
                for o in found
            ]
        }
        toolbox.receipts.add(REPLAY, toolbox.settings.now(), says, body)
    return found


def _can_be(row: dict[str, Any]) -> bool:
    alone = row["open_time"] is not None and row["replayed_at"] is None
    return alone and not NOT_OF_THE_ROW & set(row["reasons"].split())


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["table"], row["market"], row["month"]


def _replay(
    toolbox: Toolbox, place: tuple[str, str, str], rows: list[dict[str, Any]], dry_run: bool
) -> Iterator[Replayed]:
    table, market, month = place
    timeframe, partition = (
        TIMEFRAMES[table.rpartition("_")[2]],
        Partition.parse(f"{market}|{month}"),
    )
    wanted = wanted_window(toolbox, timeframe, partition)
    if not wanted:
        return
    sent = pl.DataFrame([_sent(row) for row in rows], schema=_SENT).with_row_index("row")
    judged = split_rows(
        add_request_columns(sent.drop("row"), 0, wanted).with_columns(
            sent["row"].cast(pl.Int64).alias("answer")
        ),
        timeframe,
        closed_before=toolbox.settings.now(),
    )
    alone = judged.valid.unique(NAMES).filter(~pl.col("open_time").is_duplicated())
    stored = toolbox.lake.read(raw(timeframe), partition)
    there = stored.select(NAMES) if stored is not None else alone.select(NAMES).clear()
    if not dry_run and alone.height:
        take_in(
            toolbox,
            timeframe,
            partition,
            alone.select(NAMES),
            pl.DataFrame(schema=REJECTED_SCHEMA),
            REPLAY,
            final=False,
        )
    outcome = {
        **dict(judged.rejected.select("answer", "reasons").iter_rows()),
        **dict.fromkeys(judged.valid["answer"], "several different rows"),
        **dict.fromkeys(
            judged.valid.join(alone, on=NAMES, how="semi", nulls_equal=True)["answer"], "disagrees"
        ),
        **dict.fromkeys(
            judged.valid.join(there, on=NAMES, how="semi", nulls_equal=True)["answer"], "identical"
        ),
        **dict.fromkeys(_new(judged.valid, alone, there)["answer"], "stored"),
    }


def _is_replayable(row: dict[str, Any]) -> bool:
    is_waiting = row["open_time"] is not None and row["replayed_at"] is None
    return is_waiting and not NOT_REPLAYABLE & set(row["reasons"].split())


def _place_of(row: dict[str, Any]) -> _Place:
    return _Place(row["table"], row["market"], row["month"])


def _as_sent(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row as the venue sent it; quarantine keeps all fields as text."""
    fields = dict(row["fields"])
    trades, open_time = fields.get("trades"), str(fields["open_time"])
    fields["trades"] = int(trades) if trades and trades.isdecimal() else None
    is_number = open_time.isdecimal()
    fields["open_time"] = int(open_time) if is_number else to_ms(parse_time(row["open_time"]))
    return {name: fields.get(name) for name in COLUMN_NAMES}


def _receipt_row(row: ReplayedRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "partition": row.partition.key,
        "open_time": row.open_time,
        "was": row.reasons,
        "is": row.outcome,
    }
