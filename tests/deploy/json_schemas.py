"""Random JSON schemas whose members are short."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_NAMES = st.text("abc_é", min_size=1, max_size=3)
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text('ab"\\é/', max_size=3))


def _strings() -> st.SearchStrategy[Schema]:
    plain = st.integers(0, 3).map(lambda n: {"type": "string", "minLength": n, "maxLength": n + 2})
    patterns = st.sampled_from(["^[a-c]{1,3}$", "^(x|yy)-[0-9]{2}$", "^é?$"])
    return plain | patterns.map(lambda pattern: {"type": "string", "pattern": pattern})


def _numbers() -> st.SearchStrategy[Schema]:
    whole = st.tuples(st.integers(-200, 200), st.integers(0, 300)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    )
    return whole | st.just({"type": "integer", "minimum": 0, "maximum": 40, "multipleOf": 5})


def _leaves() -> st.SearchStrategy[Schema]:
    enums = st.lists(_VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values})
    constants = _VALUES.map(lambda value: {"const": value})
    kinds = st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}])
    return st.one_of(_strings(), _numbers(), enums, constants, kinds)


def _arrays(items: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.builds(
        lambda inner, least, more: {
            "type": "array",
            "items": inner,
            "minItems": least,
            "maxItems": least + more,
        },
        items,
        st.integers(0, 1),
        st.integers(0, 2),
    )


@st.composite
def _objects(draw: st.DrawFn, values: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(_NAMES, values, max_size=3))
    required = (
        draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    )
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def schemas() -> st.SearchStrategy[Schema]:
    """Objects, arrays, alternatives and references, with at most a few leaves."""
    nested = st.recursive(
        _leaves(),
        lambda inner: st.one_of(
            _arrays(inner),
            _objects(inner),
            st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}),
        ),
        max_leaves=4,
    )
    shared = st.builds(
        lambda part, n: {
            "$defs": {"part": part},
            "type": "array",
            "items": {"$ref": "#/$defs/part"},
            "maxItems": n,
        },
        _leaves(),
        st.integers(0, 2),
    )
    return nested | shared
