"""Consolidate: bars of several venues as one series, how far these venues lie apart, and what has to
be made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import BadInput, MarketDataError, StoreFailed, Unreachable
from marketdata_assets.flows.fetch.plan import Task
from marketdata_assets.flows.operate.backfill import LOST, MANY
from marketdata_assets.flows.prove.audit import Finding, Row
from marketdata_assets.ledger.consolidations import Made, Source
from marketdata_assets.model.bar import (
    CONSOLIDATED_COLUMNS,
    RECONCILED_SCHEMA,
    empty_bars,
    format_decimals,
)
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey
from marketdata_assets.model.table import Table, consolidated_table, raw_table, reconciled_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.reconcile import FAIL, WARN, Opinion, opinions, reconcile, worst
from marketdata_assets.transforms.consolidate import consolidate as as_one_series

SHOWN = 20
RECONCILED = "reconciled"
"""The check of a consolidated partition."""


@dataclass(frozen=True, slots=True)
class Consolidated:
    """One partition after a consolidation: its bars, and every pair of venues bar by bar
    (model.bar.RECONCILED_COLUMNS).

    `changed`: it held other bars before. `note`: why it was left as it is. `error`: it failed; then
    it is as it was.
    """

    partition: Partition
    bars: pl.DataFrame = field(
        default_factory=lambda: pl.DataFrame(schema={c.name: c.dtype for c in CONSOLIDATED_COLUMNS})
    )
    pairs: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=RECONCILED_SCHEMA))
    bytes: int = 0
    changed: bool = False
    note: str | None = None
    error: MarketDataError | None = None


def consolidate(
    toolbox: Toolbox, timeframe: Timeframe, partitions: Sequence[Partition]
) -> Iterator[Consolidated]:
    """Make each partition from the raw bars that its venues have now; one that fails does not keep the
    others.

    Sends no request: a venue that is down has no bars, and is asked again by whoever ingests.
    """
    for partition in partitions:
        try:
            with toolbox.ledger.lock(partition.key):
                done = _consolidate(toolbox, timeframe, partition)
        except MarketDataError as error:
            wanted, forgiven = (
                Window(partition.month.start, partition.month.start),
                isinstance(error, Unreachable),
            )
            toolbox.ledger.fail(
                consolidated_table(timeframe),
                partition,
                wanted,
                str(error),
                [],
                toolbox.settings.now(),
                forgiven,
            )
            done = Consolidated(partition, error=error)
        yield done


def _consolidate(toolbox: Toolbox, timeframe: Timeframe, partition: Partition) -> Consolidated:
    settings, table = toolbox.settings, consolidated_table(timeframe)
    markets = settings.consolidate.get(partition.market)
    if markets is None:
        raise BadInput(
            f"{settings.source}: `consolidate:` does not name {partition.market.symbol} any more"
        )
    if settings.base(partition.market) != timeframe:
        return Consolidated(
            partition, note=f"its bars are of {settings.base(partition.market).name}"
        )
    # before the bars: where these change meanwhile, it is made once more
    sources = toolbox.consolidations.sources(raw_table(timeframe), partition.month_key)
    if _retired(sources, markets, partition.month_key):
        return _left(toolbox, timeframe, partition)
    bars, quiet = {}, {}
    for market in markets:
        part = Partition(market, partition.month)
        bars[market.venue] = _bars(
            toolbox, raw_table(timeframe), part, sources.get((market.key, partition.month_key))
        )
        quiet[market.venue] = toolbox.consolidations.quiet(raw_table(timeframe), part)
    series, pairs = as_one_series(bars, quiet), reconcile(bars, timeframe)
    before = toolbox.consolidations.made(table).get(partition.stored_key)
    toolbox.lake.write_if_changed(reconciled_table(timeframe), partition, pairs)
    stored = toolbox.lake.write(table, partition, series)
    opens, start = series["open_time"], partition.open_times(timeframe).start
    span = Window(opens[0], opens[-1] + timeframe.width) if series.height else Window(start, start)
    newest = opens[-1] if series.height else None
    of = _made_of(sources, markets, partition.month_key)
    toolbox.consolidations.record(
        table, partition, span, newest, series.height, stored, of, settings.now()
    )
    changed = before is None or before.digest != stored.digest
    return Consolidated(partition, series, pairs, stored.bytes, changed)


def _bars(
    toolbox: Toolbox, table: Table, partition: Partition, source: Source | None
) -> pl.DataFrame:
    """The raw bars of one venue. Raises StoreFailed where the ledger has some and the lake has not:
    they are lost, not lacking.
    """
    if source is None:
        return empty_bars()
    bars = toolbox.lake.read(table, partition)
    if bars is None:
        raise StoreFailed(
            f"{table.name} {partition.key} is not in the lake any more; `marketdata backfill` fetches it again"
        )
    return bars


def _retired(
    sources: Mapping[tuple[str, str], Source], markets: Sequence[Market], month: str
) -> bool:
    """Whether retention has removed what this month was made of."""
    return any(
        not source.stored for market in markets if (source := sources.get((market.key, month)))
    )


def _left(toolbox: Toolbox, timeframe: Timeframe, partition: Partition) -> Consolidated:
    bars, pairs = (
        toolbox.lake.read(table, partition)
        for table in (consolidated_table(timeframe), reconciled_table(timeframe))
    )
    note = "retention has removed raw bars of this month: it stays as it is"
    if bars is None or pairs is None:
        return Consolidated(partition, note=note)
    return Consolidated(
        partition,
        bars,
        pairs,
        toolbox.lake.size(consolidated_table(timeframe), partition) or 0,
        note=note,
    )


def _made_of(
    sources: Mapping[tuple[str, str], Source], markets: Sequence[Market], month: str
) -> str:
    """What a partition is made of, in one hash: its venues in order, and of each the rows and the
    quiet windows.
    """
    parts = [(market.key, *sources.get((market.key, month), ())) for market in markets]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --------------------------------------------------------------------------------- what has to be m
@dataclass(frozen=True, slots=True)
class Behind:
    """Why a partition has to be made, and a hash that changes when what it would be made of does."""

    reason: str
    of: str


def behind(
    toolbox: Toolbox,
    look: bool,
    busy: Collection[str] = (),
    shown: Mapping[Table, Collection[str]] | None = None,
) -> dict[Partition, Behind]:
    """The partitions whose raw bars have changed since they were made, or that are not there; sends no
    request.

    `look`: whether to look for objects that are lost. `busy`: keys of partitions that a run works
    on; `shown`: the keys that Dagster's grid shows as materialized, by table.
    """
    found = {}
    for timeframe in toolbox.settings.consolidated_timeframes:
        table = consolidated_table(timeframe)
        sources, made = (
            toolbox.consolidations.sources(raw_table(timeframe)),
            toolbox.consolidations.made(table),
        )
        sizes = toolbox.lake.list_sizes(table) if look else None
        for partition in _wanted(toolbox, table):
            if partition.key not in busy:
                then = made.get(partition.stored_key)
                reason, of = _why(toolbox, partition, sources, then, sizes)
                if (
                    reason is None
                    and of
                    and shown is not None
                    and partition.key not in shown[table]
                ):
                    reason = "Dagster does not show it"
                if reason:
                    found[partition] = Behind(reason, of)
    _believe(toolbox, found)
    return found


def consolidations(toolbox: Toolbox, partitions: Sequence[Partition]) -> list[Task]:
    """What has to be made of these raw partitions, by market and month: no bars, no requests."""
    months = {(partition.market, partition.month) for partition in partitions}
    late = behind(toolbox, look=True) if toolbox.settings.consolidate else {}
    found = (
        (p, why)
        for p, why in late.items()
        if any((m, p.month) in months for m in toolbox.settings.consolidate[p.market])
    )
    return [Task(partition, 0, 0, why.reason) for partition, why in found]


def _wanted(toolbox: Toolbox, table: Table) -> Iterator[Partition]:
    """Every partition of a consolidated table that its own retention keeps."""
    settings, kept = toolbox.settings, toolbox.settings.kept_since(table.name)
    markets = [
        market for market in settings.consolidate if settings.base(market) == table.timeframe
    ]
    return (
        p
        for p in settings.partitions(markets, Window(settings.since, settings.now()))
        if p.month.start >= kept
    )


def _why(
    toolbox: Toolbox,
    partition: Partition,
    sources: Mapping[tuple[str, str], Source],
    made: Made | None,
    sizes: Mapping[PartitionKey, int] | None,
) -> tuple[str | None, str]:
    """Why a partition has to be made, if it has to; and what it would be made of, empty where there is
    nothing.
    """
    markets, key = (
        toolbox.settings.consolidate[partition.market],
        partition.stored_key,
    )
    if not any((market.key, partition.month_key) in sources for market in markets) or _retired(
        sources, markets, partition.month_key
    ):
        return None, ""
    of = _made_of(sources, markets, partition.month_key)
    if made is None or made.of is None or made.bytes is None:
        return "never made", of
    if made.of != of:
        return "its venues' bars have changed", of
    return (LOST if sizes is not None and sizes.get(key) != made.bytes else None), of


def _believe(toolbox: Toolbox, found: Mapping[Partition, Behind]) -> None:
    """A lake that lost most of itself at once is not there; nothing is written into what lies in its
    place.
    """
    lost = sum(late.reason == LOST for late in found.values())
    if lost <= MANY:
        return
    known = sum(
        len(toolbox.consolidations.made(consolidated_table(tf)))
        for tf in toolbox.settings.consolidated_timeframes
    )
    if 2 * lost >= known:
        raise StoreFailed(
            f"{lost} of {known} consolidated objects are not in {toolbox.settings.lake}: is it mounted? Nothing is made"
        )


# --------------------------------------------------------------------------------- the second opini
def audit_consolidated(toolbox: Toolbox, timeframe: Timeframe, done: Consolidated) -> Finding:
    """`reconciled`: a warning where two venues' closes lie WARN basis points apart, an error at FAIL;
    neither stops anything.

    Only an error stands in the ledger as red: a warning is what real markets do on wild days.
    """
    found = list(opinions(done.pairs))
    warned, failed = sum(o.warned for o in found), sum(o.failed for o in found)
    apart = f"{failed} closes lie {FAIL} basis points or more apart, {warned - failed} more {WARN} or more"
    widest = max((o.close.most for o in found if o.close.most is not None), default=None)
    says = (
        f"{apart}, at the most {widest:.1f}"
        if widest is not None
        else "no two venues have bars of the same time"
    )
    finding = Finding(
        RECONCILED,
        not warned,
        says,
        numbers={"compared": sum(o.bars for o in found), "warned": warned, "failed": failed},
        table=_worst(done) if warned else (),
        severity="error" if failed else "warning",
        shown={name: value for opinion in found for name, value in _numbers(opinion).items()},
    )
    red = (False, says) if failed else None
    toolbox.ledger.set_check(
        consolidated_table(timeframe), done.partition, RECONCILED, red, toolbox.settings.now()
    )
    return finding


def _numbers(opinion: Opinion) -> dict[str, float]:
    """One pair's differences for plots, in basis points."""
    spreads = {"close": opinion.close, "return": opinion.returns}
    found = {
        f"{what}_bp_{name}": value
        for what, s in spreads.items()
        for name, value in (("p99", s.p99), ("max", s.most))
    }
    return {
        f"{opinion.venue}_{opinion.other}_{name}": round(value, 4)
        for name, value in found.items()
        if value is not None
    }


def _worst(done: Consolidated) -> list[Row]:
    rows = worst(done.pairs, SHOWN).with_columns(
        format_decimals("close_bp"), format_decimals("return_bp")
    )
    return [
        {
            "open_time": format_time(moment),
            "venue": venue,
            "other": other,
            "close_bp": close,
            "return_bp": change or "",
        }
        for moment, venue, other, close, change in rows.iter_rows()
    ]
