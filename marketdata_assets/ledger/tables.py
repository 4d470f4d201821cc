"""The tables of the ledger, for SQLite and PostgreSQL alike.

A column or a table is added here, together with a new VERSION and a script in `migrations/versions`
that brings a ledger of the version before to it. Stored names and values are a contract: where the
code calls a table or a column otherwise, the first argument is the stored name.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Dialect, Integer, Text

from marketdata_assets.model.window import format_time, parse_time

VERSION = 8


class Moment(sa.TypeDecorator[datetime]):
    """A moment as ISO text in UTC, `2024-03-01T00:00:00Z`."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        """The text of a moment."""
        return None if value is None else format_time(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:
        """The moment of a text."""
        return None if value is None else parse_time(value)


class Flag(sa.TypeDecorator[bool]):
    """A boolean as 0 or 1."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: bool | None, dialect: Dialect) -> int | None:
        """The number of a boolean."""
        return None if value is None else int(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> bool | None:
        """The boolean of a number."""
        return None if value is None else bool(value)


class JsonText(sa.TypeDecorator[Any]):
    """A JSON value as text, with its keys in the order given."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """The text of a value."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """The value of a text."""
        return None if value is None else json.loads(value)


metadata = sa.MetaData()


def _text(name: str, **options: Any) -> Column[str]:
    return Column(name, Text, nullable=False, **options)


def _count(name: str, **options: Any) -> Column[int]:
    return Column(name, Integer, nullable=False, **options)


def _seconds(name: str, **options: Any) -> Column[float]:
    """Seconds since 1970, or seconds."""
    return Column(name, sa.DOUBLE_PRECISION, nullable=False, **options)


def _moment(name: str, **options: Any) -> Column[datetime]:
    return Column(name, Moment, nullable=False, **options)


def _id() -> Column[int]:
    """A number that the database gives."""
    number = sa.BigInteger().with_variant(Integer(), "sqlite")
    return Column("id", number, sa.Identity(always=False), primary_key=True)


def trigger_statements(dialect: str, table: str) -> list[str]:
    """The SQL by which each change of a row about a market-month is noted in `unsaved`."""
    month = "month" if table != "receipts" else "'all-01'"
    market = "market" if table != "receipts" else "'receipts'"
    note = (
        "INSERT INTO unsaved (market, month, version) {values}"
        " ON CONFLICT (market, month) DO UPDATE SET version = unsaved.version + 1"
    )
    found = []
    for event, rows in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD")):
        trigger = f"CREATE TRIGGER {table}_{event.lower()} AFTER {event} ON {table} "
        if dialect == "sqlite":
            columns = ", ".join(n if n.startswith("'") else f"{rows}.{n}" for n in (market, month))
            found.append(f"{trigger}BEGIN {note.format(values=f'VALUES ({columns}, 1)')}; END")
            continue
        function = f"note_{table}_{event.lower()}"
        select = note.format(values=f"SELECT DISTINCT {market}, {month}, 1 FROM changed")
        found += [
            f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN {select}; RETURN NULL; END $$",
            f"{trigger}REFERENCING {rows} TABLE AS changed FOR EACH STATEMENT"
            f" EXECUTE FUNCTION {function}()",
        ]
    return found


def _watch(table: sa.Table) -> None:
    """Have changes of the table noted in `unsaved`."""

    def create(target: sa.Table, connection: sa.Connection, **options: Any) -> None:
        for statement in trigger_statements(connection.dialect.name, table.name):
            connection.exec_driver_sql(statement)

    sa.event.listen(table, "after_create", create)


def _create_index(table: sa.Table, statement: str) -> None:
    """Create an index of some rows with its table. As `sa.Index`, it would import both dialects."""

    def create(target: sa.Table, connection: sa.Connection, **options: Any) -> None:
        connection.exec_driver_sql(statement)

    sa.event.listen(table, "after_create", create)


_ZERO = {"server_default": sa.text("0")}
_KEY = {"primary_key": True}

schema_version = sa.Table("schema_version", metadata, _count("version"))

venues = sa.Table(
    "venues",
    metadata,
    _text("venue", **_KEY),
    _seconds("next_at", **_ZERO),
    _seconds("paused_until", **_ZERO),
    _count("failures", **_ZERO),
    _count("opened", **_ZERO),
    _seconds("broken_until", **_ZERO),
)

markets = sa.Table(
    "markets", metadata, _text("market", **_KEY), _moment("listed"), _text("evidence")
)

partitions = sa.Table(
    "partitions",
    metadata,
    _text("tbl", **_KEY),
    _text("market", **_KEY),
    _text("month", **_KEY),
    _moment("start"),
    _moment("through"),
    Column("newest", Moment),
    Column("complete", Flag, key="is_complete", nullable=False),
    _count("rows"),
    Column("bytes", sa.BigInteger),
    Column("digest", Text),
    Column("rolled", Text, key="rollup_source_digest"),
    _count("attempts", **_ZERO),
    _count("failures", **_ZERO),
    Column("error", Text),
    Column("account", JsonText),
    _moment("updated_at"),
    Column("whole_at", Moment, key="completed_at"),
)

objects = sa.Table(
    "objects",
    metadata,
    _text("tbl", **_KEY),
    _text("market", **_KEY),
    _text("month", **_KEY),
    _count("revision"),
    _text("checksum"),
    _text("stamp"),
)

gaps = sa.Table(
    "gaps",
    metadata,
    _text("tbl", **_KEY),
    _text("market", **_KEY),
    _text("month"),
    _moment("start", **_KEY),
    _moment("end"),
    _count("bars"),
    _text("reason"),
    _count("answers"),
    _text("evidence"),
    _text("cause", server_default=""),
    Column("proof", JsonText, nullable=False, server_default="{}"),
    Column("first_asked", Moment, key="first_requested"),
    Column("last_asked", Moment, key="last_requested"),
    Column("next_ask", Moment, key="next_request"),
    _text("status", server_default="open"),
)
_create_index(gaps, "CREATE INDEX gaps_to_ask ON gaps (tbl, next_ask) WHERE next_ask IS NOT NULL")

quarantine = sa.Table(
    "quarantine",
    metadata,
    _id(),
    _text("tbl"),
    _text("market"),
    _text("month"),
    Column("open_time", Text),
    _text("reasons"),
    _text("fields"),
    _text("source"),
    Column("fetch_id", sa.BigInteger),
    _count("seen", server_default=sa.text("1")),
    _text("first_seen"),
    _text("last_seen"),
    _text("content"),
    Column("replayed_at", Text),
    sa.UniqueConstraint("tbl", "market", "month", "content"),
)

fetches = sa.Table(
    "fetches",
    metadata,
    _id(),
    _text("tbl"),
    _text("market"),
    _moment("start"),
    _moment("end"),
    _seconds("asked_at"),
    _seconds("seconds"),
    _text("outcome"),
    Column("status", Integer),
    Column("rows", Integer),
    Column("error", Text),
)
sa.Index("fetches_by_market", fetches.c.market, fetches.c.asked_at)

backfill_attempts = sa.Table(
    "asks",
    metadata,
    _text("market", **_KEY),
    _text("month", **_KEY),
    _count("attempts"),
    _moment("asked_at", key="attempted_at"),
    Column("parked_at", Moment),
    _text("reason"),
)

failed_checks = sa.Table(
    "red_checks",
    metadata,
    _text("tbl", **_KEY),
    _text("market", **_KEY),
    _text("month", **_KEY),
    _text("name", **_KEY),
    Column("blocking", Flag, nullable=False),
    _text("says", key="message"),
    _count("times", server_default=sa.text("1")),
    _moment("since"),
)

heartbeats = sa.Table("beats", metadata, _text("name", **_KEY), _moment("at"))

incidents = sa.Table(
    "incidents",
    metadata,
    _id(),
    _text("key"),
    _text("severity"),
    _text("title"),
    _text("body"),
    _moment("opened_at"),
    Column("recovered_at", Moment),
)
_create_index(
    incidents, "CREATE UNIQUE INDEX incidents_open ON incidents (key) WHERE recovered_at IS NULL"
)

notifications = sa.Table(
    "letters",
    metadata,
    _id(),
    Column("incident", sa.BigInteger, nullable=False),
    _text("event"),
    _text("channel"),
    Column("sent_at", Moment),
    _count("tries", **_ZERO),
    Column("error", Text),
    sa.UniqueConstraint("incident", "event", "channel"),
)

anomalies = sa.Table(
    "anomalies",
    metadata,
    _id(),
    _text("tbl"),
    _text("market"),
    _text("month"),
    _text("kind"),
    _text("severity"),
    _text("state"),
    _moment("start"),
    _moment("end"),
    _count("bars"),
    Column("evidence", JsonText, nullable=False),
    _moment("found_at"),
    _moment("changed_at"),
    Column("note", Text),
    sa.UniqueConstraint("tbl", "market", "kind", "start"),
)

receipts = sa.Table(
    "receipts",
    metadata,
    _id(),
    _text("kind"),
    _moment("at"),
    _text("says", key="message"),
    Column("body", JsonText, nullable=False),
)

instruments = sa.Table(
    "instruments",
    metadata,
    _text("venue", **_KEY),
    _text("symbol", **_KEY),
    _moment("since", **_KEY),
    Column("until", Moment),
    Column("body", JsonText, nullable=False),
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    _text("venue", **_KEY),
    _text("day", **_KEY),
    _moment("at"),
    _count("markets"),
)

selections = sa.Table(
    "selections",
    metadata,
    _id(),
    _text("venue"),
    _text("patterns"),
    _moment("resolved_at"),
    Column("symbols", JsonText, nullable=False),
)

scrubs = sa.Table(
    "scrubs",
    metadata,
    _text("tbl", **_KEY),
    _text("market", **_KEY),
    _text("month", **_KEY),
    _moment("at"),
)

unsaved = sa.Table(
    "unsaved", metadata, _text("market", **_KEY), _text("month", **_KEY), _count("version")
)

KEPT = (partitions, objects, gaps, quarantine, anomalies, failed_checks, backfill_attempts)
"""The tables whose rows about a market-month are also written beside the lake."""
for _table in (*KEPT, receipts):
    _watch(_table)
