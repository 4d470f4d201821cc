"""Everything that can go wrong, as one tree.

    MarketDataError                     exit code
    +-- BadInput                        2   what a person wrote: universe, dates, symbols, flags
    +-- Unreachable                     3   a venue or a store that does not answer
    |   +-- VenueDown                       after all retries, or while its circuit breaker is open
    |   +-- StoreFailed                     a folder not writable, a full disk, a locked file
    |       +-- Damaged                     a stored object cannot be read as what it should be
    +-- VenueRefused                    1   the venue answered, and the answer is a final no
    +-- BarsMissing                     1   bars that the ledger counts are not where they should be
    +-- CheckFailed                     1   a blocking check of a partition is red: nothing follows
    +-- RequestFailed                   -   one request went wrong; guards decide what follows
        +-- Retry                           passing: network, 5xx, timeout, a garbled answer
        |   +-- Garbled                     the answer is not what the venue documents
        +-- Wait                            the answer demands a wait and names its end

`exit_code` is what the command line returns. A message says what happened, where and what to do, on
one line, and never holds a secret.
"""

from __future__ import annotations

import re
from typing import Any


def without_controls(text: str) -> str:
    """Return a text with `?` for each control character: others' words may hold escape codes."""
    return _CONTROLS.sub("?", text)


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class MarketDataError(Exception):
    """The root of all errors that this package raises on purpose."""

    exit_code = 1
    requests: tuple[Any, ...] = ()
    """The requests (`sources.base.Request`) that led to the error, for the fetch log."""


class BadInput(MarketDataError):
    """What a person wrote cannot be used; the message names the place and the fix."""

    exit_code = 2


class Unreachable(MarketDataError):
    """Something outside this process does not answer."""

    exit_code = 3


class VenueDown(Unreachable):
    """A venue failed again and again, or its circuit breaker is open."""


class StoreFailed(Unreachable):
    """A store could not be read or written; what it held before is untouched."""


class Damaged(StoreFailed):
    """A stored object is truncated, overwritten or does not have its table's columns."""


class BarsMissing(MarketDataError):
    """Bars that were stored are absent, or older than those that the ledger counts."""


class VenueRefused(MarketDataError):
    """The venue gave a final no (unknown symbol, forbidden, not offered)."""


class CheckFailed(MarketDataError):
    """A blocking check of a partition is red; nothing is derived from the partition."""


class RequestFailed(MarketDataError):
    """One request to a venue failed. It never leaves `sources`."""


class Retry(RequestFailed):
    """An identical request may succeed in a moment."""


class Garbled(Retry):
    """An answer came that cannot be used: text, wrong columns, too large, or cut short."""


class Wait(RequestFailed):
    """The answer demands a wait; `seconds` is how long, at the least."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds
