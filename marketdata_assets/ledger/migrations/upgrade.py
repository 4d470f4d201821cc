"""Run Alembic's scripts on an open transaction."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory


def upgrade(connection: sa.Connection, found: int) -> None:
    """Bring the tables from a version to the newest. The caller writes the version and commits.

    A script's revision is the number of its version, so that the table `schema_version`, which
    earlier releases read, is enough, and Alembic has none of its own. The operations are an
    argument of each script and not `alembic.op`, which all threads of a process share: Dagster
    migrates its own tables in this process.
    """
    operations = Operations(MigrationContext.configure(connection))
    scripts = ScriptDirectory(Path(__file__).parent)
    for script in reversed(list(scripts.walk_revisions())):
        if int(script.revision) > found:
            script.module.upgrade(operations)
