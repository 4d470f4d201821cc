"""From a venue or a file to stored raw bars: plan, request, resolve, store.

`ingest` is the loop over partitions, `collect` the requests of one, `answers` what they say
together, `partition_store` what is written; `imports` and `replay` bring rows that no venue sent.
"""
