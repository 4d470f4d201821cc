"""Files as a source: Binance's kline archives, Kraken's OHLCVT files and plain CSV become rows as a
venue sends them.

A file is believed whole or not at all: what is cut short, of another market, of two units, or not
what its checksum says is refused with its name and line. Every number stays the text that it is in
the file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl

from marketdata_assets.errors import BadInput
from marketdata_assets.model.bar import BAR_COLUMNS, COLUMN_NAMES
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe, parse_timeframe
from marketdata_assets.model.window import Window, from_ms, month_of, parse_time, to_ms
from marketdata_assets.sources.base import Fetched

MAX_BYTES = 1 << 30
"""Of one file's text: a zip that unpacks to more is not unpacked."""
REQUIRED = tuple(column.name for column in BAR_COLUMNS if not column.optional)
UNITS = ("s", "ms", "us", "ns")
_A_MS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 1_000_000)}
_LIMITS = (10**11, 10**14, 10**17)
ISO = "iso"


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of file: its columns by position, and what its name says. `venues`: whose files these
    are.
    """

    name: str
    columns: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None
    venues: tuple[str, ...] = ()


_KLINE = ("open_time", "open", "high", "low", "close", "volume", "close_time", "quote_volume", "trades", "taker_buy_volume",
          "taker_buy_quote_volume", "ignore")  # fmt: skip
BINANCE = Format(
    "binance",
    _KLINE,
    re.compile(
        r"((?P<kind>UMFUT|CMFUT)-)?(?P<id>[A-Z0-9_]+)-(?P<timeframe>\d+(s|m|h|d|w|mo))-(?P<date>\d{4}-\d\d(-\d\d)?)"
    ),
    ("binance", "binanceusdm"),
)
KRAKEN = Format(
    "kraken",
    (*_KLINE[:6], "trades"),
    re.compile(r"(?P<id>[A-Z0-9.]+)_(?P<minutes>\d+)"),
    ("kraken",),
)
PLAIN = Format("csv")
FORMATS = (BINANCE, KRAKEN, PLAIN)
_KRAKEN_NAMES = {"BTC": "XBT", "DOGE": "XDG"}


_VISION = "https://data.binance.vision/data/{kind}/monthly/klines/{id}/{timeframe}/{id}-{timeframe}-{month}.zip"
MONTHLY: dict[tuple[str, str], str] = {
    ("binance", "spot"): "spot",
    ("binance", "linear"): "futures/um",
    ("binanceusdm", "linear"): "futures/um",
}
"""Of which venues there is an archive of each month, from the first Monday after it, and below which
folder.
"""
FILES_A_MONTH = 2
"""The zip and its CHECKSUM: what a month costs in requests when it comes from the archive."""
NEWEST_ONLY: dict[str, int] = {"kraken": 720}
"""Venues whose API gives so many of the newest bars and nothing older, whatever is asked."""
ONLY_IN_FILES: dict[str, str] = {
    "kraken": "https://support.kraken.com/hc/en-us/articles/360047124832-Downloadable-historical-OHLCVT-Open-High-Low-Close-Volume-Trades-data"
}
"""Where the files are that hold what is older; new ones come every quarter."""


def monthly_archive(market: Market, tf: Timeframe, month: Window, now: datetime) -> str | None:
    """Where the archive of a month is published; None where there is none, or none yet."""
    kind = MONTHLY.get((market.venue, "linear" if ":" in market.symbol else "spot"))
    monday = month.end + timedelta(days=(7 - month.end.weekday()) % 7)
    name = symbol_id(market, BINANCE)
    if kind is None or name is None or now < monday + timedelta(days=1):
        return None
    return _VISION.format(
        kind=kind, id=name, timeframe=tf.name, month=month.start.strftime("%Y-%m")
    )


@dataclass(frozen=True, slots=True)
class Told:
    """What a person says of the files; None: their names and contents tell it.

    `columns`: by column of a bar, the name in the file's header, or its place counted from 1.
    """

    market: Market | None = None
    timeframe: Timeframe | None = None
    columns: Mapping[str, str] | None = None
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What one file is.

    `span`: the open times it is about, by its name or from its first to its last row; `held`: those
    of its rows. `lacking`: bars of its span that it does not hold.
    """

    path: Path
    sha256: str
    format: str
    market: Market
    timeframe: Timeframe
    unit: str
    rows: int
    span: Window
    held: Window
    lacking: int
    columns: tuple[str, ...] = field(repr=False)
    """The columns that it gives: null in one of them is broken."""


def files_of(paths: Iterable[Path]) -> list[Path]:
    """The files, and all zips and CSVs below the folders, each once, in the order of their names.
    Raises BadInput.
    """
    found: set[Path] = set()
    for path in paths:
        inside = (
            [p for p in path.rglob("*") if p.suffix.lower() in (".zip", ".csv") and p.is_file()]
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise BadInput(f"{path}: there is no .zip and no .csv file below this folder")
        found |= {p.resolve() for p in inside if p.suffix != ".CHECKSUM"}
    return sorted(found)


def parse_columns(text: str) -> dict[str, str]:
    """The mapping of `open_time=ts,open=o,...`. Raises BadInput."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    found = {name.strip(): theirs.strip() for name, _, theirs in pairs}
    unknown = [name for name in found if name not in COLUMN_NAMES or not found[name]]
    if unknown or len(found) < len(pairs):
        raise BadInput(
            f"--columns {text}: write `column=its name in the file`, each once, of {', '.join(COLUMN_NAMES)}"
        )
    if lacking := [name for name in REQUIRED if name not in found]:
        raise BadInput(f"--columns {text}: {', '.join(lacking)} must be named as well")
    return found


def read_file(path: Path, told: Told, markets: Sequence[Market]) -> tuple[Facts, Fetched]:
    """One file: what it is and its rows, as sent. Raises BadInput that names the file, the line and
    the way out.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: it cannot be read ({error.strerror})") from None
    sha256 = hashlib.sha256(raw).hexdigest()
    _check_sum(path, sha256)
    content, inner = (
        _unzipped(path, raw)
        if zipfile.is_zipfile(io.BytesIO(raw)) or path.suffix.lower() == ".zip"
        else (raw, None)
    )
    name = _name_of(path, inner)
    if told.columns and name and name.format is KRAKEN:
        name = None  # who names the columns speaks of a file of his own, and these names are short
    table = _Table(path, content.removeprefix(b"\xef\xbb\xbf"))
    form, places, header = _shape(table, name, told)
    if table.cells.height == int(header):
        raise BadInput(f"{path}: it holds no rows")
    market, tf = _market(path, name, told, markets, header), _timeframe(path, name, told)
    rows, unit = _rows(table, form, places, header, tf, told.unit)
    opens = rows["open_time"]
    held = Window(*(_moment(table, opens, row) for row in (opens.arg_min(), opens.arg_max())))
    held = Window(held.start, held.end + tf.width)
    span = (name and name.window) or held
    lacking = (
        span.count(tf)
        - opens.filter(
            opens.is_between(to_ms(span.start), to_ms(span.end), closed="left")
        ).n_unique()
    )
    given = tuple(n for n in COLUMN_NAMES if n in places)
    return Facts(
        path, sha256, form.name, market, tf, unit, rows.height, span, held, lacking, given
    ), Fetched(rows, span)


def _moment(table: _Table, opens: pl.Series, row: int | None) -> datetime:
    try:
        return from_ms(opens[row or 0])
    except OverflowError:
        raise BadInput(
            f"{table.path}: {opens[row or 0]} ms is no moment; is its column open_time the right one?"
        ) from None


# --------------------------------------------------------------------------------- names
@dataclass(frozen=True, slots=True)
class _Name:
    """What a file's name says."""

    format: Format
    id: str
    timeframe: Timeframe
    window: Window | None
    kind: str = ""

    def __str__(self) -> str:
        futures = {"UMFUT": " (USD-margined futures)", "CMFUT": " (coin-margined futures)"}.get(
            self.kind, ""
        )
        return f"{self.format.name}'s {self.id}{futures}"


def _name_of(path: Path, inner: str | None) -> _Name | None:
    """What the name says; the one inside a zip must not say something else."""
    outer, held = _parsed(path, path.stem), _parsed(path, Path(inner).stem) if inner else None
    if (
        outer
        and held
        and (outer.id, outer.timeframe, outer.window) != (held.id, held.timeframe, held.window)
    ):
        raise BadInput(
            f"{path}: it holds {inner}, which is another file; give the zip its own name again"
        )
    return outer or held


def _parsed(path: Path, stem: str) -> _Name | None:
    if found := BINANCE.pattern and BINANCE.pattern.fullmatch(stem):
        kind = found["kind"] or (
            "" if "futures" not in path.parts else "CMFUT" if "cm" in path.parts else "UMFUT"
        )
        if found["timeframe"] not in TIMEFRAMES:
            raise BadInput(f"{path}: {found['timeframe']} is not one of {' '.join(TIMEFRAMES)}")
        day = parse_time(found["date"] if len(found["date"]) > 7 else found["date"] + "-01")
        window = Window(day, day + timedelta(days=1)) if len(found["date"]) > 7 else month_of(day)
        return _Name(BINANCE, found["id"], parse_timeframe(found["timeframe"]), window, kind)
    if found := KRAKEN.pattern and KRAKEN.pattern.fullmatch(stem):
        fitting = [tf for tf in TIMEFRAMES.values() if tf.minutes == int(found["minutes"])]
        if not fitting:
            raise BadInput(
                f"{path}: bars of {found['minutes']} minutes are none of {' '.join(TIMEFRAMES)}"
            )
        return _Name(KRAKEN, found["id"], fitting[0], None)
    return None


def symbol_id(market: Market, form: Format) -> str | None:
    """A market's symbol as the file names of a format write it; None where there are no such files."""
    base, _, rest = market.symbol.partition("/")
    quote, _, contract = rest.partition(":")
    if form is KRAKEN:
        return None if contract else _KRAKEN_NAMES.get(base, base) + _KRAKEN_NAMES.get(quote, quote)
    settled, _, expiry = contract.partition("-")
    if contract and settled != quote:
        return None
    return base + quote + (f"_{expiry}" if expiry else "")


def _fits(name: _Name, market: Market) -> bool:
    contract = ":" in market.symbol
    return (
        market.venue in name.format.venues
        and symbol_id(market, name.format) == name.id
        and (contract or not name.kind)
    )


def _market(
    path: Path, name: _Name | None, told: Told, markets: Sequence[Market], header: bool
) -> Market:
    if name and (name.kind == "CMFUT" or name.id.endswith("_PERP")):
        raise BadInput(
            f"{path}: coin-margined futures count contracts where other files count coins; they cannot be imported"
        )
    if told.market:
        if name and not _fits(name, told.market):
            raise BadInput(
                f"{path}: it is {name}, and not {told.market.key}; name the market it is of with --market"
            )
        return told.market
    if name is None:
        raise BadInput(f"{path}: its name does not tell the market; name it with --market")
    fitting = [market for market in markets if _fits(name, market)]
    if not fitting:
        raise BadInput(
            f"{path}: no market of the universe is {name}; it has {', '.join(m.key for m in markets)}"
        )
    if len(fitting) > 1:
        raise BadInput(
            f"{path}: it may be {' or '.join(m.key for m in fitting)}; say which with --market"
        )
    if name.format is BINANCE and header and ":" not in fitting[0].symbol:
        raise BadInput(
            f"{path}: it has a header, as Binance's futures files have and its spot files have not; "
            f"if these are bars of {fitting[0].key}, say so with --market"
        )
    return fitting[0]


def _timeframe(path: Path, name: _Name | None, told: Told) -> Timeframe:
    found = name.timeframe if name else told.timeframe
    if found is None:
        raise BadInput(f"{path}: its name does not tell the timeframe; name it with --timeframe")
    if told.timeframe and told.timeframe != found:
        raise BadInput(f"{path}: its name says {found.name} and --timeframe {told.timeframe.name}")
    return found


# --------------------------------------------------------------------------------- bytes
def _check_sum(path: Path, sha256: str) -> None:
    """What lies beside the file as `<file>.CHECKSUM` must be true of it."""
    beside = path.with_name(path.name + ".CHECKSUM")
    if not beside.exists():
        return
    try:
        words = beside.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        words = []
    if len(words) != 2 or not re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
        raise BadInput(f"{beside}: it is not `sha256  name`; download it again, or remove it")
    if words[0].lower() != sha256:
        raise BadInput(
            f"{path}: its sha256 is {sha256[:12]}... and its CHECKSUM says {words[0][:12].lower()}...; download it again"
        )
    if not path.name.endswith(words[1].lstrip("*")):
        raise BadInput(f"{beside}: it is of {words[1]}; give the file its own name again")


def _unzipped(path: Path, raw: bytes) -> tuple[bytes, str]:
    """The one CSV of a zip, its CRC verified, and its name."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            if len(members) != 1 or not members[0].filename.lower().endswith(".csv"):
                held = ", ".join(m.filename for m in members[:3]) + (
                    ", ..." if len(members) > 3 else ""
                )
                raise BadInput(
                    f"{path}: one .csv is expected in it, and it holds {held or 'nothing'}; unpack it and import the .csv"
                )
            if members[0].file_size > MAX_BYTES:
                raise BadInput(f"{path}: it unpacks to more than {MAX_BYTES >> 20} MiB; split it")
            with archive.open(members[0]) as packed:
                content = packed.read(
                    MAX_BYTES + 1
                )  # ends at the size that was declared, and checks the CRC there
            return content, members[0].filename
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
        NotImplementedError,
        OSError,
    ) as error:
        raise BadInput(
            f"{path}: the zip is damaged or cannot be read ({error}); download it again"
        ) from None


class _Table:
    """The cells of a CSV, all as text; the line of each."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.whole = content.endswith((b"\n", b"\r"))
        self._content = content.rstrip(b"\r\n")
        if not self._content.strip():
            raise BadInput(f"{path}: it is empty")
        if len(content) > MAX_BYTES:
            raise BadInput(f"{path}: it is larger than {MAX_BYTES >> 20} MiB; split it")
        try:
            self.cells = pl.read_csv(self._content, has_header=False, infer_schema=False)
        except pl.exceptions.PolarsError as error:
            self._refuse_ragged()
            raise BadInput(f"{path}: it is no CSV ({str(error).splitlines()[0]})") from None
        if self.cells[:, -1].null_count():
            self._refuse_ragged()

    def fail(self, row: int, what: str) -> BadInput:
        """A complaint about one row of `cells`; lines count from 1."""
        return BadInput(f"{self.path} line {row + 1}: {what}")

    def _refuse_ragged(self) -> None:
        """Every line has as many columns as the first one."""
        try:
            text = self._content.decode()
        except UnicodeDecodeError as error:
            raise self.fail(
                self._content.count(b"\n", 0, error.start), "it is not text in UTF-8"
            ) from None
        reader, width = csv.reader(io.StringIO(text, newline="")), self._width(text)
        try:
            wrong = next((len(cells) for cells in reader if len(cells) != width), width)
        except csv.Error as error:
            raise self.fail(reader.line_num - 1, str(error)) from None
        if wrong != width:
            last = (
                "; the file ends in the middle of it"
                if reader.line_num - 1 == text.count("\n")
                else ""
            )
            raise self.fail(
                reader.line_num - 1, f"it has {wrong} columns, and the first line has {width}{last}"
            )

    @staticmethod
    def _width(text: str) -> int:
        return len(next(csv.reader(io.StringIO(text, newline="")), []))


# --------------------------------------------------------------------------------- cells
def _shape(table: _Table, name: _Name | None, told: Told) -> tuple[Format, dict[str, int], bool]:
    """The format, where each column is, counted from 0, and whether the first line is a header."""
    first = [(cell or "").strip() for cell in table.cells.row(0)]
    if told.columns:
        return PLAIN, *_mapped(table, first, told.columns)
    form = (
        name.format
        if name
        else next((f for f in (BINANCE, KRAKEN) if _looks_like(f, first, told)), PLAIN)
    )
    header = not _is_number(first[1]) if len(first) > 1 else False
    if form is PLAIN:
        names = {n: n for n in COLUMN_NAMES if n in first}
        if not header or not set(REQUIRED) <= set(names):
            raise BadInput(
                f"{table.path}: say which columns it has with --columns open_time=...,open=...,high=..."
            )
        return PLAIN, *_mapped(table, first, names)
    if len(first) != len(form.columns):
        raise BadInput(
            f"{table.path}: {form.name}'s files have {len(form.columns)} columns, and this has {len(first)}; see --columns"
        )
    if header and [_plain(cell) for cell in first[1:6]] != list(form.columns[1:6]):
        raise BadInput(
            f"{table.path} line 1: its header names {', '.join(first)}; say which column is what with --columns"
        )
    return form, {column: i for i, column in enumerate(form.columns)}, header


def _looks_like(form: Format, first: list[str], told: Told) -> bool:
    """Without a telling name: as many columns as the format has, all numbers, of a venue that has such
    files.
    """
    of_venue = told.market is not None and told.market.venue in form.venues
    return of_venue and len(first) == len(form.columns) and all(map(_is_number, first))


def _mapped(
    table: _Table, first: list[str], columns: Mapping[str, str]
) -> tuple[dict[str, int], bool]:
    """The places of mapped columns: by their names in the header, or by their numbers."""
    by_number = all(theirs.isdecimal() for theirs in columns.values())
    if not by_number:
        for theirs in columns.values():
            if first.count(theirs) != 1:
                raise BadInput(
                    f"{table.path} line 1: there is no single column {theirs!r} in {', '.join(first)}"
                )
        return {ours: first.index(theirs) for ours, theirs in columns.items()}, True
    places = {ours: int(theirs) - 1 for ours, theirs in columns.items()}
    if not all(0 <= place < len(first) for place in places.values()):
        raise BadInput(
            f"{table.path}: it has columns 1 to {len(first)}, and --columns names another"
        )
    return places, not _is_number(first[places["open"]])


def _is_number(text: str) -> bool:
    try:
        return bool(text) and float(text) == float(text)
    except ValueError:
        return False


def _plain(cell: str) -> str:
    return cell.lower().replace(" ", "_")


def _rows(
    table: _Table,
    form: Format,
    places: dict[str, int],
    header: bool,
    tf: Timeframe,
    unit: str | None,
) -> tuple[pl.DataFrame, str]:
    """The rows as `Fetched` holds them, and the unit of their times."""
    cells, skipped = table.cells[int(header) :], int(header)
    if (
        not table.whole
        and places[max(places, key=places.__getitem__)] == cells.width - 1
        and form is not BINANCE
    ):
        raise table.fail(
            skipped + cells.height - 1,
            "it has no line break, so its last number may be cut; if it is whole, add one",
        )
    taken = {column: cells.to_series(place) for column, place in places.items()}
    opens, found = _moments(table, taken["open_time"], "open_time", skipped, unit)
    if "close_time" in taken:
        closes, _ = _moments(table, taken["close_time"], "close_time", skipped, None)
        _check_lengths(table, opens, closes, tf, skipped)
    _check_spacing(table, opens, tf)
    rows = pl.DataFrame(
        {n: opens if n == "open_time" else taken[n] for n in COLUMN_NAMES if n in taken}
    )
    return rows.with_columns(
        pl.lit(None, pl.String).alias(n) for n in COLUMN_NAMES if n not in taken
    ).select(COLUMN_NAMES), found


def _moments(
    table: _Table, texts: pl.Series, column: str, skipped: int, unit: str | None
) -> tuple[pl.Series, str]:
    """Times as milliseconds since 1970, and the unit they are in: by their size, and of one unit all
    of them.
    """
    numbers = texts.cast(pl.Int64, strict=False)
    unread = numbers.is_null().arg_true()
    if len(unread) == len(texts) and unit in (None, ISO):
        return _written_out(table, texts, column, skipped), ISO
    if len(unread):
        row = unread[0]
        raise table.fail(
            skipped + row,
            f"{texts[row]!r} is no {column} like the others ({texts[int(row == 0)]!r})",
        )
    size = pl.sum_horizontal((pl.col(column).abs() >= limit).cast(pl.Int8) for limit in _LIMITS)
    sizes = numbers.alias(column).to_frame().select(size.alias("size"))["size"]
    found = UNITS[sizes[0]]
    if len(other := (sizes != sizes[0]).arg_true()):
        row = other[0]
        raise table.fail(
            skipped + row,
            f"mixed units: {column} {texts[row]} is in {UNITS[sizes[row]]}, and those before in {found}",
        )
    if unit and unit != found:
        raise table.fail(
            skipped, f"{column} {texts[0]} is in {found}, and not in {unit} as --unit says"
        )
    times, parts = _A_MS[found]
    between = ((numbers % parts) != 0).arg_true()
    if len(between) and column == "open_time":
        raise table.fail(
            skipped + between[0],
            f"{column} {texts[between[0]]} lies between two milliseconds: no bar opens there",
        )
    return (numbers * times // parts).alias(column), found


def _written_out(table: _Table, texts: pl.Series, column: str, skipped: int) -> pl.Series:
    """ISO times, in UTC: `2024-03-01`, `2024-03-01 12:00`, `2024-03-01T12:00:00Z`."""
    plain = (
        pl.col(column)
        .str.strip_chars()
        .str.replace(" ", "T", literal=True)
        .str.replace(r"(Z|[+-]00:?00)$", "")
    )
    shapes = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d")
    read = pl.coalesce(
        plain.str.to_datetime(shape, strict=False, time_unit="us") for shape in shapes
    )
    found = texts.alias(column).to_frame().select(read.dt.epoch("us"))[column]
    wrong = (found.is_null() | (found % 1000 != 0)).arg_true()
    if len(wrong):
        raise table.fail(
            skipped + wrong[0],
            f"{texts[wrong[0]]!r} is no {column}, which is a number or a time in UTC such as 2024-03-01T12:00Z",
        )
    return found // 1000


def _check_lengths(
    table: _Table, opens: pl.Series, closes: pl.Series, tf: Timeframe, skipped: int
) -> None:
    """A bar may be cut short by a halt, but none is longer than its timeframe, and not all are
    shorter.
    """
    width, lengths = tf.width // timedelta(milliseconds=1), closes - opens + 1
    longer = (lengths > width).arg_true()
    wrong = (
        longer[0]
        if len(longer)
        else 0
        if len(lengths) > 2 and not (lengths == width).any()
        else None
    )
    if wrong is not None:
        raise table.fail(
            skipped + wrong,
            f"this is no {tf.name} bar: it lasts {timedelta(milliseconds=lengths[wrong])}",
        )


def _check_spacing(table: _Table, opens: pl.Series, tf: Timeframe) -> None:
    """Bars of another timeframe under this name: most of them nearer to each other, or all of them on
    a coarser grid.
    """
    steps = opens.unique().sort().diff().drop_nulls()
    if len(steps) < 9:
        return
    width, grid = tf.width // timedelta(milliseconds=1), math.gcd(*steps.unique())
    usual = min(steps.mode().to_list())
    if usual < width or grid > width:
        said = timedelta(milliseconds=min(usual, grid) if usual < width else grid)
        raise BadInput(
            f"{table.path}: these are no {tf.name} bars, they are {said} apart; see --timeframe"
        )
