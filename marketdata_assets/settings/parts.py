"""The parts of the universe as pydantic models: one class per nested key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import format_time
from marketdata_assets.settings.fields import (
    HostName,
    Listed,
    Minutes,
    Moment,
    Place,
    ProxyUrl,
    SecretText,
    StorageClass,
    Symbol,
    SymbolGlob,
    Text,
    TimeframeName,
    TimeframeNames,
    WholeNumber,
    check_different,
    days,
    fault,
    name_from,
    public_url,
    suggest_name,
)


class StrictModel(BaseModel):
    """A part of the universe: it never changes, and a key that it does not have is an error.

    The docstring of a field is its description in the JSON schema (`schema.py`). pydantic's
    own option for that reads the sources in every process, which costs 25 ms.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,  # a secret may stand in it
    )

    @model_validator(mode="before")
    @classmethod
    def check_keys(cls, value: Any) -> Any:
        """Refuse an unknown key with the nearest name, and a missing one with an example."""
        if not isinstance(value, Mapping):
            return value
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        for key in value:
            if key not in fields:
                hint = suggest_name(str(key), fields) or f"; known keys: {', '.join(fields)}"
                raise fault(f"unknown key {str(key)[:100]!r}{hint}", at=(key,))
        for name, field in fields.items():
            if field.is_required() and name not in value:
                example = json.dumps((field.examples or ["..."])[0]).replace('"', "")
                raise fault(f"`{name}:` is missing; write it, such as `{name}: {example}`")
        return value


@lru_cache(maxsize=256)
def markets_of(venue: str, symbols: tuple[str, ...]) -> dict[str, Market]:
    """The markets by their keys, in the order written."""
    return {market.key: market for market in (Market(venue, symbol) for symbol in symbols)}


class ContractType(StrEnum):
    """What a symbol trades."""

    SPOT = "spot"
    LINEAR = "linear"
    INVERSE = "inverse"


class SymbolPattern(StrictModel):
    """Markets of a venue by what they have in common. What that means is looked up in the venue's
    list of markets, and kept: see `marketdata markets`.
    """

    quote: Text = Field(examples=["USDT"])
    """The quote currency."""
    type: Annotated[ContractType, name_from(ContractType, ContractType)] = ContractType.SPOT
    """spot, linear (a contract settled in its quote currency) or inverse. Default: spot."""
    top: Annotated[int, WholeNumber("markets", most=10_000)] | None = Field(
        default=None, examples=[50]
    )
    """Only so many, those with the largest volume of the last 24 hours. Default: all."""


def _entry_kind(value: Any) -> str:
    if isinstance(value, Mapping | SymbolPattern):
        return "pattern"
    return "glob" if isinstance(value, str) and "*" in value else "symbol"


_SymbolEntry = Annotated[
    Annotated[Symbol, Tag("symbol"), WithJsonSchema({"type": "string", "pattern": r"^[^*]+$"})]
    | Annotated[SymbolGlob, Tag("glob"), WithJsonSchema({"type": "string", "pattern": r"\*"})]
    | Annotated[SymbolPattern, Tag("pattern")],
    Discriminator(_entry_kind),
]


@lru_cache(maxsize=256)
def _symbols_of(
    entries: tuple[str | SymbolPattern, ...], resolved: tuple[str, ...]
) -> tuple[str, ...]:
    written = [e for e in entries if isinstance(e, str) and "*" not in e]
    return tuple(dict.fromkeys([*written, *resolved]))


class Venue(StrictModel):
    """What is wanted of one venue."""

    entries: Annotated[Listed[_SymbolEntry], AfterValidator(check_different)] = Field(
        alias="symbols",
        examples=[["BTC/USDT"]],
        json_schema_extra={"minItems": 1, "uniqueItems": True},
    )
    """The venue's markets, as ccxt's unified symbols: BTC/USDT; a perpetual is BTC/USDT:USDT. At
    least one, each once. `*/USDT` and `{quote: USDT, top: 50}` stand for many.
    """
    since: Moment = Field(examples=["2024-01-01"])
    """First day or moment that is wanted, UTC, inclusive; not in the future."""
    until: Moment | None = Field(default=None, examples=["2024-03-01"])
    """End of what is wanted, UTC, exclusive; after `since`. Default: until now."""
    base: TimeframeName = TIMEFRAMES["1m"]
    """The finest timeframe that is fetched; coarser ones are rolled up from it. Default: 1m."""
    reference: TimeframeNames = Field(default=(), examples=[["1h"]])
    """Other native timeframes that are fetched as well, to prove the rollups. Default: none."""
    base_url: Annotated[str, public_url("http", "https")] | None = Field(
        default=None, examples=["http://127.0.0.1:18081/binance"]
    )
    """Another scheme, host and path for every REST endpoint, without user or query. Default: the
    venue's own.
    """
    ws_url: Annotated[str, public_url("ws", "wss")] | None = Field(
        default=None, examples=["ws://127.0.0.1:18081/ws"]
    )
    """Another URL for streams, without user or query. Default: the venue's own."""
    proxy: ProxyUrl | None = Field(default=None, examples=["socks5://127.0.0.1:1080"])
    """The proxy of this venue's requests: an http, https or socks5 URL, with user and password
    where it wants them. Names are looked up by a SOCKS proxy. Default: HTTP_PROXY, HTTPS_PROXY and
    NO_PROXY of the environment.
    """
    requests_per_minute: Annotated[int, WholeNumber("requests per minute")] | None = Field(
        default=None, examples=[3000]
    )
    """Requests per minute at most, counted over all processes. Default: Binance's reported weight;
    no limit for other venues.
    """
    _name: str
    _resolved: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The venue's ccxt id: its key in the universe."""
        return self._name

    @property
    def patterns(self) -> tuple[str | SymbolPattern, ...]:
        """Those of `symbols:` that stand for many; a text has `*` in it."""
        return tuple(e for e in self.entries if isinstance(e, SymbolPattern) or "*" in e)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols that are written, in that order, then those that the patterns mean."""
        return _symbols_of(self.entries, self._resolved)

    def resolve(self, symbols: Iterable[str]) -> Venue:
        """Return this venue with what its patterns mean."""
        resolved = self.model_copy()
        resolved._resolved = tuple(symbols)
        return resolved

    @property
    def markets(self) -> tuple[Market, ...]:
        """Its markets, in the order of `symbols`."""
        return tuple(markets_of(self.name, self.symbols).values())

    @property
    def fetched_timeframes(self) -> tuple[Timeframe, ...]:
        """The timeframes that are fetched from the venue: the base first, then the references."""
        return (self.base, *self.reference)

    @model_validator(mode="after")
    def check_order(self) -> Self:
        """Refuse an end before the beginning, and the base as its own reference."""
        if self.until is not None and self.until <= self.since:
            raise fault(
                f"until {format_time(self.until)} is not after since {format_time(self.since)}; "
                "swap them",
                at=("until",),
            )
        if self.base in self.reference:
            raise fault(
                f"{self.base.name} is the base already; a reference is another timeframe",
                at=("reference",),
            )
        return self


class Automation(StrictModel):
    """What the sensors and schedules do by themselves; minutes and days are of our clock."""

    refresh_minutes: Annotated[int, WholeNumber("minutes", most=59)] = 5
    """The open month is brought to the last closed bar every so many minutes, 1 to 59. Default: 5.
    """
    runs: Annotated[int, WholeNumber("runs")] = 4
    """Runs for history that `backfill_missed` has under way at once. Default: 4."""
    attempts: Annotated[int, WholeNumber("attempts")] = 3
    """Attempts at a partition before it is parked. Default: 3."""
    cooldown_minutes: Annotated[int, WholeNumber("minutes")] = 2
    """Minutes after the first attempt before the next one; five times as long after each further
    one. Default: 2.
    """
    lookback_days: Annotated[int, days()] | None = Field(default=None, examples=[90])
    """Only closed months that end in the last so many days are filled in. Default: everything since
    `since`.
    """


class Corrections(StrictModel):
    """How far back closed bars are fetched again, as venues correct them; 0: not at all."""

    run_minutes: Annotated[int, WholeNumber("minutes", least=0, most=10_080)] = 60
    """Minutes before the missing bars that each run fetches again, 0 to 10080. Default: 60."""
    night_days: Annotated[int, days(least=0, most=31)] = 1
    """Days that are fetched again every night, 0 to 31. Default: 1."""
    month_days: Annotated[int, days(least=0, most=366)] = 31
    """Days that are fetched again every month, 0 to 366. Default: 31."""


class FreshnessLimits(StrictModel):
    """How far a market's newest bar may lie behind before that is a warning or an error."""

    warn: Minutes = Field(examples=[10])
    """Minutes behind above which it is a warning."""
    error: Minutes = Field(examples=[60])
    """Minutes behind above which it is an error; not less than `warn`."""

    @model_validator(mode="after")
    def check_order(self) -> Self:
        """Refuse a warning that would come after the error."""
        if self.warn > self.error:
            raise fault("`error:` is less than `warn:`; write the smaller number under `warn:`")
        return self


class DeltaSettings(StrictModel):
    """Which tables are published as Delta Lake tables, and where."""

    location: Place = Field(examples=["s3://bucket/delta"])
    """A folder or s3://bucket/prefix for the Delta tables, outside the lake."""
    timeframes: TimeframeNames = Field(examples=[["1m", "1h"]])
    """The timeframes that are published."""
    history_days: Annotated[int, days()] = 7
    """Days for which an older version can still be read. Default: 7."""


class ColdStorage(StrictModel):
    """Where old months go: to another place or into another storage class of the same bucket."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["lake"]}, {"required": ["storage_class"]}]}
    )

    after_days: Annotated[int, days(least=31)] = Field(examples=[365])
    """Months that ended more than so many days ago are moved, 31 or more."""
    lake: Place | None = Field(default=None, examples=["s3://bucket/cold"])
    """Another folder or s3://bucket/prefix, outside the lake; or else `storage_class`."""
    storage_class: Annotated[StorageClass, name_from(StorageClass, StorageClass)] | None = None
    """An S3 storage class for the lake's own bucket; or else `lake`."""

    @model_validator(mode="after")
    def check_choice(self) -> Self:
        """Refuse both ways at once, and none."""
        if (self.lake is None) == (self.storage_class is None):
            raise fault(
                "`{after_days: 365, lake: s3://bucket/prefix}` or "
                "`{after_days: 365, storage_class: STANDARD_IA}` is expected here"
            )
        return self


class WebAccess(StrictModel):
    """Who may use the UI besides a browser on its own machine."""

    hosts: Listed[HostName] = Field(default=(), examples=[["marketdata.example.com"]])
    """Names under which browsers reach the UI, through a proxy for example; localhost and addresses
    need none. Default: none.
    """
    token: SecretText | None = None
    """What `/report_asset_materialization` and its like must bear (`Authorization: Bearer ...`).
    It is a secret: better write it into MARKETDATA_WEB. Default: they are closed.
    """


class Clock(StrictModel):
    """A clock of our own for tests and replays."""

    start: datetime
    """The moment that the clock shows at first, UTC."""
    speed: float = Field(default=0.0, ge=0, le=1_000_000)
    """How many times as fast as the real clock it runs."""
    since: datetime | None = None
    """The real moment, UTC, at which it shows `start`. Default: it stands."""

    def now(self) -> datetime:
        """The moment that this clock shows, UTC."""
        if self.since is None:
            return self.start
        return self.start + (datetime.now(UTC) - self.since) * self.speed
