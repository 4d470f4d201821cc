"""A ledger that is lost comes back: from a backup, or from the lake alone."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marketdata_assets.context import open_context
from marketdata_assets.errors import BadInput
from marketdata_assets.flows.fetch.plan import BackfillPlanner
from marketdata_assets.flows.operate.adopt import Adopter, Adoption
from marketdata_assets.flows.operate.scrub import Scrub, Scrubber
from marketdata_assets.flows.prove.gaps import GapExplainer
from marketdata_assets.flows.read.coverage import CoverageReporter
from marketdata_assets.ledger.ledger import Ledger
from marketdata_assets.ledger.tables import KEPT
from marketdata_assets.model.window import Window, to_ms
from marketdata_assets.settings.universe import Settings
from marketdata_assets.sources.sandbox.server import SandboxExchange, serve_in_thread
from marketdata_tests.conftest import Universe
from marketdata_tests.samples import BTC
from marketdata_tests.steps import lake_files, partitions, raw_file, run_derive, run_ingest, window

pytestmark = pytest.mark.server

DAYS = window("2023-12-30", "2024-01-02")
SILENT = window("2023-12-31T20:00", "2023-12-31T20:30")


@pytest.fixture
def settings(universe: Universe) -> Settings:
    """Return a universe with two months, a gap, a receipt and rows in quarantine; its exchange is
    gone.
    """

    async def tamper(request: Any, rows: list[list[Any]]) -> list[list[Any]]:
        a, b = to_ms(SILENT.start), to_ms(SILENT.end)
        kept = [row for row in rows if not a <= row[0] < b]
        for row in kept:
            if row[0] == to_ms(DAYS.start):
                row[2] = "0.01"  # a high below the low
        return kept

    exchange = SandboxExchange(now=lambda: to_ms(DAYS.end) + 86_400_000, weight_limit=10**9)
    exchange.tamper = tamper
    with serve_in_thread(exchange) as url:
        found = universe(
            url, since="2023-12-30", until="2024-01-02", now="2024-01-03", rollups="parquet"
        )
        run_ingest(found)
        run_derive(found)
    with open_context(found) as context:
        context.ledger.receipts.add("repair", found.now(), message="tried", body={"n": 1})
        explainer = context.bind(GapExplainer)
        explainer.explain(partitions(found))
    return found


def knowledge(settings: Settings) -> dict[str, Any]:
    """Return what a user sees of the ledger."""
    with open_context(settings) as context:
        every = Window(settings.since, settings.now())
        gaps = context.bind(GapExplainer).list_gaps(settings.markets, every)
        coverage = context.bind(CoverageReporter).report(settings.markets)
        return {
            "coverage": [each.as_dict() for each in coverage],
            "gaps": [each.as_dict() for each in gaps],
            "quarantine": context.ledger.quarantine.rows(None, every, limit=100),
            "receipts": [receipt.as_dict() for receipt in context.ledger.receipts.list()],
            "plan": context.bind(BackfillPlanner).plan(partitions(settings)),
        }


def kept_rows(settings: Settings) -> dict[str, int]:
    with sqlite3.connect(settings.state / "ledger.db") as db:
        counts = {t.name: db.execute(f"SELECT count(*) FROM {t.name}").fetchone()[0] for t in KEPT}
    db.close()
    return counts


def adopt(settings: Settings) -> Adoption:
    with open_context(settings) as context:
        return context.bind(Adopter).adopt()


def test_a_lost_ledger_comes_back_from_the_lake_alone(settings: Settings) -> None:
    before, rows, files = knowledge(settings), kept_rows(settings), lake_files(settings)
    assert [gap["bars"] for gap in before["gaps"]] == [1, 30]
    assert before["quarantine"]
    shutil.rmtree(settings.state)
    assert knowledge(settings)["coverage"] != before["coverage"]
    found = adopt(settings)
    assert (found.with_proofs, found.bars_only, found.refused) == (3, 0, {})
    after = knowledge(settings)
    for row in (*before["quarantine"], *after["quarantine"]):
        row.pop("request", None)  # the fetch log is not in the lake
    assert after == before
    assert kept_rows(settings) == rows
    assert lake_files(settings) == files
    assert adopt(settings) == Adoption()


def test_objects_without_the_ledgers_rows_are_bars_and_nothing_more(settings: Settings) -> None:
    before = knowledge(settings)["coverage"][0]
    shutil.rmtree(settings.state)
    shutil.rmtree(Path(settings.lake, "ledger"))
    found = adopt(settings)
    assert (found.with_proofs, found.bars_only) == (0, 2)
    (after,) = knowledge(settings)["coverage"]
    assert after["present"] == before["present"]
    assert after["unexplained"] == 31
    assert knowledge(settings)["plan"] != []


def test_what_the_ledger_knows_is_not_replaced_by_older_rows(settings: Settings) -> None:
    file = next(Path(settings.lake, "ledger").glob("*/month=2023-12/*"))
    older = file.read_bytes()
    with open_context(settings) as context:
        context.bind(GapExplainer).reopen(BTC, SILENT.start)
    assert file.read_bytes() != older
    file.write_bytes(older)
    before = knowledge(settings)
    assert adopt(settings) == Adoption()
    assert knowledge(settings) == before


@pytest.mark.parametrize("content", [b"", b"{}", b"\x1f\x8b\x08garbage", b"[1]"])
def test_a_damaged_file_is_named_and_the_others_are_adopted(
    settings: Settings, content: bytes
) -> None:
    next(Path(settings.lake, "ledger").glob("*/month=2024-01/*")).write_bytes(content)
    shutil.rmtree(settings.state)
    found = adopt(settings)
    assert (found.with_proofs, found.bars_only) == (2, 1)
    assert list(found.refused) == ["binance:BTC-USDT|2024-01-01"]


def test_rows_that_a_killed_process_could_not_save_are_saved_by_the_next(
    settings: Settings,
) -> None:
    for file in Path(settings.lake, "ledger").glob("*/*/*"):
        file.unlink()
    with sqlite3.connect(settings.state / "ledger.db") as db:
        db.execute("UPDATE partitions SET attempts = attempts + 1")
    db.close()
    with open_context(settings):
        pass
    assert len(list(Path(settings.lake, "ledger").glob("*/*/*"))) == 2


# ------------------------------------------------------------------------ whole copies
def test_a_backup_is_restored_into_either_database(
    settings: Settings, tmp_path: Path, database: str
) -> None:
    before, file = knowledge(settings), tmp_path / "backups" / "ledger.backup"
    with open_context(settings) as context:
        rows = context.ledger.copies.back_up(file)
        last = context.ledger.receipts.list()[0].id
    assert file.stat().st_mode & 0o777 == 0o600
    ledger = Ledger(tmp_path / "other", database)
    assert ledger.copies.restore(file, replace=False) == rows
    assert ledger.receipts.add("repair", settings.now(), message="x", body={}).id > last
    again = tmp_path / "again.backup"
    assert ledger.copies.back_up(again) == rows + 1
    ledger.close()
    shutil.rmtree(settings.state)
    with open_context(settings) as context:
        context.ledger.copies.restore(again, replace=False)
        with pytest.raises(BadInput, match="is not empty; `--replace`"):
            context.ledger.copies.restore(file, replace=False)
        assert context.ledger.copies.restore(file, replace=True) == rows
    assert knowledge(settings) == before


def test_a_file_that_is_no_backup_is_refused_and_changes_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    before, file = knowledge(settings), tmp_path / "x"
    os.mkfifo(tmp_path / "pipe")
    with open_context(settings) as context:
        for content in (b"", b"text" * 5000, None):
            if content is not None:
                file.write_bytes(content)
            else:
                context.ledger.copies.back_up(file)
                file.write_bytes(file.read_bytes()[:20_000])
            if content == b"":
                continue
            with pytest.raises(BadInput, match="is no backup, or is damaged"):
                context.ledger.copies.restore(file, replace=True)
        for path in (tmp_path / "none", tmp_path / "pipe", tmp_path):
            with pytest.raises(BadInput, match="cannot be read"):
                context.ledger.copies.restore(path, replace=True)
    assert knowledge(settings) == before


# ------------------------------------------------------------------------ scrub
def scrub(settings: Settings, **options: float) -> Scrub:
    with open_context(settings) as context:
        return context.bind(Scrubber).scrub(**options)


def flip(settings: Settings) -> None:
    """Flip a bit in a page, and leave size and time as they are."""
    file = raw_file(settings)
    content, status = bytearray(file.read_bytes()), file.stat()
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def lose(settings: Settings) -> None:
    raw_file(settings).unlink()


def put_older_rollup(settings: Settings) -> None:
    file = next(Path(settings.lake).glob("rollup/ohlcv_1h/*/month=2024-01/data.parquet"))
    file.write_bytes(next(Path(settings.lake).glob("rollup/ohlcv_1h/*/*12/*")).read_bytes())


def test_everything_is_read_once_a_week(settings: Settings) -> None:
    objects = len([name for name in lake_files(settings) if name.endswith("data.parquet")])
    first = scrub(settings, minutes=0.0)
    assert first.left
    rest = scrub(settings)
    assert (first.objects + rest.objects, rest.left, rest.problems) == (objects, 0, [])
    assert scrub(settings).objects == 0
    assert scrub(settings, days=0).objects == objects
    assert settings.clock
    later = settings.clock.model_copy(update={"start": DAYS.end.replace(day=9, hour=23)})
    assert scrub(settings.model_copy(update={"clock": later})).objects == 0
    later = settings.clock.model_copy(update={"start": DAYS.end.replace(day=10)})
    assert scrub(settings.model_copy(update={"clock": later})).objects == objects


@pytest.mark.parametrize("harm", [flip, lose, put_older_rollup])
def test_what_decayed_is_found_and_mended(
    settings: Settings, harm: Callable[[Settings], None]
) -> None:
    before = knowledge(settings)
    assert scrub(settings).problems == []
    harm(settings)
    (problem,) = scrub(settings, days=0).problems
    assert problem.partition == "binance:BTC-USDT|2024-01-01"
    assert knowledge(settings)["plan"] != before["plan"]
