"""A step whose kernels are written down first and run in one go keeps its bits."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from models.kernels.choice import KERNELS
from models.kernels.native import use_kernels
from models.kernels.program import Program
from router.step import Token
from tests.models.built import needs_kernels
from tests.shards.generation import generate, greedy, limits_for, local
from tests.tiny import FAMILIES, write_tiny

PROMPTS = ((5,), tuple(range(20)), (3, 4, 5), tuple(range(60, 95)))


@pytest.fixture(autouse=True)
def afterwards() -> Iterator[None]:
    yield
    use_kernels("auto")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp(request.param))


def answers(folder: Path, dtype: torch.dtype, few_rows: int) -> tuple[dict[int, list[Token]], int]:
    """The tokens and log probabilities, and how many programs were run."""
    limits = limits_for(folder, max_num_batched_tokens=40)
    admits = [greedy(i, prompt, 12) for i, prompt in enumerate(PROMPTS)]
    with (
        patch("shards.model_runner.FEW_ROWS", few_rows),
        patch("models.kernels.program.Program.add", autospec=True, side_effect=Program.add) as add,
    ):
        tokens, _ = generate(local(folder, limits, dtype), limits, admits)
    return tokens, add.call_count


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_down_or_at_once(folder: Path, dtype: torch.dtype) -> None:
    use_kernels("native")
    at_once, none = answers(folder, dtype, 0)
    some_written, some = answers(folder, dtype, 32)
    all_written, most = answers(folder, dtype, 1000)
    assert some_written == all_written == at_once
    assert none == 0 < some < most


@needs_kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_pytorch_reads_has_been_computed(folder: Path, kernel: str) -> None:
    """Where one kernel is off, layers or halves of them take turns with what waits."""
    use_kernels(f"native,-{kernel}")
    assert answers(folder, torch.float32, 1000)[0] == answers(folder, torch.float32, 0)[0]


@needs_kernels
def test_a_structure_waits_once() -> None:
    program = Program()
    program.add("avx2", "conclave_run", 64)
    with pytest.raises(AssertionError, match="waits already"):
        program.add("avx2", "conclave_run", 64)


class Rows:
    """Something that lies in memory."""


@needs_kernels
def test_what_a_call_reads_lives_until_it_has_run() -> None:
    """Rows, batch and angles belong to nobody else once a layer has returned."""
    kept: list[weakref.ref[Rows]] = []
    program = Program()
    for structure in (64, 128):
        rows = Rows()
        program.add("avx2", "conclave_run", structure, rows)
        kept.append(weakref.ref(rows))
        del rows
    assert all(ref() is not None for ref in kept)


@needs_kernels
def test_what_waits_is_not_overwritten(folder: Path) -> None:
    """Memory that a layer gives back is filled with NaN at once."""
    use_kernels("native")
    expected, _ = answers(folder, torch.float32, 0)
    add = Program.add

    def add_and_disturb(self: Program, *arguments: Any) -> None:
        add(self, *arguments)
        rows = [kept for kept in arguments[3:] if isinstance(kept, torch.Tensor)]
        shapes = {(tensor.shape, tensor.dtype) for tensor in rows}
        del rows
        for shape, dtype in list(shapes) * 8:
            torch.full(shape, float("nan"), dtype=dtype)

    limits = limits_for(folder, max_num_batched_tokens=40)
    admits = [greedy(i, prompt, 12) for i, prompt in enumerate(PROMPTS)]
    with patch.object(Program, "add", add_and_disturb):
        assert generate(local(folder, limits, torch.float32), limits, admits)[0] == expected
