"""The command line: one file for each family of commands, and what they share.

`main` puts the families together, `options` has the shared options, `selection` opens the universe
and turns options into markets and windows, `output` prints. A command imports what it needs when it
runs. Commands that need Dagster start it as a process, so none of these modules imports it.
"""
