"""`marketdata anomalies`: implausible bars, and the state that a person gives to each."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marketdata_assets.cli.options import End, Format, ListFormat, Markets, Start, choice_parser
from marketdata_assets.cli.output import format_values, print_line, show
from marketdata_assets.cli.selection import load_context, select_window
from marketdata_assets.errors import BadInput
from marketdata_assets.model.anomaly import AnomalySeverity, AnomalyState
from marketdata_assets.model.window import format_time

if TYPE_CHECKING:
    from marketdata_assets.ledger.anomalies import AnomalyRecord
    from marketdata_assets.storage.lake import Lake

SEVERITIES = tuple(severity.label for severity in AnomalySeverity)
_COLUMNS = [
    *("id", "market", "kind", "severity", "state"),
    *("start", "end", "bars", "what", "note"),
]


class StateFilter(StrEnum):
    """Which anomalies are listed, by their state."""

    OPEN = AnomalyState.OPEN
    ACKNOWLEDGED = AnomalyState.ACKNOWLEDGED
    RESOLVED = AnomalyState.RESOLVED
    ALL = "all"


def _number_option(meaning: str) -> Any:
    return typer.Option(metavar="ID", help=f"{meaning} The number is in the list.")


_State = Annotated[StateFilter, typer.Option("--state", help="List only anomalies in this state.")]
_Severities = Annotated[
    list[str] | None,
    typer.Option(
        "--severity",
        parser=choice_parser("--severity", SEVERITIES),
        metavar="SEVERITY",
        help=f"List only this severity: {', '.join(SEVERITIES)}; repeat the option for more.",
    ),
]
_Note = Annotated[str | None, typer.Option("--note", help="Keep this reason with the new state.")]

commands = typer.Typer()


@commands.command()
def anomalies(
    *,
    market: Markets = None,
    start: Start = None,
    end: End = None,
    state: _State = StateFilter.OPEN,
    severity: _Severities = None,
    fail_if_open: Annotated[
        bool, typer.Option("--open", help="Exit with 1 where one of those listed is open.")
    ] = False,
    format: Format = ListFormat.TABLE,
    acknowledge: Annotated[int | None, _number_option("Mark an anomaly as real.")] = None,
    resolve: Annotated[int | None, _number_option("Mark an anomaly as corrected.")] = None,
    reopen: Annotated[int | None, _number_option("Mark an anomaly as open again.")] = None,
    note: _Note = None,
) -> None:
    """List bars that keep every rule and are implausible, or set the state of one anomaly."""
    from marketdata_assets.flows.read.bars import BarReader

    numbers = {
        AnomalyState.ACKNOWLEDGED: acknowledge,
        AnomalyState.RESOLVED: resolve,
        AnomalyState.OPEN: reopen,
    }
    changes = [(new, number) for new, number in numbers.items() if number is not None]
    if len(changes) > 1:
        raise BadInput("one of --acknowledge, --resolve and --reopen at a time")
    if note is not None and not changes:
        raise BadInput("--note belongs to --acknowledge, --resolve or --reopen")
    if changes:
        _set_state(*changes[0], note)
        return
    with load_context(for_reading=True) as context:
        markets = {context.bind(BarReader).find_market(key) for key in market or []}
        found = [
            record
            for record in context.ledger.anomalies.find(select_window(context.settings, start, end))
            if (not markets or record.market in markets)
            and state in (StateFilter.ALL, record.state)
            and record.anomaly.severity.label in (severity or SEVERITIES)
        ]
        rows = _json_rows(context.lake, found) if format == ListFormat.JSON else _rows(found)
    show(rows, format, columns=_COLUMNS, closing=f"{len(rows)} anomalies")
    if fail_if_open and any(record.state == AnomalyState.OPEN for record in found):
        raise typer.Exit(1)


def _set_state(state: AnomalyState, number: int, note: str | None) -> None:
    from marketdata_assets.flows.prove.anomalies import set_anomaly_state

    with load_context() as context:
        settings, ledger = context.settings, context.ledger
        record = set_anomaly_state(settings, ledger, number, state=state, note=note)
    kind = record.anomaly.kind
    print_line(f"anomaly {number} ({kind} of {record.market.key}) is {state.value}")


def _rows(records: Iterable[AnomalyRecord]) -> list[dict[str, Any]]:
    from marketdata_assets.flows.prove.anomalies import as_row

    return [{"market": r.market.key, "note": r.note, **as_row(r)} for r in records]


def _json_rows(lake: Lake, records: Iterable[AnomalyRecord]) -> list[dict[str, Any]]:
    """Return the anomalies with their evidence and the stored bars. Raises Damaged."""
    from marketdata_assets.flows.prove.anomalies import as_row, read_anomalous_bars

    return [
        {
            "market": record.market.key,
            "table": record.table.name,
            **as_row(record),
            "evidence": record.anomaly.evidence,
            "found_at": format_time(record.found_at),
            "changed_at": format_time(record.changed_at),
            "note": record.note,
            "bars_found": record.anomaly.bars,
            "bars": format_values(bars).to_dicts(),
        }
        for record, bars in read_anomalous_bars(lake, records)
    ]
