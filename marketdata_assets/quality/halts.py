"""The registry of known halts. It names what the bars show; it is never trusted alone."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from marketdata_assets.model.window import Window, parse_time


class Halt(NamedTuple):
    """A halt of all of a venue's markets, as people told of it: `window` is about right, to be
    confirmed by the bars.

    Only what was told by somebody else belongs here: a row read off our own bars would be its own
    witness.
    """

    venue: str
    window: Window
    what: str
    told_by: str


_BINANCE = "binance-public-data issues 168, 365 and 368"
_OUTAGES = """
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
"""


@lru_cache
def registry() -> tuple[Halt, ...]:
    """All known halts. Adding one is one row above."""
    return tuple(
        Halt("binance", _window(*line.split()), "trading was suspended", _BINANCE)
        for line in _OUTAGES.split("\n")
        if line
    )


def known_halts(venue: str, window: Window) -> list[Halt]:
    """The halts of a venue that touch a window."""
    return [halt for halt in registry() if venue == halt.venue and halt.window & window]


def _window(start: str, end: str) -> Window:
    return Window(parse_time(start), parse_time(end))
