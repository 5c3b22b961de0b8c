"""The whole model in one process, against Transformers and against itself under pressure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from router.step import Admit, SamplingParams, Token
from shards.checkpoint import CheckpointError
from shards.logits_processors import TokenHistory
from shards.sampler import SampleRequest, sample
from tests.shards.generation import generate, greedy, limits_for, local
from tests.tiny import FAMILIES, load_reference, reference_greedy, reference_logits, write_tiny

PROMPTS = ((5,), (3, 14, 15, 92, 65, 35), tuple(range(40, 71)), (7, 8) * 26)
"""One token, fewer than a row tile, many, and (PhiMoE) past the LongRoPE boundary."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def mixed_admits() -> list[Admit]:
    """Greedy and seeded sequences, with and without filters."""
    sampled = SamplingParams(max_tokens=14, seed=1, logprobs=3)
    kinds = (
        SamplingParams(max_tokens=20, temperature=0.0, logprobs=1),
        sampled,
        replace(sampled, seed=2, top_p=0.8, temperature=1.3),
        replace(sampled, seed=3, top_k=10, min_p=0.01, stop_token_ids=(1, 2), min_tokens=5),
    )
    return [
        Admit(seq_id=i, epoch=0, prompt=PROMPTS[i % 4], sampling=kinds[(i + i // 4) % 4])
        for i in range(8)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, folders: dict[str, Path]) -> None:
    folder = folders[family]
    limits = limits_for(folder)
    admits = [greedy(i, prompt, 24) for i, prompt in enumerate(PROMPTS)]
    tokens, _ = generate(local(folder, limits), limits, admits)
    reference = load_reference(folder)
    compared = 0
    for i, prompt in enumerate(PROMPTS):
        for token, row in zip(tokens[i], reference_greedy(reference, prompt, 24), strict=True):
            best = row.topk(2)
            if best.values[0] - best.values[1] < 1e-4:
                break
            assert token.token_id == int(best.indices[0])
            expected = torch.log_softmax(row, -1)
            assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-3)
            assert [j for j, _ in token.top_logprobs] == best.indices.tolist()
            compared += 1
    assert compared > 3 * 24


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_follows_transformers_logits(family: str, folders: dict[str, Path]) -> None:
    folder = folders[family]
    limits = limits_for(folder)
    tokens, _ = generate(local(folder, limits), limits, mixed_admits())
    reference = load_reference(folder)
    for admit in mixed_admits():
        known = list(admit.prompt)
        assert tokens[admit.seq_id]
        for token in tokens[admit.seq_id]:
            row = reference_logits(reference, known)[-1]
            history = TokenHistory(admit.prompt, known[len(admit.prompt) :])
            request = SampleRequest(seq_id=admit.seq_id, history=history, sampling=admit.sampling)
            assert token.token_id == sample(row[None], [request])[0].token_id
            expected = torch.log_softmax(row, -1)
            assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-3)
            known.append(token.token_id)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_company_never_shows(family: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    folder = folders[family]
    admits = mixed_admits()
    limits = limits_for(folder)
    alone: dict[int, list[Token]] = {}
    executor = local(folder, limits, dtype)
    for epoch, admit in enumerate(admits):
        tokens, _ = generate(executor, limits, [replace(admit, epoch=epoch)])
        alone |= tokens
    together, preemptions = generate(local(folder, limits, dtype), limits, admits)
    assert preemptions == 0
    assert together == alone
    for changes in (
        {"max_num_batched_tokens": 9},
        {"max_num_batched_tokens": 3, "block_size": 1, "num_blocks": 512},
        {"num_blocks": 20},
        {"num_blocks": 20, "max_num_batched_tokens": 7},
    ):
        tight = limits_for(folder, **changes)
        pressed, preemptions = generate(local(folder, tight, dtype), tight, admits)
        assert pressed == alone, changes
        assert (preemptions > 0) == (changes.get("num_blocks") == 20), changes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(
    family: str, folders: dict[str, Path]
) -> None:
    folder = folders[family]
    limits = limits_for(folder)
    executor = local(folder, limits)
    admits = mixed_admits()
    whole, _ = generate(executor, limits, admits)
    for epoch, emitted in enumerate((1, 4, 11), start=1):
        resumed = [
            replace(
                admit,
                epoch=epoch,
                emitted=tuple(token.token_id for token in whole[admit.seq_id][:emitted]),
            )
            for admit in admits
            if len(whole[admit.seq_id]) > emitted
        ]
        tokens, _ = generate(executor, limits, resumed)
        for admit in resumed:
            assert tokens[admit.seq_id] == whole[admit.seq_id][emitted:]


def test_a_wrong_checkpoint_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    other = write_tiny("jamba", tmp_path, intermediate_size=32)
    (other / "config.json").write_text((folders["jamba"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight is \[32, 64\], not"):
        local(other, limits_for(other))


def test_every_byte_is_read_once(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        size = (folder / "model.safetensors").stat().st_size
        read = local(folder, limits_for(folder)).bytes_read
        assert 0 < size - read < 20_000, "all but the header"
