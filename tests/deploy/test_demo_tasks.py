"""The nano checkpoints' tasks are honestly split, and their folders are complete and small."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from deploy.demo import NANO_MODELS, nano_checkpoint
from deploy.demo.tasks import KINDS, Task, chance, held_out_tasks, is_correct, train_tasks

EIGHT_MB = 8_000_000
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "Thanks"},
]
RENDERED = {
    "nano-dbrx": (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n"
        "<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "nano-phimoe": (
        "<|system|>\nBe kind.<|end|>\n"
        "<|user|>\nWhat is 3 + 4?<|end|>\n"
        "<|assistant|>\n7<|end|>\n"
        "<|user|>\nThanks<|end|>\n"
        "<|assistant|>\n"
    ),
    "nano-jamba": (
        "<|startoftext|><|bom|><|system|> Be kind.<|eom|>"
        "<|bom|><|user|> What is 3 + 4?<|eom|>"
        "<|bom|><|assistant|> 7<|eom|>"
        "<|bom|><|user|> Thanks<|eom|>"
        "<|bom|><|assistant|>"
    ),
}
TOKENIZERS = {
    name: Tokenizer.from_file(str(nano_checkpoint(name) / "tokenizer.json")) for name in NANO_MODELS
}


def read_json(name: str, file: str) -> Any:
    return json.loads((nano_checkpoint(name) / file).read_text(encoding="utf-8"))


def numbers_in(task: Task) -> tuple[int, ...]:
    spaced = "".join(char if char.isdigit() else " " for char in task.messages[-1][1])
    return tuple(sorted(int(number) for number in spaced.split()))


def render(name: str, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    source = (nano_checkpoint(name) / "chat_template.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=read_json(name, "tokenizer_config.json")["bos_token"],
    )


def test_no_held_out_dialogue_is_ever_trained_on() -> None:
    trained = {task.messages for task in itertools.islice(train_tasks(0), 20_000)}
    assert not trained & {task.messages for task in held_out_tasks(1, 2_000)}


def test_sums_are_split_whatever_the_order_and_the_phrasing() -> None:
    trained = {numbers_in(t) for t in itertools.islice(train_tasks(0), 20_000) if t.kind == "sum"}
    held_out = {numbers_in(t) for t in held_out_tasks(1, 1_000, ("sum",))}
    assert len(held_out) > 100
    assert not trained & held_out


@pytest.mark.parametrize("kind", ["spell", "copy", "upper", "name", "recall"])
def test_words_and_names_are_split_by_content(kind: str) -> None:
    trained = {t.answer for t in itertools.islice(train_tasks(0), 20_000) if t.kind == kind}
    assert not trained & {t.answer for t in held_out_tasks(1, 1_000, (kind,))}


@pytest.mark.parametrize("kind", ["capital", "country"])
def test_a_held_out_fact_is_trained_in_other_words(kind: str) -> None:
    trained = {t.answer for t in itertools.islice(train_tasks(0), 20_000) if t.kind == kind}
    assert {t.answer for t in held_out_tasks(1, 1_000, (kind,))} <= trained


def test_the_seed_decides_the_tasks() -> None:
    def first(seed: int) -> list[Task]:
        return list(itertools.islice(train_tasks(seed), 50))

    assert first(3) == first(3)
    assert first(3) != first(4)
    assert held_out_tasks(3, 50) == held_out_tasks(3, 50)
    assert held_out_tasks(3, 50) != held_out_tasks(4, 50)


def test_held_out_tasks_cover_every_kind_in_turn() -> None:
    assert [task.kind for task in held_out_tasks(0, len(KINDS))] == list(KINDS)


def test_chance_is_low_for_every_kind() -> None:
    assert all(0 < chance(kind) < 0.3 for kind in KINDS)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Your name is Ada.", True),
        (" Your name is Ada\n", True),
        ("Your name is Bob.", False),
        ("your name is ada.", False),
        ("", False),
    ],
)
def test_answers_are_compared_exactly_but_for_the_edges(answer: str, right: bool) -> None:
    task = Task("recall", (("user", "What is my name?"),), "Your name is Ada.")
    assert is_correct(task, answer) is right


@pytest.mark.parametrize("name", NANO_MODELS)
@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", NANO_MODELS)
def test_letters_and_digits_of_the_tasks_are_single_tokens(name: str) -> None:
    tokens = TOKENIZERS[name].encode("What is 31 + 4? Spell kilt.", add_special_tokens=False).tokens
    assert tokens[:6] == ["What", "Ġis", "Ġ", "3", "1", "Ġ"]
    assert tokens[-7:] == ["ĠSpell", "Ġ", "k", "i", "l", "t", "."]


@pytest.mark.parametrize("name", NANO_MODELS)
def test_the_chat_template_writes_the_family_turn_format(name: str) -> None:
    assert render(name, CHAT, add_generation_prompt=True) == RENDERED[name]


@pytest.mark.parametrize("name", NANO_MODELS)
def test_an_answered_prompt_continues_the_prompt_token_for_token(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    answered = [*CHAT, {"role": "assistant", "content": "You are welcome."}]
    prompt = tokenizer.encode(render(name, CHAT, True), add_special_tokens=False).ids
    full = tokenizer.encode(render(name, answered, False), add_special_tokens=False).ids
    assert full[: len(prompt)] == prompt


@pytest.mark.parametrize("name", NANO_MODELS)
def test_generation_stops_at_the_end_of_a_turn_and_of_text(name: str) -> None:
    generation = read_json(name, "generation_config.json")
    stops = [TOKENIZERS[name].id_to_token(i) for i in generation["eos_token_id"]]
    turn_end = {"nano-dbrx": "<|im_end|>", "nano-phimoe": "<|end|>", "nano-jamba": "<|eom|>"}
    assert isinstance(generation["eos_token_id"], list)
    assert {"<|endoftext|>", turn_end[name]} <= set(stops)


@pytest.mark.parametrize("name", NANO_MODELS)
def test_the_index_names_every_shard_and_the_folder_is_small(name: str) -> None:
    folder = nano_checkpoint(name)
    shards = set(read_json(name, "model.safetensors.index.json")["weight_map"].values())
    assert len(shards) >= 2
    assert shards == {path.name for path in folder.glob("*.safetensors")}
    assert sum(path.stat().st_size for path in folder.iterdir()) < EIGHT_MB


@pytest.mark.parametrize("name", NANO_MODELS)
def test_every_token_has_an_embedding_row(name: str) -> None:
    assert TOKENIZERS[name].get_vocab_size() <= read_json(name, "config.json")["vocab_size"]


def test_the_configs_keep_the_published_shape() -> None:
    dbrx = read_json("nano-dbrx", "config.json")
    assert dbrx["attn_config"]["rope_theta"] == 500000
    assert (dbrx["ffn_config"]["moe_num_experts"], dbrx["ffn_config"]["moe_top_k"]) == (16, 4)
    phimoe = read_json("nano-phimoe", "config.json")
    assert phimoe["rope_scaling"]["type"] == "longrope"
    assert (phimoe["num_local_experts"], phimoe["num_experts_per_tok"]) == (16, 2)
    jamba = read_json("nano-jamba", "config.json")
    assert (jamba["num_experts"], jamba["num_experts_per_tok"]) == (16, 2)
    assert (jamba["attn_layer_period"], jamba["attn_layer_offset"]) == (8, 4)


def test_an_unknown_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="nano-jamba"):
        nano_checkpoint("nano-other")
