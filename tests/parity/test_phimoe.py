"""PhiMoE, case by case: RoPE without scaling, biases, head width, sliding window, norms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from router.step import SamplingParams
from tests.groups import running_group
from tests.models.driver import read_checkpoint, tokens_of
from tests.parity.battery import assert_everywhere, assert_visible
from tests.parity.cases import case
from tests.parity.checkpoints import tensors_of
from tests.parity.generation import TOPOLOGIES, Reference, answers
from tests.parity.remedies import drop_keys, edit_config, load, logits_of
from tests.tiny import VOCAB_SIZE, write_tiny

SEQUENCES = [tokens_of(1, 30), tokens_of(2, 1), tokens_of(3, 9), tokens_of(4, 17)]


def plain_rope(folder: Path, **overrides: Any) -> Path:
    """A tiny PhiMoE without LongRoPE, as SlimMoE is."""
    return write_tiny("phimoe", folder, rope_parameters=None, num_hidden_layers=2, **overrides)


def reference(folder: Path, sequences: Sequence[Sequence[int]] = SEQUENCES) -> list[Tensor]:
    """Transformers' logits; none of these models needs a correction."""
    return logits_of(load(folder), sequences)


@case(19, "PhiMoE", "RoPE without scaling: no `rope_theta` at all means 1e6")
@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        pytest.param({}, 1e6, id="no rope key"),
        pytest.param({"rope_scaling": None, "rope_theta": 10000.0}, 1e4, id="SlimMoE's keys"),
        pytest.param({"rope_scaling": None, "rope_theta": 500}, 500.0, id="whole number"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            500.0,
            id="rope_parameters",
        ),
    ],
)
def test_rope_without_scaling(tmp_path: Path, keys: dict[str, Any], theta: float) -> None:
    folder = plain_rope(tmp_path)
    drop_keys(folder, "rope_parameters", "rope_theta")
    edit_config(folder, **keys)
    # The base is stated here, so that a default is not taken over from the oracle unseen.
    model = load(folder)
    for base in (1e6, 1e4, 500.0):
        expected = logits_of(with_rope_base(model, base), SEQUENCES)
        if base == theta:
            assert_everywhere(folder, SEQUENCES, expected)
        else:
            assert_visible(expected[0], logits_of(with_rope_base(model, theta), SEQUENCES)[0])


def with_rope_base(model: Any, theta: float) -> Any:
    """The same model rotated with another base."""
    model.config.rope_parameters["rope_theta"] = theta
    return model


@case(29, "PhiMoE", "`attention_bias` false, and true with a bias on all four projections")
@pytest.mark.parametrize("biased", [pytest.param(False, id="no"), pytest.param(True, id="yes")])
def test_attention_bias(tmp_path: Path, biased: bool) -> None:
    folder = write_tiny("phimoe", tmp_path, attention_bias=biased, num_hidden_layers=2)
    names = [f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkvo"]
    tensors = read_checkpoint(folder)
    assert [n for n in names if n in tensors and tensors[n].abs().max() > 0.1] == names * biased
    assert_everywhere(folder, SEQUENCES, reference(folder))


@case(30, "PhiMoE", "`lm_head_bias` true, false, and true on a head tied to the embedding")
@pytest.mark.parametrize(
    ("biased", "tied"),
    [
        pytest.param(True, False, id="bias"),
        pytest.param(False, False, id="no bias"),
        pytest.param(True, True, id="tied and bias"),
        pytest.param(False, True, id="tied"),
    ],
)
def test_lm_head_bias(tmp_path: Path, biased: bool, tied: bool) -> None:
    folder = write_tiny("phimoe", tmp_path, lm_head_bias=biased, tie_word_embeddings=tied)
    tensors = read_checkpoint(folder)
    assert ("lm_head.bias" in tensors, "lm_head.weight" in tensors) == (biased, not tied)
    assert_everywhere(folder, SEQUENCES, reference(folder))


@case(31, "PhiMoE", "`head_dim` explicit and not hidden_size / heads: narrower and wider queries")
@pytest.mark.parametrize(
    ("hidden", "heads", "head_dim"),
    [
        pytest.param(128, 2, 32, id="half as wide, as Phi-tiny"),
        pytest.param(64, 4, 32, id="twice as wide"),
        pytest.param(60, 7, 6, id="heads do not divide the hidden size"),
    ],
)
def test_head_dim(tmp_path: Path, hidden: int, heads: int, head_dim: int) -> None:
    folder = plain_rope(
        tmp_path,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=head_dim,
        attention_bias=True,
    )
    assert_everywhere(folder, SEQUENCES, reference(folder))


@case(32, "PhiMoE", "sliding window shorter than the prompt: full, chunked and token by token")
@pytest.mark.parametrize(
    ("window", "longrope"),
    [
        pytest.param(1, False, id="itself alone"),
        pytest.param(7, False, id="within a block"),
        pytest.param(8, False, id="one block"),
        pytest.param(20, True, id="with LongRoPE"),
    ],
)
def test_sliding_window(tmp_path: Path, window: int, longrope: bool) -> None:
    folder = write_tiny("phimoe", tmp_path) if longrope else plain_rope(tmp_path)
    unlimited = reference(folder)
    edit_config(folder, sliding_window=window)
    expected = reference(folder)
    assert_visible(expected[0], unlimited[0])
    # The first `window` positions see everything; the next one is the first that does not.
    torch.testing.assert_close(expected[0][:window], unlimited[0][:window])
    assert_visible(expected[0][window], unlimited[0][window])
    assert_everywhere(folder, SEQUENCES, expected)


@case(32, "PhiMoE", "sliding window while generating far beyond it, in the running engine")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_sliding_window_while_generating(tmp_path: Path, topology: dict[str, Any]) -> None:
    folder = plain_rope(tmp_path, sliding_window=11)
    prompts = [tuple(tokens_of(5, 14)), tuple(tokens_of(6, 5))]
    sampling = SamplingParams(max_tokens=24, temperature=0.0, logprobs=VOCAB_SIZE)
    with running_group(folder, block_size=4, max_num_batched_tokens=8, **topology) as group:
        found = answers(group, prompts, sampling)
    once = Reference(load(folder))
    for prompt, answer in zip(prompts, found, strict=True):
        once.assert_every_step(prompt, answer)


@case(36, "PhiMoE", "LayerNorm, not RMSNorm: a mean far from zero, biases, eps from `rms_norm_eps`")
@pytest.mark.parametrize("eps", [pytest.param(1e-5, id="small"), pytest.param(1e-2, id="large")])
def test_layer_norm(tmp_path: Path, eps: float) -> None:
    folder = plain_rope(tmp_path, rms_norm_eps=eps)
    with tensors_of(folder) as tensors:
        assert all(t.abs().max() > 0.1 for n, t in tensors.items() if n.endswith("norm.bias"))
        # Small rows, so that eps counts, about a mean that only LayerNorm takes away.
        table = tensors["model.embed_tokens.weight"]
        table.copy_(0.5 * table + 1.0)
        for name, tensor in tensors.items():
            if "w2" in name or "o_proj" in name:
                tensor.mul_(0.3)
    expected = reference(folder)
    assert_everywhere(folder, SEQUENCES, expected)
    edit_config(folder, rms_norm_eps=1e-5 if eps > 1e-3 else 1e-2)
    assert_visible(expected[0], reference(folder)[0])
