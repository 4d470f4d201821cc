"""Dagster's daemon, which also ends the runs of dead processes.

    python -m marketdata_assets.dagster_ext.daemon run -w FILE

takes the commands and options of `dagster-daemon`.
"""

from __future__ import annotations

import logging
import sys
import threading

import dagster as dg

# The command of `dagster-daemon`. The thread below must end with it, so both are one process.
from dagster._daemon.cli import main as run_dagster_daemon

from marketdata_assets.dagster_ext.launcher import CHECK_SECONDS, ProcessRunLauncher
from marketdata_assets.dagster_ext.runs import end_dead_runs, open_instance


def main() -> None:
    """Run `dagster-daemon`; end the runs of dead processes before it starts and beside it."""
    if sys.argv[1:2] == ["run"]:
        with open_instance() as instance:
            has_processes = isinstance(instance.run_launcher, ProcessRunLauncher)
            if has_processes:  # other launchers watch their runs themselves
                end_dead_runs(instance, include_untagged=True)
        if has_processes:
            threading.Thread(target=_end_dead_runs, name="dead-runs", daemon=True).start()
    run_dagster_daemon()


def _end_dead_runs() -> None:
    with dg.DagsterInstance.get() as instance:
        while not threading.Event().wait(CHECK_SECONDS):
            try:
                end_dead_runs(instance)
            except Exception:  # a locked database, a full disk: the next time may succeed
                logging.getLogger("dagster.daemon").exception("dead runs could not be ended")


if __name__ == "__main__":
    main()
