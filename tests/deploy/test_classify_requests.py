"""What classification refuses, by the field's name: labels, and bodies of /v1/classify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.http_api import build_api
from deploy.losses import class_targets
from deploy.model_facts import LabelSet
from deploy.openai_errors import ApiError
from tests.deploy.conftest import running_service
from tests.deploy.http_client import client_of
from tests.tiny import VOCAB_SIZE, write_tiny


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        (None, 3, [0, 3]),
        (None, 3, [0, -1]),
        (None, 3, [0]),
        (None, 3, [0, 1, 2]),
        (None, 3, [0.0, 1.0]),
        (None, 3, [True, False]),
        (None, 3, [[1, 0, 1], [0, 0, 1]]),
        (None, 3, ["good", "bad"]),
        (None, 3, [[0], [1, 2]]),
        (None, 3, {"a": 1}),
        (None, 3, [float("nan"), 1.0]),
        (None, 3, np.array([2**64 - 100, 0], np.uint64)),
        (None, 1, [[0.5, 1.0], [0.5, 1.0]]),
        ("single_label_classification", 3, [0.0, 1.0]),
        ("multi_label_classification", 3, [0, 1]),
        ("regression", 3, [0.5, 1.0]),
    ],
)
def test_labels_that_are_refused(problem: str | None, num_labels: int, labels: Any) -> None:
    names = tuple(map(str, range(num_labels)))
    with pytest.raises(ApiError) as refused:
        class_targets(labels, 2, LabelSet(names=names, problem_type=problem, pad_token_id=0))
    assert refused.value.param == "labels"


async def test_refusals(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path, classifier=True)
    with running_service(folder, executor="local") as service:
        client = client_of(build_api(service))
        for body, param in (
            ({}, "input"),
            ({"input": []}, "input"),
            ({"input": [[]]}, "input"),
            ({"input": [[5], []]}, "input"),
            ({"input": [5, "x"]}, "input"),
            ({"input": [VOCAB_SIZE]}, "input"),
            ({"input": [-1]}, "input"),
            ({"input": [5] * 257}, "input"),
            ({"input": {"text": "x"}}, "input"),
            ({"input": [5], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
            ({"input": "", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
            ({"input": [5], "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
            ({"input": [5], "truncate_prompt_tokens": "1"}, "truncate_prompt_tokens"),
            ({"input": [5], "use_activation": "no"}, "use_activation"),
            ({"input": [5], "model": "other"}, "model"),
            ({"input": [5], "messages": [{"role": "user", "content": "x"}]}, "messages"),
            ({"messages": []}, "messages"),
            ({"input": [[5]] * 999}, "input"),
        ):
            response = await client.post("/v1/classify", json=body)
            assert response.status_code in (400, 404), body
            assert response.json()["error"]["param"] == param, body
        for body in ({"input": "text"}, {"messages": [{"role": "user", "content": "x"}]}):
            error = (await client.post("/v1/classify", json=body)).json()["error"]
            assert error["code"] == "tokenizer_missing"
        for path, body in (
            ("/v1/completions", {"prompt": [5]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            response = await client.post(path, json=body)
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "no_lm_head"


async def test_dbrx_has_no_classification_head(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path)
    with running_service(folder, executor="local") as service:
        client = client_of(build_api(service))
        error = (await client.post("/v1/classify", json={"input": [5]})).json()["error"]
    assert error["code"] == "no_classification_head"
    assert "dbrx" in error["message"]
