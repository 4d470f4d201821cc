"""Everything that can go wrong, as one tree.

    MarketDataError                     exit code
    +-- BadInput                        2   the person's words: universe, dates, symbols, flags
    +-- Unreachable                     3   a venue or a store that does not answer
    |   +-- VenueDown                       after all retries, or while its circuit breaker is open
    |   +-- StoreFailed                     a folder not writable, a full disk, a file somebody holds
    |       +-- Damaged                     what lies there cannot be read as what it should be
    +-- VenueRefused                    1   the venue answered, and the answer is a final no
    +-- CheckFailed                     1   a blocking check of a partition is red: nothing is made from it
    +-- RequestFailed                   -   one request went wrong; guards decide what follows
        +-- Retry                           passing: network, 5xx, timeout, a garbled or short answer
        |   +-- Garbled                     the answer is not what the venue documents
        +-- Wait                            the venue asks for patience until a moment it names

`exit_code` is what the command line returns. Messages say what, where and how to mend it, on one
line, and never hold a secret.
"""

from __future__ import annotations

from typing import Any


class MarketDataError(Exception):
    """The root: catching it catches all that this package raises on purpose."""

    exit_code = 1
    requests: tuple[Any, ...] = ()
    """The requests (`sources.base.Request`) that led here, for the fetch log."""


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
    """A stored object is truncated, overwritten or of another shape."""


class VenueRefused(MarketDataError):
    """The venue gave a final no (unknown symbol, forbidden, not offered)."""


class CheckFailed(MarketDataError):
    """A blocking check of a partition is red; what follows from it is not made."""


class RequestFailed(MarketDataError):
    """One request to a venue failed; never seen outside `sources`."""


class Retry(RequestFailed):
    """The same request may succeed in a moment."""


class Garbled(Retry):
    """An answer came, but it cannot be believed (text, wrong columns, too large, cut short)."""


class Wait(RequestFailed):
    """The venue asks for patience; `seconds` is how long, at the least."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds
