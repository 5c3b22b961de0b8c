"""A user's program: forward passes and classifications of served models, beside Transformers'."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from models.kernels.choice import resolve_kernels
from tests.e2e.conftest import free_port
from tests.tiny import VOCAB_SIZE, load_reference, write_tiny

SPREAD = {"stages": 2, "expert_shards": 3}


@asynccontextmanager
async def application(folder: Path, **options: Any) -> AsyncIterator[Any]:
    """A handle to one served checkpoint."""
    from ray import serve

    from deploy.app import build

    args = {"model": str(folder), "dtype": "float32", **options}
    yield serve.run(build(args), name="outputs", route_prefix="/")
    await asyncio.to_thread(serve.delete, "outputs")


async def check_forward(folder: Path) -> None:
    """Every array and both losses of a padded batch, over stages and shards of real actors."""
    write_tiny("jamba", folder, router_aux_loss_coef=0.5)
    ids = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    asked = {"output_router_logits": True, "output_hidden_states": True}
    with torch.no_grad():
        theirs = load_reference(folder)(**inputs, **asked, use_cache=False)
    async with application(folder, **SPREAD) as handle:
        body = {name: value.tolist() for name, value in inputs.items()}
        ours = await handle.forward.remote({**body, **asked})
        last = await handle.forward.remote({"input_ids": ids.numpy(), "logits_to_keep": 1})
        refused = await handle.forward.remote({"inputs_embeds": [[[0.5]]]})
        classified = await handle.classify.remote({"input": [5]})
    real = mask.bool()
    close(ours["logits"][real.numpy()], theirs.logits[real])
    close([ours["loss"], ours["aux_loss"]], torch.stack([theirs.loss, theirs.aux_loss]))
    for mine, other in zip(ours["hidden_states"], theirs.hidden_states, strict=True):
        close(mine[real.numpy()], other[real])
    for mine, other in zip(ours["router_logits"], theirs.router_logits, strict=True):
        rows = real.flatten()
        close(mine[rows.numpy()], other.reshape(mine.shape)[rows])
    close(last["logits"][0], theirs.logits[0, -1:])
    assert refused["error"]["param"] == "inputs_embeds"
    assert classified["error"]["code"] == "no_classification_head"


async def check_classify(family: str, folder: Path, url: str) -> None:
    """Scores over HTTP and over the handle."""
    write_tiny(family, folder, classifier=True, id2label={0: "no", 1: "yes", 2: "maybe"})
    inputs = [[5, 6, 7], [8], [9, 10, 11, 12]]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([i]), use_cache=False).logits[0] for i in inputs]
    scores = torch.stack(rows)
    body = {"input": inputs}
    chosen = {"kernels": "auto,-attention"}
    async with (
        application(folder, **chosen) as handle,
        httpx.AsyncClient(base_url=url, timeout=60) as http,
    ):
        over_http = (await http.post("/v1/classify", json=body)).json()
        raw = (await http.post("/classify", json={**body, "use_activation": False})).json()
        over_handle = await handle.classify.remote(body)
        version = (await http.get("/version")).json()
        generated = await http.post("/v1/completions", json={"prompt": [5]})
    close([entry["probs"] for entry in over_http["data"]], torch.softmax(scores, -1))
    close([entry["probs"] for entry in raw["data"]], scores)
    assert over_handle["data"] == over_http["data"]
    names = [("no", "yes", "maybe")[int(row.argmax())] for row in scores]
    assert [entry["label"] for entry in over_http["data"]] == names
    assert version["heads"] == ["score"]
    assert version["kernels"] == resolve_kernels("auto,-attention")
    assert version["kernel_backends"]["attention"] == "torch"
    assert version["threads"] == 1  # PyTorch computes something
    assert generated.json()["error"]["code"] == "no_lm_head"


def close(actual: Any, expected: torch.Tensor) -> None:
    mine = torch.tensor(np.array(actual, dtype=np.float32))
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


async def check_all(folder: Path) -> None:
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        await check_forward(folder / "forward")
        for family in ("phimoe", "jamba"):
            await check_classify(family, folder / family, f"http://127.0.0.1:{port}")
    finally:
        await asyncio.to_thread(serve.shutdown)


if __name__ == "__main__":
    from deploy.local_ray import ray_session

    with ray_session(num_cpus=4):
        asyncio.run(check_all(Path(sys.argv[1])))
    print("all outputs agree")
