"""The types of the universe's values: each one reads the text of a YAML scalar.

A value that cannot be used raises a `fault`, one line that says what is expected. It never repeats
a secret.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    FailFast,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    PlainSerializer,
    SecretStr,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import CONSOLIDATED_VENUE, Market
from marketdata_assets.model.timeframe import MINUTE, TIMEFRAMES, Timeframe
from marketdata_assets.model.window import parse_time

K = TypeVar("K")
T = TypeVar("T")
FAULT = "fault"
"""The type of every error of ours in a pydantic ValidationError; its context has the message."""
LONGEST = 4096
"""Characters that one value may have."""


class RollupStore(StrEnum):
    """Where rolled-up bars are stored."""

    DUCKDB = "duckdb"
    PARQUET = "parquet"


class StorageClass(StrEnum):
    """The S3 storage classes of which every object can be read at once."""

    STANDARD = "STANDARD"
    STANDARD_IA = "STANDARD_IA"
    ONEZONE_IA = "ONEZONE_IA"
    INTELLIGENT_TIERING = "INTELLIGENT_TIERING"
    GLACIER_IR = "GLACIER_IR"
    REDUCED_REDUNDANCY = "REDUCED_REDUNDANCY"


def fault(message: str, *, at: tuple[str | int, ...] = ()) -> PydanticCustomError:
    """An error for a person. `at` leads from the validated value to the part that is wrong."""
    return PydanticCustomError(FAULT, "{message}", {"message": message, "at": at})


def reveal_secret(secret: SecretStr | None) -> str | None:
    """The text of a secret, for whoever connects with it."""
    return secret.get_secret_value() if secret else None


def suggest_name(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'since'?`, or nothing where no name is near."""
    near = difflib.get_close_matches(name[:100], map(str, names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def from_text(read: Callable[[str], T]) -> BeforeValidator:
    """A validator that gives `read` a scalar without its outer spaces, and reports its BadInput."""

    def validate(value: object) -> T:
        if not isinstance(value, str) or not value.strip():
            raise fault("one value is expected here")
        if len(value) > LONGEST or "\0" in value:
            raise fault(f"a value of at most {LONGEST} printable characters is expected here")
        try:
            return read(value.strip())
        except BadInput as error:
            raise fault(str(error)) from None

    return BeforeValidator(validate)


def name_from(make: Callable[[str], T], names: Iterable[str], *, what: str = "") -> BeforeValidator:
    """A validator that takes one of these names and returns `make(name)`."""
    known = list(names)

    def read(text: str) -> T:
        if text not in known:
            hint = suggest_name(text, known)
            raise BadInput(f"{what}{text[:100]!r} is not one of {', '.join(known)}{hint}")
        return make(text)

    return from_text(read)


@dataclass(frozen=True, slots=True)
class WholeNumber:
    """Marks a whole number of some unit, from `least` to `most`, both inclusive."""

    unit: str
    least: int = 1
    most: int = 1_000_000

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        bounds = f"from {self.least} to {self.most}"
        return core_schema.custom_error_schema(
            core_schema.int_schema(ge=self.least, le=self.most),
            custom_error_type=FAULT,
            custom_error_message="{message}",
            custom_error_context={
                "message": f"a whole number of {self.unit}, {bounds}, is expected here"
            },
        )


def days(least: int = 1, most: int = 36_500) -> WholeNumber:
    """Days, at most a century: no date that is counted back from today leaves the calendar."""
    return WholeNumber("days", least, most)


# --------------------------------------------------------------------------------- places and URLs
def _read_path(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise BadInput("the home folder of that user is not known; write the whole path") from None


def _read_place(text: str) -> str:
    wrong = BadInput("a folder or s3://bucket/prefix is expected here")
    if text.startswith("s3://") and _split_public_url(text, wrong).netloc:
        return text.rstrip("/")
    if "://" in text:
        raise wrong
    return str(_read_path(text))


def _split_url(text: str, wrong: BadInput) -> SplitResult:
    """The parts of a URL; raises `wrong` for what is none."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises for what is no port
    except ValueError:
        raise wrong from None
    return parts


def _split_public_url(text: str, wrong: BadInput) -> SplitResult:
    """The parts of a URL that holds no secret; raises `wrong` for what is no URL."""
    parts = _split_url(text, wrong)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise BadInput(
            "a URL without user, password or query is expected here; secrets do not belong in it"
        )
    return parts


def public_url(*schemes: str) -> BeforeValidator:
    """A validator of a URL without secrets; a slash at its end is cut off."""

    def read(text: str) -> str:
        begins = " or ".join(f"{scheme}://" for scheme in schemes)
        wrong = BadInput(f"a URL that begins with {begins} is expected here")
        parts = _split_public_url(text, wrong)
        if parts.scheme not in schemes or not parts.hostname:
            raise wrong
        return text.rstrip("/")

    return from_text(read)


def service_url(*schemes: str, example: str) -> BeforeValidator:
    """A validator of the URL of a server, which may hold a password."""

    def read(text: str) -> SecretStr:
        wrong = BadInput(f"a URL such as {example} is expected here")
        parts = _split_url(text, wrong)
        if parts.scheme not in schemes or not (parts.hostname or parts.query):
            raise wrong
        return SecretStr(text)

    return from_text(read)


# --------------------------------------------------------------------------------- markets and bars
def ccxt_venues() -> list[str]:
    """The ids of all ccxt venues, read from its folder: importing ccxt would cost seconds."""
    spec = importlib.util.find_spec("ccxt")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        return []
    return sorted(p.stem for p in Path(next(iter(folders)), "async_support").glob("[a-z]*.py"))


def _read_venue(text: str) -> str:
    known = ccxt_venues()
    if text not in known:
        raise BadInput(f"unknown venue {text[:100]!r}{suggest_name(text, known)}")
    return text


def _read_host(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", text.lower()):
        raise BadInput("a host name such as marketdata.example.com is expected here")
    return text.lower()


def _read_symbol(text: str) -> str:
    return Market(CONSOLIDATED_VENUE, text).symbol


def check_different(entries: tuple[T, ...]) -> tuple[T, ...]:
    """Refuse an empty list of symbols, and one that is written twice."""
    if not entries:
        raise fault("at least one symbol such as BTC/USDT is expected here")
    seen: set[T] = set()
    for index, entry in enumerate(entries):
        if entry in seen:
            raise fault(f"{entry} is written twice; keep one", at=(index,))
        seen.add(entry)
    return entries


def _read_glob(text: str) -> str:
    """A unified symbol in which `*` stands for any text, one part of it at the least."""
    Market(CONSOLIDATED_VENUE, text.replace("*", "ANY"))
    return text


def sort_timeframes(timeframes: Iterable[Timeframe]) -> tuple[Timeframe, ...]:
    """Each timeframe once, finest first."""
    return tuple(sorted(set(timeframes), key=lambda timeframe: timeframe.width))


TABLES = tuple(
    f"{layer}/ohlcv_{timeframe.label}"
    for layer in ("raw", "rollup", "consolidated", "reconciled")
    for timeframe in TIMEFRAMES.values()
)
"""The names of all tables that retention may shorten."""

Listed = Annotated[tuple[T, ...], FailFast()]
Keyed = Annotated[Mapping[K, T], FailFast()]
"""The first wrong element ends the check, as one line is all that is reported."""
Text = Annotated[str, from_text(str)]
Moment = Annotated[
    datetime,
    from_text(parse_time),
    WithJsonSchema({"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}.*)?$"}),
]
TimeframeName = Annotated[
    Timeframe,
    GetPydanticSchema(lambda *_: core_schema.is_instance_schema(Timeframe)),
    name_from(TIMEFRAMES.__getitem__, TIMEFRAMES, what="timeframe "),
    PlainSerializer(lambda timeframe: timeframe.name),
    WithJsonSchema({"type": "string", "enum": list(TIMEFRAMES)}),
]
TimeframeNames = Annotated[Listed[TimeframeName], AfterValidator(sort_timeframes)]
HostName = Annotated[str, from_text(_read_host)]
VenueId = Annotated[str, from_text(_read_venue)]
Symbol = Annotated[str, from_text(_read_symbol)]
SymbolGlob = Annotated[str, from_text(_read_glob)]
TableName = Annotated[
    str,
    name_from(str, TABLES, what="table "),
    WithJsonSchema({"type": "string", "enum": list(TABLES)}),
]
Minutes = Annotated[
    timedelta,
    GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(
            lambda count: count * MINUTE, handler(Annotated[int, WholeNumber("minutes")])
        )
    ),
    PlainSerializer(lambda width: width // MINUTE),
]
DatabaseUrl = Annotated[
    SecretStr,
    service_url("postgresql", "postgres", example="postgresql://user@host:5432/name"),
]
BrokerUrl = Annotated[
    SecretStr,
    service_url("redis", "rediss", "amqp", "amqps", example="redis://host:6379/0"),
]
ProxyUrl = Annotated[
    SecretStr, service_url("http", "https", "socks5", "socks5h", example="socks5://host:1080")
]
LocalPath = Annotated[Path, from_text(_read_path)]
Place = Annotated[str, from_text(_read_place)]
SecretText = Annotated[SecretStr, from_text(SecretStr)]
