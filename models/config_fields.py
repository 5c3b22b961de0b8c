"""Reading a config.json leniently about types and strictly about meaning."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from typing import Any


class ConfigError(ValueError):
    """A config.json that cannot be served: names the key, its value and what is allowed."""


class UnsupportedModel(ConfigError):
    """A model family or head that is not served."""


# No size of a model comes near; products of larger ones do not fit a tensor's 64-bit sizes.
_LARGEST = 2**40
_DTYPES = ("float32", "bfloat16", "float16")


class Fields:
    """Typed access to one (sub-)object of a config.json; a key that is absent or null has its
    class default. Remembers which keys were read, so that the others can be named."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self._raw = raw
        self._prefix = prefix
        self._read: set[str] = set()
        self._sections: dict[str, Fields] = {}

    def _get(self, key: str) -> Any:
        self._read.add(key)
        return self._raw.get(key)

    def error(self, key: str, allowed: str) -> ConfigError:
        """The error for `key`, in one sentence."""
        value = shown(self._raw[key]) if key in self._raw else "not given"
        return ConfigError(f"{self._prefix}{key} is {value}, but must be {allowed}")

    def has(self, key: str) -> bool:
        """Whether `key` holds something other than null."""
        return self._get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether `key` is there and null, which is not everywhere the same as absent."""
        return key in self._raw and self._get(key) is None

    def is_auto(self, key: str) -> bool:
        """Whether the value is to be worked out from others."""
        return bool(self._get(key) == "auto")

    @property
    def is_empty(self) -> bool:
        """Whether the object holds no key at all."""
        return not self._raw

    def spelling(self, key: str, *others: str) -> str:
        """The one of several names of a value that is given; they may not contradict each other."""
        given = [name for name in (key, *others) if self.has(name)]
        for other in given[1:]:
            if self._raw[other] != self._raw[given[0]]:
                raise self.error(other, f"the same as {self._prefix}{given[0]}")
        return given[0] if given else key

    def integer(self, key: str, default: int, minimum: int = 1) -> int:
        """An integer from `minimum` to 2**40; 8.0 is accepted for 8."""
        value = self._get(key)
        if value is None:
            return default
        if not _is_number(value) or value != int(value) or not minimum <= value <= _LARGEST:
            raise self.error(key, f"an integer of at least {minimum} and at most {_LARGEST}")
        return int(value)

    def optional_integer(self, key: str, minimum: int = 1) -> int | None:
        """An integer from `minimum` to 2**40, or None when absent or null."""
        return self.integer(key, minimum, minimum) if self.has(key) else None

    def number(self, key: str, default: float, minimum: float = 0.0) -> float:
        """A finite number of at least `minimum`, int or float."""
        value = self.optional_number(key)
        if value is None:
            return default
        if value < minimum:
            raise self.error(key, f"a number of at least {minimum:g}")
        return value

    def positive(self, key: str, default: float) -> float:
        """A finite number above 0, int or float."""
        value = self.number(key, default)
        if value == 0.0:
            raise self.error(key, "a number above 0")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, int or float, or None when absent or null."""
        value = self._get(key)
        if value is None:
            return None
        if not _is_number(value):
            raise self.error(key, "a finite number or null")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; 0 and 1 are accepted."""
        value = self._get(key)
        if value is None:
            return default
        if value not in (0, 1):
            raise self.error(key, "true or false")
        return bool(value)

    def positives(self, key: str, length: int, why: str) -> tuple[float, ...]:
        """A list of exactly `length` numbers above 0; `why` says where the length is from."""
        value = self._get(key)
        if (
            not isinstance(value, list | tuple)
            or len(value) != length
            or not all(_is_number(v) and v > 0 for v in value)
        ):
            raise self.error(key, f"a list of {length} numbers above 0, {why}")
        return tuple(float(v) for v in value)

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of the `allowed` strings."""
        value = self._get(key)
        if value is None:
            return default
        if value not in allowed:
            raise self.error(key, "one of " + ", ".join(allowed))
        return str(value)

    def labels(self, key: str) -> tuple[str, ...]:
        """An object from the ids 0, 1, 2 … (strings in JSON) to one name each, by id."""
        value = self._get(key)
        if isinstance(value, Mapping) and value:
            named = {str(label_id): str(name) for label_id, name in value.items()}
            if named.keys() == {str(label_id) for label_id in range(len(named))}:
                return tuple(named[str(label_id)] for label_id in range(len(named)))
        raise self.error(key, "an object that names each id from 0 on, without a gap")

    def only(self, key: str, allowed: object, why: str) -> None:
        """A key that may only be absent, null or `allowed`: another value asks for what is not
        served, or means different things in different versions of the reference."""
        value = self._get(key)
        if value is not None and value != allowed:
            raise self.error(key, f"{json.dumps(allowed)}: {why}")

    def section(self, key: str) -> Fields:
        """A nested object; empty when absent or null."""
        value = self._get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, "an object or null")
        return self._sections.setdefault(key, Fields(value, f"{self._prefix}{key}."))

    def dtype_name(self) -> str:
        """`dtype` (Transformers 5) or `torch_dtype`; float32 when neither is given."""
        names = [key for key in ("dtype", "torch_dtype") if self.has(key)]
        chosen = [self.choice(key, "float32", _DTYPES) for key in names]
        return chosen[0] if chosen else "float32"

    def unknown(self, without_effect: Set[str]) -> list[str]:
        """Keys, nested ones included, that hold something and were neither read nor are listed.

        A nested key is listed by its full name, `attn_config.attn_pdrop`, or, where it may appear
        in any object, by its own.
        """
        names = [
            self._prefix + key
            for key, value in self._raw.items()
            if value not in (None, {})
            and key not in self._read
            and not {key, self._prefix + key} & without_effect
        ]
        nested = [name for part in self._sections.values() for name in part.unknown(without_effect)]
        return names + nested


def check_kv_heads(fields: Fields, key: str, kv_heads: int, heads_key: str, heads: int) -> None:
    """Check that key/value heads divide the query heads; `fields` holds `key`."""
    if heads % kv_heads:
        raise fields.error(key, f"a divisor of {heads_key} ({heads})")


def head_width(fields: Fields, key: str, hidden_size: int, heads_key: str, heads: int) -> int:
    """hidden_size / heads, which must be a whole number."""
    if hidden_size % heads:
        raise fields.error(key, f"a multiple of {heads_key} ({heads})")
    return hidden_size // heads


def rope_kind(fields: Fields, rope: Fields, allowed: tuple[str, ...]) -> str:
    """The kind of RoPE that `rope` (a section of `fields`) asks for, `default` where it is silent.

    `rope_type` is the newer spelling of `type`.
    """
    for part in (fields, rope):
        part.only("partial_rotary_factor", 1.0, "RoPE turns all of a head")
    return rope.choice(rope.spelling("rope_type", "type"), "default", allowed)


def _is_number(value: object) -> bool:
    """A finite number of JSON's that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
