"""The asset of the venues' lists of markets, its job, and the schedule that takes it every day."""

# no postponed annotations here: Dagster reads them at definition time

from collections.abc import Sequence
from typing import NamedTuple

import dagster as dg

from marketdata_assets.context import open_context
from marketdata_assets.defs.results import as_dagster_failure
from marketdata_assets.defs.specs import OWNERS
from marketdata_assets.errors import MarketDataError
from marketdata_assets.flows.operate.universe import InstrumentKeeper
from marketdata_assets.ledger.instruments import ListChanges
from marketdata_assets.settings.universe import Settings

REFERENCE_MARKETS = dg.AssetKey(["reference", "markets"])
TAKE_MARKETS = "take_markets"
"""The name of the job."""
SYMBOLS_SHOWN = 20
"""How many symbols a cell of the table has."""


class ReferenceMarkets(NamedTuple):
    """The asset, and the schedule of its job."""

    asset: dg.AssetsDefinition
    schedule: dg.ScheduleDefinition


def reference_markets(settings: Settings) -> ReferenceMarkets:
    """Return `reference/markets` with the schedule that materializes it every day."""

    @dg.asset(
        key=REFERENCE_MARKETS,
        group_name="reference",
        kinds={"ccxt"},
        owners=OWNERS,
        description=(
            "The markets that each venue lists: symbols, types, contract sizes, steps, listing and "
            "expiry. One snapshot a venue and day is kept in the ledger, with every change; "
            "`marketdata markets` lists it. Patterns in `symbols:` are looked up in it again: "
            "where they mean other markets than before, the grid follows within a minute."
        ),
    )
    def markets(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        total, rows, failures = 0, [], list[str]()
        with as_dagster_failure(), open_context(settings) as app:
            keeper = app.bind(InstrumentKeeper)
            for name, venue in settings.venues.items():
                try:
                    changes = keeper.take(name)
                    wanted = keeper.resolve(venue).symbols if venue.patterns else venue.symbols
                except MarketDataError as error:
                    failures.append(str(error))
                    continue
                total += changes.total
                rows.append(_table_row(name, changes, wanted))
        if failures:  # what the other venues listed is kept all the same
            raise dg.Failure("; ".join(failures))
        return dg.MaterializeResult(
            metadata={"markets": total, "venues": dg.MetadataValue.table(rows)}
        )

    job = dg.define_asset_job(
        TAKE_MARKETS,
        selection=dg.AssetSelection.assets(REFERENCE_MARKETS),
        description="Takes a snapshot of every venue's list of markets.",
    )
    schedule = dg.ScheduleDefinition(
        name="take_markets_every_day",
        job=job,
        cron_schedule="20 0 * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )
    return ReferenceMarkets(markets, schedule)


def _table_row(venue: str, changes: ListChanges, wanted: Sequence[str]) -> dg.TableRecord:
    return dg.TableRecord(
        {
            "venue": venue,
            "markets": changes.total,
            "listed": _shown(changes.listed),
            "gone": _shown(changes.gone),
            "changed": _shown(changes.changed),
            "in the universe": len(wanted),
        }
    )


def _shown(symbols: tuple[str, ...]) -> str:
    more = f" and {len(symbols) - SYMBOLS_SHOWN} more" if len(symbols) > SYMBOLS_SHOWN else ""
    return " ".join(symbols[:SYMBOLS_SHOWN]) + more
