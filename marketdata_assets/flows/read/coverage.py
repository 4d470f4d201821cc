"""Coverage: the sum that explains every expected bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time, timedelta

from marketdata_assets.context import Toolbox
from marketdata_assets.ledger.ledger import State
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, partitions_of
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import Window, parse_time

DAY, MIDNIGHT = timedelta(days=1), time(0)


@dataclass(slots=True)
class Coverage:
    """What became of every expected bar of a market, in base bars counted as 1m: the parts sum to
    `expected`.
    """

    market: str
    expected: int = 0
    present: int = 0
    quarantined: int = 0
    no_trade: int = 0
    halted: int = 0
    not_listed: int = 0
    delisted: int = 0
    missing_at_source: int = 0
    not_fetched: int = 0

    def as_dict(self) -> dict[str, str | int]:
        """In the order of the contract."""
        return asdict(self)


def coverage(
    toolbox: Toolbox, markets: Iterable[Market], window: Window | None = None
) -> list[Coverage]:
    """One sum per market, of all that is wanted or of the bars that lie in a window.

    Bars count as present only while the object that holds them lies in the lake.
    """
    return [_coverage(toolbox, market, window) for market in markets]


def _coverage(toolbox: Toolbox, market: Market, window: Window | None) -> Coverage:
    base = toolbox.settings.venues[market.venue].base
    span, listed = toolbox.settings.span(market), toolbox.ledger.listed(market)
    span = span if window is None else span & window
    states = toolbox.ledger.states(raw_table(base), market)
    found = Coverage(market.key)
    for partition in partitions_of(market, span):
        wanted = partition.open_times(base) & Window(base.ceil(span.start), base.floor(span.end))
        late = Window(max(wanted.start, base.floor(listed)), wanted.end) if listed else wanted
        found.expected += wanted.count(base)
        found.not_listed += wanted.count(base) - late.count(base)
        _add_partition(
            toolbox, found, raw_table(base), partition, late, states.get(partition.month_key)
        )
    return _in_minutes(found, base)


def _add_partition(
    toolbox: Toolbox,
    found: Coverage,
    table: Table,
    partition: Partition,
    wanted: Window,
    state: State | None,
) -> None:
    """One month's wanted window: what lies in the lake, what the ledger explains, and the rest that
    was not fetched.
    """
    timeframe, left = table.timeframe, wanted.count(table.timeframe)
    if (
        left
        and state is not None
        and state.bytes is not None
        and toolbox.lake.size(table, partition) == state.bytes
    ):
        present, gaps = (
            _present(toolbox, table, partition, wanted, state),
            toolbox.gaps.between(table, partition.market, wanted),
        )
        found.present += present
        left -= present
        for gap in gaps:
            bars = min(left, (gap.window & wanted).count(timeframe))
            setattr(found, gap.part, getattr(found, gap.part) + bars)
            left -= bars
    found.not_fetched += left


def _present(
    toolbox: Toolbox, table: Table, partition: Partition, wanted: Window, state: State
) -> int:
    """Bars inside the window: the ledger's count of a whole month, else the object's, which may hold
    bars that are not wanted now.
    """
    if wanted == partition.open_times(table.timeframe):
        return state.rows
    bars = toolbox.lake.read(table, partition)
    return (
        0
        if bars is None
        else int(bars["open_time"].is_between(wanted.start, wanted.end, closed="left").sum())
    )


def daily_coverage(toolbox: Toolbox, table: Table) -> tuple[dict[str, list[float | None]], date]:
    """By market key, for each day from the date on: which share of the wanted bars is stored or
    explained, None where none is wanted.

    A rollup covers what its base covers and what was rolled up. Reads the ledger and a local lake's
    folders, no object.
    """
    settings = toolbox.settings
    found: dict[str, list[float | None]] = {}
    for venue in settings.venues.values():
        source = raw_table(venue.base if table.layer == "rollup" else table.timeframe)
        if source.timeframe not in venue.fetched:
            continue
        known = _Known(toolbox, source, need_rolled=table.layer == "rollup")
        for market in venue.markets:
            days = [None] * (settings.span(market).start.date() - settings.since.date()).days
            found[market.key] = [
                *days,
                *(
                    share
                    for p in partitions_of(market, settings.span(market))
                    for share in known.days(p)
                ),
            ]
    return found, settings.since.date()


class _Known:
    """What ledger and lake know of one raw table, all at once."""

    def __init__(self, toolbox: Toolbox, source: Table, need_rolled: bool) -> None:
        self._settings, self._source, self._need_rolled = toolbox.settings, source, need_rolled
        self._outlines = toolbox.ledger.outlines(source)
        # in S3 `backfill_missed` looks for lost objects from time to time
        self._sizes = (
            toolbox.lake.list_sizes(source)
            if toolbox.lake.is_local
            else {k: o.bytes for k, o in self._outlines.items()}
        )
        self._open_gaps = toolbox.ledger.unsettled(source)

    def days(self, partition: Partition) -> Iterator[float | None]:
        """The share of each day of a month that the universe wants."""
        timeframe, span = self._source.timeframe, self._settings.span(partition.market)
        settled = (
            self._settings.now() - self._settings.limits(timeframe).warn
        )  # what closed since may be on its way
        wanted, key = (
            partition.month & span & Window(span.start, settled),
            partition.stored_key,
        )
        outline = self._outlines.get(key)
        lost = outline is None or outline.bytes is None or self._sizes.get(key) != outline.bytes
        if outline is None or lost or (self._need_rolled and not outline.rolled):
            asked = Window(wanted.start, wanted.start)
        else:
            asked = Window(parse_time(outline.start), parse_time(outline.through))
            if (
                outline.complete
                and key not in self._open_gaps
                and asked.start <= wanted.start
                and asked.end >= wanted.end
            ):
                yield from [1.0] * (-(-(wanted.end - wanted.start) // DAY))
                return
        day = datetime(wanted.start.year, wanted.start.month, wanted.start.day, tzinfo=UTC)
        while day < wanted.end:
            yield self._share(
                Window(day, day + DAY) & wanted, asked, self._open_gaps.get(key, ()), timeframe
            )
            day += DAY

    @staticmethod
    def _share(
        day: Window, asked: Window, gaps: Iterable[Window], timeframe: Timeframe
    ) -> float | None:
        opens = Window(
            timeframe.ceil(day.start),
            timeframe.ceil(day.end) if day.end.time() == MIDNIGHT else timeframe.floor(day.end),
        )
        wanted = opens.count(timeframe)
        if not wanted:
            return None
        return (
            (opens & asked).count(timeframe) - sum((gap & opens).count(timeframe) for gap in gaps)
        ) / wanted


def _in_minutes(found: Coverage, base: Timeframe) -> Coverage:
    for name, value in asdict(found).items():
        if isinstance(value, int):
            setattr(found, name, value * base.minutes)
    return found
