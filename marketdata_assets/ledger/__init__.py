"""What is known of every partition, request, gap and incident, in SQLite or PostgreSQL.

`ledger` opens it and has one attribute per book; `tables` is the metadata of all tables, `records`
are the rows, and `migrations` brings the ledger of an earlier release forward.
"""
