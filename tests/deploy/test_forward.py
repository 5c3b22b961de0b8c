"""`forward` against Transformers: logits, losses, router logits and hidden states of batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploy.compute import StepBudget
from deploy.openai_errors import ApiError
from deploy.service import ApiService
from tests.deploy.conftest import Api, facts_of, running_service
from tests.tiny import FAMILIES, VOCAB_SIZE, load_reference, write_tiny

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "local": {"executor": "local"},
    "2x3": {"stages": 2, "expert_shards": 3, "max_num_batched_tokens": 7},
}
# Large, so that its share of the loss shows.
COEFFICIENT = 0.5
SPANS = ((0, 11), (4, 11), (0, 6), (5, 6))
"""No padding; left; right; both sides of a single token."""
COLUMNS = 11


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [4, 11]; what stands at padding is as good as anything."""
    ids = torch.randint(VOCAB_SIZE, (4, COLUMNS), generator=torch.manual_seed(2))
    mask = torch.zeros_like(ids)
    for row, (first, last) in enumerate(SPANS):
        mask[row, first:last] = 1
    return ids, mask


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: str = request.param
    coefficient: dict[str, Any] = {"router_aux_loss_coef": COEFFICIENT}
    if family == "dbrx":  # whose top-level coefficient nobody reads
        coefficient = {
            "router_aux_loss_coef": 9.0,
            "ffn_config": {"moe_loss_weight": COEFFICIENT},
        }
    return write_tiny(family, tmp_path_factory.mktemp(family), **coefficient)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[..., Any]:
    model = load_reference(folder)

    def call(**inputs: Any) -> Any:
        with torch.no_grad():
            return model(use_cache=False, **inputs)

    return call


@pytest.fixture(scope="module", params=TOPOLOGIES)
def service(request: pytest.FixtureRequest, folder: Path) -> Iterator[ApiService]:
    with running_service(folder, **TOPOLOGIES[request.param]) as running:
        yield running


def close(actual: Any, expected: torch.Tensor) -> None:
    assert actual.dtype == np.float32
    torch.testing.assert_close(torch.tensor(actual), expected, atol=5e-5, rtol=1e-4)


async def test_padded_batch_is_transformers(
    service: ApiService, reference: Callable[..., Any]
) -> None:
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100
    ours = await service.forward(
        {
            "input_ids": ids.tolist(),
            "attention_mask": mask.tolist(),
            "labels": labels.tolist(),
            "output_router_logits": True,
            "output_hidden_states": True,
        }
    )
    # What a padding position predicts is arbitrary in Transformers; here it is ignored.
    for row, (first, _) in enumerate(SPANS):
        labels[row, first] = -100
    theirs = reference(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        output_router_logits=True,
        output_hidden_states=True,
    )
    real = mask.bool()
    assert ours.keys() == {"loss", "aux_loss", "logits", "router_logits", "hidden_states"}
    close(ours["logits"][real.numpy()], theirs.logits[real])
    assert not ours["logits"][~real.numpy()].any()
    assert ours["loss"] == pytest.approx(float(theirs.loss), rel=1e-5)
    assert ours["aux_loss"] == pytest.approx(float(theirs.aux_loss), rel=1e-5)
    assert len(ours["hidden_states"]) == len(theirs.hidden_states)
    for mine, other in zip(ours["hidden_states"], theirs.hidden_states, strict=True):
        close(mine[real.numpy()], other[real])
        assert not mine[~real.numpy()].any()
    assert len(ours["router_logits"]) == len(theirs.router_logits)
    for mine, other in zip(ours["router_logits"], theirs.router_logits, strict=True):
        assert mine.shape == (ids.numel(), other.shape[-1])
        rows = real.flatten()
        close(mine[rows.numpy()], other.reshape(mine.shape)[rows])


async def test_without_padding_or_extras(
    service: ApiService, reference: Callable[..., Any]
) -> None:
    ids, _ = batch()
    ours = await service.forward({"input_ids": ids.numpy(), "labels": ids.numpy()})
    theirs = reference(input_ids=ids, labels=ids)
    close(ours["logits"], theirs.logits)
    assert ours["loss"] == pytest.approx(float(theirs.loss), rel=1e-5)
    assert ours["aux_loss"] is ours["router_logits"] is ours["hidden_states"] is None
    routed = await service.forward({"input_ids": ids.numpy(), "output_router_logits": True})
    assert routed["loss"] is None
    expected = reference(input_ids=ids, output_router_logits=True)
    assert routed["aux_loss"] == pytest.approx(float(expected.aux_loss), rel=1e-5)
    nothing = await service.forward({"input_ids": [[5, 6]], "labels": [[5, -100]]})
    assert np.isnan(nothing["loss"])


@pytest.mark.parametrize("keep", [0, 1, 4, 11, 99, [0, -1, 3, 3], [10], [4, 2, -11]])
async def test_logits_to_keep(
    service: ApiService, reference: Callable[..., Any], keep: int | list[int]
) -> None:
    ids, mask = batch()
    whole = await service.forward({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    body = {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "logits_to_keep": keep}
    ours = (await service.forward(body))["logits"]
    keeping = torch.tensor(keep) if isinstance(keep, list) else keep
    theirs = reference(input_ids=ids, attention_mask=mask, logits_to_keep=keeping).logits
    assert ours.shape == theirs.shape
    columns = torch.arange(COLUMNS)[-keep:] if isinstance(keep, int) else torch.arange(11)[keeping]
    assert (ours == whole["logits"][:, columns.numpy()]).all()
    real = mask[:, columns].bool()
    close(ours[real.numpy()], theirs[real])


async def test_one_expert_has_no_router(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path, num_experts=1)
    ids, _ = batch()
    with running_service(folder, executor="local") as service:
        body = {"input_ids": ids.tolist(), "labels": ids.tolist(), "output_router_logits": True}
        ours = await service.forward(body)
    with torch.no_grad():
        theirs = load_reference(folder)(input_ids=ids, labels=ids, use_cache=False)
    assert ours["router_logits"] == []
    assert ours["aux_loss"] is None
    assert ours["loss"] == pytest.approx(float(theirs.loss), rel=1e-5)


async def test_rows_wait_for_the_bytes_of_a_step() -> None:
    budget, seen = StepBudget(10), []

    async def hold(name: str, num_bytes: int) -> None:
        async with budget.hold(num_bytes):
            seen.append(name)
            await release.wait()

    release = asyncio.Event()
    tasks = [asyncio.create_task(hold(*args)) for args in (("a", 6), ("b", 5), ("c", 4), ("d", 0))]
    await asyncio.sleep(0.01)
    assert seen == ["a"], "first come, first served: nobody passes the one that does not fit"
    tasks[1].cancel()
    await asyncio.sleep(0.01)
    assert seen == ["a", "c", "d"]
    release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(1), budget.hold(10):
        pass


async def test_a_cancelled_call_aborts_every_sequence(make_api: Callable[..., Api]) -> None:
    api = make_api(delay=60)
    call = asyncio.create_task(api.service.forward({"input_ids": [[5, 6]] * 3}))
    while len(api.client.streams) < 3:
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert all(stream.aborted for stream in api.client.streams)


async def test_a_batch_is_admitted_whole(make_api: Callable[..., Api]) -> None:
    api = make_api(delay=60, max_num_seqs=1)  # and 16 may wait
    with pytest.raises(ApiError) as never:
        await api.service.forward({"input_ids": [[5]] * 18})
    assert (never.value.status, never.value.param) == (400, "input_ids")
    call = asyncio.create_task(api.service.forward({"input_ids": [[5]] * 16}))
    while len(api.client.streams) < 16:
        await asyncio.sleep(0.01)
    with pytest.raises(ApiError) as busy:
        await api.service.forward({"input_ids": [[5]] * 2})
    assert (busy.value.status, busy.value.code) == (429, "rate_limit_exceeded")
    assert len(api.client.streams) == 16
    call.cancel()


def test_facts_are_the_checkpoints() -> None:
    facts = facts_of("nano-jamba")
    assert facts.heads == {"lm"}
    assert facts.label_set is None
    assert len(facts.moe_layers) < facts.num_layers
