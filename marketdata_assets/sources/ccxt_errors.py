"""What an error of ccxt, aiohttp or a malformed answer means: retry, wait, or give up."""

from __future__ import annotations

import math
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp_socks import ProxyConnectionError, ProxyError, ProxyTimeoutError

from marketdata_assets.errors import (
    BadInput,
    Garbled,
    MarketDataError,
    RequestFailed,
    Retry,
    VenueRefused,
    Wait,
    without_controls,
)
from marketdata_assets.sources.ccxt_transport import HttpAnswer

DEFAULT_PAUSE = 10.0
"""Seconds to wait where an answer demands a wait and names no time."""
PASSING_REFUSALS = (403, 451)
"""HTTP statuses by which a firewall or a country block refuses requests that need no key."""


PROXY_WANTS_PASSWORD = 407


@contextmanager
def translate_errors(venue: str, answer: HttpAnswer) -> Iterator[None]:
    """Raise whatever goes wrong inside as RequestFailed, VenueRefused or BadInput.

    Every message begins with the venue. `answer` is filled by the request that runs inside.
    """
    from ccxt.base.errors import BaseError

    try:
        yield
    except (RequestFailed, VenueRefused, BadInput) as error:
        if not str(error).startswith(venue):
            error.args = (f"{venue}: {error}",)
        raise
    except TimeoutError:
        raise Retry(f"{venue}: no complete answer came within the deadline") from None
    except BaseError as error:
        raise _translate_ccxt(venue, error, answer) from None
    except (aiohttp.ClientError, OSError) as error:
        raise Retry(f"{venue}: {_describe(error, answer)}") from None
    except (ProxyError, ProxyConnectionError, ProxyTimeoutError) as error:
        reason = "cannot be reached" if isinstance(error, ProxyConnectionError) else "refused"
        raise Retry(f"{venue}: the proxy {reason}") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise Garbled(
            f"{venue}: the answer does not have the documented form ({type(error).__name__})"
        ) from None


def _translate_ccxt(venue: str, error: Exception, answer: HttpAnswer) -> MarketDataError:
    """Return the error of our tree that a ccxt error means; Retry for all that may pass."""
    from ccxt.base import errors as ccxt

    if isinstance(error, ccxt.RequestTimeout):
        return Retry(f"{venue}: no complete answer came within the deadline")
    if answer.status == PROXY_WANTS_PASSWORD:
        return Retry(f"{venue}: the proxy answered HTTP 407: it wants a user and a password")
    if answer.status in PASSING_REFUSALS:
        return Retry(
            f"{venue}: HTTP {answer.status}, the venue or a firewall before it refuses requests "
            "from this address: a country block, too many requests, or a wrong base_url"
        )
    is_limit = isinstance(error, ccxt.DDoSProtection | ccxt.RateLimitExceeded)
    if is_limit or answer.status in (418, 429):
        seconds = _retry_after(answer)
        return Wait(f"{venue}: HTTP {answer.status}, wait {seconds:g} s", seconds)
    if isinstance(error, ccxt.OperationFailed) and answer.status in (404, 405):
        return VenueRefused(
            f"{venue}: HTTP {answer.status}, the address does not serve this API; check base_url"
        )
    final = (ccxt.BadRequest, ccxt.AuthenticationError, ccxt.NotSupported, ccxt.ArgumentsRequired)
    passing = (ccxt.OnMaintenance, ccxt.RequestTimeout)
    if isinstance(error, final) or (answer.status == 400 and not isinstance(error, passing)):
        return VenueRefused(f"{venue}: {_describe(error, answer)}")
    return Retry(f"{venue}: {_describe(error, answer)}")


def _describe(error: Exception, answer: HttpAnswer) -> str:
    """Return what happened, in a few words and without the URL: a URL may hold a key."""
    if answer.status is None:
        return _describe_connection(error.__cause__ or error)
    text = re.sub(r"https?://\S+", "", str(error))
    message = re.search(r'"(?:msg|message|error)"\s*:\s*\[?"([^"]{1,120})', text)
    words = without_controls(message.group(1)) if message else type(error).__name__
    return f"HTTP {answer.status}, {words}"


def _describe_connection(error: BaseException) -> str:
    """Return why there is no answer, without the address of a proxy: it may hold a password."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy answered HTTP {error.status}"
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return "the proxy cannot be reached"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLCertVerificationError):
        return (
            "its certificate is not trusted; where a proxy opens TLS, name the proxy's CA file in "
            "SSL_CERT_FILE"
        )
    return "it cannot be reached, or the connection broke"


def read_date(header: str) -> datetime | None:
    """Return the moment of a Date header, UTC; None for any other text."""
    try:
        return parsedate_to_datetime(header).astimezone(UTC)
    except (ValueError, TypeError):
        return None


def _retry_after(answer: HttpAnswer) -> float:
    """Return the header's seconds, or those until its date; DEFAULT_PAUSE for any other text."""
    header = answer.headers.get("retry-after", "")
    try:
        seconds = float(header)
    except ValueError:
        date = read_date(header)
        if date is None:
            return DEFAULT_PAUSE
        seconds = date.timestamp() - time.time()
    return max(0.0, seconds) if math.isfinite(seconds) else DEFAULT_PAUSE
