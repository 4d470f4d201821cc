"""Missed: which closed months lack something, and which of them may be asked for now. Sends no
request.

The truth is the ledger beside the lake's own listing: a partition is wanted when it was never
fetched, failed, lost its object, holds a gap that may still be filled, was not rolled up, or is not
shown by Dagster. The open month belongs to `flows.refresh`, and so does the month before it for the
first hour of a month (GRACE).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import StoreFailed
from marketdata_assets.flows.fetch.ingest import wanted_window
from marketdata_assets.ledger.ledger import Ask, Outline
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition, PartitionKey, partitions_of
from marketdata_assets.model.table import Table, raw_table, rollup_table
from marketdata_assets.model.timeframe import MINUTE
from marketdata_assets.model.window import Window, format_time, month_of
from marketdata_assets.settings.universe import Venue

GRACE = timedelta(hours=1)
MONTHS_A_RUN = 12
PARTITIONS_A_RUN = 24
FEWEST_A_RUN = 2
"""Where workers are warm, a run costs little, and what is ready is shared among them in runs of as few
partitions.
"""
SLOWER = 5
"""Each attempt waits so many times as long as the one before."""

LOOK = timedelta(minutes=10)
"""How often S3 is asked for all objects, to find those that are lost."""
MANY = 100
"""So many lost objects at once, if they are half of all, are taken for a lake that is not there."""
LOST = "its object is not in the lake any more"


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring markets of a venue by consecutive months: what one run is asked for, and why."""

    markets: Sequence[Market]
    months: Sequence[Window]
    reasons: Mapping[str, int]

    @property
    def first(self) -> Partition:
        """The first market's first month."""
        return Partition(self.markets[0], self.months[0])

    @property
    def last(self) -> Partition:
        """The last market's last month."""
        return Partition(self.markets[-1], self.months[-1])

    @property
    def partitions(self) -> list[Partition]:
        """All of them."""
        return [Partition(market, month) for market in self.markets for month in self.months]

    def __str__(self) -> str:
        return f"{self.first.key} .. {self.last.key} ({_counted(self.reasons)})"


@dataclass(slots=True)
class Missed:
    """What one look found. `lost` names, by table, partitions that the ledger has and the lake has
    not.
    """

    blocks: list[Block] = field(default_factory=list)
    lost: dict[Table, list[Partition]] = field(default_factory=lambda: defaultdict(list))
    parked: list[Partition] = field(default_factory=list)
    waiting: Counter[str] = field(default_factory=Counter)

    @property
    def says(self) -> str:
        """One line: what is asked for, and why the rest is not."""
        asked = [f"asked for {block}" for block in self.blocks]
        return (
            "; ".join(asked + ([_counted(self.waiting)] if self.waiting else []))
            or "nothing is missing"
        )


def missed(
    toolbox: Toolbox, room: int, busy: Container[str], shown: Mapping[Table, Collection[str]]
) -> Missed:
    """What is missing, in at most `room` blocks, the newest months first.

    `busy` holds the keys of partitions that a run works on or waits for, `shown` the keys that
    Dagster's grid shows as materialized, by table. Attempts are counted in the ledger: whoever
    calls this sends the blocks out.
    """
    found, now = Missed(), toolbox.settings.now()
    asks = toolbox.ledger.asks()
    wanted = dict(_lacks(toolbox, shown, found, now))
    _believe(toolbox, found, wanted)
    over = [
        ask.partition
        for key, ask in asks.items()
        if key not in wanted and ask.partition.key not in busy
    ]
    if over:
        toolbox.ledger.forget_asks(over)
    ready = _ready(toolbox, wanted, asks, busy, found, now)
    most = PARTITIONS_A_RUN
    if toolbox.settings.broker and room:
        most = min(most, max(FEWEST_A_RUN, -(-len(ready) // room)))
    found.blocks = blocks(
        [venue.markets for venue in toolbox.settings.venues.values()], ready, wanted, room, most
    )
    asked = [p for block in found.blocks for p in block.partitions]
    if len(ready) > len(asked):
        found.waiting["wait for their turn"] = len(ready) - len(asked)
    if asked:
        toolbox.ledger.ask([(p, wanted[p.stored_key]) for p in asked], now)
    return found


def cooldown(toolbox: Toolbox, ask: Ask) -> timedelta:
    """How long after its last attempt a partition is left alone."""
    times: int = SLOWER ** max(0, ask.attempts - 1)
    return toolbox.settings.automation.cooldown_minutes * MINUTE * times


# --------------------------------------------------------------------------------- what is lacking
_Key = tuple[str, str]


def _lacks(
    toolbox: Toolbox, shown: Mapping[Table, Collection[str]], found: Missed, now: datetime
) -> Iterator[tuple[_Key, str]]:
    """Market key and month key of everything that is lacking, with the reason."""
    due = look_is_due(toolbox, now)
    rolled_lost = _rollups_lost(toolbox, found, due)
    for venue in toolbox.settings.venues.values():
        looks = [
            _Look(toolbox, raw_table(tf), shown.get(raw_table(tf)), due) for tf in venue.fetched
        ]
        months = list(_closed_months(toolbox, venue, now))
        for market in venue.markets:
            rolls = bool(toolbox.settings.rolled(market))
            for month, bounds in months:
                key = (market.key, month)
                reasons = (
                    look.at(key, wanted, found)
                    for look, wanted in zip(looks, bounds, strict=True)
                    if wanted
                )
                reason = next(filter(None, reasons), None)
                if (
                    reason is None
                    and rolls
                    and bounds[0]
                    and (not looks[0].outlines[key].rolled or key in rolled_lost)
                ):
                    reason = "its rollups are not up to date"
                if reason is not None:
                    yield key, reason


def look_is_due(toolbox: Toolbox, now: datetime, what: str = "lost objects") -> bool:
    """Whether to look for lost objects now: always where that is free. `what` names who looks."""
    if toolbox.lake.is_local:
        return True
    last = toolbox.ledger.last_beat(what)
    if last is not None and timedelta(0) <= now - last < LOOK:
        return False
    toolbox.ledger.beat(what, now)
    return True


def _believe(toolbox: Toolbox, found: Missed, wanted: dict[_Key, str]) -> None:
    """Only what is really lost stays lost: not what a run stores just now, and not most of the lake at
    once.
    """
    lost = {table: partitions for table, partitions in found.lost.items() if table.layer == "raw"}
    count, known = (
        sum(map(len, lost.values())),
        sum(len(toolbox.ledger.outlines(table)) for table in lost),
    )
    if count > MANY and 2 * count >= known:
        where = toolbox.settings.lake
        raise StoreFailed(
            f"{count} of {known} objects are not in {where}: is it mounted? Nothing is asked for and nothing forgotten; "
            "if they are gone for good, `marketdata backfill` fetches them again"
        )
    for table, partitions in lost.items():
        found.lost[table] = [p for p in partitions if _is_lost(toolbox, table, p)]
        for partition in set(partitions) - set(found.lost[table]):
            wanted.pop(partition.stored_key, None)
        if not found.lost[table]:
            del found.lost[table]


def _is_lost(toolbox: Toolbox, table: Table, partition: Partition) -> bool:
    with toolbox.ledger.lock(partition.key, wait=False) as free:
        state = toolbox.ledger.state(table, partition)
        return free and state is not None and state.bytes != toolbox.lake.size(table, partition)


class _Look:
    """One raw table as the ledger has it, and the lake where it is looked at, all at once."""

    def __init__(
        self, toolbox: Toolbox, table: Table, shown: Collection[str] | None, look: bool
    ) -> None:
        self.table, self.shown = table, shown
        self.outlines: dict[_Key, Outline] = toolbox.ledger.outlines(table)
        self.sizes = toolbox.lake.list_sizes(table) if look else None
        self.due = toolbox.gaps.due(table, toolbox.settings.now())

    def at(self, key: _Key, wanted: tuple[str, str], found: Missed) -> str | None:
        """Why this partition needs a run, if it does. `wanted` is ISO text, as in an Outline."""
        outline = self.outlines.get(key)
        if outline is None or outline.bytes is None:
            return f"failed: {outline.error}" if outline and outline.error else "never fetched"
        if self.sizes is not None and self.sizes.get(PartitionKey(*key)) != outline.bytes:
            found.lost[self.table].append(Partition.parse("|".join(key)))
            return LOST
        if outline.error:
            return f"failed: {outline.error}"
        if (
            not outline.complete
            or key in self.due
            or outline.start > wanted[0]
            or outline.through < wanted[1]
        ):
            return "holds a gap that may still be filled"
        return (
            None
            if self.shown is None or "|".join(key) in self.shown
            else "Dagster does not show it"
        )


def _closed_months(
    toolbox: Toolbox, venue: Venue, now: datetime
) -> Iterator[tuple[str, list[tuple[str, str] | None]]]:
    """Month key, and for each timeframe of the venue the window wanted of it (ISO; None where nothing
    is).
    """
    some, days = venue.markets[0], toolbox.settings.automation.lookback_days
    span = toolbox.settings.span(some)
    for partition in partitions_of(some, span):
        end = min(partition.month.end, venue.until or partition.month.end)
        if end > now - GRACE or (days is not None and end < now - timedelta(days=days)):
            continue
        windows = [wanted_window(toolbox, tf, partition) for tf in venue.fetched]
        yield (
            partition.month_key,
            [(format_time(w.start), format_time(w.end)) if w else None for w in windows],
        )


def _rollups_lost(toolbox: Toolbox, found: Missed, look: bool) -> set[_Key]:
    """Partitions whose rollups are gone from where they were stored; in the lake only where it is
    looked at.
    """
    timeframes = toolbox.settings.rollup_timeframes
    if toolbox.settings.rollups == "duckdb":
        if not toolbox.warehouse.exists:
            toolbox.ledger.forget_rollups()
            for tf in timeframes:
                found.lost[rollup_table(tf)] = []  # all of it
        return set()
    if not timeframes or not look:
        return set()
    pace = MINUTE if toolbox.lake.is_local else LOOK
    turn = timeframes[
        int(toolbox.settings.now().timestamp() // pace.total_seconds()) % len(timeframes)
    ]  # one table at a time: they are many
    there = toolbox.lake.list_sizes(rollup_table(turn))
    outlines = (
        item
        for base in {v.base for v in toolbox.settings.venues.values()}
        for item in toolbox.ledger.outlines(raw_table(base)).items()
    )
    kept = f"{toolbox.settings.kept_since(rollup_table(turn).name):%Y-%m-%d}"
    gone = {
        k
        for k, outline in outlines
        if outline.rolled and k not in there and k[1] >= kept and turn in _rolled(toolbox, k[0])
    }
    found.lost[rollup_table(turn)] = [Partition.parse("|".join(key)) for key in gone]
    if not gone:
        del found.lost[rollup_table(turn)]
    return gone


def _rolled(toolbox: Toolbox, market: str) -> Sequence[object]:
    known = {m.key: m for m in toolbox.settings.markets}
    return toolbox.settings.rolled(known[market]) if market in known else ()


# --------------------------------------------------------------------------------- what may be aske
def _ready(
    toolbox: Toolbox,
    wanted: Mapping[_Key, str],
    asks: Mapping[_Key, Ask],
    busy: Container[str],
    found: Missed,
    now: datetime,
) -> set[_Key]:
    ready, parking = set(), []
    closed = {name for name in toolbox.settings.venues if toolbox.breaker_open(name)}
    for key, reason in wanted.items():
        ask = asks.get(key)
        why = _why_not(toolbox, key, ask, busy, closed, now)
        if why is None and ask and ask.attempts >= toolbox.settings.automation.attempts:
            parking.append((ask.partition, reason))
            why = _PARKED
        if why is None:
            ready.add(key)
            continue
        found.waiting[why] += 1
        if why == _PARKED:
            found.parked.append(Partition.parse("|".join(key)))
    if parking:
        toolbox.ledger.park(parking, now)
    return ready


_PARKED = "are parked after too many attempts (`marketdata parked`)"


def _why_not(
    toolbox: Toolbox,
    key: _Key,
    ask: Ask | None,
    busy: Container[str],
    closed: Container[str],
    now: datetime,
) -> str | None:
    if "|".join(key) in busy:
        return "are under way"
    if ask and ask.parked_at:
        return _PARKED
    venue = key[0].partition(":")[0]
    if venue in closed:
        return f"wait for {venue}, whose circuit breaker is open"
    if ask and timedelta(0) <= now - ask.asked_at < cooldown(toolbox, ask):
        return "wait for their cooldown"
    return None


def blocks(
    groups: Iterable[Sequence[Market]],
    ready: Collection[_Key],
    wanted: Mapping[_Key, str],
    room: int,
    most: int = PARTITIONS_A_RUN,
) -> list[Block]:
    """The newest ready partitions as at most `room` rectangles of the grid, each of one group's
    neighbouring markets.

    `wanted` has the reason of each by market key and month key; `most` is how many partitions a
    rectangle may hold.
    """
    found = []
    by_market: dict[str, list[int]] = defaultdict(list)
    for market, month in wanted:
        if (market, month) in ready:
            by_market[market].append(int(month[:4]) * 12 + int(month[5:7]) - 1)
    for markets in groups:
        rows = ((i, by_market.get(market.key, [])) for i, market in enumerate(markets))
        spans = [
            (span, i) for i, months in rows for span in _spans(months, min(most, MONTHS_A_RUN))
        ]
        spans.sort(key=lambda item: (-item[0][1], item[0][0], item[1]))
        found += [
            (last, markets, first, members) for (first, last), members in _rectangles(spans, most)
        ]
    found.sort(key=lambda item: -item[0])
    return [
        _block(markets, members, first, last, wanted)
        for last, markets, first, members in found[:room]
    ]


_Span = tuple[int, int]
"""Consecutive months, first and last, counted from year 0."""


def _spans(months: Sequence[int], most: int) -> Iterator[_Span]:
    """Runs of consecutive months, the newest first, none longer than `most`."""
    left = sorted(months)
    while left:
        last = first = left.pop()
        while left and left[-1] == first - 1 and last - first + 1 < most:
            first = left.pop()
        yield first, last


def _rectangles(spans: Sequence[tuple[_Span, int]], most: int) -> Iterator[tuple[_Span, list[int]]]:
    """Neighbouring rows (by number) with the same months, in one; none of more than `most`
    partitions.
    """
    rows: list[int] = []
    for i, (span, row) in enumerate(spans):
        rows.append(row)
        after = spans[i + 1] if i + 1 < len(spans) else None
        full = (len(rows) + 1) * (span[1] - span[0] + 1) > most
        if full or after != (span, row + 1):
            yield span, rows
            rows = []


def _block(
    markets: Sequence[Market],
    rows: Sequence[int],
    first: int,
    last: int,
    wanted: Mapping[_Key, str],
) -> Block:
    months = [
        month_of(datetime(n // 12, n % 12 + 1, 1, tzinfo=UTC)) for n in range(first, last + 1)
    ]
    block = Block([markets[i] for i in rows], months, Counter())
    return replace(
        block,
        reasons=Counter(wanted[p.stored_key].partition(":")[0] for p in block.partitions),
    )


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items())
