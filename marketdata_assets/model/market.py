"""A market: a venue and a symbol. Its key is the partition key, the folder, the row key and the
REST path.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from marketdata_assets.errors import BadInput

_LETTER = r"(?:[^\W\d_]|[0-9])"
_ASSET = rf"(?:{_LETTER}|\$)(?:{_LETTER}|[.$+!&@])*"
_BASE = rf"{_ASSET}(?:-{_ASSET})*"
_SYMBOL = re.compile(rf"{_BASE}/{_ASSET}(:{_ASSET}(-[A-Za-z0-9.-]+)?)?")
MAX_CHARACTERS, MAX_BYTES = 64, 70
"""The longest symbol, in UTF-8 as well: a folder's name holds three characters for a byte."""
_EXPIRY = re.compile(r":[^-]+-(\d{6})(?:-|$)")
_VENUE = re.compile(r"[a-z][a-z0-9]*")
CONSOLIDATED_VENUE = "consolidated"
"""Takes the venue's place in a market whose bars come from several venues."""


@dataclass(frozen=True, order=True, slots=True)
class Market:
    """A venue (ccxt id) and a symbol (ccxt's unified symbol).

    Raises BadInput for a venue or a symbol of another form, so that only safe names become folders,
    keys and SQL values.
    """

    venue: str
    symbol: str

    def __post_init__(self) -> None:
        if not _VENUE.fullmatch(self.venue):
            raise BadInput(f"venue {self.venue[:100]!r} is not a ccxt id such as binance or kraken")
        symbol = self.symbol
        is_long = len(symbol) > MAX_CHARACTERS or len(symbol.encode(errors="replace")) > MAX_BYTES
        is_composed = unicodedata.is_normalized("NFKC", symbol)
        if is_long or not is_composed or not _SYMBOL.fullmatch(symbol):
            raise BadInput(
                f"symbol {symbol[:100]!r} is not a unified symbol such as BTC/USDT or BTC/USDT:USDT"
            )

    @property
    def expires(self) -> datetime | None:
        """The end of the day (UTC) on which a dated contract ends; None for all others."""
        if not (found := _EXPIRY.search(self.symbol)):
            return None
        try:
            return datetime.strptime(found[1], "%y%m%d").replace(tzinfo=UTC) + timedelta(days=1)
        except ValueError:
            return None

    @property
    def key(self) -> str:
        """`binance:BTC-USDT`; `/` becomes `-`, and the `:` of a contract symbol becomes `_`.

        The last `-` before the first `_` is the slash: `hyperliquid:XYZ-TSLA-USDC_USDC`.
        """
        return f"{self.venue}:{self.symbol.replace('/', '-').replace(':', '_')}"

    @classmethod
    def parse(cls, key: str) -> Market:
        """Return the market of a key, the exact inverse of `key`. Raises BadInput."""
        venue, _, name = key.partition(":")
        pair, contract, settled = name.partition("_")
        base, slash, quote = pair.rpartition("-")
        symbol = f"{base}/{quote}" + (f":{settled}" if contract else "")
        market = cls(venue, symbol) if slash else None
        if market is None or market.key != key:
            raise BadInput(f"market {key[:100]!r} is not written like binance:BTC-USDT")
        return market

    def __str__(self) -> str:
        return self.key


def find_market(venue: str, symbol: str) -> Market | None:
    """Return the market of a venue's list; None for a symbol that cannot be a key of ours."""
    try:
        return Market(venue, symbol)
    except BadInput:
        return None
