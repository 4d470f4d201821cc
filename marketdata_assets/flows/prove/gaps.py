"""Gaps: find the cause of each and record it with its proof; list them; reopen one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from marketdata_assets.errors import BadInput, Damaged
from marketdata_assets.flows.prove.gap_evidence import GapInvestigation
from marketdata_assets.flows.prove.venue_month import VenueMonth
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.gap import Gap, GapCause, GapReason, GapStatus
from marketdata_assets.model.intervals import fold_neighbors
from marketdata_assets.model.market import Market
from marketdata_assets.model.partition import Partition
from marketdata_assets.model.table import Table, raw_table
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.gap_causes import classify_gap, next_request_at
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.clients import VenueClients
from marketdata_assets.storage.lake import Lake


@dataclass(frozen=True, slots=True)
class ListedGap:
    """One gap with its place."""

    table: Table
    market: Market
    gap: Gap

    def as_dict(self) -> dict[str, Any]:
        """Return it as a row of a table; the proof comes last."""
        gap = self.gap
        times = (gap.first_requested, gap.last_requested, gap.next_request)
        first, last, following = (moment and format_time(moment) for moment in times)
        return {
            "market": self.market.key,
            "table": self.table.name,
            "from": format_time(gap.window.start),
            "until": format_time(gap.window.end),
            "bars": gap.bars,
            "cause": gap.kind,
            "reason": gap.reason.value,
            "asked": gap.answers,
            "first_asked": first,
            "last_asked": last,
            "next_ask": following,
            "says": gap.explanation,
            "evidence": gap.evidence,
            "proof": gap.proof,
        }


@dataclass(frozen=True, slots=True)
class GapExplainer:
    """Finds the causes of gaps by the ledger, the lake and the venue's list of markets."""

    settings: Settings
    ledger: Ledger
    lake: Lake
    venues: VenueClients

    def explain(
        self, partitions: Collection[Partition], send_requests: bool = False
    ) -> set[tuple[Table, Partition]]:
        """Look for the causes of gaps without a final one; return the partitions that changed.

        All markets and tables of the venues in these months are looked at, as each shows more about
        the others. `send_requests`: of a venue, whether it still lists a market. Objects are read
        only of months with such gaps. A partition that a run works on is left to that run.
        """
        changed = set()
        for timeframe in self.settings.raw_timeframes:
            months = {
                (p.market.venue, p.month)
                for p in partitions
                if timeframe in self.settings.venues[p.market.venue].fetched_timeframes
            }
            every = [
                Partition(market, month)
                for venue, month in months
                for market in self.settings.venues[venue].markets
            ]
            table = raw_table(timeframe)
            changed |= {
                (table, partition) for partition in self._explain(table, every, send_requests)
            }
        return changed

    def explain_new(self, markets: Collection[Market]) -> None:
        """Look for the causes of gaps that were never looked at; sends no request."""
        for timeframe in self.settings.raw_timeframes:
            new = self.ledger.gaps.unexamined(raw_table(timeframe))
            self._explain(
                raw_table(timeframe), [p for p in new if p.market in markets], send_requests=False
            )

    def list_gaps(
        self, markets: Collection[Market], window: Window, kind: str | None = None
    ) -> list[ListedGap]:
        """Return the gaps that touch a window, by market, table and time.

        New gaps are explained before. `kind` is one of model.gap.GAP_KINDS.
        """
        self.explain_new(markets)
        gaps = (gap for market in markets for gap in self._between(market, window))
        return [listed for listed in gaps if kind in (None, listed.gap.kind)]

    def reopen(self, market: Market, start: datetime) -> list[ListedGap]:
        """Discard the cause of the gap that begins at `start`, so that the next run requests it.

        Returns the gaps of all tables that begin there. Raises BadInput when there is none.
        """
        every = Window(self.settings.since, self.settings.now())
        gaps = list(self._between(market, every))
        found = [listed for listed in gaps if listed.gap.window.start == start]
        if not found:
            nearest = min(gaps, key=lambda one: abs(one.gap.window.start - start), default=None)
            hint = "; it has none at all"
            if nearest:
                hint = f"; the nearest is --start {format_time(nearest.gap.window.start)}"
            raise BadInput(f"no gap of {market.key} begins at {format_time(start)}{hint}")
        for listed in found:
            if listed.gap.reason == GapReason.NOT_LISTED:
                self.ledger.markets.withdraw_first_bar(market)
            self.ledger.gaps.reopen(listed.table, market, listed.gap, now=self.settings.now())
        return found

    def _between(self, market: Market, window: Window) -> Iterator[ListedGap]:
        """Yield the gaps by table and time; the months before a listing are one gap."""
        for timeframe in self.settings.raw_timeframes:
            table = raw_table(timeframe)
            gaps = self.ledger.gaps.between(table, market, window)
            for gap in _join_neighbors(gaps, GapCause.NOT_LISTED):
                yield ListedGap(table, market, gap)

    def _explain(
        self, table: Table, partitions: Iterable[Partition], send_requests: bool
    ) -> set[Partition]:
        by_month: dict[tuple[str, Window], list[Partition]] = defaultdict(list)
        for partition in partitions:
            by_month[partition.market.venue, partition.month].append(partition)
        changed = set()
        for (venue, window), of_month in by_month.items():
            month = VenueMonth(self.settings, self.ledger, table, venue=venue, month=window)
            for partition in of_month:
                with suppress(Damaged):  # the next ingest moves the object out of the way
                    if self._explain_partition(month, partition, send_requests):
                        changed.add(partition)
        return changed

    def _explain_partition(
        self, month: VenueMonth, partition: Partition, send_requests: bool
    ) -> bool:
        """Explain the gaps of one partition; return whether a cause has changed."""
        if not any(gap.needs_cause for gap in month.gaps(partition.market)):
            return False
        with self.ledger.lock(partition.key, wait=False) as is_free:
            if not is_free:
                return False
            gaps = self.ledger.gaps.of(month.table, partition)
            old = [gap for gap in gaps if gap.needs_cause or gap.cause == GapCause.DELISTED]
            venues = self.venues if send_requests else None
            investigation = GapInvestigation(month, partition, self.lake, venues=venues)
            new = [gap for gap in old if not gap.needs_cause]
            # the longest first: what turns out to be a halt is left out of the rates of others
            for gap in sorted((g for g in old if g.needs_cause), key=lambda g: -g.bars):
                new += _explain_gap(investigation, gap, self.settings.now())
            new = _join_neighbors(sorted(new, key=lambda gap: gap.window), GapCause.DELISTED)
            if new != old:
                self.ledger.gaps.rewrite(month.table, partition, old=old, new=new)
        return [(gap.window, gap.cause) for gap in new] != [(gap.window, gap.cause) for gap in old]


def _explain_gap(investigation: GapInvestigation, gap: Gap, now: datetime) -> Iterator[Gap]:
    """Yield the gap cut by causes. A final cause ends its requests; the rest keeps its next one.

    No cause is final before answers of two moments agree: equal ones of the same minute are one.
    """
    evidence = investigation.gather(gap)
    for part in classify_gap(evidence):
        if part.cause == GapCause.HALTED:
            investigation.month.exclude_halt(part.window)
        following = gap.next_request or next_request_at(gap.first_requested or now, now)
        is_final, status = part.is_final and gap.is_asked_apart, GapStatus.OPEN
        if part.cause:
            status = GapStatus.FINAL if is_final else GapStatus.EXPLAINED
        yield replace(
            gap,
            window=part.window,
            bars=part.window.count(evidence.timeframe),
            cause=part.cause,
            status=status,
            proof=investigation.prove(gap, evidence, part),
            next_request=None if is_final else following,
        )


def _join_neighbors(gaps: Iterable[Gap], cause: GapCause) -> list[Gap]:
    """Return the gaps, in order, with those of this cause that follow each other as one gap."""

    def join(last: Gap, gap: Gap) -> Gap | None:
        is_of_cause = last.cause == gap.cause == cause
        if not is_of_cause or last.window.end != gap.window.start:
            return None
        following = gap.next_request
        if cause == GapCause.DELISTED:  # what was final before stays it as the silence goes on
            following = last.next_request and gap.next_request
        return replace(
            gap,
            window=Window(last.window.start, gap.window.end),
            bars=last.bars + gap.bars,
            answers=last.answers + gap.answers,
            status=GapStatus.EXPLAINED if following else GapStatus.FINAL,
            first_requested=last.first_requested,
            next_request=following,
        )

    return fold_neighbors(gaps, join)
