"""Keys of the API that come from the environment, where no configuration file shows them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

VARIABLE = "CONCLAVE_API_KEY"


def with_environment_key(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the environment's key where they name none."""
    # Secrets that come from files end with a newline.
    key = os.environ.get(VARIABLE, "").rstrip("\r\n")
    return {**options, "api_key": [key]} if key and not options.get("api_key") else dict(options)
