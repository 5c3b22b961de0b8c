"""PhiMoE behind the Python handle's `forward` and `classify`: padding, pooling, losses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deploy.model_facts import model_facts
from deploy.openai_errors import ApiError
from deploy.served_model import load_served_model
from deploy.service import ApiService
from shards.checkpoint import open_model
from tests.groups import running_group
from tests.models.driver import tokens_of
from tests.parity.battery import assert_close
from tests.parity.cases import case
from tests.parity.generation import TOPOLOGIES
from tests.parity.phimoe_classifier import (
    ORIGINAL,
    PAD,
    free_of_padding,
    load_classifier,
    write_classifier,
)
from tests.parity.remedies import full_forward, load, logits_of
from tests.tiny import VOCAB_SIZE, write_tiny

Call = Callable[[ApiService], Awaitable[Any]]


@contextmanager
def running_service(folder: Path, **topology: Any) -> Iterator[Callable[[Call], Any]]:
    """A function that makes calls on the service of a running group, each on a loop of its own."""
    with running_group(folder, **topology) as group:
        limits = group.spec.limits
        service = ApiService(
            group,
            load_served_model("tiny", str(folder), VOCAB_SIZE, limits.max_model_len),
            model_facts(open_model(folder)[0]),
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )

        async def run(call: Call) -> Any:
            return await call(service)

        yield lambda call: asyncio.run(run(call))


def forward(folder: Path, body: dict[str, Any], **topology: Any) -> dict[str, Any]:
    with running_service(folder, **topology) as run:
        outputs: dict[str, Any] = run(lambda service: service.forward(body))
    return outputs


def plain(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


@case(25, "PhiMoE", "a padded batch through `forward`: each row as if alone and unpadded")
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(
    tmp_path: Path, longrope_switches_factors: Any, topology: dict[str, Any], side: str
) -> None:
    rope = {"original_max_position_embeddings": ORIGINAL}
    folder = write_tiny("phimoe", tmp_path, num_hidden_layers=2, rope_parameters=rope)
    rows = [tokens_of(i, count) for i, count in enumerate((10, 3 * ORIGINAL, ORIGINAL, 1))]
    width = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    places = [slice(width - len(row), width) if side == "left" else slice(len(row)) for row in rows]
    for row, place, tokens, real in zip(range(len(rows)), places, rows, mask, strict=True):
        ids[row, place] = tokens
        real[place] = 1
    outputs = forward(folder, {"input_ids": ids, "attention_mask": mask}, **topology)
    expected = logits_of(longrope_switches_factors(load(folder)), rows)
    for found, place, reference in zip(outputs["logits"], places, expected, strict=True):
        assert_close(plain(found[place]), reference)


# Token ids and, where there is one, mask of a batch whose padding token is 5.
WIDTH = 10
LEFT, RIGHT, WITHIN = (free_of_padding(tokens_of(i, n)) for i, n in ((1, 6), (2, 7), (3, 4)))
BATCH: dict[str, tuple[list[int], list[int]]] = {
    "left": ([PAD] * 4 + LEFT, [0] * 4 + [1] * 6),
    "right": (RIGHT + [PAD] * 3, [1] * 7 + [0] * 3),
    "within": ([*WITHIN, PAD, 8, PAD, PAD, 9, 3], [1] * WIDTH),
    "a real one at the end": (RIGHT + [PAD] * 3, [1] * WIDTH),
    "nothing else": ([PAD] * WIDTH, [1] * WIDTH),
}


@case(38, "PhiMoE", "`forward` of a classifier: padding left, right, within, and nothing else")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_pooling(tmp_path: Path, longrope_switches_factors: Any, topology: dict[str, Any]) -> None:
    folder = write_classifier(tmp_path, 3, pad_token_id=PAD)
    model = longrope_switches_factors(load_classifier(folder))
    ids, mask = ([row[part] for row in BATCH.values()] for part in (0, 1))
    with torch.no_grad():
        padded = model(torch.tensor(ids), attention_mask=torch.tensor(mask), use_cache=False).logits
    outputs = forward(folder, {"input_ids": ids, "attention_mask": mask}, **topology)
    for index, (tokens, real) in enumerate(BATCH.values()):
        alone = [token for token, flag in zip(tokens, real, strict=True) if flag]
        expected = full_forward(model, alone).logits[0]
        assert_close(padded[index], expected, "the reference itself, padded")
        assert_close(plain(outputs["logits"][index]), expected)


@case(38, "PhiMoE", "without a padding token one row is scored at its end, two are refused")
def test_no_padding_token(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, 3, pad_token_id=None)
    model, tokens = load_classifier(folder), tokens_of(7, 9)
    message = "Cannot handle batch sizes > 1 if no padding token is defined."
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([tokens, tokens]))
    with running_service(folder) as run:
        outputs = run(lambda service: service.forward({"input_ids": [tokens]}))
        with pytest.raises(ApiError, match=message):
            run(lambda service: service.forward({"input_ids": [tokens, tokens]}))
    assert_close(plain(outputs["logits"]), full_forward(model, tokens).logits)


@case(38, "PhiMoE", "`inputs_embeds` is refused by name")
def test_inputs_embeds(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, 2)
    body = {"inputs_embeds": np.zeros((1, 3, 64), np.float32)}
    with running_service(folder) as run, pytest.raises(ApiError, match=r"inputs_embeds.*input_ids"):
        run(lambda service: service.forward(body))


ROWS = [free_of_padding(tokens_of(20 + i, 8)) for i in range(4)]
SEVERAL = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
# Labels to compute a loss of: number of labels, problem_type of config.json, labels.
LOSSES: dict[str, tuple[int, str | None, Any]] = {
    "one label, so regression": (1, None, [0.5, -1.0, 2.0, 0.25]),
    "regression": (1, "regression", [[0.5], [-1.0], [2.0], [0.25]]),
    "regression of several": (3, "regression", SEVERAL),
    "whole numbers, so single label": (3, None, [0, 2, 1, 2]),
    "single label, one ignored": (3, "single_label_classification", [0, -100, 1, 2]),
    "fractions, so multi label": (3, None, SEVERAL),
    "multi label": (3, "multi_label_classification", SEVERAL),
}


@case(38, "PhiMoE", "losses of the three problem types, declared and inferred")
@pytest.mark.parametrize("name", LOSSES)
def test_losses(tmp_path: Path, name: str) -> None:
    num_labels, problem_type, labels = LOSSES[name]
    keys = {} if problem_type is None else {"problem_type": problem_type}
    folder = write_classifier(tmp_path, num_labels, pad_token_id=PAD, **keys)
    model = load_classifier(folder)
    with torch.no_grad():
        reference = model(torch.tensor(ROWS), labels=torch.tensor(labels), use_cache=False)
    outputs = forward(folder, {"input_ids": ROWS, "labels": labels})
    assert_close(plain(outputs["logits"]), reference.logits)
    assert_close(plain(outputs["loss"]), reference.loss)


@case(38, "PhiMoE", "the problem type of one call's labels does not stick to the next call's")
def test_the_problem_type_does_not_stick(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, 3, pad_token_id=PAD)
    with running_service(folder) as run:
        for labels in ([0, 2, 1, 2], SEVERAL, [0, 2, 1, 2]):
            body = {"input_ids": ROWS, "labels": labels}
            outputs = run(lambda service, body=body: service.forward(body))
            with torch.no_grad():  # a fresh model each, to which nothing sticks yet
                reference = load_classifier(folder)(
                    torch.tensor(ROWS), labels=torch.tensor(labels), use_cache=False
                )
            assert_close(plain(outputs["loss"]), reference.loss)


@case(38, "PhiMoE", "`classify`: scores, their probabilities and the label's name")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_classify(tmp_path: Path, longrope_switches_factors: Any, topology: dict[str, Any]) -> None:
    folder = write_classifier(tmp_path, 3, pad_token_id=PAD)
    model = longrope_switches_factors(load_classifier(folder))
    inputs = [[*ROWS[0], PAD, PAD], free_of_padding(tokens_of(30, ORIGINAL + 3)), [7]]
    with running_service(folder, **topology) as run:
        raw, activated = (
            run(lambda s, a=a: s.classify({"input": inputs, "use_activation": a}))["data"]
            for a in (False, True)
        )
    for tokens, scores, shares in zip(inputs, raw, activated, strict=True):
        expected = full_forward(model, tokens).logits[0]
        assert_close(plain(scores["probs"]), expected)
        assert_close(plain(shares["probs"]), expected.softmax(-1))
        assert scores["label"] == shares["label"] == model.config.id2label[int(expected.argmax())]
