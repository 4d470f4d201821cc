"""Dagster definitions only: a body reads its partitions, calls one flow, and publishes the results.

`jobs` builds all definitions; `assets`, `consolidated` and `delta` hold assets, `checks` their
checks, `sensors` and `schedules` what launches runs, `repair` and `maintenance` jobs. `results` and
`pipeline_results` publish what flows return. `partitions`, `specs`, `tags` and `instance` are what
they have in common.
"""
