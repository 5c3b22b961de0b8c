"""Request schemas as the API really takes them: null for absent, and what is refused by name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from deploy.openai_errors import Json
from deploy.unsupported import IGNORED_FIELDS, REFUSED_FIELDS, REMOVED_FIELDS, WITHOUT_EFFECT

# What neutral values are made of: those that a refused field allows are found by trying.
_CANDIDATES: tuple[Any, ...] = (
    *([], {}, False, True, 0, 1, "", "none", "auto"),
    *({"type": "text"}, ["text"], "left", "medium", -1),
)


def complete_request_schema(schemas: Json, model: type[BaseModel], *, strict: bool) -> None:
    """Add to a request's schema what its pydantic model does not say."""
    schema = schemas[model.__name__]
    properties: Json = schema["properties"]
    for name, field in properties.items():
        if name not in schema.get("required", ()):
            properties[name] = _nullable(field)
    for name, (allowed, words) in REFUSED_FIELDS.items():
        if name not in model.model_fields:
            neutral = [value for value in _CANDIDATES if allowed(value)]
            properties[name] = {
                "description": f"Not available in this version; allowed are null and {words}.",
                "enum": [None, *neutral],
            }
    for name, instead in REMOVED_FIELDS.items():
        properties[name] = {"description": f"Not available any more; use {instead}.", "const": None}
    for name in sorted(IGNORED_FIELDS - model.model_fields.keys()):
        properties[name] = {"description": "Accepted; it has no effect on the answer."}
    for name, (_, why) in WITHOUT_EFFECT.items():
        properties[name] = {"description": f"Accepted; it has no effect: {why}."}
    if strict:
        schema["additionalProperties"] = False
        if "StreamOptions" in schemas:
            schemas["StreamOptions"]["additionalProperties"] = False


def _nullable(field: Json) -> Json:
    """A field that is null is as good as absent."""
    options = field.get("anyOf")
    if options is None:
        about = ("title", "description", "default")
        kept: Json = {key: value for key, value in field.items() if key in about}
        rest = {key: value for key, value in field.items() if key not in about}
        return {**kept, "anyOf": [rest, {"type": "null"}]}
    if {"type": "null"} in options:
        return field
    return {**field, "anyOf": [*options, {"type": "null"}]}
