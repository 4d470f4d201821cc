"""Attempts and pauses, without waiting for any."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from marketdata_assets.retry import Backoff, pauses_until, retry


class Flaky:
    """Raises these errors one after the other, then returns `done`; counts the calls."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return "done"


def attempt(operation: Flaky, pauses: Iterable[float]) -> tuple[str, list[float]]:
    """What a retry of timeouts returns, and the pauses it made."""
    slept: list[float] = []
    result = retry(
        operation,
        should_retry=lambda error: isinstance(error, TimeoutError),
        pauses=pauses,
        sleep=slept.append,
    )
    return result, slept


def test_a_success_costs_no_pause():
    operation = Flaky()
    assert attempt(operation, [1.0, 2.0]) == ("done", [])
    assert operation.calls == 1


def test_each_failure_costs_the_next_pause():
    operation = Flaky(TimeoutError(), TimeoutError())
    assert attempt(operation, [1.0, 2.0, 4.0]) == ("done", [1.0, 2.0])


def test_the_last_error_is_raised_when_the_pauses_are_used_up():
    operation = Flaky(TimeoutError("1"), TimeoutError("2"), TimeoutError("3"))
    with pytest.raises(TimeoutError, match="3"):
        attempt(operation, [0.0, 0.0])
    assert operation.calls == 3


def test_any_other_error_is_raised_at_once():
    operation = Flaky(TimeoutError(), ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        attempt(operation, [0.0] * 5)
    assert operation.calls == 2


def test_pauses_double_up_to_a_cap():
    assert [*Backoff(0.5, 3.0, lambda: 1.0).pauses(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert [*Backoff(0.5, 3.0, lambda: 0.5).pauses(5)] == [0.25, 0.5, 1.0, 1.5, 1.5]


def test_jitter_is_a_share_of_the_pause():
    pauses = [Backoff(0.5, 20.0).pause(4) for _ in range(400)]
    assert 0 <= min(pauses) < 0.5
    assert 3.5 < max(pauses) <= 4.0
    assert len(set(pauses)) > 390


def test_pauses_end_at_the_deadline():
    now = [100.0]
    taken = []
    for pause in pauses_until(2.0, every=0.5, clock=lambda: now[0]):
        taken.append(pause)
        now[0] += pause
    assert taken == [0.5] * 5  # at 0, 0.5, 1, 1.5 and 2 seconds
