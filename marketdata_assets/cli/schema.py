"""`marketdata schema`: the universe's keys as a JSON Schema, for editors."""

from __future__ import annotations

from marketdata_assets.cli.common import app, print_json


@app.command()
def schema() -> None:
    """Print the JSON Schema of the universe; an editor completes and checks the file with it."""
    from marketdata_assets.settings.schema import universe_schema

    print_json(universe_schema())
