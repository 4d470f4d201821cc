"""What a venue says of one of its markets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from marketdata_assets.model.window import format_time, parse_time

_MOMENTS = ("created", "expiry")


@dataclass(frozen=True, slots=True)
class Instrument:
    """One market of a venue's list. None stands for what the venue does not say.

    Sizes are exact decimals as text: `contract_size` is the base currency of one contract (of an
    inverse one, the quote currency), `tick` the step of prices, `lot` that of amounts.
    """

    symbol: str
    """ccxt's unified symbol."""
    id: str
    """The venue's own name."""
    type: str
    """`spot`, `linear`, `inverse` or `option`."""
    base: str
    quote: str
    settle: str | None = None
    contract_size: str | None = None
    tick: str | None = None
    lot: str | None = None
    created: datetime | None = None
    """When it was listed, UTC."""
    expiry: datetime | None = None
    """When a dated contract ends, UTC."""
    active: bool | None = None
    """Whether it is traded now."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        values = asdict(self)
        for name in _MOMENTS:
            values[name] = values[name] and format_time(values[name])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Instrument:
        """Return the instrument of `as_dict`."""
        moments = {name: values[name] and parse_time(values[name]) for name in _MOMENTS}
        return cls(**{**values, **moments})
