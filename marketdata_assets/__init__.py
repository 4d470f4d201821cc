"""Exact OHLCV market data: fetched, proven, rolled up. In Python: `from marketdata_assets import
open_reader`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marketdata_assets.reader import Reader, open_reader

__all__ = ["Reader", "open_reader"]


def __getattr__(name: str) -> Any:
    """The reader, when somebody asks for it: every room lies in this package, and few need it."""
    if name in __all__:
        from marketdata_assets import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
