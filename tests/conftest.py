"""Which tests run where: slow ones on request, GPU ones where there is a GPU."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this run cannot or should not do, with the reason."""
    skips = {
        "slow": (not os.environ.get("CONCLAVE_SLOW"), "slow: set CONCLAVE_SLOW=1 to run it"),
        "gpu": (not torch.cuda.is_available(), "needs a CUDA device"),
    }
    for item in items:
        for marker, (skip, reason) in skips.items():
            if skip and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
