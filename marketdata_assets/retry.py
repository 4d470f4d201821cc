"""Attempts and the pauses between them. Clock, sleep and randomness come in by hand."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses that double from `first` seconds up to `cap`, each times a random share of itself."""

    first: float
    cap: float
    jitter: Callable[[], float] = random.random
    """Returns the share, from 0 to 1."""

    def longest_pause(self, failures: int) -> float:
        """Return the pause after so many failures (1 or more), before its share is drawn."""
        return min(self.cap, self.first * 2.0 ** (failures - 1))

    def pause(self, failures: int) -> float:
        """Return a pause after so many failures (1 or more), in seconds."""
        return self.longest_pause(failures) * self.jitter()

    def pauses(self, count: int) -> Iterator[float]:
        """Yield the pauses after the first `count` failures."""
        return (self.pause(failures) for failures in range(1, count + 1))


def pauses_until(
    seconds: float, *, every: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[float]:
    """Yield `every` until so many seconds have passed on the clock since the first was taken."""
    deadline = clock() + seconds
    while clock() <= deadline:
        yield every


def retry(
    operation: Callable[[], T],
    *,
    should_retry: Callable[[Exception], bool],
    pauses: Iterable[float],
    sleep: Callable[[float], object],
) -> T:
    """Call `operation` until it returns, with one pause after each failure; return what it returns.

    Raises its error at once where `should_retry` is false, and after the last pause in any case.
    """
    for pause in pauses:
        try:
            return operation()
        except Exception as error:
            if not should_retry(error):
                raise
        sleep(pause)
    return operation()
