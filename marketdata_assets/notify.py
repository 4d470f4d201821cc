"""Who is told? Alert channels: a file of JSON lines, and whatever Apprise can reach (chat, mail,
pagers, webhooks).

`open_channels` gives the channels, `Channel.send` tells one message to one of them. Nothing is
repeated here: a message that was not taken raises NotSent, and whoever asked may send it again. So
it may arrive twice.

An Apprise URL holds secrets. It is never shown: not in names, errors, `repr`, logs or on stderr.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from marketdata_assets.errors import BadInput, MarketDataError
from marketdata_assets.model.window import iso

if TYPE_CHECKING:
    from apprise import NotifyBase

DEADLINE = 10.0
"""Seconds that one send may take, whatever its server does and its URL says."""


class NotSent(MarketDataError):
    """A channel did not take a message; the text names the channel and never holds a secret."""


class Severity(StrEnum):
    """How bad it is, mildest first. Severities compare by rank, not by name."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0 for info up to 3 for critical."""
        return list(Severity).index(self)

    def __lt__(self, other: str) -> bool:
        return self.rank < Severity(other).rank

    def __le__(self, other: str) -> bool:
        return self.rank <= Severity(other).rank

    def __gt__(self, other: str) -> bool:
        return self.rank > Severity(other).rank

    def __ge__(self, other: str) -> bool:
        return self.rank >= Severity(other).rank


@dataclass(frozen=True, slots=True)
class Message:
    """What is told about one incident; `at` is UTC, by our clock."""

    incident: str
    """The key of the incident, e.g. `stale|raw/ohlcv_1m|binance:BTC-USDT`."""
    event: str
    """`opened` or `recovered`."""
    severity: Severity
    title: str
    """One line."""
    body: str
    """What, where and how to mend it."""
    at: datetime


class Channel(Protocol):
    """Somebody who can be told. `name` is stable and holds no secret: `file`, `slack-1`, `json-2`."""

    name: str

    def send(self, message: Message) -> None:
        """Tell it; blocks for DEADLINE seconds at most. Raises NotSent, after which the message may
        still arrive.
        """


def open_channels(file: Path, urls: Sequence[str]) -> list[Channel]:
    """The file of JSON lines first, then one channel for each Apprise URL, in order; nothing is sent
    or written yet.

    Raises BadInput for a URL that Apprise cannot use; it names the URL's position (from 1) and
    scheme. Apprise is imported when there is a URL, once per process: about 0.3 s and 40 MB.
    """
    return [_Lines(file), *(_open(url, position) for position, url in enumerate(urls, 1))]


class _Lines:
    """Appends each message as one line of JSON: at, event, severity, incident, title, body."""

    def __init__(self, file: Path) -> None:
        self.name = "file"
        self._file = file

    def send(self, message: Message) -> None:
        """One write of one whole line, so that lines of several processes never mix. Raises
        NotSent.
        """
        entry = {
            "at": iso(message.at),
            "event": message.event,
            "severity": message.severity,
            "incident": message.incident,
            "title": message.title,
            "body": message.body,
        }
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            _append(self._file, json.dumps(entry).encode() + b"\n")
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise NotSent(
                f"channel file: {self._file} cannot be written ({reason}); free or permit it"
            ) from error


def _append(file: Path, line: bytes) -> None:
    """All of the line or nothing of it, in one write. Raises OSError."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        written = os.write(handle, line)
        if written == len(line):
            return
        end = os.lseek(handle, 0, os.SEEK_CUR)
        if os.fstat(handle).st_size == end:  # a full disk took a part; nobody wrote behind it
            os.ftruncate(handle, end - written)
        raise OSError(f"{written} of {len(line)} bytes were taken")
    finally:
        os.close(handle)


class _Service:
    """One Apprise URL. A channel sends one message at a time, and is meant for one thread."""

    def __init__(self, name: str, plugin: NotifyBase) -> None:
        self.name = name
        self._plugin = plugin
        self._sending: threading.Thread | None = None

    def send(self, message: Message) -> None:
        """Tell it, within DEADLINE seconds. Raises NotSent, at once while an earlier message still
        hangs.
        """
        if self._sending and self._sending.is_alive():
            raise NotSent(
                f"channel {self.name} still hangs in an earlier message; look at its server"
            )
        taken: list[bool] = []
        # Apprise bounds each wait for a byte, but neither a name server nor one that sends a byte
        # now and then
        self._sending = threading.Thread(
            target=lambda: taken.append(_tell(self._plugin, message)), daemon=True
        )
        self._sending.start()
        self._sending.join(DEADLINE)
        if not taken:
            raise NotSent(
                f"channel {self.name} did not answer within {DEADLINE:g} s; look at its server"
            )
        if not taken[0]:
            raise NotSent(
                f"channel {self.name} did not take the message; look at its URL and its server"
            )


def _tell(plugin: NotifyBase, message: Message) -> bool:
    """Whether the service took all of it: plain text, and split where it is longer than the service
    allows.
    """
    from apprise import NotifyFormat, NotifyType, OverflowMode

    kinds = {Severity.INFO: NotifyType.INFO, Severity.WARNING: NotifyType.WARNING}
    kind = (
        NotifyType.SUCCESS
        if message.event == "recovered"
        else kinds.get(message.severity, NotifyType.FAILURE)
    )
    overflow = (
        OverflowMode.SPLIT
        if plugin.overflow_mode is OverflowMode.UPSTREAM
        else plugin.overflow_mode
    )
    try:
        with _unheard():
            return plugin.notify(
                body=message.body or message.title,  # Apprise sends no empty body
                title=message.title,
                notify_type=kind,
                body_format=NotifyFormat.TEXT,
                overflow=overflow,
            )
    except (
        Exception
    ):  # a plugin may raise anything, and the text of what it raises may hold its URL
        return False


def _open(url: str, position: int) -> _Service:
    with warnings.catch_warnings():
        # apprise.utils.pgp imports imghdr for PGPy's sake, which Python 3.11 and 3.12 call
        # deprecated
        warnings.filterwarnings("ignore", "'imghdr' is deprecated", DeprecationWarning)
        plugin = _plugin(url)
    if plugin is None:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,19}(?=://)", url)
        what = f"alert URL {position} ({f'scheme {scheme[0]}' if scheme else 'without a scheme'})"
        raise BadInput(
            f"{what} is not one that Apprise can use; write it as https://appriseit.com/services shows"
        )
    plugin.socket_connect_timeout = min(DEADLINE, plugin.socket_connect_timeout)
    plugin.socket_read_timeout = min(DEADLINE, plugin.socket_read_timeout)
    return _Service(f"{plugin.schema}-{position}", plugin)


def _plugin(url: str) -> NotifyBase | None:
    from apprise import Apprise

    try:
        with _unheard():
            return Apprise.instantiate(url)
    except Exception:  # as in _tell
        return None


_speaking_to_apprise: ContextVar[bool] = ContextVar("speaking_to_apprise", default=False)


def _heard(record: logging.LogRecord) -> bool:
    return not _speaking_to_apprise.get()


@contextmanager
def _unheard() -> Iterator[None]:
    """Whatever this thread logs meanwhile is dropped: Apprise logs URLs (debug, trace), urllib3 paths
    (debug).

    A logger's filter is not asked for what its children log, so each logger gets it; other threads
    are not touched.
    """
    for logger in [logging.root, *logging.root.manager.loggerDict.copy().values()]:
        if isinstance(logger, logging.Logger):
            logger.addFilter(_heard)
    token = _speaking_to_apprise.set(True)
    try:
        yield
    finally:
        _speaking_to_apprise.reset(token)
