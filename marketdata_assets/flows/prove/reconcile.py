"""The check `reconciled`: how far apart the venues of a consolidated partition lie."""

from __future__ import annotations

from marketdata_assets.flows.derive.consolidate import ConsolidationResult
from marketdata_assets.ledger.checks import CheckFailure
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.model.bar import format_decimals
from marketdata_assets.model.finding import ROWS_SHOWN, Finding, FindingSeverity, Row
from marketdata_assets.model.table import consolidated_table
from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.model.window import format_time
from marketdata_assets.quality.reconcile import (
    FAIL_BASIS_POINTS,
    WARN_BASIS_POINTS,
    VenueComparison,
    largest_differences,
    summarize_pairs,
)
from marketdata_assets.settings.universe import Settings

RECONCILED = "reconciled"
"""The name of the check."""


def check_reconciled(
    settings: Settings, ledger: Ledger, timeframe: Timeframe, *, result: ConsolidationResult
) -> Finding:
    """Compare two venues' closes: WARN_BASIS_POINTS is a warning, FAIL_BASIS_POINTS an error.

    Neither stops anything. Only an error is recorded in the ledger as failed: real markets reach
    warnings on volatile days.
    """
    found = list(summarize_pairs(result.pairs))
    warned, failed = sum(o.warned for o in found), sum(o.failed for o in found)
    message = "no two venues have bars of the same time"
    widest = max((o.close.largest for o in found if o.close.largest is not None), default=None)
    if widest is not None:
        message = (
            f"{failed} closes lie {FAIL_BASIS_POINTS} basis points or more apart, "
            f"{warned - failed} more {WARN_BASIS_POINTS} or more, at the most {widest:.1f}"
        )
    finding = Finding(
        RECONCILED,
        passed=not warned,
        message=message,
        numbers={"compared": sum(o.bars for o in found), "warned": warned, "failed": failed},
        rows=_worst_rows(result) if warned else (),
        severity=FindingSeverity.ERROR if failed else FindingSeverity.WARNING,
        details={name: value for o in found for name, value in _numbers(o).items()},
    )
    failure = CheckFailure(False, message) if failed else None
    table = consolidated_table(timeframe)
    ledger.checks.set(table, result.partition, {RECONCILED: failure}, now=settings.now())
    return finding


def _numbers(pair: VenueComparison) -> dict[str, float]:
    """Return one pair's differences for plots, in basis points."""
    spreads = {"close": pair.close, "return": pair.returns}
    found = {}
    for what, spread in spreads.items():
        found[f"{what}_bp_p99"], found[f"{what}_bp_max"] = spread.p99, spread.largest
    prefix = f"{pair.venue}_{pair.other}"
    return {f"{prefix}_{name}": round(v, 4) for name, v in found.items() if v is not None}


def _worst_rows(result: ConsolidationResult) -> list[Row]:
    rows = largest_differences(result.pairs, ROWS_SHOWN)
    rows = rows.with_columns(format_decimals("close_bp"), format_decimals("return_bp"))
    return [
        {
            "open_time": format_time(open_time),
            "venue": venue,
            "other": other,
            "close_bp": close,
            "return_bp": change or "",
        }
        for open_time, venue, other, close, change in rows.iter_rows()
    ]
