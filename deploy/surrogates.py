"""Halves of characters, which JSON can spell and no text may hold: refused wherever they stand."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deploy.openai_errors import ApiError

_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def may_hold_surrogates(raw: bytes) -> bool:
    """Whether a JSON text in UTF-8 spells a half, be it one of two that belong together."""
    return _ESCAPE.search(raw) is not None


def refuse_surrogates(body: object) -> None:
    """Raises ApiError 400 that names the field, for text in values and in names at any depth."""
    _check_text(body, "the request body", None)
    todo: list[tuple[object, str, str | None]] = [(body, "", None)]
    seen: set[int] = set()  # an object that is there many times is looked at once
    while todo:
        node, path, param = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for key, child in _items(node):
            if isinstance(key, str):
                _check_name(key, path, param)
            if isinstance(child, str) and _half(child) is None:
                continue
            if isinstance(child, str | list | dict):
                inner = f"{path}.{key}".lstrip(".") if isinstance(key, str) else f"{path}[{key}]"
                field = param or (key if isinstance(key, str) else None)
                _check_text(child, inner, field)
                todo.append((child, inner, field))


def _items(node: object) -> Iterable[tuple[str | int, object]]:
    if isinstance(node, dict):
        return node.items()
    return enumerate(node) if isinstance(node, list) else ()


def _check_name(name: str, path: str, param: str | None) -> None:
    if _half(name) is not None:
        shown = name.encode("ascii", "backslashreplace").decode()
        where = f"{path}.{shown}".lstrip(".")
        raise ApiError(f"{where}: a field's name must be valid Unicode", param=param or shown)


def _check_text(value: object, path: str, param: str | None) -> None:
    half = _half(value) if isinstance(value, str) else None
    if half is not None:
        raise ApiError(f"{path}: not valid Unicode: it holds {half} alone", param=param)


def _half(text: str) -> str | None:
    """The first one, as it was spelt."""
    found = None if text.isascii() else _SURROGATE.search(text)
    return None if found is None else found[0].encode("ascii", "backslashreplace").decode()
