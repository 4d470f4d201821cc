"""Everything that touches Dagster's private API, each import with its reason.

`runs` ends the runs of dead processes; `launcher`, `daemon` and `celery_runs` execute runs; the
`event_log` modules and `partition_wiping` are Dagster's storage with pooled connections; `prune`
deletes old logs; `materializations` finds what a check judges.
"""
