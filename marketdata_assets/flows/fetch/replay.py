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
from marketdata_assets.model.timeframe import TIMEFRAME_OF_LABEL, Timeframe
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

    table: str
    market: str
    month: str


@dataclass(frozen=True, slots=True)
class QuarantineReplayer:
    """Judges rows of quarantine again."""

    settings: Settings
    ledger: Ledger
    lake: Lake

    def replay(
        self, markets: Sequence[Market], window: Window, dry_run: bool = False
    ) -> list[ReplayedRow]:
        """Judge the rejected rows of these markets and open times again, and store what passes.

        A stored bar stays as it is. Of several different rows of one open_time none is stored. What
        is stored or identical is marked as replayed and not judged again. Writes a receipt.
        """
        rows = [
            row
            for market in markets
            for row in self.ledger.quarantine.rows(market, window, limit=NO_LIMIT)
            if _is_replayable(row)
        ]
        found = [
            replayed
            for place, group in groupby(sorted(rows, key=_place_of), key=_place_of)
            for replayed in self._replay(place, list(group), dry_run)
        ]
        done = [row for row in found if row.outcome in ("stored", "identical")]
        if done and not dry_run:
            now = self.settings.now()
            self.ledger.quarantine.mark_replayed([row.id for row in done], now)
            bars = sum(row.outcome == "stored" for row in done)
            message = (
                f"{len(done)} of {len(found)} refused rows pass the rules now, {bars} bars stored"
            )
            body = {"rows": [_receipt_row(row) for row in found]}
            self.ledger.receipts.add(REPLAY, now, message=message, body=body)
        return found

    def _replay(
        self, place: _Place, rows: list[dict[str, Any]], dry_run: bool
    ) -> Iterator[ReplayedRow]:
        timeframe = TIMEFRAME_OF_LABEL[place.table.rpartition("_")[2]]
        partition = Partition.parse(f"{place.market}|{place.month}")
        wanted = wanted_window(self.settings, timeframe, partition)
        if not wanted:
            return
        judged = self._judge(timeframe, rows, wanted)
        candidates = judged.valid.unique(COLUMN_NAMES).filter(~pl.col("open_time").is_duplicated())
        stored = self.lake.read(raw_table(timeframe), partition)
        before = candidates.clear() if stored is None else stored
        if not dry_run and candidates.height:
            PartitionStore(self.settings, self.ledger, self.lake).ingest_frame(
                timeframe,
                partition,
                candidates.select(COLUMN_NAMES),
                rejected=pl.DataFrame(schema=REJECTED_SCHEMA),
                sources=[REPLAY],
                settles_gaps=False,
            )
        outcomes = _outcomes(judged, candidates, before.select(COLUMN_NAMES))
        for i, row in enumerate(rows):
            yield ReplayedRow(
                row["id"],
                partition,
                timeframe,
                open_time=row["open_time"],
                reasons=row["reasons"],
                outcome=outcomes[i],
            )

    def _judge(
        self, timeframe: Timeframe, rows: Sequence[dict[str, Any]], wanted: Window
    ) -> SplitRows:
        """Apply the rules to rows of quarantine; the column `answer` is the index of a row."""
        sent = pl.DataFrame([_as_sent(row) for row in rows], schema=_SENT_SCHEMA)
        index = pl.int_range(pl.len(), dtype=pl.Int64).alias("answer")
        asked = add_request_columns(sent, 0, wanted).with_columns(index)
        return split_rows(asked, timeframe, closed_before=self.settings.now())


def _outcomes(judged: SplitRows, candidates: pl.DataFrame, stored: pl.DataFrame) -> dict[int, str]:
    """Return the outcome of each row by its index; `stored` are the bars before the replay."""
    valid = judged.valid
    unique = valid.join(candidates, on=COLUMN_NAMES, how="semi", nulls_equal=True)
    identical = valid.join(stored, on=COLUMN_NAMES, how="semi", nulls_equal=True)
    new = unique.join(stored, on="open_time", how="anti")
    return {
        **dict(judged.rejected.select("answer", "reasons").iter_rows()),
        **dict.fromkeys(valid["answer"], "several different rows"),
        **dict.fromkeys(unique["answer"], "disagrees"),
        **dict.fromkeys(identical["answer"], "identical"),
        **dict.fromkeys(new["answer"], "stored"),
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
