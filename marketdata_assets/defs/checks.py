"""The checks of assets: per partition in their own runs, and of all markets together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import dagster as dg

from marketdata_assets.charts.heat_map import draw_heat_map
from marketdata_assets.context import Context, open_context
from marketdata_assets.defs.specs import asset_key
from marketdata_assets.flows.operate.freshness import MarketFreshness, market_freshness
from marketdata_assets.flows.prove.anomalies import ANOMALIES
from marketdata_assets.flows.prove.raw_checks import BLOCKING_CHECKS, RAW_CHECKS
from marketdata_assets.flows.prove.rollup_checks import MATCHES_NATIVE, ROLLUP_CHECKS
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.model.table import Table
from marketdata_assets.model.timeframe import MINUTE
from marketdata_assets.model.window import format_time
from marketdata_assets.settings.universe import Settings

FRESHNESS, COVERAGE = "freshness", "coverage"
MARKETS_SHOWN = 200
"""How many markets the table of `freshness` has, the latest first."""
MarketCheck = Callable[[Context, Table], dg.AssetCheckResult]


def check_specs(
    settings: Settings, table: Table, grid: dg.MultiPartitionsDefinition
) -> list[dg.AssetCheckSpec]:
    """Return the checks that a run of a table's asset does per partition.

    Anomalies are found in base bars only, and only what a venue gives as a reference is compared.
    """
    venues, timeframe = settings.venues.values(), table.timeframe
    if table.layer == "raw":
        checks, special = RAW_CHECKS, ANOMALIES
        has_special = any(timeframe == venue.base for venue in venues)
    else:
        checks, special = ROLLUP_CHECKS, MATCHES_NATIVE
        has_special = any(timeframe in venue.reference for venue in venues)
    return [
        dg.AssetCheckSpec(
            name,
            asset=asset_key(table),
            description=description,
            blocking=name in BLOCKING_CHECKS,
            partitions_def=grid,
        )
        for name, description in checks.items()
        if name != special or has_special
    ]


def market_checks(settings: Settings, table: Table) -> list[dg.AssetChecksDefinition]:
    """Return the checks of all markets of an asset: `coverage`, and for raw bars `freshness`.

    The sensor `watch_markets` evaluates them without runs; the button Execute does so at once.
    """
    coverage = _coverage_description(table)
    checks = [_market_check(settings, table, COVERAGE, description=coverage, check=check_coverage)]
    if table.layer == "raw":
        freshness = _freshness_description(settings, table)
        checks.append(
            _market_check(settings, table, FRESHNESS, description=freshness, check=check_freshness)
        )
    return checks


def _market_check(
    settings: Settings, table: Table, name: str, *, description: str, check: MarketCheck
) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=asset_key(table), name=name, description=description)
    def evaluate() -> dg.AssetCheckResult:
        with open_context(settings) as app:
            return check(app, table)

    return evaluate


def _freshness_description(settings: Settings, table: Table) -> str:
    limits = settings.limits(table.timeframe)
    return (
        f"The newest stored bar of every market ended at most {limits.warn // MINUTE} minutes ago "
        f"(warning), or {limits.error // MINUTE} minutes ago (error). If red: the table names the "
        "markets; look at `marketdata health`, then run the job `repair` for them."
    )


def _coverage_description(table: Table) -> str:
    done = "stored and rolled up" if table.layer == "rollup" else "stored"
    return (
        f"Every wanted bar of every market is {done}, or its absence is explained by evidence; the "
        "picture shows markets by day. If red: the sensor `backfill_missed` works on it. Its ticks "
        "list what it waits for, and `marketdata parked` lists what it has given up."
    )


def check_freshness(app: Context, table: Table) -> dg.AssetCheckResult:
    """Return `freshness` as it is now, the latest market first."""
    settings = app.settings
    markets = market_freshness(
        settings, app.ledger, app.lake, timeframe=table.timeframe, markets=settings.markets
    )
    markets.sort(key=lambda market: market.lag, reverse=True)
    stale = sum(market.is_stale for market in markets)
    late = sum(market.is_late for market in markets) - stale
    severity = dg.AssetCheckSeverity.ERROR if stale else dg.AssetCheckSeverity.WARN
    longest = max((market.lag for market in markets), default=timedelta(0))
    rows = [_freshness_row(market) for market in markets[:MARKETS_SHOWN]]
    return dg.AssetCheckResult(
        passed=not stale and not late,
        severity=severity,
        description=f"{stale} of {len(markets)} markets are stale, {late} are late",
        metadata={
            "most_minutes_behind": longest // MINUTE,
            "stale": stale,
            "late": late,
            "markets": dg.MetadataValue.table(rows) if rows else "none",
        },
    )


def _freshness_row(market: MarketFreshness) -> dg.TableRecord:
    state = "stale" if market.is_stale else "late" if market.is_late else "fresh"
    return dg.TableRecord(
        {
            "market": market.market.key,
            "state": state,
            "newest bar ends": format_time(market.through) if market.through else "none",
            "minutes behind": market.lag // MINUTE,
            "warning at": market.limits.warn // MINUTE,
            "error at": market.limits.error // MINUTE,
        }
    )


def check_coverage(app: Context, table: Table) -> dg.AssetCheckResult:
    """Return `coverage` as it is now, with its picture."""
    coverage = app.bind(CoverageReporter).daily(table)
    shares = coverage.shares.values()
    counts = [sum(day is not None and day < 1 for day in days) for days in shares]
    days, markets = sum(counts), sum(count > 0 for count in counts)
    return dg.AssetCheckResult(
        passed=not days,
        severity=dg.AssetCheckSeverity.WARN,
        description=(
            f"{markets} of {len(counts)} markets have days that are not whole, {days} days in all"
        ),
        metadata={
            "days_not_whole": days,
            "markets_not_whole": markets,
            "market_by_day": dg.MetadataValue.md(
                draw_heat_map(coverage.shares, coverage.first_day)
            ),
        },
    )
