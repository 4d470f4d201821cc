"""The way out of a company's network: a CA file of its own."""

from __future__ import annotations

import os
from pathlib import Path

from marketdata_assets.errors import BadInput

CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""The usual variables that name a file of trusted certificates; the first one that is set counts.
"""


def ca_file(*first: str) -> str | None:
    """Return the file of trusted certificates (PEM) that the environment names; None for the
    system's. `first` are variables that count before the usual ones. Raises BadInput.
    """
    for name in (*first, *CA_VARIABLES):
        if path := os.environ.get(name):
            if not Path(path).is_file():
                raise BadInput(f"environment {name}: there is no file {path}; name a PEM file")
            return path
    return None
