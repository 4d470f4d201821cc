"""`marketdata markets` and `marketdata universe`: what venues list, and what traded most when."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marketdata_assets.cli.options import Format, ListFormat, choice_parser
from marketdata_assets.cli.output import print_line, show
from marketdata_assets.cli.selection import load_context
from marketdata_assets.errors import BadInput
from marketdata_assets.model.market import find_market
from marketdata_assets.model.window import format_time, parse_time

if TYPE_CHECKING:
    from marketdata_assets.context import Context

_TYPES = ("spot", "linear", "inverse", "option")
_COLUMNS = [
    *("market", "id", "type", "base", "quote", "settle", "contract_size", "tick", "lot"),
    *("created", "expiry", "active", "former"),
]

_Venue = Annotated[
    str | None, typer.Option("--venue", help="Take only this venue of the universe.")
]
_Quote = Annotated[
    str | None, typer.Option("--quote", help="Take only markets with this quote currency.")
]
_Type = Annotated[
    str | None,
    typer.Option(
        "--type",
        parser=choice_parser("--type", _TYPES),
        metavar="TYPE",
        help=f"Take only markets of this type: {', '.join(_TYPES)}.",
    ),
]
_Search = Annotated[
    str | None,
    typer.Option("--search", help="Take only markets with this text in symbol, id or former name."),
]
_Refresh = Annotated[
    bool,
    typer.Option(
        "--refresh",
        help="Request the lists now, and look up again what the patterns of the universe mean.",
    ),
]
_At = Annotated[
    datetime | None,
    typer.Option(
        "--at",
        parser=parse_time,
        metavar="TIME",
        help="As of this day or moment (UTC): nothing that was known later counts. Default: now.",
    ),
]
_Top = Annotated[int, typer.Option("--top", min=1, help="Print so many markets.")]
_Days = Annotated[
    int, typer.Option("--days", min=1, max=3650, help="Rank by the volume of so many days before.")
]

commands = typer.Typer()


@commands.command()
def markets(
    *,
    venue: _Venue = None,
    quote: _Quote = None,
    type: _Type = None,
    search: _Search = None,
    at: _At = None,
    refresh: _Refresh = False,
    format: Format = ListFormat.TABLE,
) -> None:
    """List the markets of the universe's venues, as their newest snapshots have them.

    A venue without a snapshot is asked for its list. A schedule takes a snapshot every day.
    """
    from marketdata_assets.flows.operate.universe import former_symbols

    with load_context() as context:
        names = _venues(context, venue)
        rows = []
        for name in names:
            _take(context, name, type, refresh=refresh)
            former = former_symbols(context.ledger, name)
            for one in context.ledger.instruments.list(name, at):
                market = find_market(name, one.symbol)
                rows.append(
                    {
                        "market": market and market.key,
                        "venue": name,
                        **one.as_dict(),
                        "former": former.get(one.symbol),
                    }
                )
        taken = {name: context.ledger.instruments.taken_at(name) for name in names}
    rows = [row for row in rows if _is_wanted(row, quote, type, search)]
    moments = ", ".join(f"{name} at {format_time(t)}" for name, t in taken.items() if t)
    show(rows, format, columns=_COLUMNS, closing=f"{len(rows)} markets; listed by {moments}")


def _venues(context: Context, name: str | None) -> list[str]:
    known = list(context.settings.venues)
    if name is not None and name not in known:
        raise BadInput(
            f"venue {name} is not in {context.settings.source}; it has {' '.join(known)}"
        )
    return [name] if name else known


def _take(context: Context, name: str, type: str | None, *, refresh: bool) -> None:
    """Take a snapshot of a venue's list where there is none, or where one is wanted."""
    from marketdata_assets.flows.operate.universe import InstrumentKeeper
    from marketdata_assets.venues.facts import MarketType

    types = {one.type for one in context.ledger.instruments.list(name)}
    is_known = type in types if type else bool(types)
    if is_known and not refresh:
        return
    keeper = context.bind(InstrumentKeeper)
    keeper.take(name, [MarketType(type)] if type else ())
    if context.settings.venues[name].patterns and refresh:
        keeper.resolve(context.settings.venues[name])


def _is_wanted(
    row: dict[str, Any], quote: str | None, type: str | None, search: str | None
) -> bool:
    if (quote and row["quote"] != quote) or (type and row["type"] != type):
        return False
    texts = (row["symbol"], row["id"], row["former"] or "")
    return not search or any(search.lower() in text.lower() for text in texts)


@commands.command()
def universe(
    *,
    at: _At = None,
    top: _Top = 50,
    days: _Days = 30,
    venue: _Venue = None,
    quote: _Quote = None,
    format: Format = ListFormat.TABLE,
) -> None:
    """Rank all markets with stored bars by the volume that was traded before a moment.

    Markets that are dead or no longer wanted today count as they did then. Only bars that closed
    before the moment count.
    """
    from marketdata_assets.flows.read.ranking import MarketRanker

    with load_context(for_reading=True) as context:
        now = context.settings.now()
        if at and at > now:
            raise BadInput(
                f"--at {format_time(at)} lies in the future; it is now {format_time(now)}"
            )
        moment = at or now
        ranking = context.bind(MarketRanker).rank(moment, days=days, venue=venue, quote=quote)
    rows = [ranked.as_dict(rank) for rank, ranked in enumerate(ranking.markets[:top], 1)]
    show(rows, format, closing=f"{len(ranking.markets)} markets traded in the {days} days before")
    if ranking.unknown and format == ListFormat.TABLE:
        print_line(
            f"{len(ranking.unknown)} markets that were listed then have no stored bars, so their "
            f"volume is not known: {' '.join(ranking.unknown[:10])}"
            f"{' ...' if len(ranking.unknown) > 10 else ''}"
        )
