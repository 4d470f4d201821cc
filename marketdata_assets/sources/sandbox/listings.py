"""The markets of the sandbox exchange, one row each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from marketdata_assets.model.timeframe import EPOCH, MINUTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One market.

    `price`: its middle price in ticks of 10^-`tick` quote; `volume`: its mean volume a minute in
    steps of 10^-`step` base; `trades`: its mean number of trades. `tick + step` is at most 8, so
    that price times amount is exact in Binance's 8 decimals. `no_trade_percent` and `gap_percent`
    of all days have one such stretch. No minute before `listed_at`, a whole one, exists.
    """

    base: str
    quote: str = "USDT"
    tick: int
    step: int
    price: int
    volume: int
    trades: int
    no_trade_percent: int
    gap_percent: int
    listed_at: datetime

    @property
    def symbol(self) -> str:
        """`BTCUSDT`"""
        return self.base + self.quote

    @property
    def first(self) -> int:
        """The first minute that can have a bar."""
        return (self.listed_at - EPOCH) // MINUTE


LISTINGS: dict[str, Listing] = {
    row.symbol: row
    for row in (
        Listing(
            base="BTC",
            tick=2,
            step=5,
            price=4_200_000,
            volume=1_200_000,
            trades=900,
            no_trade_percent=4,
            gap_percent=3,
            listed_at=datetime(2020, 1, 1, tzinfo=UTC),
        ),
        Listing(
            base="ETH",
            tick=2,
            step=4,
            price=230_000,
            volume=1_500_000,
            trades=600,
            no_trade_percent=4,
            gap_percent=3,
            listed_at=datetime(2020, 1, 1, tzinfo=UTC),
        ),
        Listing(
            base="SOL",
            tick=2,
            step=3,
            price=9_500,
            volume=2_000_000,
            trades=300,
            no_trade_percent=10,
            gap_percent=5,
            listed_at=datetime(2020, 8, 11, 6, tzinfo=UTC),
        ),
        Listing(
            base="DOGE",
            tick=5,
            step=0,
            price=8_150,
            volume=600_000,
            trades=120,
            no_trade_percent=15,
            gap_percent=5,
            listed_at=datetime(2020, 1, 1, tzinfo=UTC),
        ),
        Listing(
            base="ADA",
            tick=4,
            step=1,
            price=4_800,
            volume=800_000,
            trades=100,
            no_trade_percent=20,
            gap_percent=5,
            listed_at=datetime(2020, 1, 1, tzinfo=UTC),
        ),
        Listing(
            base="SHIB",
            tick=8,
            step=0,
            price=812,
            volume=50_000_000,
            trades=60,
            no_trade_percent=40,
            gap_percent=8,
            listed_at=datetime(2021, 5, 10, 11, 30, tzinfo=UTC),
        ),
    )
}
