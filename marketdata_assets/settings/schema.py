"""The JSON Schema of the universe: what a person may write, described by the docstrings of the
models and of their fields.
"""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema, NullableSchema, WithDefaultSchema

from marketdata_assets.model.timeframe import Timeframe
from marketdata_assets.settings.universe import Universe


def universe_schema() -> dict[str, Any]:
    """The schema that `data/universe.schema.json` is a copy of."""
    return Universe.model_json_schema(schema_generator=UniverseSchema, mode="validation")


class UniverseSchema(GenerateJsonSchema):
    """Adds the docstrings of fields, and leaves out null: a key that is not wanted is absent."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        """A model with the descriptions of its fields."""
        found = super().model_schema(schema)
        found["description"] = _unwrap(found["description"])
        for name, text in _read_docstrings(schema["cls"]).items():
            key = schema["cls"].model_fields[name].alias or name
            found["properties"][key]["description"] = _unwrap(text)
        return found

    def nullable_schema(self, schema: NullableSchema) -> JsonSchemaValue:
        """A value that may be None in Python, without null."""
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: WithDefaultSchema) -> JsonSchemaValue:
        """A default, unless it is null."""
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def encode_default(self, dft: Any) -> Any:
        """Timeframes by their names, as they are written."""
        if isinstance(dft, tuple):
            return [self.encode_default(one) for one in dft]
        return dft.name if isinstance(dft, Timeframe) else super().encode_default(dft)

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never: a title would repeat the key."""
        return False


def _read_docstrings(model: type) -> dict[str, str]:
    """The text that stands below each field of a class."""
    return {
        ast.unparse(field.target): ast.literal_eval(text.value)
        for definition in ast.parse(inspect.getsource(model)).body
        if isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _unwrap(text: str) -> str:
    """The text on one line: editors show a line break as a paragraph."""
    return " ".join(text.split())
