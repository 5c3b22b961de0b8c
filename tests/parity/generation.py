"""Sequences through the running engine, every step of them against a full forward."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from router.step import SamplingParams, Token
from shards.group import ModelGroup
from tests.parity.battery import assert_close
from tests.parity.remedies import full_forward

# Options of `running_group`.
TOPOLOGIES = [
    pytest.param({"executor": "local"}, id="local"),
    pytest.param({"stages": 2, "expert_shards": 3}, id="pipeline"),
]

Prompt = tuple[int, ...]


class Reference:
    """Log-probabilities [V] of what follows some tokens, each by a full forward, made once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: dict[Prompt, Tensor] = {}

    def after(self, tokens: Prompt) -> Tensor:
        """By a model as `remedies.load` gives it, corrected where need be."""
        if tokens not in self._known:
            row = full_forward(self._model, tokens).logits[0, -1]
            self._known[tokens] = torch.log_softmax(row, -1)
        return self._known[tokens]

    def assert_every_step(self, prompt: Prompt, answer: Sequence[Token]) -> None:
        """Greedy steps that carry all log-probabilities: these, and the likeliest token chosen."""
        known = prompt
        for token in answer:
            expected = self.after(known)
            found = torch.tensor([value for _, value in sorted(token.top_logprobs)])
            assert_close(found, expected, f"prompt of {len(prompt)}, step after {len(known)}")
            assert float(expected[token.token_id]) > float(expected.max()) - 1e-4
            known = (*known, token.token_id)


def answers(
    group: ModelGroup, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[list[Token]]:
    """All prompts at once, every token of each."""

    async def generate() -> list[list[Token]]:
        streams = [group.generate(prompt, sampling) for prompt in prompts]
        return [[token async for token in stream] for stream in streams]

    return asyncio.run(generate())
