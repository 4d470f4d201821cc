"""Requests to S3: which are repeated, the text of an error, and the usual AWS variables."""

from __future__ import annotations

import os
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from marketdata_assets.errors import StoreFailed
from marketdata_assets.network import ca_file
from marketdata_assets.retry import retry

MAX_ATTEMPTS = 5
CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 20
"""How long a server may send nothing after it has accepted a request."""
_KEYS = (
    "these keys may not do that; give their owner s3:GetObject, s3:PutObject, s3:DeleteObject "
    "and s3:ListBucket on it"
)
_EXPIRED = "the credentials have expired; get new ones"
_REGION = "the bucket lies elsewhere; set AWS_REGION, or mend AWS_ENDPOINT_URL"
_ELSEWHERE = "the server points elsewhere, where nothing is sent; mend AWS_ENDPOINT_URL"
_SILENT = "the server does not answer; check AWS_ENDPOINT_URL and the network"
_BROKEN = "the server's answers break off; check AWS_ENDPOINT_URL and the network"
_FOREIGN = "that is no answer of S3; check AWS_ENDPOINT_URL"
_ADVICE = {
    "NoSuchBucket": "there is no such bucket; make it, or mend `lake:`",
    "AccessDenied": _KEYS,
    "403": _KEYS,
    "InvalidAccessKeyId": "the server has no such AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the AWS_SECRET_ACCESS_KEY does not fit its key id",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "InvalidToken": "the server does not accept this AWS_SESSION_TOKEN; get new credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "TemporaryRedirect": _ELSEWHERE,
    "302": _ELSEWHERE,
    "307": _ELSEWHERE,
    "308": _ELSEWHERE,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "SlowDown": "the server refuses so many requests; the next run continues",
    "NoCredentialsError": (
        "there are no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "a profile or a role"
    ),
    "EndpointConnectionError": _SILENT,
    "ConnectTimeoutError": _SILENT,
    "ReadTimeoutError": _SILENT,
    "ConnectionClosedError": _BROKEN,
    "ResponseStreamingError": _BROKEN,
    "IncompleteReadError": _BROKEN,
    "ProtocolError": _BROKEN,
    "FlexibleChecksumError": "the answer differs from what was stored; check the network",
    "SSLError": "the server's certificate is not trusted; set AWS_CA_BUNDLE",
    "ResponseParserError": _FOREIGN,
}


class S3RefusedError(StoreFailed):
    """The server answered with an error; `code` is S3's own."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class S3Client:
    """Requests about the objects below `s3://bucket/prefix`, by paths relative to the prefix.

    Endpoint, region and credentials come from the usual AWS variables, profiles or roles.
    """

    def __init__(self, location: str) -> None:
        parts = urlsplit(location)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._client: Any = None

    def key(self, path: str) -> str:
        """Return the key of a path in the bucket."""
        return f"{self._prefix}/{path}".lstrip("/")

    def uri(self, path: str) -> str:
        """Return `s3://bucket/key` of a path."""
        return f"s3://{self._bucket}/{self.key(path)}"

    def call(self, verb: str, path: str, **kwargs: Any) -> dict[str, Any]:
        """Make one request (`verb` is a method of boto's client; `path` names it in errors).

        An answer that breaks off, or that says what is missing in a text that cannot be read, is
        requested again, MAX_ATTEMPTS times in all. Where the answer has a body, it is complete
        under `Content`. Raises S3RefusedError where the server answers with an error, else
        StoreFailed.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return retry(
                lambda: self._request(verb, **kwargs),
                # botocore repeats everything else by itself
                should_retry=lambda error: (
                    isinstance(error, _incomplete_answers()) or _error_code(error) == "404"
                ),
                pauses=[0.0] * (MAX_ATTEMPTS - 1),
                sleep=lambda _: None,
            )
        except ClientError as error:
            code = str(_error_code(error))
            raise S3RefusedError(self._message(path, code), code) from None
        except (*_incomplete_answers(), BotoCoreError, ValueError) as error:
            raise StoreFailed(self._message(path, type(error).__name__)) from None

    def set_storage_class(self, path: str, storage_class: str) -> None:
        """Copy an object onto itself, into another storage class."""
        self.call(
            "copy_object",
            path,
            Key=self.key(path),
            CopySource={"Bucket": self._bucket, "Key": self.key(path)},
            StorageClass=storage_class,
            MetadataDirective="COPY",
        )

    def _request(self, verb: str, **kwargs: Any) -> dict[str, Any]:
        from botocore.exceptions import ReadTimeoutError, ResponseStreamingError
        from botocore.parsers import ResponseParserError

        self._client = self._client or create_client()
        answer: dict[str, Any] = getattr(self._client, verb)(Bucket=self._bucket, **kwargs)
        if verb in ("get_object", "put_object") and "ETag" not in answer:
            raise ResponseParserError
        if "Body" in answer:
            try:
                answer["Content"] = bytes(answer["Body"].read())
            except ReadTimeoutError as error:
                raise ResponseStreamingError(error=error) from None
        return answer

    def _message(self, path: str, code: str) -> str:
        advice = _ADVICE.get(code, "check the bucket, AWS_ENDPOINT_URL and the AWS keys")
        return f"{self.uri(path)}: {code}; {advice}"


def _error_code(error: Exception) -> str | None:
    """Return the code of an error answer; its status where its text cannot be read."""
    response = getattr(error, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code


def create_client() -> Any:
    """Create boto's S3 client. It repeats by itself what may pass: 503, 500, resets, timeouts."""
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=READ_TIMEOUT_SECONDS,
        retries={"mode": "standard", "max_attempts": MAX_ATTEMPTS},
    )
    client = _create_session().create_client(
        "s3", region_name=get_region(), config=config, verify=ca_file("AWS_CA_BUNDLE")
    )
    client.meta.events.register_last("before-call.s3.HeadBucket", _follow_one_redirect)
    return client


def _follow_one_redirect(context: dict[str, Any], **_: Any) -> None:
    """Mark a request as redirected already: where a server answers only that a bucket has moved,
    and not where to, botocore would repeat the request without end.
    """
    context["s3_redirect"] = {"redirected": True}


def _create_session() -> Any:
    """Create a session of our own, because boto3's shared one is unsafe in two threads at once."""
    from botocore.session import Session

    session = Session()
    session.register_component("data_loader", _load_service_data())
    return session


@cache
def _load_service_data() -> Any:
    """Load botocore's description of S3, once, because that takes 60 ms."""
    from botocore.loaders import create_loader

    return create_loader()


def get_region() -> str | None:
    """Return the region of the variables that AWS's tools read, or of the profile.

    botocore alone does not read AWS_REGION.
    """
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    region: str | None = named or _create_session().get_config_variable("region")
    return region


def get_endpoint_url() -> str | None:
    """Return the URL of a server other than Amazon's, from the usual variables."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _incomplete_answers() -> tuple[type[Exception], ...]:
    """Return what botocore raises for an answer that ends too early, that differs from what was
    stored, or that does not come from S3.
    """
    from botocore.exceptions import (
        FlexibleChecksumError,
        IncompleteReadError,
        ResponseStreamingError,
    )
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return (
        FlexibleChecksumError,
        IncompleteReadError,
        ResponseStreamingError,
        ResponseParserError,
        HTTPError,
    )
