"""Traffic against the frames that are sent, bounds against arithmetic by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.demo import nano_checkpoint
from deploy.plan import make_plan
from deploy.plan_model import planned_model
from deploy.plan_options import PlanArgs
from models.interface import Routing
from models.registry import load_config
from router.dispatcher import TokenDispatcher
from router.placement import RoutingTable, ShardAddress, place_experts
from router.transport.base import Frame, FrameKind, Header
from shards.moe_wire import moe_call, moe_result

HEADER = Header(kind=FrameKind.MOE_CALL, epoch=1, step=1, layer=0, micro_batch=0, source=0)
BANDWIDTH = 10**12


def plan(model: str, **options: Any) -> dict[str, Any]:
    args = PlanArgs(model=model, memory_bandwidth=BANDWIDTH, tflops=100.0, **options)
    return make_plan(args, planned_model(model))


def _buffer_bytes(frame: Frame) -> int:
    return sum(buffer.nbytes for buffer in frame.buffers)


@pytest.mark.parametrize("dispatch", ["actor", "direct"])
@pytest.mark.parametrize("name", ["nano-dbrx", "nano-phimoe", "nano-jamba"])
def test_traffic_is_what_the_frames_of_one_token_hold(name: str, dispatch: str) -> None:
    config = load_config(nano_checkpoint(name))
    hidden, top_k = config.hidden_size, config.top_k
    rows = torch.zeros(1, hidden)
    ids = torch.arange(top_k)[None]
    routing = Routing(expert_ids=ids, weights=torch.ones(1, top_k), logits=rows)
    sent: list[Frame] = []
    dispatcher = TokenDispatcher(lambda shard, frame: sent.append(frame))
    dispatcher.set_table(
        RoutingTable(
            version=1,
            placement=place_experts(config.num_experts, 2, 1),
            addresses=tuple(ShardAddress(shard=i, incarnation=0, address="") for i in range(2)),
        )
    )
    dispatcher.submit(HEADER, rows, routing.expert_ids, routing.weights)
    questions = dispatcher.layers[0].sent_bytes
    exchange, hops = 2 * questions, 2  # every row comes back
    if dispatch == "actor":
        exchange += _buffer_bytes(moe_call(HEADER, rows, routing))
        exchange += _buffer_bytes(moe_result(HEADER, rows))
        hops = 4
    moe = sum(map(config.is_moe_layer, range(config.num_layers)))
    moved = plan(name, gpus_per_node=0, stages=3, expert_shards=2, dispatch=dispatch)["traffic"]
    assert moved["dispatch_bytes"] == moe * exchange
    assert moved["dispatch_hops"] == moe * hops
    assert (moved["stage_bytes"], moved["stage_hops"]) == (2 * rows.nbytes, 2)
    assert moved["bytes"] == moved["stage_bytes"] + moved["dispatch_bytes"]


def test_one_process_moves_nothing() -> None:
    moved = plan("nano-jamba", gpus_per_node=0)["traffic"]
    assert set(moved.values()) == {0}


def test_a_token_alone_reads_its_active_weights_and_its_caches() -> None:
    """Phi-tiny in one process: all that is active but the embedding table, of which one row."""
    found = plan("phi-tiny-moe", gpus_per_node=1, context=4096)
    bound = found["roofline"]["decode_batch_1"]
    weights = 2 * (1_288_969_536 - 32064 * 4096 + 4096)
    caches = 2047 * 65_536  # the window, not the context
    assert bound["weight_bytes_per_token"] == weights
    assert bound["cache_bytes_per_token"] == caches
    assert bound["tokens_per_second"] == pytest.approx(BANDWIDTH / (weights + caches))


def test_many_sequences_share_the_weights_that_they_touch() -> None:
    """Jamba-v0.1 on one huge GPU, 8 sequences: 16·(1 - (14/16)⁸) of 16 experts in 16 layers."""
    found = plan("jamba-v0.1", gpus_per_node=1, gpu_memory=2**40, concurrency=8, context=1000)
    assert found["options"]["executor"] == "local"
    bound = found["roofline"]["decode_concurrency"]
    touched = 16 * 16 * (1 - (14 / 16) ** 8) * 176_160_768
    resident = 51_570_323_328 - 16 * 16 * 176_160_768 - 65536 * 4096
    weights = 2 * (resident + 8 * 4096 + touched)
    caches = 1000 * 16_384 + 2 * (1_376_256 + 14_680_064)
    assert bound["weight_bytes_per_token"] == round(weights / 8)
    assert bound["cache_bytes_per_token"] == caches
    assert bound["step_seconds"] == pytest.approx((weights + 8 * caches) / BANDWIDTH)
    assert bound["tokens_per_second"] == pytest.approx(8 / bound["step_seconds"])


def test_experts_in_parallel_shorten_a_step() -> None:
    """DBRX, one stage and 16 shards: a token's four experts are read at once, one by each."""
    found = plan("dbrx", nodes=2, stages=1, expert_shards=16, concurrency=1, context=2)
    one_expert, resident = 396_361_728, 263_193_047_040 - 640 * 396_361_728
    own = resident - 2 * (100352 - 1) * 6144 + 2 * 163_840
    bound = found["roofline"]["decode_batch_1"]
    assert bound["step_seconds"] == pytest.approx((own + 40 * one_expert) / BANDWIDTH)


def test_stages_at_once_are_as_fast_as_the_busiest_gpu() -> None:
    """Phi-mini, 2 stages on GPUs of their own, experts on a third: which of them waits?"""
    options: dict[str, Any] = {"stages": 2, "expert_shards": 1, "concurrency": 2, "context": 2}
    found = plan("phi-mini-moe", gpus_per_node=3, layout="disaggregated", **options)
    layer, expert, head = 2 * 42_035_200, 23_592_960, 2 * (32064 * 4096 + 32064 + 2 * 4096)
    caches = 2 * 131_072
    touched = [2.0, 16 * (1 - (14 / 16) ** 2)]
    # One step of both sequences, or two steps of one each: alone, or the experts' GPU for both.
    together = 32 * layer + head + 2 * 2 * 4096 + 2 * caches + 32 * expert * touched[1]
    alone = 32 * layer + head + 2 * 4096 + caches + 32 * expert * touched[0]
    apart = max(alone, 2 * 32 * expert * touched[0])
    assert found["roofline"]["decode_concurrency"]["step_seconds"] == pytest.approx(
        min(together, apart) / BANDWIDTH
    )


def test_prefill_is_bound_by_the_busiest_gpu() -> None:
    found = plan("phi-tiny-moe", gpus_per_node=1)
    flops = 2 * (1_288_969_536 - 32064 * 4096)
    bound = found["roofline"]["prefill"]
    assert bound["flops_per_token"] == flops
    assert bound["tokens_per_second"] == pytest.approx(100e12 / flops)
    spread = plan(
        "phi-tiny-moe", gpus_per_node=5, stages=1, expert_shards=4, layout="disaggregated"
    )
    routed = 2 * 32 * 2 * 5_505_024
    busiest = max(flops - routed, routed / 4)
    assert spread["roofline"]["prefill"]["tokens_per_second"] == pytest.approx(100e12 / busiest)


def _sizing_rows() -> list[list[str]]:
    text = (Path(__file__).resolve().parents[2] / "docs" / "sizing.md").read_text()
    table = text.split("| model | quantization |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("row", _sizing_rows(), ids=lambda row: f"{row[0]} {row[1]}")
def test_the_table_of_the_docs_is_what_plan_says(row: list[str]) -> None:
    model, quantization, context, machines, *figures = row
    nodes, gpus = map(int, machines.split("×"))
    args = PlanArgs(
        model=model,
        nodes=nodes,
        gpus_per_node=gpus,
        quantization=quantization,
        context=int(context),
    )
    found = make_plan(args, planned_model(model))
    assert found["fits"]
    fullest = max(gpu["gpu_memory_bytes"] for node in found["nodes"] for gpu in node["gpus"])
    bounds = found["roofline"]
    assert figures == [
        str(found["options"]["stages"]),
        str(found["options"]["expert_shards"]),
        f"{found['weights']['bytes'] / 2**30:.1f}",
        f"{fullest / 2**30:.1f}",
        f"{bounds['decode_batch_1']['tokens_per_second']:,.0f}",
        f"{bounds['decode_concurrency']['tokens_per_second']:,.0f}",
        f"{bounds['prefill']['tokens_per_second']:,.0f}",
    ]
    # And no smaller machine of the table has room.
    smaller = [(1, 1), (1, 2), (1, 4), (1, 8)]
    for fewer_nodes, fewer in smaller[: [*smaller, (2, 8)].index((nodes, gpus))]:
        update = {"nodes": fewer_nodes, "gpus_per_node": fewer}
        assert not make_plan(args.model_copy(update=update), planned_model(model))["fits"]
