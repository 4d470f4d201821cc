"""Imports: a file's bars are stored, an error names its line, and the venue's bars stay."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from marketdata_assets.cli.main import app
from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.import_result import FileTally, ImportResult
from marketdata_assets.flows.fetch.imports import FileImporter, inspect_files
from marketdata_assets.flows.fetch.partition_store import PartitionStore
from marketdata_assets.flows.fetch.plan import BackfillPlanner
from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import partitions_of
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.archive import unpacking
from marketdata_assets.sources.archive.options import ImportOptions, parse_columns
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_tests.cli.test_cli import marketdata, text_of
from marketdata_tests.conftest import SHARED, Universe, needs_shared
from marketdata_tests.samples import BTC, outcomes, real_bars
from marketdata_tests.steps import (
    assert_bars,
    at,
    bar_requests,
    lake_files,
    ms,
    quarantined,
    run_ingest,
    stored_bars,
    window,
)

NOWHERE = "http://127.0.0.1:1"
DAY = window("2024-01-02", "2024-01-03")
FUTURES_HEADER = (
    "open_time,open,high,low,close,volume,close_time,quote_volume,count,"
    "taker_buy_volume,taker_buy_quote_volume,ignore"
)
Change = Callable[[int, list[str]], list[str]]


def as_it_is(number: int, cells: list[str]) -> list[str]:
    return cells


def klines(
    span: Window = DAY,
    unit: int = 1,
    change: Change = as_it_is,
    symbol: str = "BTCUSDT",
    timeframe: str = "1m",
) -> list[str]:
    """The sandbox's bars as the lines of a Binance archive; `unit`: how many of its units are a
    millisecond.
    """
    width, lines = TIMEFRAMES[timeframe].width.total_seconds() * 1000, []
    for number, row in enumerate(generate_bars(symbol, timeframe, span).iter_rows(named=True)):
        start = int(row["open_time"].timestamp() * 1000)
        texts = {
            name: f"{value:.8f}" if isinstance(value, Decimal) else str(value)
            for name, value in row.items()
        }
        cells = [
            str(start * unit),
            *(texts[n] for n in COLUMN_NAMES[1:6]),
            str(int(start + width) * unit - 1),
        ]
        lines.append(",".join(change(number, [*cells, *(texts[n] for n in COLUMN_NAMES[6:]), "0"])))
    return lines


def written(file: Path, lines: Sequence[str], ends: str = "\n") -> Path:
    """A CSV, or a zip that holds it."""
    text = "\n".join(lines) + ends
    if file.suffix == ".csv":
        file.write_text(text)
    else:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr(file.stem + ".csv", text)
    return file


@pytest.fixture
def settings(universe: Universe) -> Settings:
    """A universe whose venue cannot be reached."""
    return universe(
        NOWHERE,
        "[BTC/USDT, ETH/USDT]",
        until="2024-03-01",
        now="2024-03-02",
        extra="reference: [1h]",
    )


def imported(
    settings: Settings, *files: Path, dry_run: bool = False, **stated: Any
) -> ImportResult:
    """Import as the command does, up to what Dagster is asked to show."""
    market = settings.market(stated.pop("market")) if "market" in stated else None
    options = ImportOptions(market, **stated)
    with open_context(settings) as context:
        done = context.bind(FileImporter).import_files(
            inspect_files(settings, files, options), options, dry_run
        )
        assert outcomes(context.ledger) == []
    assert all(tally.is_balanced for tally in done.files)
    return done


def counts(tally: FileTally) -> dict[str, int]:
    """What became of the rows of one file, without what did not happen."""
    names = ("stored", "identical", "refused", "disagree", "conflict", "unwanted")
    return {name: value for name in names if (value := getattr(tally, name))}


# --------------------------------------------------------------------------------- what files say
@pytest.mark.parametrize(("unit", "name"), [(1, "ms"), (1000, "us"), (1_000_000, "ns")])
def test_a_daily_archive_gives_its_bars(
    settings: Settings, tmp_path: Path, unit: int, name: str
) -> None:
    done = imported(settings, written(tmp_path / "BTCUSDT-1m-2024-01-02.zip", klines(unit=unit)))
    assert counts(done.files[0]) == {"stored": 1440}
    file = done.files[0].file
    assert (file.unit, file.span, file.market, file.missing_bars) == (name, DAY, BTC, 0)
    assert_bars(stored_bars(settings), generate_bars("BTCUSDT", "1m", DAY))


def test_a_header_is_no_row_and_makes_no_spot_market_of_a_futures_file(
    settings: Settings, tmp_path: Path
) -> None:
    file = written(tmp_path / NAME, [FUTURES_HEADER, *klines()])
    with pytest.raises(BadInput, match=r"as binance's futures files have .* say so with --market"):
        imported(settings, file)
    assert counts(imported(settings, file, market="binance:BTC-USDT").files[0]) == {"stored": 1440}
    assert_bars(stored_bars(settings), generate_bars("BTCUSDT", "1m", DAY))


def test_spot_and_futures_of_one_name(universe: Universe, tmp_path: Path) -> None:
    both = universe(NOWHERE, "[BTC/USDT, BTC/USDT:USDT]", until="2024-03-01", now="2024-03-02")
    plain, telling = (
        written(tmp_path / f"{prefix}BTCUSDT-1m-2024-01-02.csv", klines())
        for prefix in ("", "UMFUT-")
    )
    with pytest.raises(
        BadInput, match="may be binance:BTC-USDT or binance:BTC-USDT_USDT; say which with --market"
    ):
        imported(both, plain)
    with pytest.raises(
        BadInput,
        match=r"it is binance's BTCUSDT \(USD-margined futures\), and not binance:BTC-USDT;",
    ):
        imported(both, telling, market="binance:BTC-USDT")
    assert imported(both, telling).files[0].file.market.symbol == "BTC/USDT:USDT"
    assert imported(both, plain, market="binance:BTC-USDT").files[0].stored == 1440


def test_a_month_and_its_reference(settings: Settings, tmp_path: Path) -> None:
    month = window("2024-01-01", "2024-02-01")
    written(tmp_path / "BTCUSDT-1m-2024-01.zip", klines(month))
    written(tmp_path / "BTCUSDT-1h-2024-01.zip", klines(month, timeframe="1h"))
    done = imported(settings, *tmp_path.glob("*.zip"))
    halt = 80  # the sandbox has no bars on the 8th from 02:00 to 03:20
    assert {t.file.timeframe.name: t.file.missing_bars for t in done.files} == {
        "1h": 1,
        "1m": month.count(TIMEFRAMES["1m"]) - 44640 + 80,
    }
    assert_bars(stored_bars(settings), generate_bars("BTCUSDT", "1m", month))
    assert_bars(stored_bars(settings, timeframe="1h"), generate_bars("BTCUSDT", "1h", month))
    with open_context(settings) as context:
        gaps = context.ledger.gaps.of(raw_table(TIMEFRAMES["1m"]), partitions_of(BTC, month)[0])
    assert [(gap.bars, gap.reason, gap.is_settled) for gap in gaps] == [(halt, "unanswered", False)]
    assert "BTCUSDT-1m-2024-01.zip holds both neighbors" in gaps[0].evidence


def test_plain_csv_with_a_mapping(settings: Settings, tmp_path: Path) -> None:
    bars = generate_bars("BTCUSDT", "1m", DAY)
    texts = bars.with_columns(
        pl.col("open_time").dt.strftime("%Y-%m-%d %H:%M:%S"),
        pl.exclude("open_time").cast(pl.String),
    )
    file = tmp_path / "mine.csv"
    texts.select(
        "volume", *(pl.col(n).alias(n[0].upper()) for n in COLUMN_NAMES[1:5]), ts="open_time"
    ).reverse().write_csv(file)
    mapping = parse_columns("open_time=ts, open=O, high=H, low=L, close=C, volume=volume")
    done = imported(
        settings, file, market="binance:BTC-USDT", timeframe=TIMEFRAMES["1m"], columns=mapping
    )
    assert (counts(done.files[0]), done.files[0].file.unit) == ({"stored": 1440}, "iso")
    assert_bars(stored_bars(settings).select(COLUMN_NAMES[:6]), bars.select(COLUMN_NAMES[:6]))
    assert stored_bars(settings)["quote_volume"].null_count() == 1440


def test_places_instead_of_names_and_our_own_csv(settings: Settings, tmp_path: Path) -> None:
    bars = generate_bars("BTCUSDT", "1m", DAY)
    whole = bars.with_columns(pl.col("open_time").dt.strftime("%Y-%m-%dT%H:%M:%SZ"))
    whole.write_csv(tmp_path / "ours.csv")
    bars.with_columns(pl.col("open_time").dt.epoch("s")).write_csv(
        tmp_path / "bare.csv", include_header=False
    )
    stated: dict[str, Any] = {"market": "binance:BTC-USDT", "timeframe": TIMEFRAMES["1m"]}
    mapping = {name: str(i + 1) for i, name in enumerate(COLUMN_NAMES)}
    assert counts(
        imported(settings, tmp_path / "bare.csv", columns=mapping, unit="s", **stated).files[0]
    ) == {"stored": 1440}
    assert counts(imported(settings, tmp_path / "ours.csv", **stated).files[0]) == {
        "identical": 1440
    }
    assert_bars(stored_bars(settings), bars)


def test_bars_of_another_timeframe_are_known_by_their_distance(
    settings: Settings, tmp_path: Path
) -> None:
    stated: dict[str, Any] = {
        "market": "binance:BTC-USDT",
        "columns": {name: str(i + 1) for i, name in enumerate(COLUMN_NAMES[:6])},
    }
    for name, asked, words in [
        ("1h", "1m", "these are no 1m bars, they are 1:00:00 apart"),
        ("1m", "1h", "these are no 1h bars, they are 0:01:00"),
    ]:
        file = written(tmp_path / f"bars {name}.csv", klines(timeframe=name))
        with pytest.raises(BadInput, match=words):
            imported(settings, file, timeframe=TIMEFRAMES[asked], **stated)
    sparse = [
        line for number, line in enumerate(klines()) if number % 7 in (0, 3)
    ]  # no two minutes beside each other
    assert counts(
        imported(
            settings, written(tmp_path / "x.csv", sparse), timeframe=TIMEFRAMES["1m"], **stated
        ).files[0]
    ) == {"stored": 412}


def test_of_two_files_the_one_that_gives_more_is_taken(settings: Settings, tmp_path: Path) -> None:
    stated: dict[str, Any] = {"market": "binance:BTC-USDT", "timeframe": TIMEFRAMES["1m"]}
    fewer = written(
        tmp_path / "a.csv",
        [",".join(COLUMN_NAMES[:6]), *(",".join(line.split(",")[:6]) for line in klines())],
    )
    whole = written(tmp_path / NAME, klines())
    done = imported(settings, fewer, whole, **stated)
    assert {tally.file.path.name: counts(tally) for tally in done.files} == {
        "a.csv": {"identical": 1440},
        NAME: {"stored": 1440},
    }
    assert_bars(stored_bars(settings), generate_bars("BTCUSDT", "1m", DAY))


@pytest.fixture
def kraken(universe: Universe) -> Settings:
    return universe(
        NOWHERE, "[BTC/USD]", until="2024-03-01", now="2024-03-02", venue="kraken", extra="base: 1h"
    )


def test_a_kraken_file_has_the_last_word_about_its_holes(kraken: Settings, tmp_path: Path) -> None:
    lines = [
        f"{ms(f'2024-01-01T{hour:02}:00') // 1000},"
        f"16500.1,16600,16400.5,16550,1.23456789,{hour + 1}"
        for hour in range(24)
        if hour != 5
    ]
    done = imported(kraken, written(tmp_path / "XBTUSD_60.csv", lines))
    assert counts(done.files[0]) == {"stored": 23}
    found = stored_bars(kraken, "kraken%3ABTC-USD", "1h")
    assert found["trades"].to_list() == [hour + 1 for hour in range(24) if hour != 5]
    assert (found["volume"][0], found["quote_volume"].null_count()) == (Decimal("1.23456789"), 23)
    with open_context(kraken) as context:
        gaps = context.ledger.gaps.of(
            raw_table(TIMEFRAMES["1h"]), partitions_of(Market("kraken", "BTC/USD"), DAY)[0]
        )
    assert [(gap.bars, gap.reason, gap.is_settled) for gap in gaps] == [(1, "no_bars", True)]


# --------------------------------------------------------------------------------- checksums and ba
def test_a_checksum_is_verified_when_it_is_there(settings: Settings, tmp_path: Path) -> None:
    file = written(tmp_path / "BTCUSDT-1m-2024-01-02.zip", klines())
    checksum = tmp_path / "BTCUSDT-1m-2024-01-02.zip.CHECKSUM"
    for text, words in [
        ("0" * 64 + "  BTCUSDT-1m-2024-01-02.zip\n", "its sha256 is"),
        (
            hashlib.sha256(file.read_bytes()).hexdigest() + "  ETHUSDT-1m-2024-01-02.zip\n",
            "it is of ETHUSDT",
        ),
        ("<html>\n", "it is not `sha256  name`"),
        ("", "it is not `sha256  name`"),
    ]:
        checksum.write_text(text)
        with pytest.raises(BadInput, match=words):
            imported(settings, file)
    assert lake_files(settings) == {}
    checksum.write_text(
        hashlib.sha256(file.read_bytes()).hexdigest() + "  BTCUSDT-1m-2024-01-02.zip\n"
    )
    assert counts(imported(settings, file, checksum).files[0]) == {"stored": 1440}


def cell(place: int, at: int, text: str) -> Change:
    """One cell with another text."""
    return lambda number, cells: (
        [*cells[:place], text, *cells[place + 1 :]] if number == at else cells
    )


NAME = "BTCUSDT-1m-2024-01-02.csv"
BAD: dict[str, tuple[str, Callable[[], list[str]], str]] = {
    "half a line": (
        NAME,
        lambda: [*klines()[:700], klines()[700][:40]],
        "line 701: it has 3 columns, and the first line has 12; the file ends",
    ),
    "a short line": (
        NAME,
        lambda: [*klines()[:5], "1,2,3", *klines()[6:]],
        "line 6: it has 3 columns, and the first line has 12",
    ),
    "a long line": (
        NAME,
        lambda: [*klines()[:5], klines()[5] + ",1", *klines()[6:]],
        "line 6: it has 13 columns",
    ),
    "an empty line": (NAME, lambda: [*klines()[:5], "", *klines()[6:]], "line 6: it has 0 columns"),
    "mixed units": (
        NAME,
        lambda: klines()[:9] + klines(unit=1000)[9:],
        r"line 10: mixed units: open_time \d+ is in us, and those before in ms",
    ),
    "mixed units of close times": (
        NAME,
        lambda: klines(change=cell(6, 3, "1704153839")),
        "line 4: mixed units: close_time",
    ),
    "no moment": (
        NAME,
        lambda: klines(change=cell(0, 7, "yesterday")),
        "line 8: 'yesterday' is no open_time",
    ),
    "between moments": (
        NAME,
        lambda: klines(unit=1000, change=cell(0, 7, "1704154020000001")),
        "line 8: .* between two milliseconds",
    ),
    "hours under minutes": (
        NAME,
        lambda: klines(timeframe="1h"),
        "line 1: this is no 1m bar: it lasts 1:00:00",
    ),
    "minutes under hours": (
        "BTCUSDT-1h-2024-01-02.csv",
        klines,
        "line 1: this is no 1h bar: it lasts 0:01:00",
    ),
    "another header": (
        NAME,
        lambda: ["time,close,high,low,open,volume,a,b,c,d,e,f", *klines()],
        "line 1: its header names time, close",
    ),
    "other columns": (
        NAME,
        lambda: [line[:-2] for line in klines()],
        "binance's files have 12 columns, and this has 11",
    ),
    "nothing": (NAME, list, "it is empty"),
    "only a header": (NAME, lambda: [FUTURES_HEADER], "it holds no rows"),
    "a symbol that nobody wants": (
        "XRPUSDT-1m-2024-01-02.csv",
        klines,
        "no market of the universe is binance's XRPUSDT",
    ),
    "futures for spot": (
        "UMFUT-ETHUSDT-1m-2024-01-02.csv",
        klines,
        r"no market of the universe is binance's ETHUSDT \(USD-margined",
    ),
    "coin-margined": ("BTCUSD_PERP-1m-2024-01-02.csv", klines, "count contracts"),
    "a timeframe that nobody fetches": (
        "BTCUSDT-5m-2024-01-02.csv",
        lambda: klines(timeframe="5m"),
        "fetches 1m 1h of binance and no 5m",
    ),
    "a timeframe that is none": ("BTCUSDT-2mo-2024-01.csv", klines, "2mo is not one of"),
    "a name that tells nothing": (
        "bars.csv",
        klines,
        "say which columns it has|its name does not tell",
    ),
    "before the universe": (
        "BTCUSDT-1h-2023-01-02.csv",
        lambda: klines(window("2023-01-02", "2023-01-03"), timeframe="1h"),
        "change since or until",
    ),
    "the future": (
        "BTCUSDT-1h-2024-03-02.csv",
        lambda: klines(window("2024-03-02", "2024-03-03"), timeframe="1h"),
        "it is now 2024-03-02",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_with_its_line_and_nothing_is_stored(
    settings: Settings, tmp_path: Path, what: str
) -> None:
    name, lines, message = BAD[what]
    good = written(
        tmp_path / "BTCUSDT-1m-2024-01-05.csv", klines(window("2024-01-05", "2024-01-06"))
    )
    bad = written(tmp_path / name, lines(), ends="" if what == "half a line" else "\n")
    with pytest.raises(BadInput, match=message):
        imported(settings, bad, *([] if what == "before the universe" else [good]))
    assert lake_files(settings) == {}
    assert quarantined(settings) == []


def test_a_file_of_another_symbol(settings: Settings, tmp_path: Path) -> None:
    file = written(tmp_path / "ETHUSDT-1m-2024-01-02.zip", klines(symbol="ETHUSDT"))
    with pytest.raises(BadInput, match="it is binance's ETHUSDT, and not binance:BTC-USDT;"):
        imported(settings, file, market="binance:BTC-USDT")
    renamed = file.rename(tmp_path / "BTCUSDT-1m-2024-01-02.zip")
    with pytest.raises(
        BadInput, match=r"it holds ETHUSDT-1m-2024-01-02\.csv, which is another file"
    ):
        imported(settings, renamed, market="binance:BTC-USDT")


@pytest.mark.parametrize("harm", ["flipped", "cut", "no zip", "two members", "a bomb"])
def test_a_zip_that_is_damaged(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    file = written(tmp_path / "BTCUSDT-1m-2024-01-02.zip", klines())
    content, message = bytearray(file.read_bytes()), "damaged or cannot be read"
    if harm == "flipped":
        content[len(content) // 2] ^= 255
    elif harm == "cut":
        content = content[: len(content) // 2]
    elif harm == "no zip":
        content = bytearray(b"<html>not found</html>")
    elif harm == "two members":
        with zipfile.ZipFile(file, "a") as packed:
            packed.writestr("another.csv", "1,2")
        content, message = (
            bytearray(file.read_bytes()),
            "one .csv is expected in it, and it holds BTCUSDT-1m-2024-01-02.csv, another.csv",
        )
    else:
        monkeypatch.setattr(unpacking, "MAX_BYTES", 1000)
        message = "unpacks to more than"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        imported(settings, file)
    assert lake_files(settings) == {}


@pytest.mark.parametrize("line", [b"\0" * 64, b"1704153600000,1,2,0.5,1,10,803\n"])
def test_a_zip_of_one_thing_for_ever_is_not_unpacked(
    settings: Settings, tmp_path: Path, line: bytes
) -> None:
    """64 MiB of zeros or of one row; the memory taken stays far below that."""
    file = tmp_path / "BTCUSDT-1m-2024-01-02.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("BTCUSDT-1m-2024-01-02.csv", line * (2**26 // len(line)))
    tracemalloc.start()
    with pytest.raises(BadInput, match="which no file of bars does"):
        imported(settings, file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "link to nothing", "folder"])
def test_what_is_no_file_is_refused_and_waits_for_nothing(
    settings: Settings, tmp_path: Path, kind: str
) -> None:
    path, words = tmp_path / "BTCUSDT-1m-2024-01-02.csv", "it cannot be read"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        words = "there is no file below this folder"
    else:
        path.symlink_to("/dev/zero" if kind == "link to a device" else tmp_path / "none")
    with pytest.raises(BadInput, match=words):
        imported(settings, path)
    (tmp_path / "folder").mkdir()
    if kind != "folder":
        path.rename(tmp_path / "folder" / path.name)
        with pytest.raises(BadInput, match="there is no file below this folder"):
            imported(settings, tmp_path / "folder")


@pytest.mark.parametrize("place", [0, 1, 700])
def test_a_quote_that_is_never_closed(settings: Settings, tmp_path: Path, place: int) -> None:
    lines = klines()
    lines[place] = '"' + lines[place]
    for name in ("BTCUSDT-1m-2024-01-02.csv", "x.csv"):
        with pytest.raises(BadInput, match=name):
            imported(settings, written(tmp_path / name, lines * 20))


def test_a_last_number_that_may_be_cut_is_not_believed(kraken: Settings, tmp_path: Path) -> None:
    lines = [f"{ms('2024-01-01') // 1000 + 3600 * i},1,2,0.5,1,10,803" for i in range(3)]
    with pytest.raises(
        BadInput, match="line 3: it has no line break, so its last number may be cut"
    ):
        imported(kraken, written(tmp_path / "XBTUSD_60.csv", lines, ends=""))
    assert counts(imported(kraken, written(tmp_path / "XBTUSD_60.csv", lines)).files[0]) == {
        "stored": 3
    }


def test_a_mapping_that_names_what_is_not_there(settings: Settings, tmp_path: Path) -> None:
    for text, words in [
        ("open_time=t,open=o", "high, low, close, volume must be named"),
        ("price=p", "write `column=its name"),
        ("open", "write"),
    ]:
        with pytest.raises(BadInput, match=words):
            parse_columns(text)
    file = written(tmp_path / "x.csv", ["t,o,h,l,c,v", "1704153600,1,2,1,1,5"])
    stated: dict[str, Any] = {"market": "binance:BTC-USDT", "timeframe": TIMEFRAMES["1m"]}
    with pytest.raises(BadInput, match="line 1: there is no single column 'time'"):
        imported(
            settings,
            file,
            columns=parse_columns("open_time=time,open=o,high=h,low=l,close=c,volume=v"),
            **stated,
        )
    with pytest.raises(BadInput, match="is in s, and not in ms as --unit says"):
        imported(
            settings,
            file,
            columns=parse_columns("open_time=t,open=o,high=h,low=l,close=c,volume=v"),
            unit="ms",
            **stated,
        )


# --------------------------------------------------------------------------------- rules, and what
def test_what_a_rule_refuses_lies_in_quarantine_under_the_files_name(
    settings: Settings, tmp_path: Path
) -> None:
    broken = {3: (2, "0.5"), 700: (5, "ten"), 900: (8, "many"), 901: (7, "")}
    lines = klines(
        change=lambda n, cells: (
            cell(broken[n][0], n, broken[n][1])(n, cells) if n in broken else cells
        )
    )
    stray = klines(window("2024-01-04", "2024-01-04T00:01"))
    done = imported(settings, written(tmp_path / NAME, [*lines, *stray]))
    assert counts(done.files[0]) == {"stored": 1436, "refused": 5}
    found = [(row["open_time"], row["reasons"], row["source"]) for row in quarantined(settings)]
    assert found == [
        ("2024-01-02T00:03:00Z", "high_below low_above vwap_outside", NAME),
        ("2024-01-02T11:40:00Z", "not_a_number", NAME),
        ("2024-01-02T15:00:00Z", "not_a_number", NAME),
        ("2024-01-02T15:01:00Z", "null", NAME),
        ("2024-01-04T00:00:00Z", "outside_window", NAME),
    ]
    with open_context(settings) as context:
        (partition, *_) = partitions_of(BTC, DAY)
        gaps = context.ledger.gaps.of(raw_table(TIMEFRAMES["1m"]), partition)
    assert [(gap.bars, gap.reason) for gap in gaps] == [
        (1, "quarantined"),
        (1, "quarantined"),
        (2, "quarantined"),
    ]


def test_again_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    file = written(tmp_path / NAME, klines())
    imported(settings, file)
    before = lake_files(settings)
    assert counts(imported(settings, file).files[0]) == {"identical": 1440}
    assert lake_files(settings) == before
    with open_context(settings) as context:
        receipts = context.ledger.receipts.list("import")
    assert [receipt.body["files"][0]["stored"] for receipt in receipts] == [0, 1440]
    assert receipts[0].body["files"][0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_dry_run_says_the_same_and_stores_nothing(settings: Settings, tmp_path: Path) -> None:
    file = written(tmp_path / NAME, klines(change=cell(2, 3, "0.5")))
    dry = imported(settings, file, dry_run=True)
    assert (counts(dry.files[0]), lake_files(settings), quarantined(settings)) == (
        {"stored": 1439, "refused": 1},
        {},
        [],
    )
    assert counts(imported(settings, file).files[0]) == counts(dry.files[0])


def test_what_the_universe_does_not_want_is_counted_and_left(
    universe: Universe, tmp_path: Path
) -> None:
    settings = universe(
        NOWHERE, since="2024-01-02T12:00", until="2024-01-02T18:00", now="2024-03-02"
    )
    done = imported(settings, written(tmp_path / NAME, klines()))
    assert counts(done.files[0]) == {"stored": 360, "unwanted": 1080}
    assert_bars(
        stored_bars(settings),
        generate_bars("BTCUSDT", "1m", window("2024-01-02T12:00", "2024-01-02T18:00")),
    )


def test_a_bar_that_is_not_closed_is_refused(universe: Universe, tmp_path: Path) -> None:
    settings = universe(NOWHERE, now="2024-01-02T12:00:30")
    done = imported(settings, written(tmp_path / NAME, klines()[:721]))
    assert counts(done.files[0]) == {"stored": 720, "refused": 1}
    assert [row["reasons"] for row in quarantined(settings)] == ["unclosed"]


def test_archive_and_venue_that_disagree(sandbox: Any, universe: Universe, tmp_path: Path) -> None:
    """The venue's bar stays, the archive's lies in quarantine, and both values are told."""
    settings = universe(sandbox[1], until="2024-01-03", now="2024-01-09")
    run_ingest(settings)
    before, asked = lake_files(settings), len(sandbox[0].requests)
    file = written(tmp_path / NAME, klines(change=cell(8, 5, "123456")))
    with open_context(settings) as context:
        files = inspect_files(settings, [file], ImportOptions())
        done = context.bind(FileImporter).import_files(files, ImportOptions())
    assert counts(done.files[0]) == {"identical": 1439, "disagree": 1}
    theirs = str(generate_bars("BTCUSDT", "1m", DAY)["trades"][5])
    (difference,) = done.differences
    assert tuple(difference) == (
        "binance:BTC-USDT",
        "1m",
        "2024-01-02T00:05:00Z",
        "trades",
        theirs,
        "stored",
        "123456",
        NAME,
    )
    (row,) = quarantined(settings)
    assert (row["reasons"], row["source"], row["fields"]["trades"]) == ("disagrees", NAME, "123456")
    assert (lake_files(settings), len(sandbox[0].requests)) == (before, asked)
    with open_context(settings) as context:
        (receipt,) = context.ledger.receipts.list("import")
    assert receipt.body["differences"][0]["value"] == theirs


def test_files_that_disagree_are_believed_neither(
    sandbox: Any, universe: Universe, tmp_path: Path
) -> None:
    """A daily and a monthly archive tell one bar differently; the venue is asked for it, and for
    nothing else.
    """
    settings = universe(sandbox[1], since="2024-01-02", until="2024-01-03", now="2024-01-09")
    day = written(tmp_path / NAME, klines(change=cell(8, 60, "123456")))
    month = written(tmp_path / "BTCUSDT-1m-2024-01.zip", klines(window("2024-01-01", "2024-01-07")))
    with open_context(settings) as context:
        files = inspect_files(settings, [day, month], ImportOptions())
        done = context.bind(FileImporter).import_files(files, ImportOptions())
    outside = generate_bars("BTCUSDT", "1m", window("2024-01-01", "2024-01-07")).height - 1440
    assert {tally.file.path.name: counts(tally) for tally in done.files} == {
        NAME: {"identical": 1439, "conflict": 1},
        month.name: {"stored": 1439, "conflict": 1, "unwanted": outside},
    }
    expected = generate_bars("BTCUSDT", "1m", DAY)
    assert_bars(
        stored_bars(settings), expected.filter(pl.col("open_time") != at("2024-01-02T01:00"))
    )
    assert {
        (row["source"], row["reasons"], row["fields"]["trades"]) for row in quarantined(settings)
    } == {
        (NAME, "conflict", "123456"),
        (month.name, "conflict", str(expected["trades"][60])),
    }
    assert [(d.of, d.value, d.other, d.other_value) for d in done.differences] == [
        (month.name, str(expected["trades"][60]), NAME, "123456")
    ]
    before = len(bar_requests(sandbox[0]))
    run_ingest(settings)
    assert_bars(stored_bars(settings), expected)
    assert 0 < len(bar_requests(sandbox[0])) - before <= 2


def test_days_in_one_go_and_what_lies_between_files_is_not_told(
    sandbox: Any, universe: Universe, tmp_path: Path
) -> None:
    """The third of some days is missing: no answer says that it has no bars.

    A gap inside a day is requested again.
    """
    settings = universe(sandbox[1], until="2024-01-05", now="2024-01-09")
    hole = ms("2024-01-02T07:00")
    days = {}
    for first, last in [("01", "02"), ("02", "03"), ("04", "05")]:
        lines = [
            line
            for line in klines(window(f"2024-01-{first}", f"2024-01-{last}"))
            if not line.startswith(str(hole))
        ]
        days[first] = written(tmp_path / f"BTCUSDT-1m-2024-01-{first}.zip", lines)
    with open_context(settings) as context:
        files = inspect_files(settings, [tmp_path], ImportOptions())
        done = context.bind(FileImporter).import_files(files, ImportOptions())
        (partition,) = partitions_of(BTC, DAY)
        stored = context.storage.lake.read(
            raw_table(TIMEFRAMES["1m"]), partition, with_provenance=True
        )
        gaps = context.ledger.gaps.of(raw_table(TIMEFRAMES["1m"]), partition)
        state = context.ledger.partitions.get(raw_table(TIMEFRAMES["1m"]), partition)
    assert [counts(tally) for tally in done.files] == [{"stored": t.file.rows} for t in done.files]
    assert stored is not None
    assert dict(stored.group_by("source").len().rows()) == {
        file.name: t.file.rows for file, t in zip(days.values(), done.files, strict=True)
    }
    assert [(gap.window, gap.reason) for gap in gaps if gap.bars == 1] == [
        (window("2024-01-02T07:00", "2024-01-02T07:01"), "unanswered")
    ]
    assert state is not None
    assert not state.is_complete
    run_ingest(settings)
    assert_bars(
        stored_bars(settings), generate_bars("BTCUSDT", "1m", window("2024-01-01", "2024-01-05"))
    )


def test_every_row_is_accounted_for_whatever_is_wrong_with_it(
    settings: Settings, tmp_path: Path
) -> None:
    dice = random.Random(5)
    lines = klines()
    for _ in range(200):
        at, place = dice.randrange(1440), dice.choice((1, 2, 3, 4, 5, 7, 8, 9, 10))
        cells = lines[at].split(",")
        lines[at] = ",".join(
            [
                *cells[:place],
                dice.choice(("", "-1", "NaN", "1e300", "0", "0.00000000000001", "x")),
                *cells[place + 1 :],
            ]
        )
    lines += dice.sample(lines, 50)
    done = imported(settings, written(tmp_path / NAME, lines))
    (tally,) = done.files
    assert tally.file.rows == 1490
    good = generate_bars("BTCUSDT", "1m", DAY)
    kept = stored_bars(settings)
    assert kept.height == tally.stored
    assert (
        kept.join(good, on=COLUMN_NAMES, how="semi", nulls_equal=True).height >= tally.stored - 200
    )  # "0" may pass the rules
    with open_context(settings) as context:
        assert (
            context.bind(PartitionStore)
            .read_result(raw_table(TIMEFRAMES["1m"]), partitions_of(BTC, DAY)[0])
            .account.is_balanced
        )


# --------------------------------------------------------------------------------- the command, the
@pytest.mark.server
def test_the_command_works_offline_and_dagster_shows_it(
    settings: Settings, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """Bars, checks and rollups come without a venue.

    A second import changes nothing, and the exit code shows that values differ.
    """
    month = window("2024-01-01", "2024-02-01")
    file = written(tmp_path / "BTCUSDT-1m-2024-01.zip", klines(month))
    first = marketdata("import", str(file), "--format", "json")
    assert first.returncode == 0, text_of(first)
    (row,) = json.loads(first.stdout)["files"]
    assert (row["rows"], row["stored"], row["lacking"]) == (44560, 44560, 80)
    days = marketdata("bars", "binance:BTC-USDT", "1d", "--format", "csv").stdout.splitlines()
    assert len(days) == 32
    shown = {
        key.to_user_string(): instance.get_materialized_partitions(key)
        for key in instance.all_asset_keys()
    }
    key = "binance:BTC-USDT|2024-01-01"
    assert shown["raw/ohlcv_1m"] == shown["rollup/ohlcv_1w"] == {key}
    assert not shown.get("raw/ohlcv_1h")  # no file told it, and nobody was asked
    written(file, klines(month, change=cell(8, 5, "123456")))
    again = marketdata("import", str(file))
    assert again.returncode == 1, text_of(again)
    assert "44559 identical, 0 refused, 1 disagree" in text_of(again)
    assert "1 values differ" in text_of(again)


def test_a_mistake_is_one_line(settings: Settings, tmp_path: Path) -> None:
    file = written(tmp_path / "ETHUSDT-1m-2024-01-02.csv", klines(symbol="ETHUSDT"))
    for arguments, words in [
        (["--market", "binance:BTC-USDT"], "it is binance's ETHUSDT"),
        (["--unit", "hours"], "--unit hours is not one of s, ms, us, ns, iso"),
        (["--timeframe", "1h"], "its name says 1m and --timeframe 1h"),
    ]:
        done = CliRunner().invoke(app, ["import", str(file), *arguments])
        assert isinstance(done.exception, BadInput)
        assert words in str(done.exception)


def test_the_plan_says_where_files_cost_less(universe: Universe) -> None:
    """Files are offered for closed months of minutes, from the first Tuesday after them.

    An hourly month is one request and needs no file.
    """
    settings = universe(NOWHERE, since="2024-01-10", now="2024-03-05", extra="reference: [1h]")
    with open_context(settings) as context:
        tasks = context.bind(BackfillPlanner).plan(settings.partitions([BTC], settings.span(BTC)))
    found = [
        (task.partition.month_key, offer.timeframe.name, offer.requests, offer.url)
        for task in tasks
        for offer in task.offers
    ]
    base = "https://data.binance.vision/data/spot/monthly/klines/BTCUSDT/1m/BTCUSDT-1m-2024-"
    assert found == [
        ("2024-01-01", "1m", 30, base + "01.zip"),
        ("2024-02-01", "1m", 40, base + "02.zip"),
    ]
    early = universe(
        NOWHERE, since="2024-02-01", now="2024-03-04T23:00"
    )  # the first Monday: it may not be there yet
    with open_context(early) as context:
        assert not any(
            task.offers
            for task in context.bind(BackfillPlanner).plan(early.partitions([BTC], early.span(BTC)))
        )


def test_the_plan_says_what_only_files_have(kraken: Settings) -> None:
    """Kraken's API has 720 hours: at the end of March 2nd those since February 1st."""
    market = Market("kraken", "BTC/USD")
    with open_context(kraken) as context:
        tasks = context.bind(BackfillPlanner).plan(kraken.partitions([market], kraken.span(market)))
    found = [
        (task.partition.month_key, offer.bars, offer.requests)
        for task in tasks
        for offer in task.offers
    ]
    assert found == [("2024-01-01", 744, None)]
    assert "support.kraken.com" in tasks[0].offers[0].url


# --------------------------------------------------------------------------------- real files
@needs_shared
def test_the_real_archives_are_the_exchanges_bars(universe: Universe) -> None:
    folder = SHARED / "marketdata" / "csv_import"
    settings = universe(
        NOWHERE,
        "[BTC/USDT, SOL/USDT, FIL/USDT:USDT]",
        "2023-02-01",
        now="2025-03-01",
        extra="reference: [15m, 1h]",
    )
    done = imported(settings, *(file for file in folder.iterdir() if file.name != "XBTUSD_60.csv"))
    assert [counts(tally) for tally in done.files] == [
        {"stored": tally.file.rows} for tally in done.files
    ]
    units = {tally.file.path.name: tally.file.unit for tally in done.files}
    assert (units["BTCUSDT-1h-2024-12.csv"], units["BTCUSDT-1h-2025-01.csv"]) == ("ms", "us")
    minutes = pl.concat(
        [
            real_bars("BTCUSDT", "1m", "2023-02-01_2023-04-30"),
            real_bars("BTCUSDT", "1m", "2024-01-01_2024-02-29"),
        ]
    )
    days = pl.col("open_time").dt.date().cast(pl.String).is_in(["2023-03-24", "2024-01-01"])
    assert_bars(stored_bars(settings), minutes.filter(days))
    hours = real_bars("BTCUSDT", "1h", "2024-11-01_2025-02-28").filter(
        pl.col("open_time").dt.strftime("%Y-%m").is_in(["2024-12", "2025-01"])
    )
    found = stored_bars(settings, timeframe="1h").filter(pl.col("open_time").dt.year() > 2023)
    assert_bars(
        found, hours.filter(pl.col("open_time").dt.strftime("%Y-%m").is_in(["2024-12", "2025-01"]))
    )
    sol = real_bars("SOLUSDT", "1m", "2023-02-01_2023-02-28").filter(
        pl.col("open_time").dt.day() == 14
    )
    assert_bars(stored_bars(settings, "binance%3ASOL-USDT"), sol)
    futures = stored_bars(settings, "binance%3AFIL-USDT_USDT")
    assert (futures.height, futures["volume"][0], futures["trades"][0]) == (
        43200,
        Decimal("42843.0"),
        452,
    )


@needs_shared
def test_the_real_kraken_file(universe: Universe) -> None:
    settings = universe(
        NOWHERE, "[BTC/USD]", "2023-01-01", now="2023-05-01", venue="kraken", extra="base: 1h"
    )
    file = SHARED / "marketdata" / "csv_import" / "XBTUSD_60.csv"
    done = imported(settings, file)
    assert counts(done.files[0]) == {"stored": 2160}
    found = stored_bars(settings, "kraken%3ABTC-USD", "1h")
    lines = [line.split(",") for line in file.read_text().splitlines()]
    assert [f"{value:.8f}" for value in found["volume"]] == [
        f"{Decimal(line[5]):.8f}" for line in lines
    ]
    assert found["open_time"].dt.epoch("s").to_list() == [int(line[0]) for line in lines]
    assert_frame_equal(
        found.select("close"),
        pl.DataFrame(
            {"close": [Decimal(line[4]) for line in lines]}, schema={"close": BAR_SCHEMA["close"]}
        ),
    )
    assert json.loads(json.dumps(done.files[0].as_dict()))["unit"] == "s"
