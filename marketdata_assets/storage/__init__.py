"""Where it rests: Parquet objects, the DuckDB warehouse, the SQLite ledger. The only room that knows a
storage engine.
"""
