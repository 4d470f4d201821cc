"""What keeps the data complete: backfill, refresh, pipeline, repair, retirement, health, alerts.

`pipeline` joins fetching, rollups and checks of one month, for Dagster and for the CLI.
"""
