"""Exact OHLCV market data: fetched, proven and rolled up.

In Python, read it with `from marketdata_assets import open_reader`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marketdata_assets.reader import Reader, open_reader

__all__ = ["Reader", "open_reader"]


def __getattr__(name: str) -> Any:
    """Import the reader on first use: every module lies in this package, and few need it."""
    if name in __all__:
        from marketdata_assets import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
