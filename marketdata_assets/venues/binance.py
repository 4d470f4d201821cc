"""Binance: spot, and USD-margined futures under ccxt's `binance`."""

from __future__ import annotations

import re
from decimal import Decimal

from marketdata_assets.venues.facts import (
    Archive,
    ArchiveFormat,
    BarsEndpoint,
    MarketType,
    Tolerance,
    VenueFacts,
    list_types,
    parse_halts,
)

# exchangeInfo (2026-11): REQUEST_WEIGHT 6000 a minute; klines weigh 2, at most 1000 bars each
SPOT_ENDPOINT = BarsEndpoint(
    page_size=1000,
    requests_per_minute=3000,
    klines_method="publicGetKlines",
    weight_per_minute=6000,
)
# exchangeInfo (2026-11): REQUEST_WEIGHT 2400 a minute; klines weigh 2 up to 499 bars, 5 from 500
LINEAR_ENDPOINT = BarsEndpoint(
    page_size=499,
    requests_per_minute=1200,
    klines_method="fapiPublicGetKlines",
    weight_per_minute=2400,
)
# ccxt 4.5.90, parse_ohlcv: column 5 counts contracts of some USD, column 7 the base currency
INVERSE_ENDPOINT = BarsEndpoint(page_size=500, requests_per_minute=1200, row_keys={"trades": 8})

KLINES_FORMAT = ArchiveFormat(
    name="binance",
    columns=(
        *("open_time", "open", "high", "low", "close", "volume", "close_time", "quote_volume"),
        *("trades", "taker_buy_volume", "taker_buy_quote_volume", "ignore"),
    ),
    file_name=re.compile(
        r"((?P<kind>UMFUT|CMFUT)-)?(?P<id>\w+)-(?P<timeframe>\d+(s|m|h|d|w|mo))"
        r"-(?P<date>\d{4}-\d\d(-\d\d)?)"
    ),
    spot_has_header=False,  # its futures files have one
)
_KLINES = "monthly/klines/{id}/{timeframe}/{id}-{timeframe}-{month}.zip"
# the file of a month appears on the first Monday after it (README of binance-public-data)
ARCHIVE = Archive(
    format=KLINES_FORMAT,
    market_types=(MarketType.SPOT, MarketType.LINEAR),
    month_urls={
        MarketType.SPOT: f"https://data.binance.vision/data/spot/{_KLINES}",
        MarketType.LINEAR: f"https://data.binance.vision/data/futures/um/{_KLINES}",
    },
    files_per_month=2,  # the zip and its CHECKSUM
)

HALTS = parse_halts(
    """
2017-09-06T16:00 2017-09-06T23:00
2017-12-04T06:00 2017-12-04T06:50
2017-12-18T10:00 2017-12-18T10:15
2017-12-18T12:29 2017-12-18T13:35
2018-01-04T03:00 2018-01-04T05:07
2018-02-08T00:28 2018-02-09T10:00
2018-02-10T06:00 2018-02-10T06:16
2018-02-11T04:00 2018-02-11T04:36
2018-06-26T02:00 2018-06-26T12:00
2018-06-27T13:00 2018-06-27T14:46
2018-07-04T00:22 2018-07-04T08:00
2018-10-19T06:00 2018-10-19T09:30
2018-11-14T02:00 2018-11-14T09:00
2019-03-12T02:00 2019-03-12T08:00
2019-05-15T03:00 2019-05-15T13:00
2019-06-07T21:13 2019-06-07T22:16
2020-02-09T02:00 2020-02-09T03:00
2020-02-19T11:35 2020-02-19T17:30
2020-03-04T09:21 2020-03-04T11:30
2020-04-25T02:00 2020-04-25T04:30
2020-06-28T02:00 2020-06-28T05:30
2020-11-30T06:00 2020-11-30T07:00
2020-12-21T13:47 2020-12-21T18:00
2020-12-25T02:00 2020-12-25T03:00
2021-02-11T03:40 2021-02-11T05:00
2021-03-06T02:00 2021-03-06T03:30
2021-04-20T02:00 2021-04-20T04:30
2021-04-25T04:01 2021-04-25T08:45
2021-08-13T02:00 2021-08-13T06:30
2021-09-29T07:00 2021-09-29T09:00
2023-03-24T12:40 2023-03-24T14:00
""",
    description="trading was suspended",
    reported_by="binance-public-data issues 168, 365 and 368",
)

FLOATING_POINT_SUM = Tolerance(
    absolute=Decimal("1e-8"),
    relative=Decimal("2.7e-16"),
    reason="the venue added quote volumes up in binary floating point: the last digit of 53 bits, "
    "printed with 8 decimals",
    measured="4h beside 1h of BTC/USDT, 2020-02 and 03: 197 values of 359 bars, at most 5e-8 and, "
    "above 1e-8, 2.61e-16; none in 2023 and 2024",
)

FACTS = VenueFacts(
    venue="binance",
    endpoints={
        MarketType.SPOT: SPOT_ENDPOINT,
        MarketType.LINEAR: LINEAR_ENDPOINT,
        MarketType.INVERSE: INVERSE_ENDPOINT,
    },
    markets_option=list_types(spot=["spot"], linear=["linear"], inverse=["inverse"]),
    archive=ARCHIVE,
    halts=HALTS,
    tolerances={
        "quote_volume": FLOATING_POINT_SUM,
        "taker_buy_quote_volume": FLOATING_POINT_SUM,
    },
)
