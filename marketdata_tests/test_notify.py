"""Alert channels against real parts: files that several processes write, and servers that answer,
refuse, hang and trickle.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from aiohttp import web

from marketdata_assets import notify
from marketdata_assets.errors import BadInput, MarketDataError
from marketdata_assets.notify import (
    AlertEvent,
    AlertSeverity,
    Channel,
    Message,
    NotSent,
    open_channels,
)
from marketdata_tests.steps import at, serving

pytestmark = pytest.mark.server

CANARY = "CANARY7e57"
STALE = Message(
    incident="stale|raw/ohlcv_1m|binance:BTC-USDT",
    event=AlertEvent.OPENED,
    severity=AlertSeverity.WARNING,
    title="binance:BTC-USDT is stale",
    body="The newest bar is 3 h old.\nRun `marketdata backfill`. <b>&amp; 币安",
    at=at("2024-03-01T12:00:00.5"),
)


def message(
    event: AlertEvent = AlertEvent.OPENED,
    severity: AlertSeverity = AlertSeverity.WARNING,
    **changed: str,
) -> Message:
    facts = {"incident": STALE.incident, "title": STALE.title, "body": STALE.body, **changed}
    return Message(event=event, severity=severity, at=STALE.at, **facts)


def lines(file: Path) -> list[dict[str, Any]]:
    """Parse every line of a file as JSON, and check that the last one ends with a newline."""
    text = file.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


class Hook:
    """A webhook that records the requests and answers with `status`."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.paths: list[str] = []
        self.sent: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path_qs)
        self.sent.append(await request.json())
        return web.Response(status=self.status)


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def trickle(request: web.Request) -> web.StreamResponse:
    """Send a byte now and then, so that no wait for a byte is long."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b".")
        await asyncio.sleep(0.02)


def json_url(base: str, path: str = "hook") -> str:
    return f"{base.replace('http', 'json', 1)}/{path}"


START = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from marketdata_assets import notify

def message(title="t", body="b"):
    return notify.Message(
        incident="key",
        event=notify.AlertEvent.OPENED,
        severity=notify.AlertSeverity.ERROR,
        title=title,
        body=body,
        at=datetime(2024, 3, 1, tzinfo=UTC),
    )

def channels(*urls):
    return notify.open_channels(Path(sys.argv[1]), urls)
"""


def process(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a process that runs the code, with `message`, `channels` and `notify` defined."""
    command = [sys.executable, *options.pop("flags", ()), "-c", START + code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(code: str, *arguments: object, **options: Any) -> tuple[int | None, str, str]:
    """Run the code. Return exit code, stdout and stderr."""
    with process(code, *arguments, **options) as child:
        try:
            out, err = child.communicate(timeout=30)
        finally:
            child.kill()
        return child.returncode, out, err


@pytest.fixture
def service(tmp_path: Path) -> Callable[[str], Channel]:
    """Return `service(url)`, which opens the channel of that URL."""

    def make(url: str) -> Channel:
        _, channel = open_channels(tmp_path / "alerts.jsonl", [url])
        return channel

    return make


@pytest.fixture
def refused() -> Iterator[str]:
    """Reserve a port where nothing listens. Yield its base URL."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def test_severities_compare_by_rank():
    mildest_first = [
        AlertSeverity.INFO,
        AlertSeverity.WARNING,
        AlertSeverity.ERROR,
        AlertSeverity.CRITICAL,
    ]
    assert sorted(AlertSeverity, reverse=True) == mildest_first[::-1]
    assert [severity.rank for severity in mildest_first] == [0, 1, 2, 3]
    assert max(mildest_first) is AlertSeverity.CRITICAL
    for i, one in enumerate(mildest_first):
        for j, other in enumerate(mildest_first):
            assert (one < other, one <= other, one > other, one >= other) == (
                i < j,
                i <= j,
                i > j,
                i >= j,
            )


def test_not_sent_is_an_error_of_this_package():
    assert issubclass(NotSent, MarketDataError)


# ---------------------------------------------------------------- the file
def test_each_message_is_one_line_of_the_file(tmp_path: Path):
    file = tmp_path / "state" / "alerts.jsonl"
    (channel,) = open_channels(file, [])
    assert channel.name == "file"
    assert not file.parent.exists()
    channel.send(STALE)
    channel.send(
        message(
            AlertEvent.RECOVERED,
            AlertSeverity.INFO,
            title="fresh again",
            body="line\u2028separator \udc80 \x00",
        )
    )
    assert lines(file) == [
        {
            "at": "2024-03-01T12:00:00.500000Z",
            "event": "opened",
            "severity": "warning",
            "incident": STALE.incident,
            "title": STALE.title,
            "body": STALE.body,
        },
        {
            "at": "2024-03-01T12:00:00.500000Z",
            "event": "recovered",
            "severity": "info",
            "incident": STALE.incident,
            "title": "fresh again",
            "body": "line\u2028separator \udc80 \x00",
        },
    ]
    assert list(lines(file)[0]) == ["at", "event", "severity", "incident", "title", "body"]


WRITER = """
import time
(channel,) = channels()
messages = [message(f"{sys.argv[2]}-{n}", sys.argv[2] * (n * 97 % 2000)) for n in range(2000)]
print("ready", flush=True)
time.sleep(max(0, float(sys.stdin.readline()) - time.time()))
for each in messages:
    channel.send(each)
"""


def test_lines_of_several_processes_never_mix(tmp_path: Path):
    file = tmp_path / "state" / "alerts.jsonl"
    writers = [process(WRITER, file, name) for name in "abcd"]
    assert [writer.stdout.readline() for writer in writers if writer.stdout] == ["ready\n"] * 4
    start = f"{time.time() + 0.1}\n"  # all at once
    for writer in writers:
        assert writer.stdin
        writer.stdin.write(start)
        writer.stdin.flush()
    for writer in writers:
        assert (writer.communicate(timeout=60), writer.returncode) == (("", ""), 0)
    found = lines(file)
    assert len(found) == 8000
    for name in "abcd":
        own = [(entry["title"], entry["body"]) for entry in found if entry["title"][0] == name]
        assert own == [(f"{name}-{n}", name * (n * 97 % 2000)) for n in range(2000)]
    names = "".join(entry["title"][0] for entry in found)
    assert len(re.findall(r"(.)(?!\1)", names)) > 4  # they wrote at the same time


@pytest.mark.parametrize("wrong", ["a folder", "below a file", "full"])
def test_a_file_that_cannot_be_written_raises_not_sent(tmp_path: Path, wrong: str):
    (tmp_path / "plain").write_text("")
    (channel,) = open_channels(
        {"a folder": tmp_path, "below a file": tmp_path / "plain" / "x", "full": Path("/dev/full")}[
            wrong
        ],
        [],
    )
    with pytest.raises(
        NotSent, match=r"^channel file: .* cannot be written \(.+\); free or permit it$"
    ):
        channel.send(STALE)


FULL_DISK = """
import resource
(channel,) = channels()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sent = 0
try:
    for _ in range(20):
        channel.send(message())
        sent += 1
except notify.NotSent:
    print(sent)
"""


def test_a_disk_with_room_for_a_part_of_a_line_keeps_only_whole_lines(tmp_path: Path):
    file = tmp_path / "alerts.jsonl"
    code, out, err = run(FULL_DISK, file)
    assert (code, err) == (0, "")
    assert len(lines(file)) == int(out) > 1
    assert file.stat().st_size < 1000  # the next line would have fitted in part


# ---------------------------------------------------------------- services
@pytest.mark.parametrize(
    ("event", "severity", "kind"),
    [
        (AlertEvent.OPENED, AlertSeverity.INFO, "info"),
        (AlertEvent.OPENED, AlertSeverity.WARNING, "warning"),
        (AlertEvent.OPENED, AlertSeverity.ERROR, "failure"),
        (AlertEvent.OPENED, AlertSeverity.CRITICAL, "failure"),
        (AlertEvent.RECOVERED, AlertSeverity.CRITICAL, "success"),
        (AlertEvent.RECOVERED, AlertSeverity.INFO, "success"),
    ],
)
def test_a_service_receives_text_and_severity(
    service: Callable[[str], Channel], event: AlertEvent, severity: AlertSeverity, kind: str
):
    hook = Hook()
    with serving(hook.answer) as base:
        service(json_url(base, "hook?-key=v")).send(message(event, severity))
    assert hook.paths == ["/hook?key=v"]
    assert [(got["title"], got["message"], got["type"]) for got in hook.sent] == [
        (STALE.title, STALE.body, kind)
    ]


def test_channels_keep_their_order_and_are_named_by_service_and_position(tmp_path: Path):
    urls = [
        "json://127.0.0.1/a",
        "https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ",
        "jsons://127.0.0.1/a",
        "mailtos://me:secret@example.com",
    ]
    assert [channel.name for channel in open_channels(tmp_path / "x", urls)] == [
        "file",
        "json-1",
        "slack-2",
        "jsons-3",
        "mailtos-4",
    ]


def test_a_long_message_is_split_unless_the_url_has_another_setting(
    service: Callable[[str], Channel],
):
    hook, long = Hook(), "word " * 10_000
    with serving(hook.answer) as base:
        service(json_url(base)).send(message(body=long))
        assert " ".join(got["message"] for got in hook.sent).split() == long.split()
        assert len(hook.sent) == 2
        hook.sent.clear()
        service(json_url(base, "hook?overflow=truncate")).send(message(body=long))
        assert len(hook.sent) == 1


def test_a_message_without_a_body_is_sent(service: Callable[[str], Channel]):
    hook = Hook()
    with serving(hook.answer) as base:
        service(json_url(base)).send(message(body=""))
    assert [got["message"] for got in hook.sent] == [STALE.title]


@pytest.mark.parametrize("status", [302, 400, 404, 500, 503])
def test_an_answer_other_than_success_raises_not_sent(
    service: Callable[[str], Channel], status: int
):
    hook = Hook(status)
    with serving(hook.answer) as base, pytest.raises(NotSent) as caught:
        service(json_url(base, "hook?retry=5&wait=1&optional=yes")).send(STALE)
    assert (
        str(caught.value)
        == "channel json-1 did not take the message; look at its URL and its server"
    )
    assert len(hook.sent) == 1


def test_a_service_that_does_not_listen_raises_not_sent(
    service: Callable[[str], Channel], refused: str
):
    channel = service(json_url(refused))
    with pytest.raises(NotSent, match=r"^channel json-1 did not take the message"):
        channel.send(STALE)


def test_a_timeout_in_the_url_is_used_up_to_the_deadline(service: Callable[[str], Channel]):
    with serving(hang) as base:
        channel, begun = service(json_url(base, "hook?rto=0.2")), time.monotonic()
        with pytest.raises(NotSent):
            channel.send(STALE)
        assert time.monotonic() - begun < 5
        patient: Any = service(json_url(base, "hook?rto=300&cto=300"))
        assert patient._plugin.request_timeout == (notify.DEADLINE, notify.DEADLINE)
    assert notify.DEADLINE == 10


def test_a_service_that_trickles_blocks_no_longer_than_the_deadline(
    service: Callable[[str], Channel], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(notify, "DEADLINE", 0.3)
    with serving(trickle) as base:
        channel, begun = service(json_url(base)), time.monotonic()
        with pytest.raises(
            NotSent, match=r"^channel json-1 did not answer within 0\.3 s; look at its server$"
        ):
            channel.send(STALE)
        assert 0.3 <= time.monotonic() - begun < 5
        begun = time.monotonic()
        with pytest.raises(NotSent, match=r"^channel json-1 still hangs in an earlier message"):
            channel.send(STALE)
        assert time.monotonic() - begun < 0.3


def test_a_channel_that_hung_works_again(
    service: Callable[[str], Channel], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(notify, "DEADLINE", 0.2)
    hook, slow = Hook(), True

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5 if slow else 0)
        return await hook.answer(request)

    with serving(answer) as base:
        channel: Any = service(json_url(base, "hook?rto=5"))
        channel._plugin.socket_read_timeout = 5.0
        with pytest.raises(NotSent, match="did not answer"):
            channel.send(STALE)
        channel._sending.join()
        slow = False
        monkeypatch.setattr(notify, "DEADLINE", 10)
        channel.send(STALE)
    assert len(hook.sent) == 2  # the first one arrived late: a message may arrive twice


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"slakc://{CANARY}/b/c", "alert URL 2 (scheme slakc)"),
        (f"slack://{CANARY}", "alert URL 2 (scheme slack)"),
        (f"https://user:{CANARY}@example.com/{CANARY}", None),
        (f"http://[::1{CANARY}", "alert URL 2 (scheme http)"),
        (f"json://127.0.0.1/?tz={CANARY}", "alert URL 2 (scheme json)"),
        (CANARY, "alert URL 2 (without a scheme)"),
        (f"{CANARY * 5}://x", "alert URL 2 (without a scheme)"),
        ("", "alert URL 2 (without a scheme)"),
    ],
)
def test_a_url_that_apprise_cannot_use_is_bad_input(
    tmp_path: Path, url: str, shown: str | None, logs: io.StringIO
):
    shown = shown or "alert URL 2 (scheme https)"
    with pytest.raises(BadInput) as caught:
        open_channels(tmp_path / "x", ["json://127.0.0.1/a", url])
    assert str(caught.value) == (
        f"{shown} is not one that Apprise can use; write it as https://appriseit.com/services shows"
    )
    assert CANARY not in "".join(traceback.format_exception(caught.value)) + logs.getvalue()


# ---------------------------------------------------------------- secrets and cost
@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    """Record all logs of every logger, at every level, with tracebacks."""
    logging.getLogger("urllib3").setLevel(
        logging.NOTSET
    )  # the client of Kubernetes raises it for all
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    level = logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(1)
    yield stream
    logging.root.setLevel(level)
    logging.root.removeHandler(handler)


def test_no_secret_is_ever_shown(
    tmp_path: Path, logs: io.StringIO, refused: str, capfd: pytest.CaptureFixture[str]
):
    secret = f"{CANARY}/{CANARY}?-token={CANARY}&+Authorization={CANARY}&:key={CANARY}"
    shown = ""
    with serving(Hook().answer) as good, serving(Hook(500).answer) as bad:
        addresses = [
            json_url(base.replace("://", f"://{CANARY}:{CANARY}@"), secret)
            for base in (good, bad, refused)
        ]
        channels = open_channels(tmp_path / "alerts.jsonl", [*addresses, addresses[0] + "&rto=-1"])
        for channel in channels:
            shown += repr(channel) + str(channel) + channel.name
            try:
                channel.send(STALE)
            except NotSent as error:
                shown += "NotSent " + "".join(traceback.format_exception(error))
                shown += repr(error.__context__)  # a logger may show the whole chain
        assert shown.count("NotSent ") == 3
        assert CANARY not in shown + repr(channels) + logs.getvalue() + "".join(capfd.readouterr())
        assert CANARY not in (tmp_path / "alerts.jsonl").read_text()
        # the control: other records are logged, and urllib3 and Apprise do log the URL
        requests.post(f"{good}/{CANARY}", json={})
        assert f"/{CANARY}" in logs.getvalue()
        logs.truncate(0)
        channels[1]._plugin.notify(body="x")  # type: ignore[attr-defined]
        assert f"/{CANARY}" in logs.getvalue()


def test_other_threads_can_log_while_a_message_is_sent(
    service: Callable[[str], Channel], logs: io.StringIO
):
    inside, logged = threading.Event(), threading.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        inside.set()
        await asyncio.to_thread(logged.wait, 5)
        return web.Response()

    with serving(answer) as base:
        channel = service(json_url(base, CANARY))
        sender = threading.Thread(target=channel.send, args=(STALE,))
        sender.start()
        assert inside.wait(5)
        logging.getLogger("urllib3.connectionpool").debug("another thread")
        logged.set()
        sender.join()
    assert "another thread" in logs.getvalue()
    assert CANARY not in logs.getvalue()


def test_apprise_is_imported_for_a_url_only_and_without_a_warning(tmp_path: Path):
    code = """
channels()
assert "apprise" not in sys.modules
channels("json://127.0.0.1/a")
assert "apprise" in sys.modules
"""
    assert run(code, tmp_path / "x", flags=["-W", "error"]) == (0, "", "")


def test_a_hanging_service_does_not_keep_the_process(tmp_path: Path):
    code = """
notify.DEADLINE = 0.3
_, channel = channels(sys.argv[2])
try:
    channel.send(message())
except notify.NotSent as error:
    print(error)
"""
    with serving(trickle) as base:
        found = run(code, tmp_path / "x", json_url(base, CANARY))
    assert found == (0, "channel json-1 did not answer within 0.3 s; look at its server\n", "")
