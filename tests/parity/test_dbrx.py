"""DBRX, case by case: RoPE, the clamp, attention heads, norms, padding and pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from router.step import SamplingParams
from tests.groups import ask_all, running_group
from tests.models.driver import tokens_of
from tests.parity.battery import Arrays, assert_close, assert_everywhere
from tests.parity.cases import case
from tests.parity.checkpoints import tensors_of
from tests.parity.remedies import drop_keys, edit_config, full_forward, load, logits_of
from tests.tiny import reference_greedy, write_tiny

SEQUENCES = [tokens_of(1, 30), tokens_of(2, 1), tokens_of(3, 9), tokens_of(4, 17)]
HEAD_DIM = 16


def attn(**keys: Any) -> dict[str, Any]:
    return {"attn_config": keys}


def assert_matches(folder: Path, model: Any, **options: Any) -> list[Arrays]:
    return assert_everywhere(folder, SEQUENCES, logits_of(model, SEQUENCES), **options)


@case(1, "DBRX", "general wiring: clip 8, two kv heads, theta 500000, two of four experts")
def test_base(tmp_path: Path, rope_base_from_attn_config: Any) -> None:
    folder = write_tiny("dbrx", tmp_path, attn_config={"clip_qkv": 8.0})
    assert_matches(folder, rope_base_from_attn_config(load(folder)))


@case(2, "DBRX", "theta of attn_config is used, whatever stands at the top level")
@pytest.mark.parametrize("layout", ["hub's keys", "contradicted at the top level"])
def test_rope_theta(tmp_path: Path, rope_base_from_attn_config: Any, layout: str) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2)
    if layout == "hub's keys":
        drop_keys(folder, "rope_parameters")
    else:
        edit_config(folder, rope_theta=123.0)
    by_theta = {}
    for theta in (500000, 10000):
        edit_config(folder, attn_config={"rope_theta": theta})
        by_theta[theta] = assert_matches(folder, rope_base_from_attn_config(load(folder)))
    far, near = (by_theta[theta][0]["logits"] for theta in (500000, 10000))
    assert (far - near).abs().max() > 0.1


@case(3, "DBRX", "clip_qkv null does not clamp")
def test_no_clamp(tmp_path: Path, rope_base_from_attn_config: Any, clip_nothing: Any) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2, attn_config={"clip_qkv": None})
    # q and v are far beyond any clamp that might come in by default; k keeps the scores small.
    with tensors_of(folder) as tensors:
        for name, rows in tensors.items():
            if name.endswith("Wqkv.weight"):
                rows[: 4 * HEAD_DIM].mul_(8)
                rows[4 * HEAD_DIM : 6 * HEAD_DIM].div_(8)
                rows[6 * HEAD_DIM :].mul_(8)
    model = clip_nothing(rope_base_from_attn_config(load(folder)))
    assert _largest_projection(model) > 16
    assert_matches(folder, model)


def _largest_projection(model: Any) -> float:
    """Of the q, k and v before any clamp, in the first layer."""
    seen: list[float] = []
    attention = model.transformer.blocks[0].norm_attn_norm.attn
    hook = attention.Wqkv.register_forward_hook(lambda _m, _i, out: seen.append(out.abs().max()))
    full_forward(model, SEQUENCES[0])
    hook.remove()
    return float(seen[0])


@case(4, "DBRX", "a clamp that bites: q, k and v, before RoPE")
@pytest.mark.parametrize("clip", [pytest.param(0.5, id="half"), pytest.param(0, id="to zero")])
def test_clamp_bites(tmp_path: Path, rope_base_from_attn_config: Any, clip: float) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2, attn_config={"clip_qkv": clip})
    assert_matches(folder, rope_base_from_attn_config(load(folder)))


@case(5, "DBRX", "the clamp as an int and as a float")
def test_clamp_as_int(tmp_path: Path, rope_base_from_attn_config: Any) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2, attn_config={"clip_qkv": 1.0})
    as_float = assert_matches(folder, rope_base_from_attn_config(load(folder)))
    edit_config(folder, attn_config={"clip_qkv": 1})
    as_int = assert_matches(folder, rope_base_from_attn_config(load(folder)))
    for mine, other in zip(as_int, as_float, strict=True):
        assert torch.equal(mine["logits"], other["logits"])


@case(6, "DBRX", "one kv head (said or by default), as many as query heads, and in between")
@pytest.mark.parametrize(
    ("heads", "said"),
    [
        pytest.param(1, True, id="one"),
        pytest.param(1, False, id="one by default"),
        pytest.param(4, True, id="all"),
    ],
)
def test_kv_heads(tmp_path: Path, rope_base_from_attn_config: Any, heads: int, said: bool) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2, attn_config={"kv_n_heads": heads})
    if not said:
        drop_keys(folder, "attn_config.kv_n_heads", "num_key_value_heads")
    model = rope_base_from_attn_config(load(folder))
    rows = model.transformer.blocks[0].norm_attn_norm.attn.Wqkv.weight.shape[0]
    assert rows == (4 + 2 * heads) * HEAD_DIM
    assert_matches(folder, model)


@case(13, "DBRX", "LayerNorm subtracts the mean, has no bias and an eps of 1e-5")
@pytest.mark.parametrize("rows", ["of tiny variance", "of large mean"])
def test_layer_norm(tmp_path: Path, rope_base_from_attn_config: Any, rows: str) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2)
    with tensors_of(folder) as tensors:
        embedding = tensors["transformer.wte.weight"]
        if rows == "of large mean":
            embedding.add_(3.0)
        else:  # eps decides their scale; projections back to the residual keep it small
            for name, tensor in tensors.items():
                if name.endswith(("wte.weight", "out_proj.weight", "experts.mlp.w2")):
                    tensor.mul_(1e-3)
    assert_matches(folder, rope_base_from_attn_config(load(folder)))


@case(17, "DBRX", "pipelines of two and of four stages")
@pytest.mark.parametrize("stages", [pytest.param(2, id="two"), pytest.param(4, id="four")])
def test_pipelines(tmp_path: Path, rope_base_from_attn_config: Any, stages: int) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=5)
    assert_matches(folder, rope_base_from_attn_config(load(folder)), stages=stages)


@case(17, "DBRX", "rows of a left-padded batch and cached decoding equal the single sequence")
@torch.no_grad()
def test_padding_and_cache(tmp_path: Path, rope_base_from_attn_config: Any) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=2)
    model = rope_base_from_attn_config(load(folder))
    packed = assert_matches(folder, model)
    padded, mask = left_padded(SEQUENCES)
    together = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    for arrays, tokens, rows in zip(packed, SEQUENCES, together, strict=True):
        assert_close(arrays["logits"], rows[-len(tokens) :], "left-padded")
    cache, steps = None, []
    for token in SEQUENCES[3]:
        out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[0])
    assert_close(packed[3]["logits"], torch.cat(steps), "cached")


def left_padded(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, S] of one batch."""
    width = max(map(len, sequences))
    padded = torch.tensor([[5] * (width - len(tokens)) + tokens for tokens in sequences])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in sequences])
    return padded, mask


@case(17, "DBRX", "greedy tokens of the running engine, whole and in pipelines")
@pytest.mark.parametrize(
    "topology",
    [
        pytest.param({"executor": "local"}, id="local"),
        pytest.param({"stages": 2, "expert_shards": 3}, id="two stages"),
        pytest.param({"stages": 4, "expert_shards": 3}, id="four stages"),
    ],
)
async def test_generates(
    tmp_path: Path, rope_base_from_attn_config: Any, topology: dict[str, Any]
) -> None:
    folder = write_tiny("dbrx", tmp_path, n_layers=4)
    model = rope_base_from_attn_config(load(folder))
    prompts = [tuple(tokens) for tokens in SEQUENCES]
    expected = [tuple(int(r.argmax()) for r in reference_greedy(model, p, 8)) for p in prompts]
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    with running_group(folder, **topology) as group:
        answers = await ask_all(group, prompts, greedy)
    assert [answer.token_ids for answer in answers] == expected
