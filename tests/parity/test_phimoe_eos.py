"""PhiMoE's three ends of sequence, through the running engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.served_model import load_defaults
from router.step import SamplingParams
from shards.group import ModelGroup
from tests.groups import Answer, ask_all, running_group
from tests.models.driver import tokens_of
from tests.parity.cases import case
from tests.parity.checkpoints import tensors_of
from tests.parity.generation import TOPOLOGIES
from tests.parity.remedies import edit_config, load
from tests.tiny import write_tiny

VOCAB = 32064
ENDOFTEXT, ASSISTANT, END = 32000, 32001, 32007
USER = 32010
MAX_TOKENS = 9
PROMPTS = [tuple(tokens_of(i, 4 + 3 * i, VOCAB)) for i in range(4)]


def generated(model: Any, prompt: tuple[int, ...], eos: list[int] | None) -> tuple[int, ...]:
    """What Transformers generates, its end of sequence included; `eos` None: as the files say."""
    own = {} if eos is None else {"eos_token_id": eos}
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0, **own
    )
    return tuple(output[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of PhiMoE's own vocabulary; each prompt meets another special token, in mid-answer.

    The files are as published: config.json names one end, generation_config.json all three.
    """
    folder = write_tiny(
        "phimoe", tmp_path_factory.mktemp("eos"), num_hidden_layers=2, vocab_size=VOCAB
    )
    edit_config(folder, eos_token_id=ENDOFTEXT)
    model = load(folder)
    answers = [generated(model, prompt, [VOCAB - 1]) for prompt in PROMPTS]
    assert {len(answer) for answer in answers} == {MAX_TOKENS}
    specials = (ENDOFTEXT, ASSISTANT, END, USER)
    # The special token takes the place, in the head, of a token that its prompt's answer holds.
    with tensors_of(folder) as tensors:
        for step, (answer, special) in enumerate(zip(answers, specials, strict=True), start=2):
            both = torch.tensor([answer[step], special])
            for name in ("lm_head.weight", "lm_head.bias"):
                tensors[name][both] = tensors[name][both.flip(0)]
    generation = {"bos_token_id": 1, "eos_token_id": [ENDOFTEXT, ASSISTANT, END]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def answers_of(group: ModelGroup, folder: Path) -> list[Answer]:
    """What the engine makes of every prompt with the checkpoint's own defaults."""
    defaults, _ = load_defaults(folder, None)
    sampling = SamplingParams(
        max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=defaults.eos_token_ids
    )
    return asyncio.run(ask_all(group, PROMPTS, sampling))


@case(39, "PhiMoE", "each of 32000, 32001 and 32007 ends an answer, no other special token does")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_each_end(folder: Path, topology: dict[str, Any]) -> None:
    model = load(folder)
    with running_group(folder, **topology) as group:
        found = answers_of(group, folder)
    assert [a.token_ids for a in found] == [generated(model, p, None) for p in PROMPTS]
    assert [a.token_ids[-1] for a in found[:3]] == [ENDOFTEXT, ASSISTANT, END]
    assert [len(a.token_ids) for a in found] == [3, 4, 5, MAX_TOKENS]
    assert [a.finish for a in found] == ["stop", "stop", "stop", "length"]
    assert USER in found[3].token_ids


@case(39, "PhiMoE", "without generation_config.json only config.json's 32000 ends an answer")
def test_config_alone(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    model = load(tmp_path)
    with running_group(tmp_path) as group:
        found = answers_of(group, tmp_path)
    assert [a.token_ids for a in found] == [generated(model, p, None) for p in PROMPTS]
    assert [a.finish for a in found] == ["stop", "length", "length", "length"]
