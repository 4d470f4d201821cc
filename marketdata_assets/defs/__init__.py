"""Dagster's door, thin: an asset body reads its keys, calls one flow, returns the result as
metadata.
"""
