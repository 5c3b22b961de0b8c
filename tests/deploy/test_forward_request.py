"""What `forward` refuses, by the field's name, and the bounds of what it returns."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.forward import plan_forward
from deploy.forward_request import FIELDS
from deploy.model_facts import LabelSet, ModelFacts
from deploy.openai_errors import ApiError

FACTS = ModelFacts(
    family="jamba",
    vocab_size=100,
    hidden_size=16,
    num_layers=4,
    moe_layers=(1, 3),
    num_experts=4,
    top_k=2,
    aux_loss_coef=0.0,
    heads=frozenset({"lm"}),
    label_set=None,
)
TWO_LABELS = LabelSet(names=("a", "b"), problem_type=None, pad_token_id=0)
IDS = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (None, None),
        ([], None),
        ({}, "input_ids"),
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[]]}, "input_ids"),
        ({"input_ids": [1, 2]}, "input_ids"),
        ({"input_ids": [[[1]]]}, "input_ids"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids"),
        ({"input_ids": [[1.0, 2.0]]}, "input_ids"),
        ({"input_ids": [[True]]}, "input_ids"),
        ({"input_ids": [["1"]]}, "input_ids"),
        ({"input_ids": "text"}, "input_ids"),
        ({"input_ids": {"a": 1}}, "input_ids"),
        ({"input_ids": [[-1]]}, "input_ids"),
        ({"input_ids": [[100]]}, "input_ids"),
        ({"input_ids": [[2**70]]}, "input_ids"),
        ({"input_ids": np.array([[2**64 - 1]], np.uint64)}, "input_ids"),
        ({"input_ids": [[1] * 65]}, "input_ids"),
        ({"inputs_embeds": [[[0.5]]]}, "inputs_embeds"),
        ({"input_ids": IDS, "position_ids": IDS}, "position_ids"),
        ({"input_ids": IDS, "use_cache": False}, "use_cache"),
        ({"input_ids": IDS, 5: 5}, "5"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, "attention_mask"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 2], [1, 1, 1]]}, "attention_mask"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, -1], [1, 1, 1]]}, "attention_mask"),
        ({"input_ids": IDS, "attention_mask": [[1, 0, 1], [1, 1, 1]]}, "attention_mask"),
        ({"input_ids": IDS, "attention_mask": [[0, 0, 0], [1, 1, 1]]}, "attention_mask"),
        ({"input_ids": IDS, "attention_mask": [[0.5, 1, 1], [1, 1, 1]]}, "attention_mask"),
        ({"input_ids": IDS, "labels": [1, 2]}, "labels"),
        ({"input_ids": IDS, "labels": [[1, 2, 3], [1, 2, 100]]}, "labels"),
        ({"input_ids": IDS, "labels": [[1, 2, 3], [1, 2, -1]]}, "labels"),
        ({"input_ids": IDS, "labels": [[1, 2, 3], [1, 2, 0.5]]}, "labels"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "logits_to_keep"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": [0, 1, 2]}, "logits_to_keep"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep"),
        ({"input_ids": IDS, "logits_to_keep": True}, "logits_to_keep"),
        ({"input_ids": IDS, "logits_to_keep": 1.0}, "logits_to_keep"),
        ({"input_ids": IDS, "logits_to_keep": []}, "logits_to_keep"),
        ({"input_ids": IDS, "logits_to_keep": [3]}, "logits_to_keep"),
        ({"input_ids": IDS, "logits_to_keep": [-4]}, "logits_to_keep"),
        ({"input_ids": IDS, "logits_to_keep": [[0], [1]]}, "logits_to_keep"),
        ({"input_ids": IDS, "output_router_logits": 1}, "output_router_logits"),
        ({"input_ids": IDS, "output_hidden_states": "yes"}, "output_hidden_states"),
    ],
)
def test_what_is_refused_names_the_field(body: object, param: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        plan_forward(body, FACTS, max_model_len=64, max_num_batched_tokens=512)
    assert refused.value.status == 400
    assert refused.value.param == param
    assert param is None or refused.value.message.startswith(f"{param}: ")


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-5, 5)
    | st.floats()
    | st.text(max_size=2)
    | st.sampled_from([np.array(3), np.array([[1, 2]], object), b"x", 1j, np.datetime64("now")]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), odd), st.booleans())
def test_nothing_odd_gets_past_the_check(body: dict[str, Any], scores: bool) -> None:
    facts = replace(FACTS, heads=frozenset({"score"}), label_set=TWO_LABELS) if scores else FACTS
    with suppress(ApiError):
        assert plan_forward({"input_ids": IDS, **body}, facts, 64, 512).computations()


def test_masks_may_be_true_and_false() -> None:
    mask = np.array([[True, True, False], [False, True, True]])
    plan = plan_forward({"input_ids": IDS, "attention_mask": mask}, FACTS, 64, 512)
    assert [c.tokens for c in plan.computations()] == [(1, 2), (5, 6)]


@pytest.mark.parametrize(
    ("larger", "body", "param"),
    [
        ({"vocab_size": 2**17}, {}, "logits_to_keep"),
        ({"hidden_size": 2**15}, {"output_hidden_states": True}, "output_hidden_states"),
        ({"num_experts": 2**18}, {"output_router_logits": True}, "output_router_logits"),
    ],
)
def test_results_have_a_bound(larger: dict[str, int], body: dict[str, Any], param: str) -> None:
    facts = replace(FACTS, **larger)
    request = {"input_ids": np.ones((64, 64), np.int64), **body}
    with pytest.raises(ApiError) as refused:
        plan_forward(request, facts, max_model_len=64, max_num_batched_tokens=512)
    assert refused.value.param == param
    assert str(2**30) in refused.value.message
    plan_forward({**request, "input_ids": [[1] * 64] * 2}, facts, 64, 512)


def test_what_a_step_returns_has_a_bound() -> None:
    """It is the row's own: neither other rows nor columns that are dropped count."""
    facts = replace(FACTS, vocab_size=2**22, hidden_size=64)
    row = np.ones((1, 64), np.int64)
    with pytest.raises(ApiError, match=f"max_num_batched_tokens=512 .* allowed are {2**29}"):
        plan_forward({"input_ids": row}, facts, 64, 512)
    assert plan_forward({"input_ids": row}, facts, 64, 16).computations()[0].step_bytes == 2**28
    kept = plan_forward({"input_ids": row, "logits_to_keep": 2}, facts, 64, 512)
    assert kept.computations()[0].step_bytes == 2**25
    both = {"input_ids": row, "logits_to_keep": 2, "output_hidden_states": True}
    hidden = 4 * 64 * 64 * (facts.num_layers + 1)
    assert plan_forward(both, facts, 64, 512).computations()[0].step_bytes == 2**25 + hidden
