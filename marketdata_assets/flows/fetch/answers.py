"""What all answers about one span of one market say together: bars, rejected rows and gaps.

A bar is accepted when answers agree on it, a gap when two answers delivered both its neighbors and
nothing between them. Everything here is a pure decision on answers that have come.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import cast

import polars as pl

from marketdata_assets.errors import MarketDataError, VenueRefused
from marketdata_assets.flows.fetch.known_gaps import clip_gaps, missing_windows, remaining_gaps
from marketdata_assets.ledger.fetches import to_log
from marketdata_assets.ledger.records import LoggedFetch, RowAccount
from marketdata_assets.model.bar import BAR_SCHEMA, COLUMN_NAMES, empty_bars
from marketdata_assets.model.gap import ANSWERED, PROMPT_ATTEMPTS, Gap, GapReason, GapStatus
from marketdata_assets.model.intervals import (
    count_covers,
    group_consecutive,
    subtract_window,
    subtract_windows,
)
from marketdata_assets.model.market import Market
from marketdata_assets.model.timeframe import EPOCH, Timeframe
from marketdata_assets.model.window import Window, format_time
from marketdata_assets.quality.agreement import (
    NO_DOUBT,
    Judgement,
    ResolvedAnswers,
    coalesce_optional,
    judge_answers,
    resolve_answers,
)
from marketdata_assets.quality.gap_causes import next_request_at
from marketdata_assets.quality.split import (
    REJECTED_SCHEMA,
    concat_answers,
    reject_bars,
    split_rows,
)
from marketdata_assets.sources.base import BarsPage, Request

STORED = -1
"""Stands for the stored bars among the numbers of the answers."""

_FOUND_MISSING = (GapReason.NO_BARS, GapReason.QUARANTINED, GapReason.DOUBTED)
"""Reasons of gaps in which a bar needs two answers."""

FEWEST_BROKEN, BROKEN_SHARE = 5, 0.1
"""So many broken rows, and so many for each valid one, make a whole answer doubtful."""


@dataclass(frozen=True, slots=True)
class FetchSpan:
    """What is to be fetched of one market and timeframe.

    `wanted` are the open times wanted, `stored` the stored bars of the partition (with provenance),
    `gaps` its known gaps. Bars that open inside `again` are requested although they are stored.
    """

    market: Market
    timeframe: Timeframe
    wanted: Window
    stored: pl.DataFrame
    gaps: Sequence[Gap]
    again: Window | None = None


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What a fetch brought.

    `bars` are new or replace stored ones (`corrected` of them). Everything before `through` has
    been requested. `answers[i]` is the index in `fetches` of the request that brought answer i.
    `error`: why the rest was not requested.
    """

    bars: pl.DataFrame = field(default_factory=empty_bars)
    rejected: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=REJECTED_SCHEMA))
    gaps: tuple[Gap, ...] = ()
    account: RowAccount = field(default_factory=RowAccount)
    fetches: tuple[LoggedFetch, ...] = ()
    answers: tuple[int, ...] = ()
    retries: int = 0
    seconds_waited: float = 0.0
    through: datetime = EPOCH
    corrected: int = 0
    error: MarketDataError | None = None


@dataclass(slots=True)
class Answers:
    """All answers about one span so far.

    `window` are the open times that can be answered, `closed_before` is the venue's clock, `now`
    ours. A null in one of `columns` breaks a rule.
    """

    span: FetchSpan
    window: Window
    closed_before: datetime
    now: datetime
    columns: tuple[str, ...]
    page_size: int
    """Bars that one answer can hold."""
    fetched: list[BarsPage] = field(default_factory=list)
    refused: dict[Window, VenueRefused] = field(default_factory=dict)
    """What the venue refused to answer because of its window."""
    probes: list[BarsPage] = field(default_factory=list)
    """Answers about bars outside of the span; only the fetch log keeps them."""
    served_from: datetime = EPOCH
    """The first open time that the venue serves, as far as its answers show."""
    served_evidence: str = ""
    silent_until: datetime = EPOCH
    """The venue answered with bars from then on for whatever was requested before."""
    received: int = 0
    judgement: Judgement = NO_DOUBT
    """What `resolve` thought of whole answers last."""
    _valid: list[pl.DataFrame] = field(
        default_factory=lambda: [pl.DataFrame(schema={"answer": pl.Int64(), **BAR_SCHEMA})]
    )
    _rejected: list[pl.DataFrame] = field(
        default_factory=lambda: [pl.DataFrame(schema=REJECTED_SCHEMA)]
    )
    _extents: dict[int, tuple[datetime, datetime]] = field(default_factory=dict)
    _empty: list[Window] = field(default_factory=list)

    def add(self, fetched: Sequence[BarsPage]) -> None:
        """Apply the rules to new answers; bars beyond the window are used, but not counted."""
        if not fetched:
            return
        first = len(self.fetched)
        self.fetched.extend(fetched)
        timeframe = self.span.timeframe
        valid, rejected = split_rows(
            concat_answers([(page.rows, page.window) for page in fetched], first),
            timeframe,
            closed_before=self.closed_before,
            columns=self.columns,
        )
        opens = pl.col("open_time")
        extents = valid.group_by("answer").agg(opens.min().alias("a"), opens.max().alias("b"))
        self._extents.update((answer, (a, b)) for answer, a, b in extents.iter_rows())
        start, end = self.window.start, self.window.end
        is_outside = (opens < start) | (opens >= end)
        neighbor = is_outside & opens.is_between(timeframe.shift(start, -1), end, closed="both")
        self._valid.append(valid.filter(~is_outside))
        self._rejected.append(rejected.filter(~neighbor.fill_null(False)))
        self._empty.extend(page.window for page in fetched if page.rows.is_empty())
        self.received += self._valid[-1].height + self._rejected[-1].height

    def resolve(self) -> ResolvedAnswers:
        """Return what the answers, together with the stored bars that they repeat, agree on.

        Answers that others contradict as a whole have no say (`judgement`).
        """
        rows = self._with_stored(self._delivered())
        cuts: dict[int, object] = {STORED: STORED}
        cuts |= {index: page.window for index, page in enumerate(self.fetched)}
        judged = judge_answers(rows, cuts, STORED)
        broken = self._broken_answers() - judged.false
        self.judgement = judged._replace(disputed=judged.disputed | broken)
        doubted = self.judgement.doubted
        believed = rows.filter(~pl.col("answer").is_in(doubted)) if doubted else rows
        resolved = resolve_answers(believed)
        contested = self._contested_bars(believed)
        if contested.is_empty():
            return resolved
        is_contested = pl.col("open_time").is_in(contested.implode())
        is_new = ~pl.col("open_time").is_in(resolved.unresolved["open_time"].implode())
        more = believed.filter(is_contested & is_new).select(resolved.unresolved.columns)
        return resolved._replace(
            bars=resolved.bars.filter(~is_contested),
            outvoted=resolved.outvoted.filter(~is_contested),
            unresolved=pl.concat([resolved.unresolved, more]),
        )

    def _contested_bars(self, rows: pl.DataFrame) -> pl.Series:
        """Return the open times of bars that no more answers delivered than answers with bars on
        both sides lack: some of them are wrong. What an earlier run found missing there counts as
        one more. Stored bars are not among them.
        """
        rejected = pl.concat(self._rejected).drop_nulls("open_time")
        grid = self.span.timeframe.floors(pl.col("open_time"))
        delivered = rows.select("answer", "open_time").unique()
        known = pl.concat([delivered, rejected.select("answer", grid)]).unique()
        counts, opens = dict(known.group_by("answer").len().iter_rows()), delivered["open_time"]
        opens, absent = opens.unique().sort(), list[pl.Series]()
        for answer, (first, last) in self._extents.items():
            begin = opens.search_sorted(first, side="right")
            inside = opens[begin : opens.search_sorted(last, side="left")]
            if answer in self.judgement.doubted or inside.len() <= counts.get(answer, 0) - 2:
                continue
            own = known.filter(pl.col("answer") == answer)["open_time"]
            absent.append(inside.filter(~inside.is_in(own.implode())))
        moments = opens.to_list() if self.span.gaps else []
        for gap in self.span.gaps:
            begin, end = (bisect_left(moments, t) for t in (gap.window.start, gap.window.end))
            if begin < end and gap.reason in _FOUND_MISSING:
                absent.append(opens[begin:end])
        if not any(series.len() for series in absent):
            return opens.clear()
        lacks = pl.concat(absent).alias("open_time").value_counts(name="lacks")
        found = lacks.join(delivered, on="open_time").group_by("open_time", "lacks").agg("answer")
        is_stored = pl.col("answer").list.contains(STORED)
        is_contested = pl.col("answer").list.len() <= pl.col("lacks")
        return found.filter(is_contested & ~is_stored)["open_time"]

    def _broken_answers(self) -> frozenset[int]:
        """Return the answers of which so many rows break a rule that the others are doubted, too:
        scaled prices, for example, are rounded below their own low.
        """
        broken = pl.concat(self._rejected).group_by("answer").agg(pl.len().alias("broken"))
        if broken.is_empty():
            return frozenset()
        valid = pl.concat(self._valid).group_by("answer").agg(pl.len().alias("valid"))
        both = broken.filter(pl.col("broken") >= FEWEST_BROKEN).join(valid, on="answer")
        return frozenset(
            both.filter(pl.col("broken") > BROKEN_SHARE * pl.col("valid"))["answer"].to_list()
        )

    def doubted_bars(self) -> list[datetime]:
        """Return the open times of bars that only disputed answers hold."""
        if not self.judgement.disputed:
            return []
        rows = pl.concat(self._valid)
        is_disputed = pl.col("answer").is_in(self.judgement.disputed)
        believed = rows.filter(~pl.col("answer").is_in(self.judgement.doubted))
        opens = rows.filter(is_disputed)["open_time"].unique()
        known = pl.concat([believed["open_time"], self.span.stored["open_time"]])
        return opens.filter(~opens.is_in(known.implode())).sort().to_list()

    def _with_stored(self, new: pl.DataFrame) -> pl.DataFrame:
        """Return delivered rows together with the stored bars that they repeat."""
        stored = self.span.stored
        old = stored.join(new.select("open_time").unique(), on="open_time", how="semi")
        old = coalesce_optional(
            old.select(pl.lit(STORED, pl.Int64).alias("answer"), *COLUMN_NAMES),
            new.unique("open_time", keep="first"),
        )
        return pl.concat([new, old])

    def missing(self, resolved: ResolvedAnswers) -> list[Window]:
        """Return the windows that are neither stored, nor resolved, nor a gap that waits."""
        opens, gaps = self._open_times(resolved), self.span.gaps
        return missing_windows(opens, self.span.timeframe, self.window, gaps=gaps, now=self.now)

    def confirmed_rejections(self) -> list[Window]:
        """Return the bars that two answers delivered with the same broken fields."""
        repeated = self._rejection_votes().filter(pl.col("votes") > 1)
        return group_consecutive(repeated["open_time"].drop_nulls().to_list(), self.span.timeframe)

    def count_confirmations(self, window: Window) -> int:
        """Return how many answers say that the venue has nothing in a window.

        An answer delivered bars on both sides and nothing between them. Where no page reaches so
        far, or the window lies at an end of the span, empty answers cover all of it, and others
        delivered bars on both sides: what lies beyond the venue's horizon is empty, too.
        """
        spanning = self.count_spanning(window)
        is_inside = self.window.start < window.start and window.end < self.window.end
        is_short = window.count(self.span.timeframe) + 2 <= self.page_size
        if spanning or (is_short and is_inside):
            return spanning
        is_between = self.has_bars_before(window.start) and self.has_bars_after(window.end)
        return count_covers(window, self._empty) if is_between else 0

    def count_spanning(self, window: Window) -> int:
        """Return how many answers delivered bars on both sides of a window, and none between."""
        return sum(
            a < window.start and b >= window.end
            for answer, (a, b) in self._extents.items()
            if answer not in self.judgement.false
        )

    def has_bars_before(self, moment: datetime) -> bool:
        """Return whether a bar was delivered that opens before a moment."""
        return any(first < moment for first, _ in self._extents.values())

    def has_bars_after(self, moment: datetime) -> bool:
        """Return whether a bar was delivered that opens at a moment or after it."""
        return any(last >= moment for _, last in self._extents.values())

    def first_delivered(self) -> datetime | None:
        """Return the open time of the first bar that was delivered and keeps every rule."""
        return min((first for first, _ in self._extents.values()), default=None)

    def first_delivered_in(self, window: Window) -> datetime | None:
        """Return the open time of the first such bar in the window; None where it holds none."""
        opens = pl.concat(self._valid)["open_time"]
        inside = opens.filter(opens.is_between(window.start, window.end, closed="left"))
        return cast(datetime | None, inside.min())

    def count_empty_before(self, moment: datetime) -> int:
        """Return how many answers would hold the bar before `moment`, and hold none before it."""
        first = self.first_delivered()
        if first is None or first < moment:
            return 0
        ends = ((f.window.start, f.first_available or f.window.end) for f in self.fetched)
        return sum(start < moment <= end for start, end in ends)

    def set_served_from(self, moment: datetime, evidence: str) -> None:
        """Note that the venue serves nothing that opens before `moment`, and what shows it."""
        if moment > self.served_from:
            self.served_from = moment
            known = self.served_evidence
            self.served_evidence = f"{known}; {evidence}" if known else evidence

    def start_at(self, moment: datetime) -> None:
        """Leave out what opens before `moment`: the market was not listed then."""
        self.window = Window(max(self.window.start, moment), self.window.end)

    def build_result(self, resolved: ResolvedAnswers) -> FetchResult:
        """Return what to store. Raises VenueRefused when most stored bars are contradicted."""
        is_stored = pl.col("answer") == STORED
        lost = pl.concat([resolved.outvoted, resolved.unresolved]).filter(~is_stored)
        delivered = self._delivered()
        doubted = self._doubted_rows(delivered, resolved)
        rejected = pl.concat(
            [*self._rejected, reject_bars(lost, "conflict"), reject_bars(doubted, "doubted")]
        )
        corrected = resolved.outvoted.filter(is_stored)["open_time"]
        self._raise_if_contradicted(corrected)
        bars = resolved.bars.join(self.span.stored, on=COLUMN_NAMES, how="anti", nulls_equal=True)
        repeated = delivered.join(
            resolved.bars, on=COLUMN_NAMES, how="semi", nulls_equal=True
        ).height
        fetches, answers = self._fetch_log()
        return FetchResult(
            bars=bars.sort("open_time"),
            rejected=rejected,
            gaps=tuple(self._gaps(resolved)),
            account=RowAccount(self.received, bars.height, repeated - bars.height, rejected.height),
            fetches=fetches,
            answers=answers,
            retries=sum(len(f.requests) - 1 for f in self.fetched),
            seconds_waited=sum(f.wait_seconds for f in self.fetched),
            through=self.window.end,
            corrected=corrected.len(),
        )

    def build_unanswered(self, requests: Sequence[Request]) -> FetchResult:
        """Return the result for a market that the venue no longer lists: all is unanswered."""
        opens, gaps = self.span.stored["open_time"], self.span.gaps
        windows = missing_windows(opens, self.span.timeframe, self.window, gaps=gaps, now=self.now)
        found = self._waiting_gaps(opens) + [self._gap(w, GapReason.UNANSWERED, 1) for w in windows]
        return FetchResult(
            gaps=tuple(sorted(found, key=lambda gap: gap.window)),
            fetches=tuple(to_log(requests, self.window)),
            through=self.window.end,
        )

    def _doubted_rows(self, delivered: pl.DataFrame, resolved: ResolvedAnswers) -> pl.DataFrame:
        """Return the rows of doubted answers that no believed one confirms."""
        doubted = self.judgement.doubted
        if not doubted:
            return delivered.clear()
        rows = delivered.filter(pl.col("answer").is_in(doubted))
        return rows.join(resolved.bars, on=COLUMN_NAMES, how="anti", nulls_equal=True)

    def _delivered(self) -> pl.DataFrame:
        """Return the rows that keep every rule, completed from the stored bars."""
        return coalesce_optional(pl.concat(self._valid), self.span.stored)

    def _open_times(self, resolved: ResolvedAnswers) -> pl.Series:
        opens = [self.span.stored["open_time"], resolved.bars["open_time"]]
        return pl.concat(opens).unique().sort()

    def _rejection_votes(self) -> pl.DataFrame:
        """Return the rejected rows by the bar that they stand for, with the number of answers."""
        rows = pl.concat(self._rejected)
        grid = self.span.timeframe.floors(pl.col("open_time"))
        votes = pl.col("answer").n_unique().alias("votes")
        return rows.group_by(grid.alias("open_time"), "fields").agg(votes)

    def _raise_if_contradicted(self, corrected: pl.Series) -> None:
        """A venue corrects some bars; answers that deny most repeated ones are about another
        market.
        """
        timeframe = self.span.timeframe
        windows = group_consecutive(corrected.to_list(), timeframe)
        in_a_row = [window for window in windows if window.count(timeframe) > 1]
        delivered = pl.concat(self._valid)["open_time"].unique()
        repeated = self.span.stored["open_time"].is_in(delivered.implode()).sum()
        if in_a_row and 2 * corrected.len() > repeated:
            error = VenueRefused(
                f"{self.span.market.venue}: its answers contradict the stored bars of "
                f"{in_a_row[0]}, {corrected.len()} of {repeated} requested again; nothing "
                "of them is stored. If the venue did correct them, repair a longer span, most of "
                "which agrees"
            )
            error.requests = tuple(r for answer in self.fetched for r in answer.requests)
            raise error

    def _gaps(self, resolved: ResolvedAnswers) -> list[Gap]:
        timeframe, missing = self.span.timeframe, self.missing(resolved)
        rows = pl.concat(self._rejected).drop_nulls("open_time")
        opens = timeframe.floors(pl.col("open_time"))
        is_doubted = pl.col("answer").is_in(self.judgement.doubted)
        broken = rows.filter(~is_doubted).select(opens)["open_time"].to_list()
        doubted = rows.filter(is_doubted).select(opens)["open_time"].to_list()
        unresolved = resolved.unresolved["open_time"].to_list()
        found: dict[GapReason, list[Window]] = {}
        for reason, moments in (
            (GapReason.QUARANTINED, broken),
            (GapReason.DOUBTED, [*doubted, *self.doubted_bars(), *unresolved]),
        ):
            rest = subtract_windows(missing, group_consecutive(moments, timeframe))
            found[reason], missing = subtract_windows(missing, rest), rest
        gaps = self._waiting_gaps(self._open_times(resolved))
        gaps += [self._gap(w, reason, 1) for reason, windows in found.items() for w in windows]
        gaps += [gap for window in missing for gap in self._absent_gaps(window)]
        return sorted(gaps, key=lambda gap: gap.window)

    def _waiting_gaps(self, opens: pl.Series) -> list[Gap]:
        """Return the known gaps that wait, without the bars that answers brought all the same."""
        waiting = [gap for gap in self.span.gaps if not gap.is_due(self.now)]
        return clip_gaps(
            remaining_gaps(waiting, opens, self.span.timeframe),
            self.window.start,
            self.span.timeframe,
        )

    def _absent_gaps(self, window: Window) -> Iterator[Gap]:
        """Yield the part that the venue does not serve, and the rest."""
        unserved = window & Window(EPOCH, self.served_from)
        if unserved:
            gap = self._gap(unserved, GapReason.NOT_SERVED, 1)
            yield replace(
                gap, evidence="; ".join(filter(None, (self.served_evidence, gap.evidence)))
            )
        for rest in subtract_window(window, [unserved]):
            confirmations = self.count_confirmations(rest)
            is_absent = confirmations > 1
            reason = GapReason.NO_BARS if is_absent else GapReason.UNANSWERED
            yield self._gap(rest, reason, confirmations if is_absent else 1)

    def _gap(self, window: Window, reason: GapReason, answers: int) -> Gap:
        """Return a gap that continues what is known of it; it is requested at growing distance."""
        about = [f for f in self.fetched if f.window & window]
        evidence = "; ".join(
            f"asked {f.window} at {_sent_at(f)}, {f.rows.height} rows" for f in about[-2:]
        )
        before = [gap for gap in self.span.gaps if gap.window & window]
        answers += max((gap.answers for gap in before), default=0)
        now = self.now.replace(microsecond=0)
        first = min((gap.first_requested for gap in before if gap.first_requested), default=now)
        is_same = (g for g in before if g.window == window and g.status != GapStatus.REOPENED)
        prompt = reason not in ANSWERED and answers < PROMPT_ATTEMPTS
        return Gap(
            window,
            window.count(self.span.timeframe),
            reason=reason,
            answers=answers,
            evidence=evidence,
            proof=next((gap.proof for gap in is_same), {}),
            first_requested=first,
            last_requested=now,
            next_request=now if prompt else next_request_at(first, now),
        )

    def _fetch_log(self) -> tuple[tuple[LoggedFetch, ...], tuple[int, ...]]:
        fetches: list[LoggedFetch] = []
        answers = []
        for fetched in self.fetched:
            fetches += to_log(fetched.requests, fetched.window)
            answers.append(len(fetches) - 1)
        for page in self.probes:
            fetches += to_log(page.requests, page.window)
        for window, error in self.refused.items():
            fetches += to_log(error.requests, window)
        return tuple(fetches), tuple(answers)


def _sent_at(fetched: BarsPage) -> str:
    if not fetched.requests:
        return "?"
    return format_time(datetime.fromtimestamp(int(fetched.requests[-1].sent_at), UTC))
