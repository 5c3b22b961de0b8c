"""JSON schemas that refer to themselves without end: no finite JSON keeps to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

_MOST_ROUNDS = 20
"""Longer chains of references than this are left to the compiler of grammars."""


def endless_reference(schema: Mapping[str, Any] | bool) -> str | None:
    """The first `$ref` into the schema that nothing finite satisfies; None where there is none."""
    found = {ref: _target(schema, ref) for ref in _references(schema)}
    targets = {ref: target for ref, target in found.items() if target is not None}
    finite: set[str] = {ref for ref in found if ref not in targets}
    for _ in range(_MOST_ROUNDS):
        more = {
            ref
            for ref, target in targets.items()
            if ref not in finite and _is_finite(target, finite)
        }
        if not more:
            return next((ref for ref in found if ref not in finite), None)
        finite |= more
    return None


def _references(schema: object) -> Iterator[str]:
    """Every one, and some that are none: `$ref` as the name of a property."""
    todo = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, Mapping):
            if isinstance(ref := node.get("$ref"), str):
                yield ref
            todo += reversed(list(node.values()))
        elif isinstance(node, list):
            todo += reversed(node)


def _target(schema: object, ref: str) -> Mapping[str, Any] | None:
    """What a JSON pointer of the schema's own names; None for all else."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    node = schema
    for part in unquote(ref).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node if isinstance(node, Mapping) else None


def _is_finite(schema: object, finite: set[str]) -> bool:
    """Whether something finite keeps to it, given the references of which that is known."""
    if not isinstance(schema, Mapping):
        return True
    ref = schema.get("$ref")
    if isinstance(ref, str) and ref not in finite:
        return False
    needed = [*_list(schema, "allOf"), *_needed_parts(schema)]
    if not all(_is_finite(each, finite) for each in needed):
        return False
    choices = [found for key in ("anyOf", "oneOf") if (found := _list(schema, key))]
    return all(any(_is_finite(each, finite) for each in found) for found in choices)


def _needed_parts(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of what every instance holds."""
    if schema.get("type") == "object":
        properties = schema.get("properties")
        names = [name for name in _list(schema, "required") if isinstance(name, str)]
        if not isinstance(properties, Mapping):
            return []
        return [properties[name] for name in names if name in properties]
    if schema.get("type") == "array" and _is_positive(schema.get("minItems")):
        firsts = _list(schema, "prefixItems")
        return firsts[:1] if firsts else [schema.get("items")]
    return []


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value >= 1
