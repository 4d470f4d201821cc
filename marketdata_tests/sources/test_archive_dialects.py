"""CSV as people have it: other delimiters, decimals, times and packings are read exactly, or their
refusal names the true cause.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pyarrow as pa
import pytest

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.sources.archive import unpacking
from marketdata_assets.sources.archive.options import (
    ImportOptions,
    parse_columns,
    parse_decimal,
    parse_delimiter,
    parse_time_zone,
)
from marketdata_assets.sources.archive.reading import find_files, read_file

BTC = Market("binance", "BTC/USDT")
START = datetime(2024, 1, 1, tzinfo=UTC)
TIMES = [START + i * timedelta(minutes=1) for i in range(12)]
HEADER = ["open_time", "open", "high", "low", "close", "volume"]
NUMBERS = [
    f"{42283 + i}.58 {42285 + i}.58 {42282 + i}.5 {42284 + i}.58 1.5".split() for i in range(12)
]


def table(write: Callable[[datetime], Any], header: bool = True, **dialect: Any) -> str:
    """Rows in a dialect, by Python's own writer; `write` may return several cells of a time."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n", **dialect)
    if header:
        rows.writerow(HEADER)
    for moment, numbers in zip(TIMES, NUMBERS, strict=True):
        cells = write(moment)
        rows.writerow([*(cells if isinstance(cells, list) else [cells]), *numbers])
    return text.getvalue()


def read(
    tmp_path: Path, content: str | bytes, name: str = "bars.csv", **stated: Any
) -> pl.DataFrame:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    options = ImportOptions(BTC, TIMEFRAMES["1m"], **stated)
    return read_file(file, options, [BTC])[1]


def assert_read(found: pl.DataFrame, first: datetime = START) -> None:
    expected = [int((first + i * timedelta(minutes=1)).timestamp() * 1000) for i in range(12)]
    assert found["open_time"].to_list() == expected
    assert found.select(HEADER[1:]).rows() == [tuple(numbers) for numbers in NUMBERS]


def seconds(moment: datetime) -> str:
    return str(int(moment.timestamp()))


@pytest.mark.parametrize(
    "write",
    [
        seconds,
        lambda t: f"{seconds(t)}.0",
        lambda t: f"{seconds(t)}000",
        lambda t: f"{seconds(t)}000000",
        lambda t: f"{seconds(t)}000000000",
        lambda t: f"{t:%Y-%m-%dT%H:%M:%SZ}",
        lambda t: f"{t:%Y-%m-%d %H:%M}",
        lambda t: f"{t:%Y-%m-%d %H:%M:%S.000}",
        lambda t: t.astimezone(ZoneInfo("Asia/Kolkata")).isoformat(" "),
        lambda t: t.astimezone(ZoneInfo("America/New_York")).strftime("%Y-%m-%dT%H:%M:%S%z"),
        lambda t: f"{t:%Y.%m.%d %H:%M}",
        lambda t: f"{t:%Y/%m/%d %H:%M:%S}",
        lambda t: f"{t:%Y%m%d %H%M%S}",
        lambda t: f"{t:%Y%m%d%H%M%S}",
        lambda t: f"{t:%Y%m%d%H%M}",
    ],
)
def test_a_time_may_be_written_in_many_ways(
    tmp_path: Path, write: Callable[[datetime], str]
) -> None:
    assert_read(read(tmp_path, table(write)))


@pytest.mark.parametrize(
    ("zone", "ahead"), [("UTC", 0), ("EST", -5), ("Europe/Berlin", 1), ("Asia/Kolkata", 5.5)]
)
def test_a_time_without_a_zone_is_of_the_zone_that_is_stated(
    tmp_path: Path, zone: str, ahead: float
) -> None:
    found = read(tmp_path, table(lambda t: f"{t:%Y-%m-%d %H:%M}"), time_zone=zone)
    assert_read(found, START - timedelta(hours=ahead))


@pytest.mark.parametrize("hour", ["02:30", "02:00"])
@pytest.mark.parametrize(("day", "what"), [("2024-03-31", "skipped"), ("2024-10-27", "twice")])
def test_a_clock_that_changes_is_refused(tmp_path: Path, day: str, hour: str, what: str) -> None:
    row = f"{day} {hour},1,1,1,1,1\n"
    with pytest.raises(BadInput, match=r"line 2: .* is no moment of Europe/Berlin"):
        read(tmp_path, ",".join(HEADER) + "\n" + row, time_zone="Europe/Berlin")


@pytest.mark.parametrize(
    ("delimiter", "option"), [(";", ";"), ("\t", "tab"), ("|", "|"), (",", ",")]
)
def test_other_delimiters(tmp_path: Path, delimiter: str, option: str) -> None:
    content = table(seconds, delimiter=delimiter)
    assert_read(read(tmp_path, content, delimiter=parse_delimiter(option)))
    if delimiter != ",":
        with pytest.raises(BadInput, match=f"try --delimiter '{'tab' if option == 'tab' else '.'}"):
            read(tmp_path, content)


def test_a_decimal_comma(tmp_path: Path) -> None:
    content = table(seconds, delimiter=";").replace(".", ",")
    assert_read(read(tmp_path, content, delimiter=";", decimal=parse_decimal(",")))
    thousands = content.replace("42283,58", "42.283,58", 1)
    with pytest.raises(BadInput, match=r"line 2: .*thousands separators"):
        read(tmp_path, thousands, delimiter=";", decimal=",")


def test_date_and_time_apart(tmp_path: Path) -> None:
    def apart(moment: datetime) -> list[str]:
        return [f"{moment:%Y.%m.%d}", f"{moment:%H:%M}"]

    places = parse_columns("open_time=1+2,open=3,high=4,low=5,close=6,volume=7")
    assert_read(read(tmp_path, table(apart, header=False), columns=places))
    named = "<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>\n" + table(apart, header=False)
    names = parse_columns("open_time=Date+Time,open=open,high=high,low=low,close=close,volume=VOL")
    assert_read(read(tmp_path, named, columns=names))


def test_blanks_cases_marks_and_line_ends(tmp_path: Path) -> None:
    content = table(seconds).replace(",", " , ").replace("open_time", "Open Time")
    assert_read(read(tmp_path, "\ufeff" + content.replace("\n", "\r\n")))


@pytest.mark.parametrize(
    ("pack", "suffix"),
    [
        (gzip.compress, ".gz"),
        (bz2.compress, ".bz2"),
        (lambda raw: pa.compress(raw, codec="zstd", asbytes=True), ".zst"),
    ],
)
def test_packed_files(tmp_path: Path, pack: Callable[[bytes], bytes], suffix: str) -> None:
    """Unpacked whole and verified; cut, damaged and swollen ones are one clear line."""
    raw = table(seconds).encode()
    packed, name = pack(raw), f"bars.csv{suffix}"
    assert_read(read(tmp_path, packed, name))
    assert_read(read(tmp_path, packed, "bars.csv"))  # the first bytes say it, not the name
    assert_read(read(tmp_path, raw, name))
    assert [file.name for file in find_files([tmp_path])] == sorted({"bars.csv", name})
    for harm in (packed[: len(packed) // 2], packed[:-3]):
        with pytest.raises(BadInput, match="damaged or cut short"):
            read(tmp_path, harm, name)
    with pytest.raises(BadInput, match="unpacks to more than"):
        read(tmp_path, pack(bytes(unpacking.MAX_RATIO << 16)), name)


def test_a_packed_tar_is_named(tmp_path: Path) -> None:
    inside = io.BytesIO()
    with tarfile.open(fileobj=inside, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("bars.csv"), io.BytesIO())
    with pytest.raises(BadInput, match="a tar in it"):
        read(tmp_path, inside.getvalue(), "bars.tar.gz")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda t: f"{t:%m/%d/%Y %I:%M %p}", "is no open_time, which is a number, or a time such"),
        (lambda t: f"{t:%Y-%m-%d %H:%M}" + ("Z" if t.minute else ""), "some name their zone"),
        (lambda t: seconds(t) if t.minute else f"{t:%Y-%m-%d}", "like the others"),
    ],
)
def test_other_times_are_refused_by_their_line(
    tmp_path: Path, write: Callable[[datetime], str], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        read(tmp_path, table(write))


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_delimiter, ";;", "one character"),
        (parse_delimiter, "a", "one character"),
        (parse_decimal, ";", "'.' or ','"),
        (parse_time_zone, "Europe/Berlim", "did you mean Europe/Berlin"),
        (parse_time_zone, "UTC+5", "is no time zone"),
    ],
)
def test_a_wrong_option_says_what_is_expected(
    parse: Callable[[str], str], text: str, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        parse(text)


def test_names_of_archives_may_be_in_any_script(tmp_path: Path) -> None:
    market = Market("binance", "币安人生/USDT")
    file = tmp_path / "币安人生USDT-1m-2024-01.csv"
    rows = [
        f"{seconds(t)}000,{','.join(n)},{seconds(t)}999,1,1,1,1,0"
        for t, n in zip(TIMES, NUMBERS, strict=True)
    ]
    rows = [
        row.replace(f"{seconds(t)}999", f"{int(seconds(t)) + 59}999")
        for t, row in zip(TIMES, rows, strict=True)
    ]
    file.write_text("\n".join(rows) + "\n")
    found, _ = read_file(file, ImportOptions(), [BTC, market])
    assert (found.market, found.timeframe.name, found.rows) == (market, "1m", 12)
