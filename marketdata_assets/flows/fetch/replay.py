"""Replay: rows in quarantine that the rules would take today become bars. Sends no request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.flows.fetch.ingest import take_in, wanted_window
from marketdata_assets.model.bar import NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, parse_time, to_ms
from marketdata_assets.quality.split import REJECTED_SCHEMA, add_request_columns, split_rows

REPLAY = "replay"
EVERY = 10**9
NOT_OF_THE_ROW = {"outside_window", "unclosed", "conflict", "disagrees", "overlap"}
"""Reasons that no rule about the row itself gave: the row came unasked or too early, or others deny
it.
"""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One row of quarantine that was judged again. `outcome`: `stored`, `identical`, `disagrees`, or
    the reasons it still breaks.
    """

    id: int
    partition: Partition
    timeframe: Timeframe
    open_time: str
    reasons: str
    outcome: str


def replay(
    toolbox: Toolbox, markets: Sequence[Market], window: Window, dry_run: bool = False
) -> list[Replayed]:
    """Judge the refused rows of these markets and open times again, and store what passes now; write a
    receipt.

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
    for i, row in enumerate(rows):
        yield Replayed(
            row["id"], partition, timeframe, row["open_time"], row["reasons"], outcome[i]
        )


def _new(kept: pl.DataFrame, alone: pl.DataFrame, there: pl.DataFrame) -> pl.DataFrame:
    return kept.join(alone, on=NAMES, how="semi", nulls_equal=True).join(
        there, on="open_time", how="anti"
    )


_SENT: dict[str, pl.DataType] = {name: pl.String() for name in NAMES} | {
    "open_time": pl.Int64(),
    "trades": pl.Int64(),
}


def _sent(row: dict[str, Any]) -> dict[str, Any]:
    """The row as the venue sent it: quarantine keeps all fields as text."""
    fields = dict(row["fields"])
    trades = fields.get("trades")
    fields["trades"] = int(trades) if trades and trades.isdecimal() else None
    fields["open_time"] = (
        int(fields["open_time"])
        if str(fields["open_time"]).isdecimal()
        else to_ms(parse_time(row["open_time"]))
    )
    return {name: fields.get(name) for name in NAMES}
