"""The command line. Commands that need no Dagster import none of it; those that do start it as
processes.
"""
