"""Pages that are false as a whole: nothing of them is stored, or all is in quarantine."""

from __future__ import annotations

import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from marketdata_assets.model.bar import BAR_SCHEMA
from marketdata_assets.quality.agreement import NO_DOUBT, judge_answers
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_tests.steps import window

sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))
from lying import Trial, run_trial

BARS = generate_bars("BTCUSDT", "1m", window("2024-01-01", "2024-01-02"))
STORED = -1


@pytest.mark.server
@pytest.mark.parametrize(
    "trial",
    [
        Trial("request", "scaled", 0.1, 0),
        Trial("random", "shifted", 0.3, 0),
        Trial("old", "shifted", 0.5, 0),
        Trial("old", "scaled", 0.97, 0),
    ],
)
def test_a_venue_that_lies_has_no_wrong_bar_stored(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three runs. Where its lies are few, everything true is stored in the end."""
    for name in ("MARKETDATA_UNIVERSE", "MARKETDATA_NOW"):  # the bench sets them
        monkeypatch.setenv(name, "")
    runs, requests = run_trial(trial)
    assert [run.wrong for run in runs] == [0, 0, 0]
    assert requests < 400
    if trial.mode != "old":
        assert runs[-1].stored == runs[-1].expected


def answers(*parts: tuple[int, int, int, str]) -> pl.DataFrame:
    """Return rows of answers: its number, its bars from one to another, and the factor of its
    prices.
    """
    frames = []
    for number, first, end, factor in parts:
        frame = BARS[first:end]
        price = (pl.col("close") * pl.lit(Decimal(factor))).cast(BAR_SCHEMA["close"])
        frame = frame.with_columns(price.alias("close"))
        frames.append(frame.select(pl.lit(number, pl.Int64).alias("answer"), *BAR_SCHEMA))
    return pl.concat(frames)


def judged(rows: pl.DataFrame) -> tuple[set[int], set[int]]:
    """Return false and disputed answers, when each is an answer to a request of its own."""
    cuts = {number: number for number in rows["answer"].unique()}
    judgement = judge_answers(rows, cuts, STORED)
    return {*judgement.false}, {*judgement.disputed}


def test_answers_that_agree_are_not_doubted() -> None:
    rows = answers((0, 0, 100, "1"), (1, 98, 200, "1"), (STORED, 0, 50, "1"))
    assert judge_answers(rows, {0: 0, 1: 1, STORED: STORED}, STORED) == NO_DOUBT


def test_two_that_contradict_each_other_are_both_doubted() -> None:
    assert judged(answers((0, 0, 100, "1"), (1, 98, 200, "1.01"))) == (set(), {0, 1})


def test_one_against_many_other_requests_is_false() -> None:
    around = [(2, 0, 60, "1"), (3, 58, 160, "1"), (4, 150, 200, "1")]
    rows = answers((0, 0, 100, "1"), (1, 98, 200, "1.01"), *around)
    assert judged(rows) == ({1}, set())


def test_equal_answers_to_one_request_are_one_witness() -> None:
    rows = answers((0, 0, 100, "1"), *((i, 98, 200, "1.01") for i in range(1, 9)))
    cuts = {0: "first"} | dict.fromkeys(range(1, 9), "second")
    judgement = judge_answers(rows, cuts, STORED)
    assert (judgement.false, judgement.disputed) == (frozenset(), frozenset(range(9)))


def test_a_bar_that_flickers_costs_no_answer_its_credit() -> None:
    rows = answers((0, 0, 100, "1"), (1, 0, 100, "1"), (2, 40, 140, "1"))
    moment: datetime = BARS["open_time"][50]
    flickers = (pl.col("answer") == 1) & (pl.col("open_time") == moment)
    rows = rows.with_columns(pl.when(flickers).then(Decimal(1)).otherwise("close").alias("close"))
    assert judged(rows) == (set(), set())


def test_most_answers_are_no_majority_where_they_say_nothing_of_the_others_bars() -> None:
    """Old pages that are all shifted meet the true ones in two bars only."""
    many = [(i, 40 * i, 40 * i + 42, "1.01") for i in range(20)]
    false, disputed = judged(answers(*many, (20, 800, 842, "1")))
    assert (false, disputed) == (set(), set(range(21)))


def test_stored_bars_that_a_venue_corrects_are_judged_bar_by_bar() -> None:
    rows = answers((STORED, 0, 100, "1"), (0, 0, 60, "1.01"), (1, 40, 100, "1.01"))
    assert judged(rows) == (set(), set())
    assert judged(answers((STORED, 0, 100, "1"), (0, 0, 60, "1.01"))) == (set(), {0})


def test_the_last_bars_of_two_lies_do_not_join_them_to_the_truth() -> None:
    """A pair that shares few bars connects nothing that a pair with many parts."""
    rows = answers((0, 0, 100, "1"), (1, 50, 150, "1.01"), (2, 148, 200, "1"), (3, 90, 148, "1"))
    last = (pl.col("answer") == 1) & (pl.col("open_time") >= BARS["open_time"][148])
    truth = rows.filter(pl.col("answer") == 2).select("open_time", pl.col("close").alias("true"))
    rows = rows.join(truth, on="open_time", how="left").with_columns(
        pl.when(last).then("true").otherwise("close").alias("close")
    )
    false, disputed = judged(rows.drop("true"))
    assert 1 in false | disputed
