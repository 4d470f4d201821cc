"""`marketdata anomalies`: what is hard to believe, with its bars, and what a person says of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from marketdata_assets.cli.common import (
    End,
    Format,
    Markets,
    Start,
    app,
    as_text,
    one_of,
    opened,
    print_json,
    print_table,
    say,
    window_of,
)
from marketdata_assets.errors import BadInput

STATES, SEVERITIES = (
    ("open", "acknowledged", "resolved", "all"),
    ("low", "medium", "high", "critical"),
)
_Id = Annotated[int | None, typer.Option(metavar="ID", help="The number of an entry.")]


@app.command()
def anomalies(
    market: Markets = None,
    start: Start = None,
    end: End = None,
    state: Annotated[str, typer.Option("--state", help=", ".join(STATES))] = "open",
    severity: Annotated[
        list[str] | None,
        typer.Option("--severity", help="low, medium, high or critical; again for more."),
    ] = None,
    format: Format = "table",
    acknowledge: _Id = None,
    resolve: _Id = None,
    reopen: _Id = None,
    note: Annotated[str | None, typer.Option("--note", help="Why, kept with the entry.")] = None,
) -> None:
    """Bars that keep every rule and are hard to believe; --acknowledge what is real, --resolve what is
    mended.
    """
    one_of(format, "table", "json")
    wanted = _wanted(state, severity or [])
    marks = {"acknowledged": acknowledge, "resolved": resolve, "open": reopen}
    given = [(word, id) for word, id in marks.items() if id is not None]
    if len(given) > 1:
        raise BadInput("one of --acknowledge, --resolve and --reopen at a time")
    if note is not None and not given:
        raise BadInput("--note belongs to --acknowledge, --resolve or --reopen")
    if given:
        _mark(*given[0], note)
    else:
        _list(market, start, end, wanted, format)


def _wanted(state: str, severities: list[str]) -> tuple[set[str], set[str]]:
    for option, value, allowed in (
        ("--state", state, STATES),
        *(("--severity", s, SEVERITIES) for s in severities),
    ):
        if value not in allowed:
            raise BadInput(f"{option} {value} is not one of {', '.join(allowed)}")
    return set(STATES) if state == "all" else {state}, set(severities or SEVERITIES)


def _mark(word: str, id: int, note: str | None) -> None:
    from marketdata_assets.flows.prove.anomalies import mark
    from marketdata_assets.model.anomaly import AnomalyState

    with opened() as (_, toolbox):
        entry = mark(toolbox, id, AnomalyState(word), note)
    say(f"anomaly {id} ({entry.anomaly.kind} of {entry.market.key}) is {word}")


def _list(
    market: list[str] | None,
    start: str | None,
    end: str | None,
    wanted: tuple[set[str], set[str]],
    format: str,
) -> None:
    from marketdata_assets.flows.prove.anomalies import bars_of, row_of
    from marketdata_assets.flows.read.bars import known_market
    from marketdata_assets.model.window import format_time

    with opened() as (settings, toolbox):
        window = window_of(settings, start, end)
        markets = {known_market(toolbox, key) for key in market or []}
        found = [
            entry
            for entry in toolbox.anomalies.find(window)
            if (not markets or entry.market in markets)
            and entry.state.value in wanted[0]
            and entry.anomaly.severity.label in wanted[1]
        ]
        if format == "table":
            names = [
                "id",
                "market",
                "kind",
                "severity",
                "state",
                "start",
                "end",
                "bars",
                "what",
                "note",
            ]
            print_table(
                [
                    {"market": entry.market.key, "note": entry.note, **row_of(entry)}
                    for entry in found
                ],
                names,
            )
            return
        rows: list[dict[str, Any]] = []
        for entry, bars in bars_of(toolbox, found):
            told = {
                "found_at": format_time(entry.found_at),
                "changed_at": format_time(entry.changed_at),
                "note": entry.note,
            }
            row = {
                "market": entry.market.key,
                "table": entry.table.name,
                **row_of(entry),
                "evidence": entry.anomaly.evidence,
            }
            rows.append(
                {**row, **told, "bars_found": entry.anomaly.bars, "bars": as_text(bars).to_dicts()}
            )
    print_json(rows)
