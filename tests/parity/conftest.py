"""The corrections of the oracle as fixtures, one per entry of `remedies.REMEDIES`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity import remedies


@pytest.fixture
def rope_base_from_attn_config() -> Any:
    return remedies.rope_base_from_attn_config


@pytest.fixture
def clip_nothing() -> Any:
    return remedies.clip_nothing


@pytest.fixture
def default_rope_base() -> Any:
    return remedies.default_rope_base


@pytest.fixture
def float_weight_norm() -> Any:
    return remedies.float_weight_norm


@pytest.fixture
def longrope_switches_factors() -> Any:
    return remedies.longrope_switches_factors


@pytest.fixture
def longrope_context() -> Any:
    return remedies.longrope_context


@pytest.fixture
def full_forward() -> Any:
    return remedies.full_forward


@pytest.fixture
def corrected(rope_base_from_attn_config: Any, longrope_switches_factors: Any) -> Any:
    """Transformers' model of a tiny checkpoint of any family, with what its family needs."""
    corrections = {"dbrx": rope_base_from_attn_config, "phimoe": longrope_switches_factors}

    def load(folder: Path) -> Any:
        model = remedies.load(folder)
        correct = corrections.get(model.config.model_type)
        return correct(model) if correct else model

    return load
