"""The values that every other room speaks about: markets, windows of time, timeframes, partitions,
tables and bars. This room imports only `errors` and does no I/O.
"""
