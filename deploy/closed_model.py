"""Objects in requests that hold nothing but what is known here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

_MOST_KEYS = 64


class Closed(BaseModel):
    """A key that nobody here knows would change what is asked for: it is refused by name."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: Any) -> Any:
        # Before each of them becomes an error of its own.
        if isinstance(value, dict) and len(value) > _MOST_KEYS:
            known = ", ".join(field.alias or name for name, field in cls.model_fields.items())
            raise ValueError(f"{len(value)} keys; allowed are {known}")
        return value
