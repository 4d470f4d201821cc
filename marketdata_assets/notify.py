"""Alert channels: a file of JSON lines, and every service that Apprise supports (chat, mail,
pagers, webhooks).

`open_channels` returns the channels, and `Channel.send` sends one message through one of them. No
message is repeated here: where a channel does not accept it, `send` raises NotSent, and the caller
may send it again. So a message may arrive twice.

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
from marketdata_assets.model.window import format_time
from marketdata_assets.network import ca_file

if TYPE_CHECKING:
    from apprise import NotifyBase

DEADLINE = 10.0
"""Seconds that one send may take, whatever its server does and whatever its URL allows."""


class NotSent(MarketDataError):
    """A channel did not accept a message. The text names the channel and never holds a secret."""


class AlertEvent(StrEnum):
    """What happened to an incident."""

    OPENED = "opened"
    RECOVERED = "recovered"


class AlertSeverity(StrEnum):
    """How bad an incident is, mildest first. Severities compare by rank, not by name."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0 for info up to 3 for critical."""
        return list(AlertSeverity).index(self)

    def __lt__(self, other: str) -> bool:
        return self.rank < AlertSeverity(other).rank

    def __le__(self, other: str) -> bool:
        return self.rank <= AlertSeverity(other).rank

    def __gt__(self, other: str) -> bool:
        return self.rank > AlertSeverity(other).rank

    def __ge__(self, other: str) -> bool:
        return self.rank >= AlertSeverity(other).rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """The text about one event of one incident.

    `incident` is the key of the incident, e.g. `stale|raw/ohlcv_1m|binance:BTC-USDT`. `title` is
    one line; `body` says what happened, where, and what to do. `at` is UTC, by our clock.
    """

    incident: str
    event: AlertEvent
    severity: AlertSeverity
    title: str
    body: str
    at: datetime


class Channel(Protocol):
    """A way to reach a person. `name` is stable and holds no secret: `file`, `slack-1`."""

    name: str

    def send(self, message: Message) -> None:
        """Send one message, within DEADLINE seconds. Raises NotSent, after which the message may
        still arrive.
        """


def open_channels(file: Path, urls: Sequence[str]) -> list[Channel]:
    """Return the channel of the file first, then one for each Apprise URL, in order. Nothing is
    sent or written yet.

    Raises BadInput for a URL that Apprise cannot use; the error names the URL's position (from 1)
    and scheme. Apprise is imported when there is a URL, once per process: about 0.3 s and 40 MB.
    """
    channels = (_open_apprise_channel(url, position) for position, url in enumerate(urls, 1))
    return [_FileChannel(file), *channels]


class _FileChannel:
    """Appends each message as one line of JSON: at, event, severity, incident, title, body."""

    def __init__(self, file: Path) -> None:
        self.name = "file"
        self._file = file

    def send(self, message: Message) -> None:
        """Write one whole line at once, so that lines of several processes never mix. Raises
        NotSent.
        """
        entry = {
            "at": format_time(message.at),
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
    """Append the whole line or nothing of it, in one write. Raises OSError."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        written = os.write(handle, line)
        if written == len(line):
            return
        end = os.lseek(handle, 0, os.SEEK_CUR)
        if (
            os.fstat(handle).st_size == end
        ):  # the disk is full, and no other process wrote behind us
            os.ftruncate(handle, end - written)
        raise OSError(f"{written} of {len(line)} bytes were written")
    finally:
        os.close(handle)


class _AppriseChannel:
    """One Apprise URL. It sends one message at a time, for one thread."""

    def __init__(self, name: str, plugin: NotifyBase) -> None:
        self.name = name
        self._plugin = plugin
        self._sending: threading.Thread | None = None

    def send(self, message: Message) -> None:
        """Send one message, within DEADLINE seconds. Raises NotSent; at once while an earlier
        message still hangs.
        """
        if self._sending and self._sending.is_alive():
            raise NotSent(
                f"channel {self.name} still hangs in an earlier message; look at its server"
            )
        accepted: list[bool] = []
        # in a thread, because Apprise limits the wait for each byte, but neither the name server's
        # time nor the number of bytes
        self._sending = threading.Thread(
            target=lambda: accepted.append(_send_to_service(self._plugin, message)), daemon=True
        )
        self._sending.start()
        self._sending.join(DEADLINE)
        if not accepted:
            raise NotSent(
                f"channel {self.name} did not answer within {DEADLINE:g} s; look at its server"
            )
        if not accepted[0]:
            raise NotSent(
                f"channel {self.name} did not take the message; look at its URL and its server"
            )


def _send_to_service(plugin: NotifyBase, message: Message) -> bool:
    """Send plain text, in parts where it is longer than the service allows. Return whether the
    service accepted all of it.
    """
    from apprise import NotifyFormat, NotifyType, OverflowMode

    kinds = {
        AlertSeverity.INFO: NotifyType.INFO,
        AlertSeverity.WARNING: NotifyType.WARNING,
    }
    kind = kinds.get(message.severity, NotifyType.FAILURE)
    has_default_overflow = plugin.overflow_mode is OverflowMode.UPSTREAM
    try:
        with _suppress_logs():
            return plugin.notify(
                body=message.body or message.title,  # Apprise sends no empty body
                title=message.title,
                notify_type=NotifyType.SUCCESS if message.event == AlertEvent.RECOVERED else kind,
                body_format=NotifyFormat.TEXT,
                overflow=OverflowMode.SPLIT if has_default_overflow else plugin.overflow_mode,
            )
    except Exception:  # a plugin may raise anything, and the text may hold its URL
        return False


def _open_apprise_channel(url: str, position: int) -> _AppriseChannel:
    with warnings.catch_warnings():
        # apprise.utils.pgp imports imghdr for PGPy's sake, which Python 3.11 and 3.12 call
        # deprecated
        warnings.filterwarnings("ignore", "'imghdr' is deprecated", DeprecationWarning)
        plugin = _create_plugin(url)
    if plugin is None:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,19}(?=://)", url)
        kind = f"scheme {scheme[0]}" if scheme else "without a scheme"
        raise BadInput(
            f"alert URL {position} ({kind}) is not one that Apprise can use; "
            "write it as https://appriseit.com/services shows"
        )
    if plugin.verify_certificate and (trusted := ca_file()):
        plugin.verify_certificate = trusted  # type: ignore[assignment]  # as `requests` takes it
    plugin.socket_connect_timeout = min(DEADLINE, plugin.socket_connect_timeout)
    plugin.socket_read_timeout = min(DEADLINE, plugin.socket_read_timeout)
    return _AppriseChannel(f"{plugin.schema}-{position}", plugin)


def _create_plugin(url: str) -> NotifyBase | None:
    from apprise import Apprise

    try:
        with _suppress_logs():
            return Apprise.instantiate(url)
    except Exception:  # a plugin may raise anything, and the text may hold its URL
        return None


_is_calling_apprise: ContextVar[bool] = ContextVar("is_calling_apprise", default=False)


def _may_log(record: logging.LogRecord) -> bool:
    return not _is_calling_apprise.get()


@contextmanager
def _suppress_logs() -> Iterator[None]:
    """Drop what this thread logs meanwhile, because Apprise logs URLs (debug, trace) and urllib3
    paths (debug).

    Every logger gets the filter, because a parent's filter does not see the records of its
    children. Other threads log as before.
    """
    for logger in [logging.root, *logging.root.manager.loggerDict.copy().values()]:
        if isinstance(logger, logging.Logger):
            logger.addFilter(_may_log)
    token = _is_calling_apprise.set(True)
    try:
        yield
    finally:
        _is_calling_apprise.reset(token)
