"""A constrained answer has the same bits on every layout, whatever is preempted or dies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from deploy.demo import nano_checkpoint
from deploy.served_model import ServedModel, load_served_model
from deploy.structured_outputs import choice_grammar, schema_grammar
from deploy.vocabulary import vocabulary_of
from models.registry import load_config
from router.step import Admit, FinishReason, SamplingParams, Token
from shards.group import ModelGroup
from shards.local_executor import LocalExecutor
from tests.groups import Answer, answer_of, healed, kill_worker, running_group
from tests.shards.generation import generate, limits_for

MODEL = "nano-jamba"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 30, "maxLength": 40},
        "tags": {"type": "array", "items": {"enum": ["a", 7, None]}, "minItems": 3, "maxItems": 6},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
GRAMMARS = (schema_grammar(SCHEMA), None, choice_grammar(["yes", "no", "no more"]))
PROMPTS = [tuple(range(5, 5 + n)) for n in (4, 11, 30)]


def served() -> ServedModel:
    return load_served_model(MODEL, str(nano_checkpoint(MODEL)), 512, 512)


def params(seed: int, temperature: float) -> SamplingParams:
    return SamplingParams(
        max_tokens=120,
        temperature=temperature,
        seed=seed,
        logprobs=2,
        stop_token_ids=served().defaults.eos_token_ids,
    )


async def ask(
    group: ModelGroup, prompt: tuple[int, ...], sampling: SamplingParams, grammar: str | None
) -> Answer:
    stream = group.generate(prompt, sampling, grammar=grammar)
    return answer_of([token async for token in stream])


async def ask_all(group: ModelGroup) -> list[Answer]:
    """Every prompt with every grammar, greedy and drawn, at once."""
    return await asyncio.gather(
        *(
            ask(group, prompt, params(seed, temperature), grammar)
            for seed, prompt in enumerate(PROMPTS)
            for grammar in GRAMMARS
            for temperature in (0.0, 1.0)
        )
    )


def check_forms(answers: list[Answer]) -> None:
    """That answers to the schema keep to it."""
    tokenizer = served().tokenizer
    assert tokenizer is not None
    texts = [tokenizer.decode(answer.token_ids) for answer in answers]
    for start in range(0, len(answers), 6):
        for text in texts[start : start + 2]:
            jsonschema.validate(json.loads(text), SCHEMA)
        for text in texts[start + 4 : start + 6]:
            assert text in ("yes", "no", "no more")
        assert all(answers[start + i].finish == "stop" for i in (0, 1, 4, 5))


def test_the_same_bits_on_every_layout() -> None:
    layouts: list[dict[str, Any]] = [
        {"executor": "local"},
        {"executor": "local", "max_num_seqs": 1},
        {"executor": "pipeline", "expert_shards": 2},
        {"stages": 2, "expert_shards": 2, "dispatch": "direct"},
        {"stages": 3, "max_num_batched_tokens": 16},
    ]
    found = []
    for options in layouts:
        with running_group(MODEL, **options) as group:
            found.append(asyncio.run(ask_all(group)))
    check_forms(found[0])
    assert all(answers == found[0] for answers in found)


def bits(tokens: dict[int, list[Token]]) -> dict[int, Answer]:
    return {seq_id: answer_of(answer) for seq_id, answer in tokens.items()}


def executor_of(folder: Path, limits: Any) -> LocalExecutor:
    config = load_config(folder)
    vocabulary = vocabulary_of(served())
    return LocalExecutor(config, folder, torch.float32, limits, vocabulary=vocabulary)


def admits(epoch: int = 0, emitted: dict[int, tuple[int, ...]] | None = None) -> list[Admit]:
    return [
        Admit(
            seq_id=seq_id,
            epoch=epoch,
            prompt=PROMPTS[seq_id % 3],
            emitted=(emitted or {}).get(seq_id, ()),
            sampling=params(seq_id, float(seq_id % 2)),
            grammar=GRAMMARS[seq_id // 3 % 2],
        )
        for seq_id in range(6)
    ]


def test_preemption_changes_nothing() -> None:
    folder = nano_checkpoint(MODEL)
    roomy, tight = limits_for(folder, num_blocks=256), limits_for(folder, num_blocks=56)
    expected, calm = generate(executor_of(folder, roomy), roomy, admits())
    assert calm == 0
    found, preemptions = generate(executor_of(folder, tight), tight, admits())
    assert preemptions > 0
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("cut", [1, 7, 25])
def test_who_resumes_goes_on_where_it_was(cut: int) -> None:
    folder = nano_checkpoint(MODEL)
    limits = limits_for(folder, num_blocks=256)
    whole, _ = generate(executor_of(folder, limits), limits, admits())
    ids = {seq_id: tuple(t.token_id for t in tokens) for seq_id, tokens in whole.items()}
    emitted = {seq_id: answer[:cut] for seq_id, answer in ids.items() if len(answer) > cut}
    resumed = [a for a in admits(1, emitted) if a.seq_id in emitted]
    rest, _ = generate(executor_of(folder, limits), limits, resumed)
    for seq_id, tokens in rest.items():
        assert tokens == whole[seq_id][cut:]
        assert tokens[-1].finish in (FinishReason.STOP, FinishReason.LENGTH)


async def test_a_kill_changes_nothing() -> None:
    options: dict[str, Any] = {"stages": 2, "expert_shards": 2}
    with running_group(MODEL, processes=True, **options) as group:
        expected = await ask_all(group)
        check_forms(expected)
        for victim in (("stage", 1), ("engine", 0)):
            asked = asyncio.create_task(ask_all(group))
            await asyncio.sleep(0)
            seen = 0
            async for _ in group.generate((7, 8), params(1, 0.0), grammar=GRAMMARS[0]):
                seen += 1
                if seen == 8:
                    assert not asked.done()
                    kill_worker(group, *victim)
            assert await asyncio.wait_for(asked, 60) == expected
            await healed(group)
