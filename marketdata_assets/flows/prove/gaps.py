"""Gaps: look for the cause of each hole and write it down with its proof; list them; have one asked
for again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from marketdata_assets.context import Toolbox
from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.flows.prove.gap_evidence import Look, Month
from marketdata_assets.ledger.gaps import REOPENED
from marketdata_assets.ledger.ledger import Gap
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.gap_causes import CAUSES, DELISTED, HALTED, ask_again_at, classify

UNEXPLAINED = "unexplained"
KINDS = (*CAUSES, "quarantined", UNEXPLAINED)
"""What a gap can be; `--cause` takes one of them."""


def explain(
    toolbox: Toolbox, partitions: Collection[Partition], ask: bool = False
) -> set[tuple[Table, Partition]]:
    """Look for the causes of all gaps that have none for good, in these months of their venues; of
    what more is known now.

    All markets and tables of the venues are looked at, as each tells more about the others. `ask`:
    a venue may be asked whether it still lists a market. Objects are read only of months with such
    gaps. A partition that a run works on is left alone: that run explains it.
    """
    changed = set()
    for timeframe in toolbox.settings.raw_timeframes:
        venues = {
            venue.name for venue in toolbox.settings.venues.values() if timeframe in venue.fetched
        }
        months = {(p.market.venue, p.month) for p in partitions if p.market.venue in venues}
        whole = [
            Partition(market, month)
            for venue, month in months
            for market in toolbox.settings.venues[venue].markets
        ]
        changed |= {
            (raw_table(timeframe), partition)
            for partition in _explain_all(toolbox, raw_table(timeframe), whole, ask)
        }
    return changed


def explain_new(toolbox: Toolbox, markets: Collection[Market]) -> None:
    """The same for the gaps of these markets that nobody has looked at. Sends no request."""
    for timeframe in toolbox.settings.raw_timeframes:
        _explain_all(
            toolbox,
            raw_table(timeframe),
            [p for p in toolbox.gaps.unexamined(raw_table(timeframe)) if p.market in markets],
            False,
        )


def _explain_all(
    toolbox: Toolbox, table: Table, partitions: Iterable[Partition], ask: bool
) -> set[Partition]:
    by_month: dict[tuple[str, Window], list[Partition]] = defaultdict(list)
    for partition in partitions:
        by_month[partition.market.venue, partition.month].append(partition)
    changed = set()
    for (venue, window), chosen in by_month.items():
        month = Month(toolbox, table, venue, window)
        for partition in chosen:
            with suppress(Damaged):  # the next ingest sets the object aside
                changed |= {partition} if _explain(toolbox, month, partition, ask) else set()
    return changed


def _is_open(gap: Gap) -> bool:
    """Whether a cause is looked for. Refused rows speak for themselves, and what was reopened is asked
    for first.
    """
    return (
        gap.reason != "quarantined"
        and (not gap.cause or gap.next_ask is not None)
        and REOPENED not in gap.proof
    )


def _explain(toolbox: Toolbox, month: Month, partition: Partition, ask: bool) -> bool:
    if not any(_is_open(gap) for gap in month.gaps(partition.market)):
        return False
    with toolbox.ledger.lock(partition.key, wait=False) as free:
        if not free:
            return False
        gaps = [
            gap
            for gap in toolbox.ledger.gaps(month.table, partition)
            if _is_open(gap) or gap.cause == DELISTED
        ]
        look, parts = Look(month, partition, ask), [gap for gap in gaps if not _is_open(gap)]
        for gap in sorted(
            filter(_is_open, gaps), key=lambda gap: -gap.bars
        ):  # the longest first: halts are no habit
            parts += _parts(look, gap, toolbox.settings.now())
        new = _one_end(parts)
        if new != gaps:
            toolbox.gaps.rewrite(month.table, partition, gaps, new)
    return [(gap.window, gap.cause) for gap in new] != [(gap.window, gap.cause) for gap in gaps]


def _parts(look: Look, gap: Gap, now: datetime) -> Iterator[Gap]:
    """The gap cut by causes. What is final is never asked for again; the rest keeps its turn."""
    facts = look.facts(gap)
    for part in classify(facts):
        if part.cause == HALTED:
            look.month.set_aside(part.window)
        turn = None if part.final else gap.next_ask or ask_again_at(gap.first_asked or now, now)
        proof = json.dumps(look.proof(gap, facts, part))
        yield gap._replace(
            window=part.window,
            bars=part.window.count(facts.timeframe),
            cause=part.cause,
            proof=proof,
            next_ask=turn,
        )


def _one_end(gaps: Iterable[Gap]) -> list[Gap]:
    """A delisted market's silence as one gap, however often it was asked for in the meantime."""
    joined: list[Gap] = []
    for gap in sorted(gaps):
        last = joined[-1] if joined else None
        if last and last.cause == gap.cause == DELISTED and last.window.end == gap.window.start:
            turn = last.next_ask and gap.next_ask
            whole = Window(last.window.start, gap.window.end)
            joined[-1] = gap._replace(
                window=whole,
                bars=last.bars + gap.bars,
                answers=last.answers + gap.answers,
                first_asked=last.first_asked,
                next_ask=turn,
            )
        else:
            joined.append(gap)
    return joined


# --------------------------------------------------------------------------------- listing
@dataclass(frozen=True, slots=True)
class Explained:
    """One gap with its place. `kind` is one of KINDS."""

    table: Table
    market: Market
    gap: Gap

    @property
    def kind(self) -> str:
        """Its cause, `quarantined`, or that it has none yet."""
        return "quarantined" if self.gap.reason == "quarantined" else self.gap.cause or UNEXPLAINED

    def as_dict(self) -> dict[str, Any]:
        """In the order of the table; the proof comes last."""
        gap = self.gap
        asked, last, following = (
            moment and format_time(moment)
            for moment in (gap.first_asked, gap.last_asked, gap.next_ask)
        )
        return {
            "market": self.market.key,
            "table": self.table.name,
            "from": format_time(gap.window.start),
            "until": format_time(gap.window.end),
            "bars": gap.bars,
            "cause": self.kind,
            "reason": gap.reason,
            "asked": gap.answers,
            "first_asked": asked,
            "last_asked": last,
            "next_ask": following,
            "says": words_of(gap),
            "evidence": gap.evidence,
            "proof": proof_of(gap),
        }


def gaps(
    toolbox: Toolbox, markets: Collection[Market], window: Window, kind: str | None = None
) -> list[Explained]:
    """Every gap of these markets that touches a window, by market, table and time, after what is new
    was explained.
    """
    explain_new(toolbox, markets)
    tables = [raw_table(timeframe) for timeframe in toolbox.settings.raw_timeframes]
    found = [
        Explained(table, m, gap)
        for m in markets
        for table in tables
        for gap in toolbox.gaps.between(table, m, window)
    ]
    return [one for one in found if kind in (None, one.kind)]


def reopen(toolbox: Toolbox, market: Market, start: datetime) -> list[Explained]:
    """Forget the cause of the market's gap that begins at `start`, so that the next run asks for it.
    Raises BadInput.
    """
    every = Window(toolbox.settings.since, toolbox.settings.now())
    tables = [raw_table(timeframe) for timeframe in toolbox.settings.raw_timeframes]
    known = [
        Explained(table, market, gap)
        for table in tables
        for gap in toolbox.gaps.between(table, market, every)
    ]
    found = [one for one in known if one.gap.window.start == start]
    if not found:
        nearest = min(known, key=lambda one: abs(one.gap.window.start - start), default=None)
        hint = (
            f"; the nearest is --start {format_time(nearest.gap.window.start)}"
            if nearest
            else "; it has none at all"
        )
        raise BadInput(f"no gap of {market.key} begins at {format_time(start)}{hint}")
    for one in found:
        toolbox.gaps.reopen(one.table, market, one.gap, toolbox.settings.now())
    return found


def proof_of(gap: Gap) -> dict[str, Any]:
    """A gap's proof as it is stored."""
    found: dict[str, Any] = json.loads(gap.proof)
    return found


def words_of(gap: Gap) -> str:
    """Why a gap is what it is; before anybody has looked, what the answers said."""
    return str(proof_of(gap).get("words") or gap.evidence)
