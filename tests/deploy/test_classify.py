"""Classification against Transformers: pooling, scores, losses, and vLLM's API around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from deploy.demo import nano_checkpoint
from deploy.http_api import build_api
from deploy.losses import class_targets, classification_loss
from deploy.model_facts import LabelSet
from deploy.openai_errors import ApiError
from deploy.served_model import load_served_model
from deploy.service import ApiService
from shards.group import ModelGroup
from tests.deploy.conftest import facts_of, running_service
from tests.deploy.http_client import client_of
from tests.groups import running_group
from tests.tiny import VOCAB_SIZE, load_reference, write_tiny

FAMILIES = ("phimoe", "jamba")
LABELS = ("good", "bad", "ugly")
ID2LABEL = dict(enumerate(LABELS))
PAD = 3
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "local": {"executor": "local"},
    "2x3": {"stages": 2, "expert_shards": 3, "max_num_batched_tokens": 7},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp(request.param)
    return write_tiny(request.param, where, classifier=True, id2label=ID2LABEL)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=TOPOLOGIES)
def group(request: pytest.FixtureRequest, folder: Path) -> Iterator[ModelGroup]:
    with running_group(folder, **TOPOLOGIES[request.param]) as running:
        yield running


def service_of(group: ModelGroup, folder: Path, **changed: Any) -> ApiService:
    """The API over a running group, whose label set is what config.json says but for `changed`."""
    facts = facts_of(str(folder))
    assert facts.label_set is not None
    return ApiService(
        group,
        load_served_model("tiny", str(folder), facts.vocab_size, group.spec.limits.max_model_len),
        replace(facts, label_set=replace(facts.label_set, **changed)),
        max_num_seqs=4,
        max_num_batched_tokens=group.spec.limits.max_num_batched_tokens,
    )


def close(actual: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(np.array(actual)), expected, atol=5e-5, rtol=1e-4)


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """[7, 9] ids and mask: no padding, right, left, both; then rows without padding: a padding
    token inside, real ones at the end, and nothing else."""
    ids = torch.randint(PAD + 1, VOCAB_SIZE, (7, 9), generator=torch.manual_seed(4))
    mask = torch.ones_like(ids)
    for row, (first, last) in enumerate([(0, 9), (0, 5), (3, 9), (2, 6)]):
        mask[row] = 0
        mask[row, first:last] = 1
    ids[mask == 0] = PAD
    ids[4, 5] = PAD
    ids[5, 6:] = PAD
    ids[6] = PAD
    return ids, mask


async def test_scores_of_a_padded_batch(group: ModelGroup, folder: Path, reference: Any) -> None:
    ids, mask = padded_batch()
    service = service_of(group, folder, pad_token_id=PAD)
    body = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "output_hidden_states": True}
    ours = await service.forward({**body, "labels": [0, 1, 2, -100, 0, 1, 2]})
    reference.config.pad_token_id = PAD
    reference.config.problem_type = None
    with torch.no_grad():
        theirs = reference(
            input_ids=ids,
            attention_mask=mask,
            labels=torch.tensor([0, 1, 2, -100, 0, 1, 2]),
            output_hidden_states=True,
            use_cache=False,
        )
    close(ours["logits"], theirs.logits)
    assert ours["loss"] == pytest.approx(float(theirs.loss), rel=1e-5)
    assert ours["aux_loss"] is ours["router_logits"] is None
    real = mask.bool()
    for mine, other in zip(ours["hidden_states"], theirs.hidden_states, strict=True):
        close(mine[real.numpy()], other[real])


async def test_without_a_padding_token(group: ModelGroup, folder: Path, reference: Any) -> None:
    ids, _ = padded_batch()
    service = service_of(group, folder, pad_token_id=None)
    reference.config.pad_token_id = None
    one = await service.forward({"input_ids": ids[5:6].tolist()})
    with torch.no_grad():
        close(one["logits"], reference(input_ids=ids[5:6], use_cache=False).logits)
        with pytest.raises(ValueError, match="no padding token") as theirs:
            reference(input_ids=ids, use_cache=False)
    with pytest.raises(ApiError) as ours:
        await service.forward({"input_ids": ids.tolist()})
    assert ours.value.message == str(theirs.value)


async def test_a_score_the_mask_excludes(group: ModelGroup, folder: Path) -> None:
    service = service_of(group, folder, pad_token_id=PAD)
    body = {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 0]]}
    with pytest.raises(ApiError) as refused:
        await service.forward(body)
    assert refused.value.param == "attention_mask"
    for extra in ({"logits_to_keep": 1}, {"output_router_logits": True}):
        with pytest.raises(ApiError) as refused:
            await service.forward({"input_ids": [[5, 6, 7]], **extra})
        assert refused.value.param == next(iter(extra))


def test_config_says_what_is_pooled(folder: Path) -> None:
    label_set = facts_of(str(folder)).label_set
    family = json.loads((folder / "config.json").read_text())["model_type"]
    pad = {"phimoe": None, "jamba": 0}[family]
    assert label_set == LabelSet(names=LABELS, problem_type=None, pad_token_id=pad)


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        (None, 1, [0.5, -1.0]),
        (None, 1, [[0.5], [-1.0]]),
        (None, 1, [2, 3]),
        ("regression", 1, [0.5, -1.0]),
        ("regression", 3, [[0.5, 1.0, 2.0], [0.0, -1.0, 3.0]]),
        (None, 3, [2, 0]),
        (None, 3, [[2], [-100]]),
        (None, 3, [-100, -100]),
        ("single_label_classification", 3, [1, 1]),
        (None, 3, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.5]]),
        ("multi_label_classification", 3, [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        ("multi_label_classification", 1, [[1.0], [0.0]]),
    ],
)
def test_losses(problem: str | None, num_labels: int, labels: list[Any]) -> None:
    scores = 40 * torch.randn(2, num_labels, generator=torch.manual_seed(5))
    label_set = LabelSet(
        names=tuple(map(str, range(num_labels))), problem_type=problem, pad_token_id=0
    )
    config: Any = SimpleNamespace(problem_type=problem, num_labels=num_labels)
    expected = ForSequenceClassificationLoss(torch.tensor(labels), scores, config)
    targets = class_targets(labels, 2, label_set)
    assert targets.problem_type == config.problem_type
    loss = classification_loss(scores.numpy(), targets)
    assert loss == pytest.approx(float(expected), rel=1e-5, nan_ok=True)
    assert label_set.problem_type == problem, "what one call's labels imply must not stick"


INPUTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [5, 6, PAD]]


def reference_scores(reference: Any, inputs: list[list[int]], pad: int | None) -> torch.Tensor:
    """[n, 3], each input by itself."""
    reference.config.pad_token_id = pad
    with torch.no_grad():
        rows = [reference(input_ids=torch.tensor([i]), use_cache=False).logits[0] for i in inputs]
    return torch.stack(rows)


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
async def test_classify_is_vllms(
    group: ModelGroup, folder: Path, reference: Any, path: str
) -> None:
    scores = reference_scores(reference, INPUTS, PAD)
    expected = {
        None: torch.softmax(scores, -1),
        "single_label_classification": torch.softmax(scores, -1),
        "multi_label_classification": torch.sigmoid(scores),
        "regression": scores,
    }
    for problem, probabilities in expected.items():
        service = service_of(group, folder, pad_token_id=PAD, problem_type=problem)
        async with client_of(build_api(service)) as client:
            reply = (await client.post(path, json={"model": "tiny", "input": INPUTS})).json()
        assert reply["id"].startswith("classify-")
        assert (reply["object"], reply["model"]) == ("list", "tiny")
        assert isinstance(reply["created"], int)
        assert (reply["usage"]["prompt_tokens"], reply["usage"]["total_tokens"]) == (16, 16)
        assert [set(d) for d in reply["data"]] == [{"index", "label", "probs", "num_classes"}] * 4
        assert [d["index"] for d in reply["data"]] == [0, 1, 2, 3]
        assert [d["num_classes"] for d in reply["data"]] == [3] * 4
        assert [d["label"] for d in reply["data"]] == [LABELS[int(s.argmax())] for s in scores]
        close([d["probs"] for d in reply["data"]], probabilities.double())


async def test_one_input_cut_or_raw(group: ModelGroup, folder: Path, reference: Any) -> None:
    service = service_of(group, folder, pad_token_id=None)
    tokens = INPUTS[2]
    for body, seen in (
        ({}, tokens),
        ({"truncate_prompt_tokens": 3}, tokens[-3:]),
        ({"truncate_prompt_tokens": -1}, tokens),
        ({"truncate_prompt_tokens": 99}, tokens),
    ):
        reply = await service.classify({"input": tokens, "use_activation": False, **body})
        [entry] = reply["data"]
        close(entry["probs"], reference_scores(reference, [seen], None)[0].double())
        assert reply["usage"]["prompt_tokens"] == len(seen)


async def test_text_and_messages(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path, classifier=True, vocab_size=512, id2label=ID2LABEL)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(nano_checkpoint("nano-jamba") / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = ["What is this?", "Nothing much."]
    messages = [{"role": "user", "content": "What is this?"}]
    with running_service(folder, executor="local") as service:
        for body, inputs in (
            ({"input": texts}, [tokenizer(text).input_ids for text in texts]),
            # Without a text there is the BOS, in a list and by itself.
            ({"input": ["", texts[0]]}, [tokenizer("").input_ids, tokenizer(texts[0]).input_ids]),
            ({"input": ""}, [tokenizer("").input_ids]),
            (
                {"input": texts[0], "add_special_tokens": False},
                [tokenizer(texts[0], add_special_tokens=False).input_ids],
            ),
            (
                {"messages": messages},
                [tokenizer.apply_chat_template(messages, return_dict=False)],
            ),
            (
                {"messages": messages, "add_generation_prompt": True},
                [
                    tokenizer.apply_chat_template(
                        messages, add_generation_prompt=True, return_dict=False
                    )
                ],
            ),
        ):
            reply = await service.classify({**body, "wat": 1})
            expected = torch.softmax(reference_scores(reference, inputs, 0), -1)
            close([d["probs"] for d in reply["data"]], expected.double())
            assert reply["usage"]["prompt_tokens"] == sum(map(len, inputs))
            assert reply["warnings"] == ["unknown field wat has no effect"]


async def test_one_backbone_two_heads(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path / "both", classifier=True, id2label=ID2LABEL)
    tensors = load_file(folder / "model.safetensors")
    scores = reference_scores(
        AutoModelForSequenceClassification.from_pretrained(folder).eval(), INPUTS, 0
    )
    # A head of usual size: a larger one shows how far any float32 model is from the exact one.
    tensors["lm_head.weight"] = torch.randn(VOCAB_SIZE, 64, generator=torch.manual_seed(6)) / 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["JambaForSequenceClassification", "JambaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with running_service(folder, stages=2, expert_shards=3) as service:
        classified = await service.classify({"input": INPUTS})
        forward = await service.forward({"input_ids": [INPUTS[2]]})
        completed = await service.completions({"prompt": INPUTS[2], "temperature": 0})
    close([d["probs"] for d in classified["data"]], torch.softmax(scores, -1).double())
    plain = tmp_path / "lm"
    shutil.copytree(folder, plain)
    config["architectures"] = ["JambaForCausalLM"]
    (plain / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        model = load_reference(plain)
        expected = model(input_ids=torch.tensor([INPUTS[2]]), use_cache=False).logits
    close(forward["logits"], expected)
    assert isinstance(completed, dict)
    assert completed["usage"]["completion_tokens"] > 0
