"""Is it right? Each rule beside a row that breaks just it, and the accounts that always sum."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

import pandera.errors
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketdata_assets.model.bar import BAR_COLUMNS, BAR_SCHEMA, COLUMN_NAMES, empty_bars
from marketdata_assets.model.timeframe import TIMEFRAMES, Timeframe
from marketdata_assets.model.window import Window, to_ms
from marketdata_assets.quality.agreement import (
    coalesce_optional,
    compare_with_stored,
    resolve_answers,
    resolve_files,
)
from marketdata_assets.quality.contract import check_bars
from marketdata_assets.quality.rules import REQUIRED, build_rules
from marketdata_assets.quality.split import (
    REJECTED_SCHEMA,
    SplitRows,
    add_request_columns,
    reject_bars,
    split_rows,
)
from marketdata_tests.conftest import needs_shared
from marketdata_tests.samples import MINUTE, START, Row, at, dump, frame, minutes, random_rows, row

M1 = TIMEFRAMES["1m"]
ASKED = Window(START, START + timedelta(days=1))
LATER = START + timedelta(days=2)
NOON = START + timedelta(hours=12)
SENT_SCHEMA = {
    name: pl.Int64() if name in ("open_time", "trades") else pl.String() for name in COLUMN_NAMES
}
TEXTS = [name for name, dtype in SENT_SCHEMA.items() if dtype == pl.String]


def sent(open_time: datetime | int | None = NOON, **changes: Any) -> Row:
    """A row as a source gives it: milliseconds and texts; clean unless changed."""
    values = row(NOON)
    texts = {name: str(values[name]) for name in TEXTS}
    moment = to_ms(open_time) if isinstance(open_time, datetime) else open_time
    return {**texts, "open_time": moment, "trades": values["trades"], **changes}


def judge(
    rows: Iterable[Row],
    timeframe: Timeframe = M1,
    asked: Window = ASKED,
    closed: datetime = LATER,
    columns: Sequence[str] = REQUIRED,
) -> SplitRows:
    """Split rows of one answer."""
    frame = pl.DataFrame(
        [{name: r[name] for name in COLUMN_NAMES} for r in rows], schema=SENT_SCHEMA
    )
    return split_rows(
        add_request_columns(frame, 3, asked), timeframe, closed_before=closed, columns=columns
    )


def reasons(*args: Any, **kwargs: Any) -> list[str]:
    """Why the only row is refused; nothing when it is kept."""
    judged = judge(*args, **kwargs)
    assert judged.valid.height + judged.rejected.height == 1
    return judged.rejected["reasons"].str.split(" ").to_list()[0] if judged.rejected.height else []


# --------------------------------------------------------------------------------- one row, one rul
BROKEN: dict[str, list[Row]] = {
    "null": [sent(**{column.name: None}) for column in BAR_COLUMNS if not column.optional],
    "not_a_number": [
        *(sent(**{name: "NaN"}) for name in TEXTS),
        *(
            sent(volume=text)
            for text in ("inf", "-Infinity", "", " ", "ten", "1,5", "0x10", "1.2.3", "1" + "0" * 26)
        ),
        sent(to_ms(NOON) * 1000),  # microseconds for milliseconds: the year 55971
        sent(to_ms(NOON) + 2**61),  # a thousand times that wraps around to a good moment
        sent(-(2**62)),
    ],
    "too_precise": [
        *(
            sent(**{name: f"{sent()[name]}.0000000000001"})
            for name in ("high", "quote_volume", "taker_buy_quote_volume")
        ),
        sent(taker_buy_volume="1e-13"),
        sent(taker_buy_volume="1.00000000000010e-0"),
        sent(taker_buy_volume="0.25E-11"),
        sent(taker_buy_volume="0.5e-12"),
    ],
    "non_positive_price": [sent(low="0"), sent(low="-0.000000000001")],
    "negative_volume": [
        sent(taker_buy_volume="-1"),
        sent(taker_buy_quote_volume="-0.000000000001"),
        sent(trades=-1),
    ],
    "high_below": [sent(high="104.999999999999"), sent(open="111")],
    "low_above": [sent(low="100.000000000001"), sent(close="89.9")],
    "vwap_outside": [
        sent(quote_volume="1100.01"),
        sent(quote_volume="899.99"),
        sent(volume="0", taker_buy_volume="0"),
    ],
    "taker_above_total": [
        sent(taker_buy_volume="10.000000000001"),
        sent(taker_buy_quote_volume="1030.1"),
    ],
    "off_grid": [sent(NOON + timedelta(milliseconds=1)), sent(at("2024-01-01T10:28:14.789"))],
    "outside_window": [sent(START - MINUTE), sent(ASKED.end)],
    "unclosed": [],
}


@pytest.mark.parametrize(
    ("rule", "broken"), [(rule, broken) for rule, rows in BROKEN.items() for broken in rows]
)
def test_a_row_breaks_exactly_one_rule(rule: str, broken: Row):
    assert reasons([broken]) == [rule]


def test_every_rule_is_tried():
    assert [rule.name for rule in build_rules(M1, LATER)] == list(BROKEN)
    assert len({rule.description for rule in build_rules(M1, LATER)}) == len(BROKEN)


def test_a_bar_is_closed_when_its_end_is_at_the_venues_clock():
    assert reasons([sent(NOON)], closed=NOON + MINUTE) == []
    assert reasons([sent(NOON)], closed=NOON + MINUTE - timedelta(milliseconds=1)) == ["unclosed"]
    assert reasons([sent(NOON)], timeframe=TIMEFRAMES["4h"], closed=NOON + timedelta(hours=3)) == [
        "unclosed"
    ]


@pytest.mark.parametrize(
    "clean",
    [
        sent(),
        sent(START),
        sent(ASKED.end - MINUTE),
        sent(quote_volume=None, trades=None, taker_buy_volume=None, taker_buy_quote_volume=None),
        sent(
            volume="0", quote_volume="0", trades=0, taker_buy_volume="0", taker_buy_quote_volume="0"
        ),
        sent(
            open="100",
            high="100",
            low="100",
            close="100",
            quote_volume="1000",
            taker_buy_quote_volume="600",
        ),
        sent(taker_buy_volume="10", taker_buy_quote_volume="1030"),
        sent(quote_volume="1100"),
        sent(volume="10.0000000000000000"),
        sent(taker_buy_volume="1e-12"),
        sent(taker_buy_volume="0E-20"),
        sent(volume="1E1"),
    ],
)
def test_a_clean_row_breaks_none(clean: Row):
    assert reasons([clean]) == []


def test_all_broken_rules_are_named_in_the_order_of_the_table():
    found = reasons([sent(ASKED.end + timedelta(seconds=1), low="0", volume=None)])
    assert found == ["null", "non_positive_price", "off_grid", "outside_window"]


def test_null_is_broken_in_every_column_that_the_venue_always_gives():
    for name in ("quote_volume", "trades", "taker_buy_volume", "taker_buy_quote_volume"):
        assert reasons([sent(**{name: None})]) == []
        assert reasons([sent(**{name: None})], columns=COLUMN_NAMES) == ["null"]


@pytest.mark.parametrize("hour", [0, 7, 13, 23])
def test_the_stamps_of_2018_02_are_off_the_grid(hour: int):
    """Binance stamped its 1h bars of 2018-02 at 28 minutes, 14.789 seconds past the hour."""
    opened = at(f"2018-02-09T{hour:02}:28:14.789")
    judged = judge([sent(opened)], TIMEFRAMES["1h"], Window(at("2018-02-09"), at("2018-02-10")))
    assert judged.rejected["reasons"].to_list() == ["off_grid"]
    assert judged.rejected["open_time"].to_list() == [opened]


@pytest.mark.parametrize(
    ("day", "on_grid"),
    [("2024-01-08", True), ("2024-01-04", False), ("2024-01-07", False), ("1969-12-29", True)],
)
def test_the_grid_of_weeks_is_monday(day: str, on_grid: bool):
    asked = Window(at("1960-01-01"), at("2025-01-01"))
    assert reasons([sent(at(day))], TIMEFRAMES["1w"], asked, asked.end) == (
        [] if on_grid else ["off_grid"]
    )


# --------------------------------------------------------------------------------- nothing is bent,
_WRITTEN = st.from_regex(r"[+-]?[0-9]{0,4}(\.[0-9]{0,15})?([eE][+-]?[0-9]{1,2})?", fullmatch=True)
_NUMERALS = st.text("0123456789.eE+-_ ,", max_size=20) | _WRITTEN


@given(st.lists(_NUMERALS | st.floats().map(repr), min_size=1, max_size=30))
def test_a_number_is_kept_exactly_or_refused(texts: list[str]):
    """Whatever is written, what is stored is that very number."""
    judged = judge(
        [sent(taker_buy_volume=text, volume="1e25", quote_volume=None) for text in texts]
    )
    for text, value in zip(
        kept_texts(texts, judged), judged.valid["taker_buy_volume"], strict=True
    ):
        try:
            assert Decimal(text) == value
        except InvalidOperation:
            pytest.fail(f"{text!r} became {value}")


def kept_texts(texts: list[str], judged: SplitRows) -> list[str]:
    """The texts that are not among the rejected ones, in order."""
    refused = Counter(
        json.loads(fields)["taker_buy_volume"] for fields in judged.rejected["fields"]
    )
    assert all(texts.count(text) == count for text, count in refused.items()), (
        "one text, two verdicts"
    )
    return [text for text in texts if text not in refused]


_MESSY = st.fixed_dictionaries(
    {
        name: st.sampled_from(
            ["1", "2", "3", "3", "2.5", "0", "-1", "abc", "2.0000000000001", None]
        )
        for name in TEXTS
    }
    | {"trades": st.sampled_from([0, 7, -1, None])}
    | {
        "open_time": st.sampled_from(
            [
                None,
                *(to_ms(NOON) + ms for ms in (0, 60_000, 60_001, -86_400_000, 43_200_000, 2**60)),
            ]
        )
    }
)


def verdict(r: Row) -> set[str]:
    """The rules a messy row breaks, by plain Python."""
    price = {n: number(r[n]) for n in ("open", "high", "low", "close")}
    amount = {
        n: number(r[n])
        for n in ("volume", "quote_volume", "taker_buy_volume", "taker_buy_quote_volume")
    }
    moment = r["open_time"] if r["open_time"] is not None and r["open_time"] < 10**14 else None
    others = (
        [v for n, v in price.items() if n != "high" and v is not None],
        [v for n, v in price.items() if n != "low" and v is not None],
    )
    low, high, volume, quote = price["low"], price["high"], amount["volume"], amount["quote_volume"]
    known = None not in (low, high, volume, quote)
    pairs = [(amount["taker_buy_volume"], volume), (amount["taker_buy_quote_volume"], quote)]
    broken = {
        "null": any(r[n] is None for n in ("open_time", "open", "high", "low", "close", "volume")),
        "not_a_number": "abc" in r.values() or moment != r["open_time"],
        "too_precise": "2.0000000000001" in r.values(),
        "non_positive_price": any(v is not None and v <= 0 for v in price.values()),
        "negative_volume": any(v is not None and v < 0 for v in [*amount.values(), r["trades"]]),
        "high_below": high is not None and bool(others[0]) and high < max(others[0]),
        "low_above": low is not None and bool(others[1]) and low > min(others[1]),
        "vwap_outside": known and not low * volume <= quote <= high * volume,
        "taker_above_total": any(None not in pair and pair[0] > pair[1] for pair in pairs),
        "off_grid": moment is not None and moment % 60_000 != 0,
        "outside_window": moment is not None
        and not to_ms(ASKED.start) <= moment < to_ms(ASKED.end),
        "unclosed": moment is not None and moment + 60_000 > to_ms(ASKED.end),
    }
    return {name for name, is_broken in broken.items() if is_broken}


def number(text: str | None) -> Any:
    """A text as DECIMAL(38, 12) holds it."""
    return None if text in (None, "abc") else Decimal(text).quantize(Decimal(1).scaleb(-12))


@settings(max_examples=60)
@given(st.lists(_MESSY, max_size=25))
def test_every_row_ends_in_one_frame_with_the_reasons_that_python_finds(rows: list[Row]):
    judged = judge(rows, closed=ASKED.end)
    verdicts = [verdict(r) for r in rows]
    assert judged.valid.height + judged.rejected.height == len(rows)
    # where one of its four numbers is unknown, the row is broken anyway and vwap_outside may be
    # named or not
    unsure = [
        {"vwap_outside"} - v if {"null", "not_a_number"} & v else set() for v in verdicts if v
    ]
    found = [set(text.split(" ")) for text in judged.rejected["reasons"]]
    assert [f - u for f, u in zip(found, unsure, strict=True)] == [v for v in verdicts if v]
    refused = [json.loads(fields) for fields in judged.rejected["fields"]]
    assert refused == [as_text(r) for r, v in zip(rows, verdicts, strict=True) if v]
    kept = judged.valid.drop("answer").with_columns(pl.col("open_time").dt.epoch("ms"))
    assert kept.rows() == [as_numbers(r) for r, v in zip(rows, verdicts, strict=True) if not v]
    assert judged.valid.schema == pl.Schema({"answer": pl.Int64(), **BAR_SCHEMA})
    assert judged.rejected.schema == pl.Schema(REJECTED_SCHEMA)


def as_text(r: Row) -> Row:
    """A row with all values as text."""
    return {name: None if r[name] is None else str(r[name]) for name in COLUMN_NAMES}


def as_numbers(r: Row) -> tuple[Any, ...]:
    """A clean row's values."""
    return tuple(number(r[name]) if name in TEXTS else r[name] for name in COLUMN_NAMES)


@needs_shared
@pytest.mark.parametrize(
    ("symbol", "span"),
    [
        ("BTCUSDT", "2023-02-01_2023-04-30"),
        ("ETHUSDT", "2024-01-01_2024-02-29"),
        ("SOLUSDT", "2023-02-01_2023-02-28"),
    ],
)
def test_no_real_bar_breaks_a_rule(symbol: str, span: str):
    """Real data of Binance holds no broken bar, the zero-volume minutes before the halt of
    2023-03-24 included.
    """
    rows = dump("binance_spot", symbol, "1m", span).rename({"count": "trades"}).select(COLUMN_NAMES)
    judged = split_rows(
        add_request_columns(rows, 0, Window(at("2023-01-01"), at("2025-01-01"))),
        M1,
        closed_before=at("2025-01-01"),
    )
    assert (judged.valid.height, judged.rejected.height) == (rows.height, 0)
    assert judged.valid["volume"].sum() == sum(map(Decimal, rows["volume"]))


def test_bars_refused_after_all_keep_their_fields():
    bars = frame([row(NOON, trades=None)]).select(pl.lit(5, pl.Int64).alias("answer"), pl.all())
    refused = reject_bars(bars, "conflict")
    assert refused.schema == pl.Schema(REJECTED_SCHEMA)
    assert refused.drop("fields").rows() == [(5, NOON, "conflict")]
    fields = json.loads(refused["fields"][0])
    assert list(fields) == list(COLUMN_NAMES)
    assert (Decimal(fields["quote_volume"]), fields["trades"]) == (1030, None)


# --------------------------------------------------------------------------------- several answers
Vote = tuple[int, int, int]
"""An answer's number, a minute, and which variant of the bar it gives."""


def ballots(votes: Iterable[Vote]) -> pl.DataFrame:
    """Kept rows of several answers."""
    votes = list(votes)
    rows = frame(
        row(START + minute * MINUTE, close=Decimal(90 + variant), trades=None)
        for _, minute, variant in votes
    )
    return rows.select(pl.Series("answer", [answer for answer, _, _ in votes], pl.Int64), pl.all())


def as_votes(rows: pl.DataFrame) -> list[Vote]:
    """Rows of a frame as votes again; bars without an answer count as answer 0."""
    answers = rows["answer"] if "answer" in rows.columns else [0] * rows.height
    places = ((moment - START) // MINUTE for moment in rows["open_time"])
    return [(a, m, int(c) - 90) for a, m, c in zip(answers, places, rows["close"], strict=True)]


@pytest.mark.parametrize(
    ("votes", "chosen", "repeated", "outvoted", "unresolved"),
    [
        ([], [], 0, [], []),
        ([(0, 1, 1), (0, 0, 1)], [(0, 1), (1, 1)], 0, [], []),
        ([(0, 0, 1), (1, 0, 1)], [(0, 1)], 1, [], []),
        ([(0, 0, 1), (1, 0, 2)], [], 0, [], [(0, 0, 1), (1, 0, 2)]),
        ([(0, 0, 1), (1, 0, 2), (2, 0, 2)], [(0, 2)], 1, [(0, 0, 1)], []),
        (
            [(0, 0, 1), (1, 0, 1), (2, 0, 2), (3, 0, 2)],
            [],
            0,
            [],
            [(0, 0, 1), (1, 0, 1), (2, 0, 2), (3, 0, 2)],
        ),
        (
            [(0, 0, 1), (1, 0, 1), (2, 0, 2), (3, 0, 2), (4, 0, 3)],
            [],
            0,
            [],
            [(0, 0, 1), (1, 0, 1), (2, 0, 2), (3, 0, 2), (4, 0, 3)],
        ),
        ([(0, 0, 1), (1, 0, 2), (2, 0, 3)], [], 0, [], [(0, 0, 1), (1, 0, 2), (2, 0, 3)]),
        # an answer that repeats itself has one voice
        ([(0, 0, 1), (0, 0, 1), (1, 0, 2)], [], 0, [], [(0, 0, 1), (0, 0, 1), (1, 0, 2)]),
        ([(0, 0, 1), (0, 0, 1)], [(0, 1)], 1, [], []),
        # an answer that contradicts itself is outvoted by two others
        ([(0, 0, 1), (0, 0, 2), (1, 0, 2), (2, 0, 2)], [(0, 2)], 2, [(0, 0, 1)], []),
        # one contradiction leaves the other minutes alone; -1 is what is stored
        (
            [(-1, 0, 1), (0, 0, 2), (1, 0, 2), (0, 1, 1), (0, 2, 1), (1, 2, 3)],
            [(0, 2), (1, 1)],
            1,
            [(-1, 0, 1)],
            [(0, 2, 1), (1, 2, 3)],
        ),
    ],
)
def test_answers_by_hand(
    votes: list[Vote],
    chosen: list[tuple[int, int]],
    repeated: int,
    outvoted: list[Vote],
    unresolved: list[Vote],
):
    found = resolve_answers(ballots(votes))
    assert [vote[1:] for vote in as_votes(found.bars)] == chosen
    assert sorted(as_votes(found.outvoted)) == outvoted
    assert sorted(as_votes(found.unresolved)) == unresolved
    assert len(votes) == len(chosen) + repeated + len(outvoted) + len(unresolved)
    assert found.bars.schema == pl.Schema(BAR_SCHEMA)
    with_answer = pl.Schema({"answer": pl.Int64(), **BAR_SCHEMA})
    assert found.outvoted.schema == found.unresolved.schema == with_answer


@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 3), st.integers(1, 3)), max_size=20))
def test_every_row_is_chosen_repeated_outvoted_or_unresolved(votes: list[Vote]):
    found = resolve_answers(ballots(votes))
    chosen = {}
    for minute in {minute for _, minute, _ in votes}:
        voices = Counter(variant for _, variant in {(a, v) for a, m, v in votes if m == minute})
        (first, most), *others = voices.most_common()
        if not others or (most > 1 and others[0][1] < most):
            chosen[minute] = first
    assert [vote[1:] for vote in as_votes(found.bars)] == sorted(chosen.items())
    assert sorted(as_votes(found.outvoted)) == sorted(
        v for v in votes if chosen.get(v[1], v[2]) != v[2]
    )
    assert sorted(as_votes(found.unresolved)) == sorted(v for v in votes if v[1] not in chosen)


def test_two_bars_without_the_same_values_are_one_bar():
    bars = frame([row(START, quote_volume=None, trades=None)] * 2)
    found = resolve_answers(bars.select(pl.Series("answer", [0, 1], pl.Int64), pl.all()))
    assert (found.bars.height, found.outvoted.height, found.unresolved.height) == (1, 0, 0)


# --------------------------------------------------------------------------------- files and stored
def numbered(*rows: Row) -> pl.DataFrame:
    """Each row as the only row of its file."""
    return frame(rows).select(pl.Series("answer", range(len(rows)), pl.Int64), pl.all())


def opened(bars: pl.DataFrame) -> list[tuple[int, int]]:
    """Answer and minute of each row."""
    return [(a, (t - START) // MINUTE) for a, t in bars.select("answer", "open_time").iter_rows()]


def test_files_that_contradict_each_other_are_not_used():
    rows = numbered(
        row(START, trades=None),
        row(START),
        row(START + MINUTE),
        row(START + MINUTE, close=Decimal(106)),
        row(START + 2 * MINUTE),
    )
    found = resolve_files(rows)
    assert opened(found.bars) == [(0, 0), (4, 2)]
    assert opened(found.repeats) == [(1, 0)]
    assert sorted(opened(found.conflicts)) == [(2, 1), (3, 1)]


def test_bars_beside_the_stored_ones():
    stored = frame([row(START, trades=None), row(START + MINUTE)])
    found = compare_with_stored(
        numbered(row(START), row(START + MINUTE, close=Decimal(106)), row(START + 2 * MINUTE)),
        stored,
    )
    assert opened(found.new) == [(2, 2)]
    assert opened(found.identical) == [(0, 0)]
    assert opened(found.different) == [(1, 1)]
    (different,) = found.different.to_dicts()
    assert (different["close"], different["close_stored"]) == (106, 105)


def test_values_that_are_not_given_come_from_the_other_frame():
    rows = frame(
        [row(START, trades=None), row(START + MINUTE), row(START + 2 * MINUTE, trades=None)]
    )
    by = frame([row(START, trades=5, close=Decimal(106)), row(START + MINUTE, trades=9)])
    found = coalesce_optional(rows, by)
    assert found["trades"].to_list() == [5, 7, None]
    assert found["close"].to_list() == [105, 105, 105]
    assert found.columns == rows.columns


# --------------------------------------------------------------------------------- the contract of
def clean_bars() -> pl.DataFrame:
    """Three bars as they may be stored."""
    return frame(
        [
            row(START),
            row(START + MINUTE, trades=None, quote_volume=None),
            row(START + 3 * MINUTE, volume=Decimal(0)),
        ]
    )


def test_the_contract_lets_clean_bars_through():
    assert check_bars(clean_bars()).equals(clean_bars())
    assert check_bars(empty_bars()).is_empty()
    bars = frame(random_rows(1, minutes(500), nulls=0.3))
    assert check_bars(bars).equals(bars)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (lambda bars: bars.select(*COLUMN_NAMES[:1], "high", "open", *COLUMN_NAMES[3:]), "high"),
        (lambda bars: bars.drop("trades"), "trades"),
        (lambda bars: bars.drop("close"), "close"),
        (lambda bars: bars.with_columns(pl.lit(1).alias("extra")), "extra"),
        (lambda bars: bars.rename({"volume": "amount"}), "amount"),
        (lambda bars: bars.with_columns(pl.col("close").cast(pl.Float64)), "close"),
        (lambda bars: bars.with_columns(pl.col("close").cast(pl.String)), "close"),
        (lambda bars: bars.with_columns(pl.col("volume").cast(pl.Decimal(38, 8))), "volume"),
        (lambda bars: bars.with_columns(pl.col("trades").cast(pl.Int32)), "trades"),
        (lambda bars: bars.with_columns(pl.col("open_time").dt.cast_time_unit("ms")), "open_time"),
        (
            lambda bars: bars.with_columns(pl.col("open_time").dt.replace_time_zone(None)),
            "open_time",
        ),
        (lambda bars: pl.concat([bars, bars[-1:]]), "ascending"),
        (lambda bars: bars.reverse(), "ascending"),
        *(
            (lambda bars, n=c.name: bars.with_columns(pl.lit(None, BAR_SCHEMA[n]).alias(n)), c.name)
            for c in BAR_COLUMNS
            if not c.optional
        ),
        *(
            (lambda bars, n=n: bars.with_columns(pl.lit(0).cast(BAR_SCHEMA[n]).alias(n)), n)
            for n in ("open", "high", "low", "close")
        ),
        *(
            (lambda bars, n=n: bars.with_columns(pl.lit(-1).cast(BAR_SCHEMA[n]).alias(n)), n)
            for n in COLUMN_NAMES[5:]
        ),
    ],
)
def test_the_contract_refuses_what_is_no_frame_of_bars(change: Any, column: str):
    with pytest.raises((pandera.errors.SchemaErrors, pandera.errors.SchemaError)) as refused:
        check_bars(change(clean_bars()))
    assert column in str(refused.value)
