"""What lies before a market's first bar is a gap like others: listed, and asked about again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

from marketdata_assets.model.timeframe import TIMEFRAME_OF_LABEL
from marketdata_assets.model.window import Window, format_time, parse_time

revision = "7"
down_revision = "6"

_DUE = "1970-01-01T00:00:00Z"


def upgrade(op: Operations) -> None:
    """From version 6. A first bar that two equal answers showed is asked about at once."""
    connection = op.get_bind()
    claims = sa.text(
        "SELECT p.tbl, p.market, p.month, p.start, p.through, m.listed, m.evidence"
        " FROM partitions p JOIN markets m ON m.market = p.market"
        " WHERE p.tbl LIKE 'raw/%' AND p.bytes IS NOT NULL AND p.start < m.listed"
    )
    insert = sa.text(
        'INSERT INTO gaps (tbl, market, month, start, "end", bars, reason, answers, evidence,'
        " cause, status, next_ask) VALUES (:tbl, :market, :month, :start, :end, :bars,"
        " 'not_listed', 1, :evidence, 'not_listed', 'explained', :next_ask)"
        " ON CONFLICT DO NOTHING"
    )
    for row in connection.execute(claims).mappings().all():
        timeframe = TIMEFRAME_OF_LABEL[row["tbl"].rpartition("_")[2]]
        start, through = parse_time(row["start"]), parse_time(row["through"])
        first = timeframe.floor(parse_time(row["listed"]))
        window = Window(start, min(first, through))
        if window:
            values = {
                **{name: row[name] for name in ("tbl", "market", "month", "start", "evidence")},
                "end": format_time(window.end),
                "bars": window.count(timeframe),
                "next_ask": _DUE if first <= through else None,
            }
            connection.execute(insert, values)
