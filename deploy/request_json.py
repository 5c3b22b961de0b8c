"""From a request's bytes to JSON values, by RFC 8259 and nothing beyond it."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable
from typing import Any, NoReturn

from deploy.openai_errors import ApiError
from deploy.surrogates import may_hold_surrogates, refuse_surrogates

MAX_DEPTH = 100
"""Objects and lists inside each other; what reads them (templates, grammars) often recurses."""
_TOO_MANY_DIGITS = 10**4300
"""Python's own bound, for texts."""


def decode_json(raw: bytes) -> object:
    """The value of a body in UTF-8, with or without a byte-order mark. Raises ApiError 400.

    Stricter than Python's own: no NaN, no infinity (also not as 1e999), no name twice in an
    object, because one of the two values would silently be dropped, no halves of characters.
    """
    if not raw:
        raise ApiError("the request body is empty: it must be a JSON object")
    try:
        value = json.loads(
            raw.decode("utf-8-sig"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise ApiError(
            f"the request body is not valid UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        raise ApiError(f"the request body is not valid JSON: {error}") from None
    except ValueError:  # Python's own bound on digits
        raise _long_integer() from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and is_deep(value):
        raise _too_deep()
    if may_hold_surrogates(raw):
        refuse_surrogates(value)
    return value


def check_json(body: object) -> None:
    """Refuse what `decode_json` never returns, in a body that is no bytes. Raises ApiError 400."""
    level = [body]
    for _ in range(MAX_DEPTH + 1):
        inner: dict[int, Any] = {}  # an object that is there many times is looked at once
        for node in level:
            for child in _children(node):
                if isinstance(child, dict | list):
                    inner[id(child)] = child
                else:
                    _check_scalar(child)
        if not inner:
            break
        level = list(inner.values())
    else:
        raise _too_deep()
    if not isinstance(body, dict | list):
        _check_scalar(body)
    refuse_surrogates(body)


def _children(node: object) -> Iterable[Any]:
    if not isinstance(node, dict):
        return node if isinstance(node, list) else ()
    for name in node:
        if not isinstance(name, str):
            raise _no_json(f"a name that is no text but {_type_name(name)}")
    return node.values()


def _check_scalar(value: object) -> None:
    if value is None or isinstance(value, str | bool):
        return
    if isinstance(value, int):
        if abs(value) >= _TOO_MANY_DIGITS:
            raise _long_integer()
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _no_json(f"{value:g}, which is no JSON number")
    else:
        raise _no_json(f"{_type_name(value)}, which is no JSON type")


def _type_name(value: object) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _no_json(what: str) -> ApiError:
    return ApiError(f"the request body is not valid JSON: it holds {what}")


def _long_integer() -> ApiError:
    return ApiError("the request body holds an integer with too many digits")


def _too_deep() -> ApiError:
    return ApiError(f"the request body is nested more than {MAX_DEPTH} levels deep")


def is_deep(value: Any) -> bool:
    """Whether a JSON value is nested more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(f"the request body is not valid JSON: {name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ApiError(f"the request body holds a number out of range: {reprlib.repr(digits)}")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        # `add` returns None: the first name that is there already.
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        shown = twice.encode("ascii", "backslashreplace").decode()
        raise ApiError(f"{shown}: given more than once in one object", param=shown)
    return found
