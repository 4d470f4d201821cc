"""The universe and every limit: `fields` reads single values, `parts` and `universe` are the models
with a description per key, `load` reads the YAML file and the environment once, at a door, and
`schema` is the JSON Schema for editors.
"""
