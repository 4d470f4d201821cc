"""The Dagster UI: a real Chromium clicks in the pages that `marketdata dev` serves."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from marketdata_assets.flows.prove.raw_checks import RAW_CHECKS
from marketdata_assets.model.window import Window, parse_time
from marketdata_assets.sources.sandbox.bars import generate_bars
from marketdata_assets.sources.sandbox.server import SandboxExchange
from marketdata_assets.system import start_module, stop
from marketdata_tests.conftest import Universe

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--lang=en-US",  # without it the page stays blank
    # nothing leaves this machine
    "--host-resolver-rules=MAP rebound.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
TIMEOUT_MS = 120_000  # ms for one thing to appear, on a loaded machine
expect.set_options(timeout=TIMEOUT_MS)

RAW = "raw/ohlcv_1m"
SINCE, END = "2023-12-31", "2024-01-01"
MARKET, MONTH = "binance:BTC-USDT", "2023-12-01"
PARTITION = f"{MARKET}|{MONTH}"
ROWS = generate_bars("BTCUSDT", "1m", Window(parse_time(SINCE), parse_time(END))).height


@pytest.fixture
def chromium() -> str:
    """Return the path of a browser; `make test` installs one where it can."""
    found = [path for path in map(shutil.which, BROWSERS) if path]
    return found[0] if found else pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH")


@pytest.fixture
def ui(sandbox: tuple[SandboxExchange, str], universe: Universe, tmp_path: Path) -> Iterator[str]:
    """Serve two markets and two months by `marketdata dev`; yield the address.

    It is three o'clock, and the exchange's clock stands at midnight: a dead feed. Afterwards no
    process of the test lives.
    """
    universe(sandbox[1], symbols="[BTC/USDT, ETH/USDT]", since=SINCE, now="2024-01-10T03:00:00Z")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["marketdata_assets.cli.main", "dev", "--port", str(port)]
    output = tmp_path / "dev.log"
    with output.open("w") as log:
        server = start_module(command, dict(os.environ), stdout=log, stderr=log)
    try:
        assert eventually(lambda: "UI ready" in output.read_text() or server.poll() is not None)
        assert server.poll() is None, output.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server, grace_seconds=60)
    assert eventually(lambda: not processes_of(tmp_path)), processes_of(tmp_path)


def eventually(is_so: Callable[[], bool]) -> bool:
    """Whether a condition becomes true before the timeout."""
    return any(is_so() or threading.Event().wait(0.1) for _ in range(TIMEOUT_MS // 100))


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of all processes that were started with this folder's universe."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(folder / "universe.yaml") in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.fixture
def page(chromium: str, ui: str, tmp_path: Path) -> Iterator[Page]:
    """A fresh headless Chromium; `last.png` shows its last page. Errors of the page's own code are
    ours.
    """
    errors: list[object] = []
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=chromium,
            args=SWITCHES,
            locale="en-US",
            viewport={"width": 1500, "height": 950},
            base_url=ui,
            timeout=TIMEOUT_MS,
        )
        context.set_default_timeout(TIMEOUT_MS)
        context.on("weberror", lambda event: errors.append(event.error))
        page = context.pages[0]
        yield page
        page.screenshot(path=tmp_path / "last.png")
        context.close()
    assert errors == []


def open_asset(page: Page, key: str, tab: str) -> None:
    """Open a tab of an asset's page."""
    page.goto(f"/assets/{key}")
    page.get_by_role("tablist").first.get_by_role("tab", name=tab, exact=True).click()
    page.wait_for_url(f"**/assets/{key}?view={tab.lower()}*")


def open_partition(page: Page, key: str, partition: str) -> None:
    """Open a partition's panel on its asset's Partitions tab. The UI updates it only when it is
    opened.
    """
    page.goto(f"/assets/{key}?view=partitions&partition={quote(partition)}")
    expect(page.get_by_text(partition).filter(visible=True)).to_be_visible()


def open_check(page: Page, key: str, check: str) -> Locator:
    """Open a check on its asset's Checks tab; return its latest result."""
    page.goto(f"/assets/{key}?view=checks&checkDetail={check}")
    return page.get_by_text("Evaluation result", exact=True).locator("xpath=..")


def has_passed_partitions(page: Page, check: str) -> bool:
    """Whether the Partitions tab of a raw check, opened anew, counts a partition as passed."""
    open_check(page, RAW, check)
    tabs = page.get_by_role("tablist").filter(has_text="Execution history")
    tabs.get_by_role("tab", name="Partitions").click()
    passed = page.get_by_text(re.compile(r"Passed \(\d+\)"))
    expect(passed).to_be_visible()
    return "(0)" not in passed.inner_text()


def materialize(page: Page, key: str, market: str, month: str) -> None:
    """Launch one partition from its asset's page, and wait until the run has succeeded."""
    open_asset(page, key, "Partitions")
    page.get_by_role("button", name="Materialize…").click()
    dialog = page.get_by_role("dialog").filter(has_text="Launch runs to materialize")
    dialog.get_by_placeholder("ex: ").fill(
        month
    )  # first: until this field is there, both fields look alike
    dialog.get_by_placeholder("ex: ").press("Enter")
    dialog.get_by_text("Select a partition or create one").click()
    page.get_by_role("menuitem", name=market).click()
    page.keyboard.press("Escape")
    expect(dialog.get_by_text("1 partition", exact=True)).to_be_visible()
    with page.expect_response(
        lambda answer: "mutation Launch" in (answer.request.post_data or "")
    ) as launched:
        dialog.get_by_role("button", name="Launch 1 run").click()
    run = re.search(r"\w{8}-\w{4}-\w{4}-\w{4}-\w{12}", launched.value.text())
    assert run, launched.value.text()
    page.goto(f"/runs/{run[0]}")
    expect(page.get_by_text("Success", exact=True)).to_be_visible()


def test_a_partition_is_materialized_by_clicking(page: Page, ui: str) -> None:
    materialize(page, RAW, MARKET, MONTH)
    open_partition(page, RAW, PARTITION)
    expect(page.get_by_text("Materialized", exact=True)).to_be_visible()
    expect(page.get_by_role("row", name=f"rows {ROWS}", exact=True)).to_be_visible()
    open_asset(page, RAW, "Events")
    page.get_by_text(PARTITION).filter(visible=True).first.click()
    expect(page.get_by_text(f"Partition {PARTITION} materialized in run")).to_be_visible()
    for shown in (
        f"rows {ROWS}",
        f"first_bar {SINCE}T00:00:00Z",
        f"last_bar {SINCE}T23:59:00Z",
        "rows_quarantined 0",
    ):
        expect(page.get_by_role("row", name=shown, exact=True)).to_be_visible()
    for picture in ("closes", "coverage"):
        expect(page.get_by_role("img", name=picture)).to_be_visible()
    page.get_by_text("[Show Markdown]").click()
    expect(page.get_by_role("dialog").get_by_role("img", name="candles")).to_be_visible()
    attack_from_another_page(page, ui)
    open_partition(page, RAW, PARTITION)
    expect(page.get_by_text("Materialized", exact=True)).to_be_visible()


ATTACKS = """async ([ui, mutation]) => {
    const url = ui + "/graphql", body = JSON.stringify({query: mutation});
    const send = (address, options) => fetch(address, options).then(a => a.type, e => e.name);
    const results = [
        await send(url, {method: "POST", mode: "no-cors", body}),
        await send(url, {method: "POST", headers: {"Content-Type": "application/json"}, body}),
        await send(url + "?query=" + encodeURIComponent(mutation), {mode: "no-cors"}),
        await send(ui + "/report_asset_materialization/raw/ohlcv_1m?partition=x",
                   {method: "POST", mode: "no-cors"}),
        await new Promise(done => {
            const socket = new WebSocket(url.replace("http", "ws"), "graphql-ws");
            socket.onopen = () => done("open");
            socket.onerror = () => done("closed");
        }),
    ];
    const form = document.createElement("form");
    Object.assign(form, {method: "post", enctype: "text/plain", action: url});
    form.innerHTML = "<input name='{\\"query\\":\\"" + mutation + "\\", \\"x' value='\\":1}'>";
    document.body.append(form);
    form.submit();
    return results;
}"""
WIPE = 'mutation {wipeAssets(assetPartitionRanges: [{assetKey: {path: [\\"raw\\"]}}]) {__typename}}'


def attack_from_another_page(page: Page, ui: str) -> None:
    """Do what a page of another origin, open in the same browser, can do; nothing is answered."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _EmptyPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        with page.expect_response(lambda answer: answer.request.is_navigation_request()) as form:
            results = page.evaluate(ATTACKS, [ui, WIPE])
        server.shutdown()
    assert results == ["opaque", "TypeError", "opaque", "opaque", "closed"]
    assert form.value.status == 403
    rebound = page.goto(ui.replace("127.0.0.1", "rebound.example"))
    assert rebound is not None
    assert rebound.status == 403


class _EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html><body></body></html>")

    def log_message(self, *_: object) -> None: ...


def test_a_stale_market_is_red(page: Page) -> None:
    """A sensor evaluates the newest bars; no run is needed."""
    materialize(page, RAW, MARKET, MONTH)
    expect(open_check(page, RAW, "freshness")).to_contain_text("Failed")
    expect(page.get_by_role("row", name=re.compile(f"^{MARKET} stale 2024-01-"))).to_be_visible()


def test_the_checks_of_a_partition_are_shown_as_passed(page: Page) -> None:
    materialize(page, RAW, MARKET, MONTH)
    page.get_by_placeholder("Filter…", exact=True).fill("type:ASSET_CHECK_EVALUATION")
    for check in RAW_CHECKS:
        expect(
            page.get_by_text(
                f"Check {check} succeeded for materialization of raw / ohlcv_1m."
            ).first
        ).to_be_visible()
    for check in RAW_CHECKS:
        # A sensor's run may evaluate the same partition just now, and the tab is never refreshed.
        assert eventually(lambda check=check: has_passed_partitions(page, check)), check
        page.get_by_text(MARKET, exact=True).filter(visible=True).first.click()
        page.get_by_text(MONTH, exact=True).filter(visible=True).last.click()
        expect(page.get_by_text(PARTITION).filter(visible=True)).to_be_visible()
        expect(page.get_by_text("Passed", exact=True)).to_be_visible()
