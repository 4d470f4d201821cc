"""`marketdata gaps`: every hole, why it is there, and the way to have one asked for again."""

from __future__ import annotations

from typing import Annotated

import typer

from marketdata_assets.cli.common import (
    End,
    Format,
    Markets,
    Start,
    app,
    chosen,
    one_of,
    opened,
    out,
    print_json,
    print_table,
    window_of,
)
from marketdata_assets.errors import BadInput
from marketdata_assets.model.window import parse_time


@app.command()
def gaps(
    market: Markets = None,
    start: Start = None,
    end: End = None,
    cause: Annotated[
        str | None,
        typer.Option(
            help="Only no_trade, halted, delisted, missing_at_source, quarantined or unexplained."
        ),
    ] = None,
    reopen: Annotated[
        bool,
        typer.Option(
            "--reopen",
            help="Forget the cause of the gap of --market that begins at --start, and ask for it again.",
        ),
    ] = False,
    format: Format = "table",
) -> None:
    """Every gap with its cause and the proof of it. JSON has the requests, the neighbours and the
    other markets as well.
    """
    from marketdata_assets.flows.prove import gaps as flow

    one_of(format, "table", "json")
    if cause not in (None, *flow.KINDS):
        raise BadInput(f"--cause {cause} is not one of {', '.join(flow.KINDS)}")
    with opened(for_reading=not reopen) as (settings, toolbox):
        if reopen:
            if not market or len(market) > 1 or not start:
                raise BadInput(
                    "--reopen needs one --market and the --start of a gap, as `marketdata gaps` prints them"
                )
            found = flow.reopen(toolbox, settings.market(market[0]), parse_time(start))
        else:
            found = flow.gaps(
                toolbox, chosen(settings, market), window_of(settings, start, end), cause
            )
    rows = [one.as_dict() for one in found]
    if format == "json":
        print_json(rows)
        return
    print_table(
        rows,
        [
            "market",
            "table",
            "from",
            "until",
            "bars",
            "cause",
            "asked",
            "last_asked",
            "next_ask",
            "says",
        ],
    )
    bars = sum(row["bars"] for row in rows)
    out.print(
        f"{len(rows)} gaps, {bars} bars" + (", asked for again by the next run" if reopen else ""),
        highlight=False,
    )
