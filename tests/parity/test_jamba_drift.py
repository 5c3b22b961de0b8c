"""Jamba where rounding adds up: in bfloat16, over thousands of tokens, with int8 experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.driver import read_checkpoint, tokens_of
from tests.models.oracle import write_checkpoint
from tests.parity.battery import assert_close
from tests.parity.cases import case
from tests.parity.executors import LocalRunner, pipeline
from tests.parity.jamba import (
    RECURRENT,
    SEQUENCES,
    jamba,
    reference,
    same_bits_everywhere,
    schedule,
)
from tests.parity.remedies import load, logits_of
from tests.parity.session import Session

MANY = [*(tokens_of(seed, 60) for seed in range(4)), tokens_of(9, 9)]
MIXED = schedule((3, 1), (2, 1), 3)
BFLOAT16 = {
    "experts, stored in float32": (MIXED, torch.float32),
    "experts, stored in bfloat16": (MIXED, torch.bfloat16),
    "dense Mamba": ({**RECURRENT, "num_experts": 1}, torch.bfloat16),
}


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def top_1(logits: Tensor, exact: Tensor) -> float:
    """The share of positions whose best token is the exact one."""
    return float((logits.argmax(-1) == exact.argmax(-1)).float().mean())


def assert_drift_of(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Ours is as far from the exact logits as Transformers in bfloat16, within what the order of
    roundings moves either; single logits jump where a token changes its experts."""
    assert rms(ours - exact) <= 1.3 * rms(theirs - exact)
    assert (ours - exact).abs().max() <= 1.6 * (theirs - exact).abs().max()
    assert top_1(ours, exact) >= top_1(theirs, exact) - 0.03


@case(58, "Jamba", "bfloat16: drift from exact logits and top-1 agreement as Transformers' own")
@pytest.mark.parametrize(("keys", "stored"), BFLOAT16.values(), ids=BFLOAT16.keys())
def test_bfloat16(tmp_path: Path, keys: dict[str, int], stored: torch.dtype) -> None:
    folder = jamba(tmp_path, **keys)
    write_checkpoint(folder, {n: t.to(stored) for n, t in read_checkpoint(folder).items()})
    exact = torch.cat(reference(folder, MANY))
    theirs = torch.cat(logits_of(load(folder, torch.bfloat16), MANY))
    ours = torch.cat(same_bits_everywhere(folder, MANY, dtype="bfloat16"))
    assert_drift_of(ours, theirs, exact)
    assert rms(ours - exact) > 1e-3, "this was not bfloat16"


@pytest.mark.gpu
@case(58, "Jamba", "bfloat16: drift from exact logits and top-1 agreement as Transformers' own")
def test_bfloat16_of_the_fast_kernels(tmp_path: Path) -> None:
    """Transformers takes the kernels of `mamba_ssm` where they can be imported."""
    pytest.importorskip("mamba_ssm", reason="the fast kernels are not installed")
    folder = jamba(tmp_path, **MIXED)
    exact = torch.cat(reference(folder, MANY))
    model = load(folder, torch.bfloat16).cuda()
    with torch.no_grad():
        rows = [model(torch.tensor([t]).cuda(), use_cache=False).logits[0] for t in MANY]
    theirs = torch.cat(rows).float().cpu()
    ours = torch.cat(same_bits_everywhere(folder, MANY, dtype="bfloat16"))
    assert_drift_of(ours, theirs, exact)


LONG, TAIL = 4096, 16


@case(60, "Jamba", "4096 tokens at once, in chunks, and step by step at the end")
def test_long_sequence(tmp_path: Path) -> None:
    """The recurrence alone: attention over so much would only take time."""
    keys = {**schedule((8, 4), (2, 1), 2), "hidden_size": 32, "max_position_embeddings": 8192}
    folder = jamba(tmp_path, seed=2, **keys)
    tokens = tokens_of(8, LONG)
    whole = reference(folder, [tokens])[0]
    local = Session(LocalRunner(folder))
    one = local.start(tokens)
    local.step({one: LONG})
    at_once = local.finish(one)["logits"]
    assert_close(at_once, whole, "at once")
    with pipeline(folder) as runner:
        for session in (local, Session(runner)):
            seq = session.start(tokens)
            for size in (1000, 3, LONG - TAIL - 1003, *[1] * TAIL):
                session.step({seq: size})
            assert torch.equal(session.finish(seq)["logits"], at_once)


Chosen = Callable[[str], bool]


def routed(name: str) -> bool:
    return ".experts." in name


def linear(name: str) -> bool:
    """What int8-all adds: attention projections and dense FFNs, never anything of a mixer."""
    dense = "feed_forward." in name and "router" not in name
    return routed(name) or dense or "self_attn." in name


def rounded_to_int8(folder: Path, chosen: Chosen) -> dict[str, Tensor]:
    """The checkpoint with each row of the chosen matrices as round(row / s) * s, where s is the
    largest magnitude / 127, in float32 as it is stored."""
    tensors = read_checkpoint(folder)
    for name in filter(chosen, tensors):
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round() * scale
    return tensors


INT8 = {"int8": routed, "int8-all": linear}


@case(60, "Jamba", "int8: exactly that of rounded matrices, none of Mamba's; its drift is bounded")
@pytest.mark.parametrize("quantization", INT8)
def test_int8(tmp_path: Path, quantization: str) -> None:
    folder = jamba(tmp_path / "whole", **schedule((3, 1), (2, 1), 4))
    exact = torch.cat(reference(folder))
    ours = same_bits_everywhere(folder, SEQUENCES, quantization=quantization)
    rounded = jamba(tmp_path / "rounded", **schedule((3, 1), (2, 1), 4))
    write_checkpoint(rounded, rounded_to_int8(folder, INT8[quantization]))
    for logits, expected in zip(ours, reference(rounded), strict=True):
        assert_close(logits, expected, "against rounded matrices")
    drift = rms(torch.cat(ours) - exact)
    bound = {"int8": 0.02, "int8-all": 0.05}[quantization]
    assert 1e-3 < drift / float(exact.std()) < bound
    assert top_1(torch.cat(ours), exact) > 0.95
