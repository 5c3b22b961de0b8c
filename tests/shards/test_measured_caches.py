"""Real model instances whose caches are as large as the measured memory allows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from deploy.config import parse_args
from deploy.resolve import resolve
from models.interface import KVCache
from router.step import SamplingParams
from router.transport.base import Transport
from router.transport.sockets import SocketTransport
from shards.client import GroupFailed
from shards.control import INGRESS
from shards.group import ModelGroup
from shards.spec import Role, WorkerSpec
from shards.stage_worker import StageWorker
from shards.worker import RunsForever, Worker, announce, make_worker
from tests.groups import ThreadLauncher, ask_all, healed, running_group

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, logprobs=1)
PROMPTS = [tuple(range(5, 5 + n)) for n in (4, 11, 30, 70)]
FEW: dict[str, Any] = {"max_model_len": 112, "max_num_seqs": 4, "block_size": 4}
PIPELINE: dict[str, Any] = {"stages": 2, "expert_shards": 2}
# Of nano-dbrx: keys and values of 4 tokens, 2 heads, 16 elements of 4 bytes, in 4 layers.
DBRX_BLOCK = 2 * 4 * 2 * 16 * 4 * 4
# Of nano-jamba: the same in 1 layer; 128 channels of 3 + 16 elements of 4 bytes in 7 layers.
JAMBA_BLOCK, JAMBA_STATE = 2 * 4 * 2 * 16 * 4, 128 * 19 * 4 * 7
# Half of it is used: in nano-dbrx for little more than the 28 blocks of the longest sequence.
TIGHT = {
    "nano-dbrx": (2 * 30 * DBRX_BLOCK + 1, (30, 0, 0)),
    "nano-jamba": (2 * (6 * JAMBA_STATE + 33 * JAMBA_BLOCK), (99, 4, 1)),
}


@pytest.mark.parametrize("options", [{"executor": "local"}, PIPELINE], ids=["1", "2x2"])
@pytest.mark.parametrize("model", TIGHT)
async def test_measured_caches_give_the_same_bits(
    model: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_group(model, **FEW, **options, kv_cache_memory="1GiB") as group:
        expected = await ask_all(group, PROMPTS, GREEDY)
        assert group.cache_summary.endswith("(as kv_cache_memory says)")
    with running_group(model, **FEW, **options, kv_cache_memory="auto") as group:
        assert await ask_all(group, PROMPTS, GREEDY) == expected
        assert group.load.total_blocks == 4 * 28
        assert "measured" in group.cache_summary
    free, sizes = TIGHT[model]
    monkeypatch.setattr("shards.worker.free_bytes", lambda: free)
    with running_group(model, **FEW, **options) as group:
        assert await ask_all(group, PROMPTS, GREEDY) == expected
        load = group.load
        assert (load.total_blocks, load.total_slots, load.total_snapshots) == sizes
        assert load.preemptions or model != "nano-dbrx", "the room must be small"


def end(worker: RunsForever) -> None:
    """Have a worker's loop return: to everyone else it is dead."""
    assert isinstance(worker, Worker)
    worker.stopping = True
    worker.transport.wake()


@pytest.mark.parametrize("victim", [Role.STAGE, Role.ENGINE])
async def test_successors_get_the_same_caches(
    victim: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the machine has left by then does not matter."""
    free, (num_blocks, _, _) = TIGHT["nano-dbrx"]
    later = itertools.chain([free] * 6, itertools.repeat(1))
    monkeypatch.setattr("shards.worker.free_bytes", lambda: next(later))
    made: list[tuple[WorkerSpec, RunsForever]] = []

    def make(spec: WorkerSpec, transport: Transport) -> RunsForever:
        worker = make_worker(spec, transport)
        made.append((spec, worker))
        return worker

    spec = resolve(parse_args({"model": "nano-dbrx", **FEW, **PIPELINE})).spec
    group = ModelGroup(spec, ThreadLauncher(make), SocketTransport(INGRESS, spec.secret))
    group.start(timeout=60)
    try:
        expected = await ask_all(group, PROMPTS, GREEDY)
        summary = group.cache_summary
        end(next(worker for spec, worker in made if spec.role is victim))
        while all(status.incarnation == 0 for status in group.workers()):
            await ask_all(group, PROMPTS[:1], GREEDY)
        await healed(group)
        assert await ask_all(group, PROMPTS, GREEDY) == expected
        assert group.load.total_blocks == num_blocks
        assert group.cache_summary == summary
    finally:
        group.stop()
    assert [spec.incarnation for spec, _ in made] == [0] * 6 + [1]
    for _, worker in made:
        if isinstance(worker, StageWorker):
            assert worker._runner is not None
            caches = [cache for cache in worker._runner._caches if isinstance(cache, KVCache)]
            assert [len(cache.key) for cache in caches] == [num_blocks] * 2


@pytest.mark.parametrize("options", [{"executor": "local"}, PIPELINE], ids=["1", "2x2"])
def test_too_little_memory_fails_the_group_with_the_reason(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.worker.free_bytes", lambda: 2 * 28 * DBRX_BLOCK - 1)
    failed = pytest.raises(GroupFailed, match=r"kv_cache_memory=auto: this machine has 224\.0 KiB")
    with failed as error, running_group("nano-dbrx", **FEW, **options):
        raise AssertionError("it must not start")
    assert "max_model_len=112 need 112.0 KiB there" in str(error.value)


def test_a_machine_that_says_nothing_needs_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> int:
        raise ValueError("/proc/meminfo cannot be read")

    monkeypatch.setattr("shards.worker.free_bytes", silent)
    worker_spec = WorkerSpec(
        group=resolve(parse_args({"model": "nano-dbrx"})).spec, role=Role.ENGINE, index=0
    )
    transport = SocketTransport(worker_spec.peer, "s")
    try:
        worker = make_worker(worker_spec, transport)
        with pytest.raises(ValueError, match=r"kv_cache_memory=auto: /proc/meminfo .* 2GiB"):
            announce(worker, worker_spec)
    finally:
        transport.close()
    with running_group("nano-dbrx", kv_cache_memory="1MiB", max_model_len=100) as group:
        assert group.cache_summary
