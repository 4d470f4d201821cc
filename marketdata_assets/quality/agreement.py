"""Several answers about identical open times: which bar is used, and which rows contradict it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import polars as pl

from marketdata_assets.model.bar import BAR_COLUMNS, COLUMN_NAMES

_VALUES = COLUMN_NAMES[1:]
MAJORITY = 4
"""How many times as many requests have to say otherwise, for an answer to be false as a whole."""
_OPTIONAL = frozenset(column.name for column in BAR_COLUMNS if column.optional)


class ResolvedAnswers(NamedTuple):
    """What `resolve_answers` made of the rows of all answers.

    `bars`: one bar per open_time, sorted. `outvoted`: rows (with `answer`) that lost against two or
    more equal answers. `unresolved`: rows (with `answer`) of open_times for which no variant has
    won; none of those open_times is in `bars`. All other rows repeat one of `bars`.
    """

    bars: pl.DataFrame
    outvoted: pl.DataFrame
    unresolved: pl.DataFrame


def resolve_answers(rows: pl.DataFrame) -> ResolvedAnswers:
    """Choose one bar per open_time among the rows of all answers.

    `rows` has the columns `answer` and `model.bar.BAR_SCHEMA`. The only variant of an open_time is
    chosen. Of several, the one that most answers gave is chosen when at least two gave it and no
    other has as many votes; an answer has one vote for a variant.
    """
    repeated = rows["open_time"].is_duplicated()
    if not repeated.any():
        return ResolvedAnswers(
            rows.select(COLUMN_NAMES).sort("open_time"), rows.clear(), rows.clear()
        )
    single, several = rows.filter(~repeated), rows.filter(repeated)
    variants = several.group_by(COLUMN_NAMES).agg(pl.col("answer").n_unique().alias("votes"))
    counted = variants.with_columns(
        pl.col("votes").max().over("open_time").alias("most"),
        pl.len().over("open_time").alias("rivals"),
    )
    leads = pl.col("votes") == pl.col("most")
    leads_alone = leads.sum().over("open_time") == 1
    won = leads & ((pl.col("rivals") == 1) | ((pl.col("most") > 1) & leads_alone))
    judged = counted.with_columns(won.alias("won"), won.any().over("open_time").alias("resolved"))
    winners = judged.filter("won").select(COLUMN_NAMES)
    decided = several.join(
        judged.select(*COLUMN_NAMES, "won", "resolved"),
        on=COLUMN_NAMES,
        how="left",
        nulls_equal=True,
    )
    return ResolvedAnswers(
        pl.concat([single.select(COLUMN_NAMES), winners]).sort("open_time"),
        outvoted=decided.filter(~pl.col("won") & pl.col("resolved")).select(rows.columns),
        unresolved=decided.filter(~pl.col("resolved")).select(rows.columns),
    )


class Judgement(NamedTuple):
    """What `judge_answers` thinks of whole answers, by their numbers.

    `false` answers are contradicted in most of their bars by many that agree with each other. Of
    the `disputed` ones nobody knows yet which are false; `contradicted` are those of them that
    others contradict directly.
    """

    false: frozenset[int]
    disputed: frozenset[int]
    contradicted: frozenset[int]

    @property
    def doubted(self) -> frozenset[int]:
        """The answers that have no say."""
        return self.false | self.disputed


NO_DOUBT = Judgement(frozenset(), frozenset(), frozenset())


def judge_answers(rows: pl.DataFrame, cuts: Mapping[int, object], stored: int) -> Judgement:
    """Find answers that are false as a whole: scaled, shifted, or of another market.

    `rows` has the columns `answer` and `model.bar.BAR_SCHEMA`; `cuts` names the request of each
    answer, because two equal answers to the same request are one witness. Answers that agree about
    most of the bars that both hold form a group. A group is false when another one has
    MAJORITY times as many requests, and contradicts most bars of each of its answers. The stored
    bars are an answer as well, number `stored`, which is never false.
    """
    several = rows.filter(rows["open_time"].is_duplicated())
    if several.select("open_time").n_unique() == several.select(COLUMN_NAMES).n_unique():
        return NO_DOUBT
    values = several.select("answer", "open_time", pl.struct(_VALUES).hash().alias("value"))
    pairs = _pairs(values)
    groups = _group({*rows["answer"].unique()}, pairs)
    apart = [(a, b) for a, b, _, agree in pairs if not agree and groups[a] is not groups[b]]
    bars = dict(rows.group_by("answer").len().iter_rows())
    false: set[int] = set()
    disputed: set[int] = set()
    contradicted: set[int] = set()
    for a, b in apart:
        if stored in (a, b):
            answer = b if a == stored else a
            if len(_cuts(groups[answer], cuts)) == 1:  # else the venue corrects what is stored,
                disputed |= groups[answer]  # and each bar is judged by itself
                contradicted.add(answer)
            continue
        one, other = sorted((groups[a], groups[b]), key=lambda group: len(_cuts(group, cuts)))
        refuted = _count_refuted(values, one, other - {stored})
        has_majority = len(_cuts(other, cuts)) >= MAJORITY * len(_cuts(one, cuts))
        if has_majority and all(2 * refuted.get(each, 0) >= bars[each] for each in one - {stored}):
            false |= one - {stored}
        else:
            disputed |= one | other
            contradicted |= {a, b}
    return Judgement(
        frozenset(false), frozenset(disputed - false - {stored}), frozenset(contradicted - false)
    )


def _pairs(values: pl.DataFrame) -> list[tuple[int, int, int, bool]]:
    """Return two answers, how many bars both hold, and whether they agree about most of these; the
    pairs that share the most bars first.
    """
    both = values.join(values, on="open_time", suffix="_b").filter(
        pl.col("answer") < pl.col("answer_b")
    )
    is_equal = pl.col("value") == pl.col("value_b")
    pairs = both.group_by("answer", "answer_b").agg(
        pl.len().alias("shared"), (2 * is_equal.sum() > pl.len()).alias("agree")
    )
    return pairs.sort("shared", "answer", "answer_b", descending=[True, False, False]).rows()


def _group(answers: set[int], pairs: Sequence[tuple[int, int, int, bool]]) -> dict[int, set[int]]:
    """Return the group of each answer: those that are connected by agreeing pairs.

    A pair that shares fewer bars than a contradicting one connects nothing that this one parts.
    """
    groups = {answer: {answer} for answer in answers}
    enemies = [(a, b, shared) for a, b, shared, agree in pairs if not agree]
    for a, b, shared, agree in pairs:
        one, other = groups[a], groups[b]
        if not agree or one is other:
            continue
        if any(more > shared and ({c, d} & one and {c, d} & other) for c, d, more in enemies):
            continue
        small, large = sorted((one, other), key=len)
        large |= small
        for answer in small:
            groups[answer] = large
    return groups


def _cuts(group: set[int], cuts: Mapping[int, object]) -> set[object]:
    return {cuts[answer] for answer in group}


def _count_refuted(values: pl.DataFrame, one: set[int], other: set[int]) -> dict[int, int]:
    """Return how many bars of each answer of one group the other group contradicts."""
    mine = values.filter(pl.col("answer").is_in(one))
    theirs = values.filter(pl.col("answer").is_in(other))
    apart = mine.join(theirs, on="open_time", suffix="_b").filter(
        pl.col("value") != pl.col("value_b")
    )
    counts = apart.group_by("answer").agg(pl.col("open_time").n_unique())
    return dict(counts.iter_rows())


def coalesce_optional(rows: pl.DataFrame, by: pl.DataFrame) -> pl.DataFrame:
    """Fill nulls in the optional columns of `rows` from the row of `by` with that open_time.

    `by` holds an open_time at most once. A value that is not given contradicts nothing: a file may
    have more columns than the venue's API.
    """
    with_nulls = [name for name in COLUMN_NAMES if name in _OPTIONAL and rows[name].null_count()]
    if not with_nulls or by.is_empty():
        return rows
    others = by.select("open_time", *(pl.col(name).alias(name + "_by") for name in with_nulls))
    joined = rows.join(others, on="open_time", how="left", maintain_order="left")
    return joined.with_columns(
        pl.coalesce(name, name + "_by").alias(name) for name in with_nulls
    ).select(rows.columns)


class ResolvedFiles(NamedTuple):
    """What `resolve_files` made of the rows of several files; each row is in exactly one frame.

    `bars`: one bar per open_time. `repeats`: rows that do not contradict the bar of their
    open_time. `conflicts`: all rows of open_times about which files contradict each other.
    """

    bars: pl.DataFrame
    repeats: pl.DataFrame
    conflicts: pl.DataFrame


def resolve_files(rows: pl.DataFrame) -> ResolvedFiles:
    """Choose one bar per open_time among the rows of several files.

    `rows` has the columns `answer` and `model.bar.COLUMN_NAMES`. Files do not outvote each other:
    where two differ, neither is used; a value that one of them does not give is no difference. Of
    rows that agree, the one with the lowest `answer` is chosen.
    """
    repeated = rows["open_time"].is_duplicated()
    if not repeated.any():
        return ResolvedFiles(rows, rows.clear(), rows.clear())
    differs = pl.any_horizontal(pl.col(name).min() != pl.col(name).max() for name in _VALUES)
    differing = (
        rows.filter(repeated)
        .group_by("open_time")
        .agg(differs.fill_null(False).alias("differs"))
        .filter("differs")
    )
    conflicts = rows.join(differing, on="open_time", how="semi")
    agreed = rows.join(differing, on="open_time", how="anti").sort(
        "open_time", "answer", maintain_order=True
    )
    is_first = agreed["open_time"].is_first_distinct()
    return ResolvedFiles(
        agreed.filter(is_first), repeats=agreed.filter(~is_first), conflicts=conflicts
    )


class StoredComparison(NamedTuple):
    """Bars compared with the stored ones of their open_times; each bar is in exactly one frame.

    `new`: no bar is stored. `identical`: the stored bar has equal values. `different`: it has
    others, which are in the columns `<column>_stored`.
    """

    new: pl.DataFrame
    identical: pl.DataFrame
    different: pl.DataFrame


def compare_with_stored(bars: pl.DataFrame, stored: pl.DataFrame) -> StoredComparison:
    """Compare bars (one per open_time) with those that are stored of the partition.

    A value that one of the two does not give contradicts nothing.
    """
    both = bars.join(stored.select(COLUMN_NAMES), on="open_time", suffix="_stored")
    equal = {name: pl.col(name) == pl.col(name + "_stored") for name in _VALUES}
    agrees = both.select(
        pl.all_horizontal(
            expr.fill_null(True) if name in _OPTIONAL else expr for name, expr in equal.items()
        ).alias("agrees")
    )["agrees"]
    return StoredComparison(
        bars.join(stored.select("open_time"), on="open_time", how="anti"),
        identical=both.filter(agrees).select(bars.columns),
        different=both.filter(~agrees),
    )
