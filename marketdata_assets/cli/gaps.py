"""`marketdata gaps`: lists every gap with its cause, or discards the cause of one."""

from __future__ import annotations

from typing import Annotated

import typer

from marketdata_assets.cli.options import End, Format, ListFormat, Markets, Start, choice_parser
from marketdata_assets.cli.output import show
from marketdata_assets.cli.selection import load_context, select_markets, select_window
from marketdata_assets.errors import BadInput
from marketdata_assets.model.gap import GAP_KINDS

_COLUMNS = [
    *("market", "table", "from", "until", "bars", "cause"),
    *("asked", "last_asked", "next_ask", "says"),
]

_Cause = Annotated[
    str | None,
    typer.Option(
        "--cause",
        parser=choice_parser("--cause", GAP_KINDS),
        metavar="CAUSE",
        help=f"List only gaps of this cause: {', '.join(GAP_KINDS)}.",
    ),
]
_Reopen = Annotated[
    bool,
    typer.Option(
        "--reopen",
        help="Discard the cause of the gap of --market that begins at --start; the next run "
        "requests it again.",
    ),
]

commands = typer.Typer()


@commands.command()
def gaps(
    *,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    cause: _Cause = None,
    reopen: _Reopen = False,
    format: Format = ListFormat.TABLE,
) -> None:
    """List every gap with its cause and the proof.

    JSON also has the requests, the bars on both sides and what the other markets had.
    """
    from marketdata_assets.flows.prove.gaps import GapExplainer

    with load_context(for_reading=not reopen) as context:
        settings, explainer = context.settings, context.bind(GapExplainer)
        if reopen:
            if not market or len(market) > 1 or not start:
                raise BadInput(
                    "--reopen needs one --market and the --start of a gap, as `marketdata gaps` "
                    "prints them"
                )
            found = explainer.reopen(settings.market(market[0]), start)
        else:
            markets, window = select_markets(settings, market), select_window(settings, start, end)
            found = explainer.list_gaps(markets, window, cause)
    rows = [gap.as_dict() for gap in found]
    following = ", which the next run requests again" if reopen else ""
    closing = f"{len(rows)} gaps, {sum(row['bars'] for row in rows)} bars{following}"
    show(rows, format, columns=_COLUMNS, closing=closing)
