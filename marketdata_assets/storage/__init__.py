"""Where bars are stored: Parquet objects in a folder or in S3, the DuckDB warehouse, Delta tables
and lock files. DuckDB, Delta and AWS libraries are imported in this room only.
"""
