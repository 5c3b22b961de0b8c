"""Reading a config.json leniently about types and strictly about meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A config.json that cannot be served: names the key, its value and what is allowed."""


class UnsupportedModel(ConfigError):
    """A model family or head that is not served."""


_DTYPES = ("float32", "bfloat16", "float16")


class Fields:
    """Typed access to one (sub-)object of a config.json; a key that is absent or null has its
    class default."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self._raw = raw
        self._prefix = prefix

    def error(self, key: str, allowed: str) -> ConfigError:
        """The error for `key`, in one sentence."""
        return ConfigError(f"{self._prefix}{key} is {self._raw.get(key)!r}, but must be {allowed}")

    def has(self, key: str) -> bool:
        """Whether `key` holds something other than null."""
        return self._raw.get(key) is not None

    def integer(self, key: str, default: int, minimum: int = 1) -> int:
        """An integer of at least `minimum`; 8.0 is accepted for 8."""
        value = self._raw.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self.error(key, f"an integer of at least {minimum}")
        if value < minimum:
            raise self.error(key, f"an integer of at least {minimum}")
        return int(value)

    def number(self, key: str, default: float, minimum: float = 0.0) -> float:
        """A finite number of at least `minimum`, int or float."""
        value = self.optional_number(key)
        if value is None:
            return default
        if value < minimum:
            raise self.error(key, f"a number of at least {minimum:g}")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, int or float, or None when absent or null."""
        value = self._raw.get(key)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.error(key, "a finite number or null")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; 0 and 1 are accepted."""
        value = self._raw.get(key)
        if value is None:
            return default
        if value not in (0, 1):
            raise self.error(key, "true or false")
        return bool(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of exactly `length` numbers."""
        value = self._raw.get(key)
        if (
            not isinstance(value, list | tuple)
            or len(value) != length
            or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        ):
            raise self.error(key, f"a list of {length} numbers")
        return tuple(float(v) for v in value)

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of the `allowed` strings."""
        value = self._raw.get(key)
        if value is None:
            return default
        if value not in allowed:
            raise self.error(key, "one of " + ", ".join(allowed))
        return str(value)

    def section(self, key: str) -> Fields:
        """A nested object; empty when absent or null."""
        value = self._raw.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, "an object or null")
        return Fields(value, f"{self._prefix}{key}.")

    def dtype_name(self) -> str:
        """`dtype` (Transformers 5) or `torch_dtype`; float32 when neither is given."""
        key = "dtype" if self.has("dtype") else "torch_dtype"
        return self.choice(key, "float32", _DTYPES)


def attention_heads(fields: Fields, heads: int, kv_heads: int, kv_key: str) -> None:
    """Check that key/value heads divide the query heads."""
    if heads % kv_heads:
        raise fields.error(kv_key, f"a divisor of the {heads} attention heads")


def head_width(fields: Fields, key: str, hidden_size: int, heads: int) -> int:
    """hidden_size / heads, which must be a whole number."""
    if hidden_size % heads:
        raise fields.error(key, f"a multiple of the {heads} attention heads")
    return hidden_size // heads
