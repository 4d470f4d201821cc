"""Small pictures for the UI: SVG in a data URI, which Dagster's Markdown shows inline. Imports no
Dagster.
"""
