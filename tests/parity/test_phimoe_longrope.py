"""PhiMoE's LongRoPE: which factors and which multiplier, for which sequence, from which keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config_fields import ConfigError
from models.registry import load_config
from tests.models.driver import tokens_of
from tests.parity.battery import assert_close, assert_everywhere, assert_same_bits, assert_visible
from tests.parity.cases import case
from tests.parity.executors import LocalRunner, pipeline
from tests.parity.remedies import drop_keys, edit_config, load, logits_of
from tests.parity.session import Session, in_one_batch
from tests.tiny import write_tiny

Remedy = Callable[..., Any]

ORIGINAL = 16
THETA = 10000.0
SHORT = [1.0 + 0.05 * i for i in range(8)]
LONG = [2.0 + 0.4 * i for i in range(8)]
SCALING = {
    "short_factor": SHORT,
    "long_factor": LONG,
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": ORIGINAL,
}


def tiny(folder: Path, **rope: Any) -> Path:
    """A tiny PhiMoE whose original context is 16 tokens."""
    scaling = {**SCALING, **rope}
    return write_tiny("phimoe", folder, num_hidden_layers=2, rope_parameters=scaling)


def in_one_regime(folder: Path, scratch: Path, which: str, tokens: list[int]) -> Tensor:
    """Logits of uncorrected Transformers on the same weights with only one regime to choose."""
    same = {
        key: value
        for part in ("short", "long")
        for key, value in (
            (f"{part}_factor", LONG if which == "long" else SHORT),
            (f"{part}_mscale", SCALING[f"{which}_mscale"]),
        )
    }
    return logits_of(load(tiny(scratch, **same)), [tokens])[0]


@pytest.mark.parametrize("count", [ORIGINAL, ORIGINAL + 1])
def test_why_the_factors_are_corrected(
    tmp_path: Path, longrope_switches_factors: Remedy, count: int
) -> None:
    folder, tokens = tiny(tmp_path / "model"), tokens_of(1, count)
    plain = logits_of(load(folder), [tokens])[0]
    corrected = logits_of(longrope_switches_factors(load(folder)), [tokens])[0]
    which = "long" if count > ORIGINAL else "short"
    assert_close(corrected, in_one_regime(folder, tmp_path / which, which, tokens), which)
    if which == "long":
        assert_visible(plain, corrected)
    else:
        assert_close(plain, corrected, "within the original context")


@pytest.mark.parametrize("count", [ORIGINAL, ORIGINAL + 1])
def test_the_corrected_angles_are_the_papers(
    tmp_path: Path, longrope_switches_factors: Remedy, count: int
) -> None:
    rotary = longrope_switches_factors(load(tiny(tmp_path))).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), position_ids=torch.arange(count)[None])
    factors, scale = (LONG, 1.3) if count > ORIGINAL else (SHORT, 1.1)
    for j, factor in enumerate(factors):
        angle = (count - 1) / (factor * THETA ** (2 * j / 16))
        assert math.isclose(float(cos[0, -1, j]), scale * math.cos(angle), abs_tol=1e-5)
        assert math.isclose(float(sin[0, -1, j]), scale * math.sin(angle), abs_tol=1e-5)


@case(20, "PhiMoE", "LongRoPE up to the boundary (one less, and exactly): the short regime")
def test_up_to_the_boundary(tmp_path: Path, longrope_switches_factors: Remedy) -> None:
    folder = tiny(tmp_path / "model")
    sequences = [tokens_of(2, ORIGINAL - 1), tokens_of(3, ORIGINAL)]
    expected = logits_of(longrope_switches_factors(load(folder)), sequences)
    long = in_one_regime(folder, tmp_path / "long", "long", sequences[1])
    assert_visible(expected[1], long)
    assert_everywhere(folder, sequences, expected)


@case(21, "PhiMoE", "LongRoPE one token beyond the boundary: long factors and long multiplier")
def test_beyond_the_boundary(tmp_path: Path, longrope_switches_factors: Remedy) -> None:
    folder = tiny(tmp_path / "model")
    # The shortest is also prefilled in two chunks, of which the first lies within the boundary.
    sequences = [tokens_of(4, ORIGINAL + 1), tokens_of(5, 2 * ORIGINAL + 1)]
    expected = logits_of(longrope_switches_factors(load(folder)), sequences)
    short = in_one_regime(folder, tmp_path / "short", "short", sequences[0])
    assert_visible(expected[0], short)
    assert_everywhere(folder, sequences, expected)


@case(22, "PhiMoE", "LongRoPE that switches its multiplier alone, and its factors alone")
@pytest.mark.parametrize(
    "same",
    [
        pytest.param({"long_factor": SHORT}, id="only the multiplier"),
        pytest.param({"long_mscale": 1.1}, id="only the factors"),
    ],
)
def test_one_of_the_two_switches(
    tmp_path: Path, longrope_switches_factors: Remedy, same: dict[str, Any]
) -> None:
    folder = tiny(tmp_path / "model", **same)
    sequences = [tokens_of(6, ORIGINAL), tokens_of(7, ORIGINAL + 1), tokens_of(8, ORIGINAL + 9)]
    expected = logits_of(longrope_switches_factors(load(folder)), sequences)
    short = in_one_regime(folder, tmp_path / "short", "short", sequences[1])
    assert_visible(expected[1], short)
    assert_everywhere(folder, sequences, expected)
    assert_everywhere(folder, sequences[1:], expected[1:])


@case(24, "PhiMoE", "sequences on both sides of the boundary in one batch: each as if alone")
@pytest.mark.parametrize("where", ["local", "pipeline"])
def test_both_sides_in_one_batch(
    tmp_path: Path, longrope_switches_factors: Remedy, where: str
) -> None:
    folder = tiny(tmp_path)
    sequences = [tokens_of(i, n) for i, n in enumerate((5, 40, ORIGINAL, ORIGINAL + 1, 1))]
    expected = logits_of(longrope_switches_factors(load(folder)), sequences)
    if where == "local":
        session = Session(LocalRunner(folder))
        together = in_one_batch(session, sequences)
        alone = [in_one_batch(session, [tokens])[0] for tokens in sequences]
    else:
        with pipeline(folder, stages=2) as runner:
            session = Session(runner)
            together = in_one_batch(session, sequences)
            alone = [in_one_batch(session, [tokens])[0] for tokens in sequences]
    for i, reference in enumerate(expected):
        assert_close(together[i]["logits"], reference, f"{len(sequences[i])} tokens")
        assert_same_bits(together[i], alone[i], f"{len(sequences[i])} tokens, alone")
    assert_everywhere(folder, sequences, expected)


@case(25, "PhiMoE", "a short prompt, left-padded beyond the boundary: padding does not count")
def test_padding_does_not_count(tmp_path: Path, longrope_switches_factors: Remedy) -> None:
    """Rows are packed without padding; the reference is padded, with positions from its mask."""
    folder = tiny(tmp_path)
    model = longrope_switches_factors(load(folder))
    tokens, padding = tokens_of(9, 10), 3 * ORIGINAL
    mask = torch.tensor([[0] * padding + [1] * len(tokens)])
    ids = torch.tensor([[0] * padding + tokens])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        right = model(ids, position_ids=positions, **options).logits[0, padding:]
        counted = model(ids, **options).logits[0, padding:]
    # What a padded batch does where positions count the padding, as they do by default.
    assert_visible(counted, right)
    company = tokens_of(10, padding + len(tokens))
    expected = [right, logits_of(model, [company])[0]]
    assert_everywhere(folder, [tokens, company], expected)


INSIDE = {k: v for k, v in SCALING.items() if k != "original_max_position_embeddings"}
CONTEXT = {"original_max_position_embeddings": ORIGINAL}
LAYOUTS = {
    "only inside": {"rope_scaling": {"type": "longrope", **INSIDE, **CONTEXT}, "rope_theta": THETA},
    "rope_type": {
        "rope_scaling": {"rope_type": "longrope", **INSIDE, **CONTEXT},
        "rope_theta": THETA,
    },
    "inside and at the top level": {
        "rope_scaling": {"type": "longrope", **INSIDE, **CONTEXT},
        "rope_theta": THETA,
        **CONTEXT,
    },
    "its own place wins": {
        "rope_scaling": {"type": "longrope", **INSIDE, **CONTEXT},
        "rope_theta": THETA,
        "original_max_position_embeddings": 3,
    },
    "absent, so all of the context": {
        "rope_scaling": {"type": "longrope", **INSIDE},
        "rope_theta": THETA,
        "max_position_embeddings": ORIGINAL,
    },
    "saved by Transformers 5": {
        "rope_parameters": {
            "rope_type": "longrope",
            "type": "longrope",
            "rope_theta": THETA,
            **INSIDE,
            **CONTEXT,
        },
        "rope_scaling": None,
    },
    "base inside": {
        "rope_scaling": {"type": "longrope", "rope_theta": THETA, **INSIDE, **CONTEXT},
        "rope_theta": 77.0,
    },
}


@case(27, "PhiMoE", "every layout of the LongRoPE keys, and every place of the original context")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(tmp_path: Path, longrope_switches_factors: Remedy, layout: dict[str, Any]) -> None:
    folder = tiny(tmp_path / "model")
    drop_keys(folder, "rope_parameters", "rope_theta", "original_max_position_embeddings")
    edit_config(folder, **layout)
    sequences = [tokens_of(11, ORIGINAL), tokens_of(12, ORIGINAL + 1)]
    expected = logits_of(longrope_switches_factors(load(folder)), sequences)
    long = in_one_regime(folder, tmp_path / "long", "long", sequences[1])
    assert_close(expected[1], long, "the layout means the same model to the reference")
    assert_everywhere(folder, sequences, expected)


@case(27, "PhiMoE", "the original context at the top level alone")
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_context_at_the_top_level(
    tmp_path: Path, longrope_switches_factors: Remedy, longrope_context: Remedy, section: str
) -> None:
    folder = tiny(tmp_path)
    drop_keys(folder, "rope_parameters", "rope_theta")
    edit_config(
        folder, **{section: {"rope_type": "longrope", "rope_theta": THETA, **INSIDE}}, **CONTEXT
    )
    sequences = [tokens_of(13, ORIGINAL), tokens_of(14, ORIGINAL + 1)]
    plain = longrope_switches_factors(load(folder))
    uncorrected = logits_of(plain, sequences)
    expected = logits_of(longrope_context(plain, ORIGINAL), sequences)
    assert_close(uncorrected[0], expected[0], "within both contexts")
    assert_visible(uncorrected[1], expected[1])
    assert_everywhere(folder, sequences, expected)


@case(27, "PhiMoE", "LongRoPE under its first name, `su`")
def test_first_name(tmp_path: Path, longrope_switches_factors: Remedy) -> None:
    folder, sequences = tiny(tmp_path), [tokens_of(15, 9), tokens_of(16, ORIGINAL + 4)]
    expected = logits_of(longrope_switches_factors(load(folder)), sequences)
    drop_keys(folder, "rope_parameters")
    edit_config(folder, rope_scaling={"type": "su", **INSIDE}, rope_theta=THETA, **CONTEXT)
    assert_everywhere(folder, sequences, expected)


@case(28, "PhiMoE", "`rope_scaling` without numeric multipliers, or of another kind, is refused")
@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        pytest.param({"short_mscale": None}, "short_mscale", "a number", id="no short multiplier"),
        pytest.param({"long_mscale": None}, "long_mscale", "a number", id="no long multiplier"),
        pytest.param({"long_mscale": "1.3"}, "long_mscale", "number", id="text"),
        pytest.param({"type": "linear", "factor": 2.0}, "type", "longrope", id="linear"),
        pytest.param({"type": "yarn", "factor": 2.0}, "type", "longrope", id="yarn"),
        pytest.param({"type": "dynamic", "factor": 2.0}, "type", "longrope", id="dynamic"),
        pytest.param({"long_factor": LONG[:-1]}, "long_factor", "a list of 8", id="short list"),
        pytest.param({"short_factor": None}, "short_factor", "a list of 8", id="no list"),
    ],
)
def test_refused_scaling(tmp_path: Path, changes: dict[str, Any], key: str, allowed: str) -> None:
    folder = tiny(tmp_path)
    drop_keys(folder, "rope_parameters")
    wrong = {"type": "longrope", **SCALING, **changes}
    # A key that is null is as absent as one that is not there.
    for section in (wrong, {k: v for k, v in wrong.items() if v is not None}):
        edit_config(folder, rope_scaling=None)
        edit_config(folder, rope_scaling=section)
        with pytest.raises(
            ConfigError, match=rf"rope_scaling\.{key} is .* but must be .*{allowed}"
        ):
            load_config(folder)
        if "mscale" in key:
            with pytest.raises(Exception, match=f"{key} field must be a number"):
                load(folder)
