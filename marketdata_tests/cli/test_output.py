"""Lists of the command line: one table or one JSON document out of the same rows."""

from __future__ import annotations

import json

import pytest

from marketdata_assets.cli.options import ListFormat
from marketdata_assets.cli.output import print_line, print_problem, show

ROWS = [
    {"market": "binance:BTC-USDT", "bars": 3, "reasons": ["[red] is no markup", "b"]},
    {"market": "kraken:BTC-USD", "bars": None, "reasons": []},
]


def test_json_has_all_keys_in_order_and_no_closing_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(ROWS, ListFormat.JSON, columns=["market"], closing="2 rows")
    text = capsys.readouterr().out
    assert json.loads(text) == ROWS
    assert list(json.loads(text)[0]) == ["market", "bars", "reasons"]
    show([], ListFormat.JSON, document={"rows": []}, closing="0 rows")
    assert capsys.readouterr().out == '{\n  "rows": []\n}\n'


def test_a_table_has_the_columns_with_their_cells_and_a_closing_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    columns = ["market", "reasons", "bars"]
    show(ROWS, ListFormat.TABLE, columns=columns, cells={"reasons": "; ".join}, closing="2 rows")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "market            reasons                bars",
        "binance:BTC-USDT  [red] is no markup; b  3",
        "kraken:BTC-USD",
        "2 rows",
    ]


def test_an_empty_table_is_its_closing_line(capsys: pytest.CaptureFixture[str]) -> None:
    show([], ListFormat.TABLE, columns=["market"], closing="0 rows")
    assert capsys.readouterr().out == "0 rows\n"


def test_lines_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "https://example.com/" + "x" * 200 + " :smile: [bold]"
    print_line(text)
    print_problem("failed", text)
    assert capsys.readouterr() == (text + "\n", f"failed {text}\n")


def test_escape_codes_in_others_words_are_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A venue's error or a symbol could rewrite the terminal."""
    evil = "no such\x1b]0;title\x07\x1b[2J symbol\x9b31m\r"
    print_line(evil)
    print_problem("error:", evil)
    show([{"market": evil}], ListFormat.TABLE)
    printed = "".join(capsys.readouterr())
    assert not set(printed) & {chr(n) for n in (*range(10), *range(11, 32), *range(127, 160))}
    assert printed.count("no such?]0;title??[2J symbol?31m?") == 3
