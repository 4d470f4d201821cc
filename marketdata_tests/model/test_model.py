"""The values of `model`: keys are exact inverses, and grids and months equal those of a second
count, by hand and by calendar.
"""

from __future__ import annotations

import calendar
import string
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import (
    BAR_COLUMNS,
    BAR_SCHEMA,
    COLUMN_NAMES,
    DECIMAL,
    ROLLUP_COLUMNS,
    empty_bars,
    format_decimals,
)
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, adjacent_partition, partitions_of
from marketdata_assets.model.table import rollup_table
from marketdata_assets.model.timeframe import TIMEFRAMES, parse_timeframe
from marketdata_assets.model.window import Window, format_time, from_ms, month_of, parse_time, to_ms
from marketdata_tests.samples import BTC, DECIMALS, MINUTE, at

# ---------------------------------------------------------------- markets
_ASSETS = st.builds(
    str.__add__,
    st.sampled_from(string.ascii_letters + string.digits),
    st.text(string.ascii_letters + string.digits + ".$", max_size=9),
)
_SPOT = st.builds("{}/{}".format, _ASSETS, _ASSETS)
_CONTRACTS = st.builds(
    "{}:{}{}".format, _SPOT, _ASSETS, st.sampled_from(["", "-250328", "-250328-50000-C"])
)
SYMBOLS = _SPOT | _CONTRACTS
HOSTILE = [
    "",
    "/",
    "..",
    "../..",
    "../../etc/passwd",
    "BTC'; DROP TABLE x",
    "BTC/USDT'; DROP TABLE x",
    'BTC/US"DT',
    "BTC/USDT|2024-03-01",
    "BTC/USDT,ETH/USDT",
    "BTC/USDT\n",
    "BTC /USDT",
    "BTC/USDT\x00",
    "BTC\\USDT",
    "BTC-USDT",
    "BTC_USDT",
    "BTC/USD-T",
    "BTC/USD_T",
    "BTC/USDT:",
    "BTC/USDT:USDT:USDT",
    "BTC/USDT/USDT",
    "BTC/USDT=1",
    "%2e%2e/%2e%2e",
    "₿/USDT",
    "BTC/ＵＳＤＴ",
    "BTC/١٢٣",
    "BTC/US\u200bDT",
    "BTC/\u202eTDSU",
    "e\u0301/USDT",
    "BTC/US-DT",
    "A_B/USDT",
    "BTC USD/USDT",
    "币" * 30 + "/USDT",
    "A" * 300 + "/USDT",
    "BTC/" + "U" * 300,
]


@pytest.mark.parametrize(
    ("symbol", "key"),
    [
        ("BTC/USDT", "binance:BTC-USDT"),
        ("BTC/USDT:USDT", "binance:BTC-USDT_USDT"),
        ("BTC/USDT:USDT-250328", "binance:BTC-USDT_USDT-250328"),
        ("BTC/USD:BTC-250328-50000-C", "binance:BTC-USD_BTC-250328-50000-C"),
        ("1000SATS/USDT", "binance:1000SATS-USDT"),
        ("币安人生/USDT", "binance:币安人生-USDT"),
        ("人生K线/USDT:USDT", "binance:人生K线-USDT_USDT"),
        ("XYZ-TSLA/USDC:USDC", "binance:XYZ-TSLA-USDC_USDC"),
        ("BTC2X-FLI/USDT", "binance:BTC2X-FLI-USDT"),
        ("$PAC/USDT", "binance:$PAC-USDT"),
        ("C+CHARGE/USDT", "binance:C+CHARGE-USDT"),
        ("BTC/USDC:USDC-260327-0.5-P", "binance:BTC-USDC_USDC-260327-0.5-P"),
    ],
)
def test_a_key_by_hand(symbol: str, key: str):
    assert Market("binance", symbol).key == str(Market("binance", symbol)) == key
    assert Market.parse(key) == Market("binance", symbol)


@given(SYMBOLS)
def test_a_key_leads_back_to_its_market(symbol: str):
    market = Market("kraken", symbol)
    assert Market.parse(market.key) == market
    assert set(market.key) <= set(string.ascii_letters + string.digits + ".$:-_")
    assert market.key.count(":") == 1


@pytest.mark.parametrize("symbol", HOSTILE)
def test_a_hostile_symbol_is_refused(symbol: str):
    with pytest.raises(BadInput) as refused:
        Market("binance", symbol)
    assert len(str(refused.value)) < 300
    assert "BTC/USDT" in str(refused.value)


@pytest.mark.parametrize(
    "venue",
    [
        "",
        "Binance",
        "../binance",
        "binance:",
        "bin ance",
        "binance|",
        "1inch",
        "b" + "ö",
        "binance\n",
    ],
)
def test_a_hostile_venue_is_refused(venue: str):
    with pytest.raises(BadInput):
        Market(venue, "BTC/USDT")


@pytest.mark.parametrize(
    "key",
    [f"binance:{symbol}" for symbol in HOSTILE if symbol not in ("BTC-USDT",)]
    + [
        "",
        ":",
        "binance",
        "BTC-USDT",
        "binance:BTC/USDT",
        "binance:BTC-USDT:USDT",
        "binance:BTC/USDT-1",
        ":BTC-USDT",
        "binance:-",
        "x" * 300,
    ],
)
def test_text_that_is_no_key_is_refused(key: str):
    with pytest.raises(BadInput) as refused:
        Market.parse(key)
    assert len(str(refused.value)) < 300


@given(
    st.text(max_size=80) | st.builds("binance:{}".format, st.text(string.printable, max_size=20))
)
def test_any_text_is_a_key_exactly_or_refused(text: str):
    with suppress(BadInput):
        assert Market.parse(text).key == text


@pytest.mark.parametrize(
    ("symbol", "expires"),
    [
        ("BTC/USDT", None),
        ("BTC/USDT:USDT", None),
        ("BTC/USDT:USDT-240329", "2024-03-30"),
        ("BTC/USD:BTC-241231-60000-C", "2025-01-01"),
        ("BTC/USDT:USDT-999999", None),
    ],
)
def test_a_dated_contract_ends_with_its_day(symbol: str, expires: str | None):
    assert Market("okx", symbol).expires == (at(expires) if expires else None)


# ---------------------------------------------------------------- moments and timeframes
MOMENTS = st.datetimes(datetime(1969, 1, 1), datetime(2199, 12, 31), timezones=st.just(UTC))


def test_the_table_of_timeframes():
    assert {tf.name: tf.width / MINUTE for tf in TIMEFRAMES.values()} == {
        "1s": 1 / 60,
        "1m": 1,
        "3m": 3,
        "5m": 5,
        "15m": 15,
        "30m": 30,
        "1h": 60,
        "2h": 120,
        "4h": 240,
        "6h": 360,
        "8h": 480,
        "12h": 720,
        "1d": 1440,
        "3d": 4320,
        "1w": 10080,
        "1M": 31 * 1440,
    }
    for tf in TIMEFRAMES.values():
        assert parse_timeframe(tf.name) is tf
    for name in ("2m", "1D", "", "1mo"):
        with pytest.raises(BadInput, match="1s 1m 3m"):
            parse_timeframe(name)


def test_names_of_tables_differ_in_more_than_the_case_of_a_letter():
    """SQL, and some file systems, do not tell 1M from 1m."""
    labels = {tf.label.lower() for tf in TIMEFRAMES.values()}
    assert len(labels) == len(TIMEFRAMES)
    assert rollup_table(TIMEFRAMES["1M"]).name == "rollup/ohlcv_1mo"


def test_which_bars_consist_of_which():
    made_of = {
        name: [other for other in TIMEFRAMES if TIMEFRAMES[name].is_made_of(TIMEFRAMES[other])]
        for name in ("1m", "5m", "8h", "3d", "1w", "1M")
    }
    days = ["1s", "1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h", "1d"]
    assert made_of == {
        "1m": ["1s", "1m"],
        "5m": ["1s", "1m", "5m"],
        "8h": ["1s", "1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "8h"],
        "3d": [*days, "3d"],
        "1w": [*days, "1w"],
        "1M": days,
    }


def grid_floor(moment: datetime, name: str) -> datetime:
    """Return the open time of the bar from the fields of the clock and the calendar."""
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    if name == "1w":
        return day - timedelta(days=moment.isoweekday() - 1)
    if name == "1M":
        return day.replace(day=1)
    if name == "3d":
        return day - timedelta(days=day.toordinal() % 3 - EPOCH_DAY % 3) % timedelta(days=3)
    size = {"s": 1, "m": 60, "h": 3600, "d": 86400}[name[-1]] * int(name[:-1])
    second = moment.hour * 3600 + moment.minute * 60 + moment.second
    return day + timedelta(seconds=second // size * size)


EPOCH_DAY = datetime(1970, 1, 1, tzinfo=UTC).toordinal()
SECOND = timedelta(seconds=1)


@given(MOMENTS, st.sampled_from(list(TIMEFRAMES)))
def test_floor_and_ceil_follow_the_calendar(moment: datetime, name: str):
    tf, below = TIMEFRAMES[name], grid_floor(moment, name)
    assert tf.floor(moment) == below
    after = grid_floor(below + tf.width, name)
    assert tf.ceil(moment) == (moment if moment == below else after)
    assert (tf.shift(below, 1), tf.shift(after, -1)) == (after, below)
    assert tf.count(below, after) == 1
    assert tf.floor(below) == tf.ceil(below) == below


def test_weeks_begin_on_monday():
    week = TIMEFRAMES["1w"]
    assert week.floor(at("2024-03-03T23:59:59.999999")) == at("2024-02-26")
    assert (
        week.floor(at("2024-03-04"))
        == week.ceil(at("2024-02-26T00:00:00.000001"))
        == at("2024-03-04")
    )
    assert week.floor(at("1969-12-31")) == at("1969-12-29")


@given(MOMENTS)
def test_moments_as_text_and_as_numbers(moment: datetime):
    assert parse_time(format_time(moment)) == moment
    assert format_time(moment).endswith("Z")
    assert from_ms(to_ms(moment)) == moment.replace(microsecond=moment.microsecond // 1000 * 1000)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-03-01", "2024-03-01T00:00:00Z"),
        ("2024-03-01T12:00:00Z", "2024-03-01T12:00:00Z"),
        ("2024-03-01T12:00:00+02:00", "2024-03-01T10:00:00Z"),
        ("2024-03-01 12:00", "2024-03-01T12:00:00Z"),
        ("2024-02-29", "2024-02-29T00:00:00Z"),
        ("2018-02-08T00:28:14.789", "2018-02-08T00:28:14.789000Z"),
    ],
)
def test_a_moment_by_hand(text: str, moment: str):
    assert format_time(parse_time(text)) == moment


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "2023-02-29",
        "2024-13-01",
        "2024-03-01T25:00",
        "1704067200",
        "0001-01-01T00:00:00+05:00",
    ],
)
def test_text_that_is_no_moment_is_refused(text: str):
    with pytest.raises(BadInput, match="is not a date such as"):
        parse_time(text)


# ---------------------------------------------------------------- windows
WINDOWS = st.builds(
    lambda start, length: Window(start, start + length * timedelta(seconds=20)),
    MOMENTS,
    st.integers(-200, 3000),
)


@given(WINDOWS, st.sampled_from(["1m", "5m", "15m", "1h"]))
def test_a_window_counts_the_bars_that_open_inside(window: Window, name: str):
    tf, moment, opens = TIMEFRAMES[name], grid_floor(window.start, name), 0
    while moment < window.end:
        opens += moment >= window.start
        moment += tf.width
    assert window.count(tf) == opens
    assert bool(window) == (window.start < window.end)


@given(WINDOWS, st.integers(1, 50))
def test_pages_cover_a_window_once(window: Window, size: int):
    pages = list(window.pages(TIMEFRAMES["1m"], size))
    edges = [page.start for page in pages] + [window.end]
    assert not pages or edges[0] == window.start
    assert bool(pages) == bool(window)
    assert [page.end for page in pages] == edges[1:]
    assert all(page and page.end - page.start <= size * MINUTE for page in pages)


def test_the_intersection_of_windows():
    a, b = Window(at("2024-01-01"), at("2024-01-03")), Window(at("2024-01-02"), at("2024-01-05"))
    assert a & b == Window(at("2024-01-02"), at("2024-01-03"))
    assert not a & Window(at("2024-01-03"), at("2024-01-04"))
    assert str(a) == "[2024-01-01T00:00:00Z, 2024-01-03T00:00:00Z)"


# ---------------------------------------------------------------- partitions
def month(year: int, number: int) -> Window:
    """Return a calendar month by Python's calendar."""
    start = datetime(year, number, 1, tzinfo=UTC)
    return Window(start, start + timedelta(days=calendar.monthrange(year, number)[1]))


MONTHS = st.builds(month, st.integers(1970, 2199), st.integers(1, 12))


@given(MOMENTS)
def test_a_month_equals_the_calendars(moment: datetime):
    assert month_of(moment) == month(moment.year, moment.month)


@given(MONTHS, st.sampled_from(list(TIMEFRAMES)))
def test_a_bar_belongs_to_the_month_of_its_last_second(span: Window, name: str):
    opens = Partition(BTC, span).open_times(TIMEFRAMES[name])
    before, last = (grid_floor(t - SECOND, name) for t in (opens.start, opens.end))
    for moment in (opens.start, last):
        assert grid_floor(moment, name) == moment
        assert span.start <= last_second(moment, name) < span.end
    for moment in (before, opens.end):
        assert not span.start <= last_second(moment, name) < span.end


def last_second(opened: datetime, name: str) -> datetime:
    return grid_floor(opened + TIMEFRAMES[name].width, name) - SECOND


@given(MOMENTS, st.sampled_from(list(TIMEFRAMES)))
def test_every_moment_belongs_to_exactly_one_partition(moment: datetime, name: str):
    """Of the months around it, exactly one owns its bar."""
    opened = grid_floor(moment, name)
    near = partitions_of(BTC, Window(moment - timedelta(days=40), moment + timedelta(days=40)))
    owners = [
        p
        for p in near
        if p.open_times(TIMEFRAMES[name]).start <= opened < p.open_times(TIMEFRAMES[name]).end
    ]
    last = last_second(opened, name)
    assert [p.month_key for p in owners] == [f"{last.year}-{last.month:02}-01"]


def test_a_week_lies_in_the_month_of_its_sunday():
    week = TIMEFRAMES["1w"]
    # Monday 2024-02-26 .. Sunday 2024-03-03; Monday 2024-03-25 .. Sunday 2024-03-31
    assert Partition(BTC, month(2024, 3)).open_times(week) == Window(
        at("2024-02-26"), at("2024-04-01")
    )
    assert Partition(BTC, month(2024, 2)).open_times(week) == Window(
        at("2024-01-29"), at("2024-02-26")
    )
    assert Partition(BTC, month(2024, 3)).open_times(TIMEFRAMES["1d"]) == month(2024, 3)


@given(SYMBOLS, MONTHS)
def test_a_partition_key_leads_back(symbol: str, span: Window):
    market = Market("binance", symbol)
    partition = Partition(market, span)
    assert partition.key == f"{market.key}|{span.start:%Y-%m}-01"
    assert Partition.parse(partition.key) == partition
    assert partition.stored_key == (market.key, f"{span.start:%Y-%m}-01")
    assert "|".join(partition.stored_key) == partition.key
    assert Partition.from_stored_key(partition.stored_key) == partition


@pytest.mark.parametrize(
    "key",
    [
        "",
        "|",
        "binance:BTC-USDT",
        "binance:BTC-USDT|",
        "|2024-03-01",
        "binance:BTC-USDT|2024-03-02",
        "binance:BTC-USDT|2024-03",
        "binance:BTC-USDT|20240301",
        "binance:BTC-USDT|2024-W09-5",
        "binance:BTC-USDT|2024-03-01T00:00:00",
        "binance:BTC-USDT|2024-03-01|x",
        "binance:BTC-USDT|2024-13-01",
        "binance:BTC-USDT|9999-12-01",
        "binance:BTC-USDT|../../etc",
        "2024-03-01|binance:BTC-USDT",
    ],
)
def test_text_that_is_no_partition_key_is_refused(key: str):
    with pytest.raises(BadInput):
        Partition.parse(key)


def test_the_adjacent_months():
    january, december = Partition(BTC, month(2024, 1)), Partition(BTC, month(2023, 12))
    assert adjacent_partition(january, -1) == december
    assert adjacent_partition(december, +1) == january


def test_partitions_of_a_span():
    def keys(start: str, end: str) -> list[str]:
        return [p.month_key for p in partitions_of(BTC, Window(at(start), at(end)))]

    assert keys("2023-11-15", "2024-02-01") == ["2023-11-01", "2023-12-01", "2024-01-01"]
    assert keys("2023-11-15", "2024-02-01T00:00:01")[-1] == "2024-02-01"
    assert keys("2024-02-01", "2024-02-01") == keys("2024-02-02", "2024-01-01") == []


# ---------------------------------------------------------------- bars
def test_the_columns_of_a_bar():
    assert COLUMN_NAMES == (
        "open_time",
        "open",
        "high",
        "low",
        "close",
        "volume",
        "quote_volume",
        "trades",
        "taker_buy_volume",
        "taker_buy_quote_volume",
    )
    assert {c.name for c in BAR_COLUMNS if c.optional} == {
        "quote_volume",
        "trades",
        "taker_buy_volume",
        "taker_buy_quote_volume",
    }
    assert [c.name for c in ROLLUP_COLUMNS[len(BAR_COLUMNS) :]] == [
        "vwap",
        "bars_expected",
        "bars_present",
    ]
    assert empty_bars().schema == pl.Schema(BAR_SCHEMA)
    assert empty_bars().is_empty()


@given(st.lists(DECIMALS, min_size=1, max_size=20))
def test_decimals_as_text_have_every_digit_and_no_trailing_zero(values: list[Decimal]):
    values = [*values, Decimal(0), Decimal(100), Decimal("-1.25")]
    texts = (
        pl.DataFrame({"v": values}, schema={"v": DECIMAL})
        .select(format_decimals("v"))["v"]
        .to_list()
    )
    assert [Decimal(text) for text in texts] == values
    assert texts[-3:] == ["0", "100", "-1.25"]
    assert all(
        set(text) <= set("0123456789.-") and not (("." in text) and text.endswith(("0", ".")))
        for text in texts
    )
