"""Proxies and CA files, before a venue, S3 and the servers of alerts."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from aiohttp import web

from marketdata_assets.errors import BadInput, Retry, VenueRefused
from marketdata_assets.model.market import Market
from marketdata_assets.model.table import raw_table
from marketdata_assets.model.timeframe import TIMEFRAMES
from marketdata_assets.model.window import Window, from_ms
from marketdata_assets.network import CA_VARIABLES
from marketdata_assets.notify import open_channels
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.base import BarsPage
from marketdata_assets.sources.ccxt_rest import CcxtSource
from marketdata_assets.storage.lake import Lake
from marketdata_assets.storage.views import open_views, run_query
from marketdata_tests.fake_venues import VENUES
from marketdata_tests.fake_venues.frame import MINUTE, serving_venue
from marketdata_tests.proxies import HOST, Proxy, running_proxy
from marketdata_tests.s3_proxy import open_proxy
from marketdata_tests.samples import JANUARY
from marketdata_tests.sources.test_fetching import self_signed
from marketdata_tests.steps import serving
from marketdata_tests.test_notify import STALE

pytestmark = pytest.mark.server

BTC = Market("bybit", "BTC/USDT")
USER, PASSWORD = "canary-user", "canary-password"
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "AWS_CA_BUNDLE", *CA_VARIABLES)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def venue_url() -> Iterator[str]:
    now = int(time.time() * 1000) // MINUTE * MINUTE + 30_000
    with serving_venue(VENUES["bybit"](now=now)) as url:
        yield url


def fetch(base_url: str, proxy: str | None = None) -> BarsPage:
    """Request ten bars of an hour ago."""
    entry = {"symbols": [BTC.symbol], "since": "2020-01-01", "base_url": base_url}
    entry |= {"proxy": proxy} if proxy else {}
    venue = Settings.model_validate({"venues": {BTC.venue: entry}}).venues[BTC.venue]
    start = int(time.time() * 1000) // MINUTE * MINUTE - 60 * MINUTE

    async def request() -> BarsPage:
        source = CcxtSource(venue)
        try:
            window = Window(from_ms(start), from_ms(start + 10 * MINUTE))
            return await source.fetch(BTC, TIMEFRAMES["1m"], window)
        finally:
            await source.close()

    return asyncio.run(request())


def address(proxy: Proxy, scheme: str) -> str:
    user = f"{proxy.user}:{proxy.password}@" if proxy.user else ""
    return f"{scheme}://{user}127.0.0.1:{proxy.port}"


# ------------------------------------------------------------ venues
@pytest.mark.parametrize("user", ["", USER])
@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
def test_a_venue_has_a_proxy_of_its_own(venue_url: str, scheme: str, user: str) -> None:
    """Only the proxy can look the venue's name up."""
    with running_proxy(venue_url, user, PASSWORD if user else "") as proxy:
        page = fetch(f"http://{HOST}", address(proxy, scheme))
    assert page.rows.height == 10
    assert set(proxy.wanted) == {HOST}


def test_the_proxy_of_the_environment(venue_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_proxy(venue_url, USER, PASSWORD) as proxy:
        monkeypatch.setenv("HTTP_PROXY", address(proxy, "http"))
        assert fetch(f"http://{HOST}").rows.height == 10
        assert set(proxy.wanted) == {HOST}
        monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
        seen = len(proxy.wanted)
        assert fetch(venue_url).rows.height == 10
        assert len(proxy.wanted) == seen
        with running_proxy(venue_url) as own:  # the venue's own proxy counts before the others
            assert fetch(f"http://{HOST}", address(own, "socks5")).rows.height == 10
        assert (len(proxy.wanted), set(own.wanted)) == (seen, {HOST})


def test_a_proxy_that_fails_is_told_and_no_password_with_it(venue_url: str) -> None:
    with running_proxy(venue_url, USER, PASSWORD) as proxy:
        for scheme in ("http", "socks5"):
            wrong = f"{scheme}://{USER}:canary-wrong@127.0.0.1:{proxy.port}"
            with pytest.raises(Retry) as refused:
                fetch(f"http://{HOST}", wrong)
            assert "canary" not in str(refused.value)
            assert "the proxy " in str(refused.value)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for scheme in ("http", "socks5"):
        with pytest.raises(Retry, match="bybit: the proxy cannot be reached"):
            fetch(f"http://{HOST}", f"{scheme}://{USER}:{PASSWORD}@127.0.0.1:{port}")


def test_a_socks_proxy_in_the_environment_belongs_into_the_universe(
    venue_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(BadInput, match="write it there and unset"):
        fetch(venue_url)


def test_a_companys_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directly and through a tunnel: trusted where a variable names the file."""
    file, tls = self_signed(tmp_path), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file)
    now = int(time.time() * 1000) // MINUTE * MINUTE + 30_000
    with serving_venue(VENUES["bybit"](now=now), tls) as url:
        with pytest.raises(Retry, match="not trusted; where a proxy opens TLS, name"):
            fetch(url)
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            with monkeypatch.context() as patch:
                patch.setenv(name, str(file))
                assert fetch(url).rows.height == 10
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "absent.pem"))
        with pytest.raises(BadInput, match="environment SSL_CERT_FILE: there is no file"):
            fetch(url)


# ------------------------------------------------------------ S3 and alerts
def test_s3_behind_a_companys_proxy(
    bucket: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours, Polars' and Arrow's client: through HTTP_PROXY, and with a CA file of its own."""
    lake, table = Lake(f"s3://{bucket}/lake"), raw_table(TIMEFRAMES["1m"])
    bars = pl.DataFrame({name: [None] for name in table.schema}, schema=table.schema).with_columns(
        open_time=pl.lit(JANUARY.month.start), **dict.fromkeys(("open", "high", "low", "close"), 1)
    )
    bars = bars.select(table.typed_columns)
    lake.write(table, JANUARY, bars)

    def read_all() -> None:
        fresh = Lake(f"s3://{bucket}/lake")
        stored = fresh.read(table, JANUARY)
        assert stored is not None
        assert stored.height == 1
        assert fresh.scan(table, [JANUARY], JANUARY.month).collect().height == 1
        uris = [*fresh.find_uris(table, [JANUARY]).values()]
        with open_views({table: uris}, None) as views:
            found = run_query(views, "SELECT count(*) FROM raw.ohlcv_1m")
        assert found.rows() == [(1,)]

    with running_proxy(s3_server) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://192.0.2.1")  # which is nowhere
        patch.setenv("HTTP_PROXY", address(proxy, "http"))
        read_all()
        assert set(proxy.wanted) == {"192.0.2.1"}
    file, tls = self_signed(tmp_path), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file)
    with open_proxy(s3_server, tls) as front:
        monkeypatch.setenv("AWS_ENDPOINT_URL", front.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        read_all()


def test_alerts_through_a_proxy_and_with_a_ca_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []

    async def take(request: web.Request) -> web.Response:
        received.append(await request.json())
        return web.json_response({})

    def send(url: str) -> None:
        for channel in open_channels(tmp_path / "alerts.jsonl", [url])[1:]:
            channel.send(STALE)

    with serving(take) as url, running_proxy(url) as proxy, monkeypatch.context() as patch:
        patch.setenv("HTTP_PROXY", address(proxy, "http"))
        send(f"json://{HOST}/hook")
    file, tls = self_signed(tmp_path), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file)
    with serving(take, tls) as url:
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        send(url.replace("https", "jsons") + "/hook")
    assert len(received) == 2


# ------------------------------------------------------------ redirects
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_refused_and_named(venue_url: str, status: int) -> None:
    """No request follows it, to another host or to another path."""
    seen = []

    async def redirect(request: web.Request) -> web.Response:
        seen.append(request.path)
        where = venue_url.replace("127.0.0.1", "localhost") + str(request.rel_url)
        return web.Response(status=status, headers={"Location": where})

    with serving(redirect) as url, pytest.raises(VenueRefused) as refused:
        fetch(url)
    assert str(refused.value) == (
        f"bybit: HTTP {status}, it redirects to localhost, which is not followed; write the right "
        "address in base_url"
    )
    assert len(seen) == 1
