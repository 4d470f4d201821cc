"""Bars for tests: built by hand, drawn from a seed, or read from the real files below ../shared."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.storage.parquet import encode, to_arrow, with_absent
from marketdata_tests.conftest import SHARED

# examples have no deadline, because a busy machine is no defect; examples that share a fixture use
# different names in it
settings.register_profile(
    "marketdata",
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("marketdata")

BTC, ETH = Market("binance", "BTC/USDT"), Market("binance", "ETH/USDT")
START = datetime(2024, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
JANUARY = Partition(BTC, Window(START, datetime(2024, 2, 1, tzinfo=UTC)))
FEBRUARY = Partition(
    BTC, Window(datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC))
)

Row = dict[str, Any]


def run_sql(ledger: Ledger, sql: str, **values: Any) -> int:
    """Change the ledger's tables without the ledger; return how many rows changed."""
    with ledger.database.transaction() as connection:
        return connection.execute(sa.text(sql), values).rowcount


def read_sql(ledger: Ledger, sql: str, **values: Any) -> list[tuple[Any, ...]]:
    """Return what a query finds in the ledger's tables."""
    return ledger.database.plain_rows(sa.text(sql).bindparams(**values))


def outcomes(ledger: Ledger) -> list[tuple[str, str, int]]:
    """Return outcomes and errors of the fetch log with their counts, the most frequent first."""
    counted = "SELECT outcome, coalesce(error, ''), count(*) FROM fetches GROUP BY 1, 2"
    return read_sql(ledger, f"{counted} ORDER BY 3 DESC")


def at(text: str) -> datetime:
    """Parse an ISO time as UTC, independently of the package."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def row(open_time: datetime, **changes: Any) -> Row:
    """Return one bar as Python values: prices 100, 110, 90, 105; volume 10 at 103 on average.

    Takers bought 6 of the 10. `changes` replaces values.
    """
    numbers = {
        "open": 100,
        "high": 110,
        "low": 90,
        "close": 105,
        "volume": 10,
        "quote_volume": 1030,
    }
    takers = {"taker_buy_volume": 6, "taker_buy_quote_volume": 620}
    decimals = {name: Decimal(value) for name, value in {**numbers, **takers}.items()}
    return {**decimals, "open_time": open_time, "trades": 7, **changes}


def frame(rows: Iterable[Row]) -> pl.DataFrame:
    """Rows as a frame of bars."""
    return pl.DataFrame([{name: r[name] for name in COLUMN_NAMES} for r in rows], schema=BAR_SCHEMA)


def random_rows(
    seed: int, opens: Iterable[datetime], digits: int = 12, scale: int = 12, nulls: float = 0.0
) -> list[Row]:
    """Return bars with random numbers of up to `digits` digits, up to `scale` behind the point.

    `nulls` is the share of the optional values that is null.
    """
    dice = random.Random(seed)

    def number() -> Decimal:
        return Decimal(dice.randrange(1, 10 ** dice.randint(1, digits))).scaleb(
            -dice.randint(0, scale)
        )

    def given(value: Any) -> Any:
        return None if dice.random() < nulls else value

    rows = []
    for moment in opens:
        low, opened, closed, high = sorted(number() for _ in range(4))
        amounts = {
            name: given(number())
            for name in ("quote_volume", "taker_buy_volume", "taker_buy_quote_volume")
        }
        rows.append(
            {"open_time": moment, "open": opened, "high": high, "low": low, "close": closed}
            | {"volume": number(), "trades": given(dice.randrange(10**6)), **amounts}
        )
    return rows


def minutes(count: int, start: datetime = START) -> list[datetime]:
    """Return `count` consecutive open times of 1m bars."""
    return [start + i * MINUTE for i in range(count)]


def random_bars(seed: int = 1, count: int = 100) -> pl.DataFrame:
    """Return random bars whose numbers fit into 18 digits, eight of them behind the point; a fifth
    of the optional values is null.
    """
    return frame(random_rows(seed, minutes(count), digits=10, scale=8, nulls=0.2))


def moved_to(bars: pl.DataFrame, partition: Partition) -> pl.DataFrame:
    """Return bars of January as those of another month, as far as that goes."""
    return bars.with_columns(pl.col("open_time") + (partition.month.start - START))


def raw_object(bars: pl.DataFrame, partition: Partition | None = None) -> bytes:
    """Return the object of raw bars in a table whose columns were never widened."""
    whole = with_absent(bars, raw_table(TIMEFRAMES["1m"]).stored_columns)
    table = raw_table(TIMEFRAMES["1m"])
    return encode(to_arrow(whole, {}), table.identity(partition or JANUARY))


def earlier_object(content: bytes) -> bytes:
    """Return an object as releases before 0.2 wrote it: each column of decimals has the smallest
    scale that holds its digits, in 18 digits, or 38 digits with twelve behind the point.
    """
    sink = io.BytesIO()
    table = pq.read_table(io.BytesIO(content)).replace_schema_metadata()
    for index, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type):
            kinds = [pa.decimal128(18, scale) for scale in range(13)] + [pa.decimal128(38, 12)]
            kind = next(kind for kind in kinds if _fits(table.column(index), kind))
            table = table.set_column(index, field.name, table.column(index).cast(kind))
    pq.write_table(table, sink, store_decimal_as_integer=True, compression="zstd")
    return sink.getvalue()


def _fits(column: Any, kind: Any) -> bool:
    try:
        column.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


DECIMALS = st.builds(
    lambda digits, scale: Decimal(digits).scaleb(-scale),
    st.integers(1, 10**26 - 1),
    st.integers(0, 12),
).filter(lambda value: value < 10**25)
"""Positive numbers with up to 26 digits that fit into DECIMAL(38, 12)."""


def dump(venue: str, symbol: str, timeframe: str, span: str) -> pl.DataFrame:
    """Read a real file below ../shared/marketdata without any change."""
    return pl.read_parquet(SHARED / "marketdata" / venue / symbol / timeframe / f"{span}.parquet")


def real_bars(symbol: str, timeframe: str, span: str) -> pl.DataFrame:
    """Read real bars of Binance, all nine columns, with polars alone."""
    rows = dump("binance_spot", symbol, timeframe, span).rename({"count": "trades"})
    opens = (
        pl.from_epoch("open_time", time_unit="ms")
        .dt.replace_time_zone("UTC")
        .cast(BAR_SCHEMA["open_time"])
    )
    return rows.select(opens, *(pl.col(name).cast(BAR_SCHEMA[name]) for name in COLUMN_NAMES[1:]))


def start_python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start another process that runs this code, with pipes to and from it."""
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    return subprocess.Popen([sys.executable, "-c", code, *arguments], **{**pipes, **options})


def kill(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to the process and wait until it has ended."""
    process.kill()
    process.communicate()
