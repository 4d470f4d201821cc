"""Assets that got another name, one new unit for one old one."""

from __future__ import annotations

RENAMED_ASSETS = {
    "POL": "MATIC",  # polygon.technology/blog, migration from 2024-09-04
    "RENDER": "RNDR",  # know.rendernetwork.com, RNP-006, venues in 2024-07
    "S": "FTM",  # soniclabs.com, upgrade portal, venues in 2025-01
    "A": "EOS",  # vaulta.com, token swap, venues in 2025-05
    "XNO": "NANO",  # blog.nano.org, ticker change of 2021-11
    "FIRO": "XZC",  # firo.org, rebranding of 2020-10
}
"""By new name: the name before. A venue lists the new one as another market, with another id."""
