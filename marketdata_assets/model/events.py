"""What flows report while they run, and what processes send each other as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class BarsReceived:
    """A venue answered: `bars` rows in `requests` requests."""

    bars: int
    requests: int


@dataclass(frozen=True, slots=True)
class RowsProcessed:
    """An import has accounted for `rows` more rows of its files."""

    rows: int


@dataclass(frozen=True, slots=True)
class FileInspected:
    """A file named `file` was read and holds `rows` rows."""

    file: str
    rows: int


@dataclass(frozen=True, slots=True)
class PartitionsRead:
    """`done` of `total` partitions were read."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class PartitionFailed:
    """A partition (Dagster key) failed; `exit_code` is the command's if nothing worse happens."""

    partition: str
    message: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class CheckNotPassed:
    """A check of a partition (Dagster key) did not pass. A warning does not fail a command."""

    check: str
    partition: str
    message: str
    is_warning: bool


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker process waits for its first range."""


@dataclass(frozen=True, slots=True)
class RangeFinished:
    """The run over the range `start` .. `end` (Dagster keys, inclusive) ended."""

    start: str
    end: str
    success: bool
    message: str


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """Asks a worker process for one run over the partitions `start` .. `end` (keys, inclusive).

    `imported` names the raw tables whose bars came from files: then no venue is asked, only these
    tables are checked, and rollups are made where "rollup" is among them.
    """

    start: str
    end: str
    imported: tuple[str, ...] = ()


END_OF_REQUESTS = "end"
"""The line after the last request: a worker process ends when it has read it."""

Event = (
    BarsReceived
    | RowsProcessed
    | FileInspected
    | PartitionsRead
    | PartitionFailed
    | CheckNotPassed
    | WorkerReady
    | RangeFinished
)
_TYPES: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        BarsReceived,
        RowsProcessed,
        FileInspected,
        PartitionsRead,
        PartitionFailed,
        CheckNotPassed,
        WorkerReady,
        RangeFinished,
    )
}

ProgressCallback = Callable[[Event], None]
"""Receives every event of a flow, possibly from another thread."""


def no_progress(event: Event) -> None:
    """Ignore the event."""


def to_json(event: Event | RangeRequest) -> str:
    """Return an event or a request as one line of JSON without a line break."""
    return json.dumps({"event": type(event).__name__, **asdict(event)})


def from_json(line: str) -> Event:
    """Return the event of a line that `to_json` wrote; raises KeyError for an unknown event."""
    fields = json.loads(line)
    return _TYPES[fields.pop("event")](**fields)


def request_from_json(line: str) -> RangeRequest:
    """Return the request of a line that `to_json` wrote; raises KeyError for anything else."""
    fields = json.loads(line)
    return RangeRequest(fields["start"], fields["end"], tuple(fields["imported"]))
