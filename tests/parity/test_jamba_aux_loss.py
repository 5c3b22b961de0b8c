"""Jamba's load-balancing loss, from the router logits of its MoE layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.conftest import running_service
from tests.parity.battery import assert_close
from tests.parity.cases import case
from tests.parity.jamba import SEQUENCES, SHORT, jamba, schedule
from tests.parity.remedies import load

EXECUTORS: dict[str, dict[str, Any]] = {
    "local": {"executor": "local"},
    "pipeline": {"executor": "pipeline", "stages": 2, "expert_shards": 3},
}
everywhere = pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS.keys())
DENSE = {"executor": "pipeline", "stages": 2}


@case(59, "Jamba", "the load-balancing loss counts MoE layers alone")
@everywhere
@pytest.mark.parametrize("per_token", [1, 2, 3], ids=["one", "two", "three"])
async def test_aux_loss(
    tmp_path: Path, per_token: int, executor: dict[str, Any], full_forward: Any
) -> None:
    """Two MoE layers of five; a dense layer that counted would change every average."""
    keys = schedule((3, 1), (3, 1), 5)
    folder = jamba(tmp_path, **keys, num_experts_per_tok=per_token, router_aux_loss_coef=0.5)
    model = load(folder, torch.float64)
    with running_service(folder, **executor) as service:
        for tokens in SEQUENCES:
            batch = {"input_ids": [tokens], "labels": [tokens], "output_router_logits": True}
            ours = await service.forward(batch)
            labels = torch.tensor([tokens])
            theirs = full_forward(model, tokens, labels=labels, output_router_logits=True)
            assert len(theirs.router_logits) == 2
            for logits, expected in zip(ours["router_logits"], theirs.router_logits, strict=True):
                assert_close(torch.from_numpy(logits), expected)
            assert ours["aux_loss"] == pytest.approx(theirs.aux_loss.item(), abs=1e-5, rel=1e-4)
            wanted = theirs.loss.item()
            assert ours["loss"] == pytest.approx(wanted, abs=1e-5, rel=1e-4, nan_ok=True)
            assert (wanted != wanted) == (len(tokens) == 1), "one token predicts nothing"


@case(43, "Jamba", "num_experts 1: every layer dense, no gates, no router logits to give")
@pytest.mark.parametrize("executor", [EXECUTORS["local"], DENSE], ids=EXECUTORS.keys())
async def test_no_aux_loss_with_one_expert(
    tmp_path: Path, executor: dict[str, Any], full_forward: Any
) -> None:
    """Transformers crashes when it is asked for them; its loss without them is all there is."""
    folder, tokens = jamba(tmp_path, **SHORT, num_experts=1), SEQUENCES[2]
    labels = torch.tensor([tokens])
    expected = full_forward(load(folder, torch.float64), tokens, labels=labels).loss.item()
    with running_service(folder, **executor) as service:
        batch = {"input_ids": [tokens], "labels": [tokens], "output_router_logits": True}
        ours = await service.forward(batch)
    assert not ours["router_logits"]
    assert ours["aux_loss"] is None
    assert ours["loss"] == pytest.approx(expected, abs=1e-5, rel=1e-4)
