"""Loading seen from outside: memory of real worker processes, and the bar on a terminal."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deploy.config import parse_args
from deploy.resolve import resolve
from models.interface import ModelConfig
from models.registry import load_config
from shards.checkpoint import extent_on_disk, open_model
from shards.control import Started
from shards.load_plan import plan_loading
from shards.spec import Role, WorkerSpec
from shards.subprocess_launcher import SubprocessLauncher
from shards.verify import model_slices
from tests.e2e.conftest import START_TIMEOUT_S, free_port
from tests.tiny import FAMILIES, write_tiny

MIB = 2**20

# Narrow enough for a small machine, with stages and experts of a hundred megabytes and more each.
LARGE: dict[str, dict[str, Any]] = {
    "dbrx": {
        "model_type": "dbrx",
        "architectures": ["DbrxForCausalLM"],
        "vocab_size": 8192,
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 8,
        "max_seq_len": 256,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 4, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 512, "moe_num_experts": 16, "moe_top_k": 2},
        "torch_dtype": "bfloat16",
    },
    "phimoe": {
        "model_type": "phimoe",
        "architectures": ["PhiMoEForCausalLM"],
        "vocab_size": 8192,
        "hidden_size": 2048,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "attention_bias": True,
        "lm_head_bias": True,
        "torch_dtype": "bfloat16",
    },
    "jamba": {
        "model_type": "jamba",
        "architectures": ["JambaForCausalLM"],
        "vocab_size": 8192,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "max_position_embeddings": 256,
        "torch_dtype": "bfloat16",
    },
}


def write_large(family: str, folder: Path) -> int:
    """A random bfloat16 checkpoint of at least 1 GB in several files; returns its data's size."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LARGE[family]))
    shapes = _shapes(load_config(folder))
    weight_map: dict[str, str] = {}
    batch: dict[str, torch.Tensor] = {}
    names = sorted(shapes)
    for name in names:
        batch[name] = torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        if name == names[-1] or sum(t.nbytes for t in batch.values()) > 200 * MIB:
            file = f"model-{len(weight_map):05}.safetensors"
            save_file(batch, folder / file)
            weight_map |= dict.fromkeys(batch, file)
            batch = {}
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(2 * math.prod(shape) for shape in shapes.values())


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor by its hub name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for wanted, _ in model_slices(config, "none"):
        source = wanted.sources[0]
        extent = extent_on_disk(wanted, source)
        shapes[source.name] = tuple(map(max, shapes.get(source.name, extent), extent))
    return shapes


@pytest.fixture
def large_folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "large"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Launcher(SubprocessLauncher):
    """Starts worker processes for nobody but this test, and waits until one has loaded."""

    def __init__(self) -> None:
        super().__init__({"OMP_NUM_THREADS": "1"})
        self.loaded = threading.Event()
        self.answer: Started | None = None

    def started(self, spec: WorkerSpec, started: Started) -> None:
        self.answer = started
        self.loaded.set()

    def died(self, spec: WorkerSpec, reason: str, fatal: bool) -> None:
        self.loaded.set()

    def pid(self, spec: WorkerSpec) -> int:
        return self._processes[spec].pid


@dataclass(frozen=True)
class Footprint:
    """Highest unique memory seen by sampling, highest resident memory as the kernel saw it."""

    unique: int
    resident: int
    bytes_read: int


def unique_memory(pid: int) -> int:
    """Bytes of memory that no other process shares; 0 before and after its life."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(map(int, re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", text, re.M)))


def footprint(spec: WorkerSpec) -> Footprint:
    """Load one worker in a process of its own."""
    launcher = Launcher()
    launcher.spawn(spec, launcher)
    pid, peak = launcher.pid(spec), 0
    try:
        while not launcher.loaded.wait(0.005):
            peak = max(peak, unique_memory(pid))
        assert launcher.answer is not None, f"{spec.peer} died"
        peak = max(peak, unique_memory(pid))
        status = Path(f"/proc/{pid}/status").read_text()
        high = re.search(r"^VmHWM:\s+(\d+) kB", status, re.M)
        assert high is not None
        return Footprint(peak, 1024 * int(high[1]), launcher.answer.bytes_read)
    finally:
        launcher.discard(spec)
        launcher.close()


def worker_specs(folder: Path, quantization: str = "none") -> list[tuple[WorkerSpec, int]]:
    """The workers of two stages and three expert shards, and what each should read."""
    options = {"stages": 2, "expert_shards": 3, "dtype": "bfloat16", "quantization": quantization}
    alone = {"max_model_len": 64, "max_num_seqs": 1, "warm_spare": False}
    group = resolve(parse_args({"model": str(folder), **options, **alone})).spec
    return [
        (WorkerSpec(group=group, role=load.role, index=load.index), load.num_bytes)
        for load in plan_loading(group, *open_model(folder))
    ]


def check_growth(idle_spec: WorkerSpec, spec: WorkerSpec, weights: int) -> int:
    """Load a worker that has `weights` bytes of them in the end; returns what it read.

    Its idle state is that of the same worker with a model of a few kilobytes.
    """
    idle, loaded = footprint(idle_spec), footprint(spec)
    unique, resident = loaded.unique - idle.unique, loaded.resident - idle.resident
    print(
        f"{spec.peer} quantization={spec.group.quantization}: weights {weights / MIB:.1f} MiB, "
        f"peak growth of unique memory {unique / MIB:.1f} MiB ({unique / weights:.1%}), "
        f"of resident memory {resident / MIB:.1f} MiB; idle {idle.unique / MIB:.1f} MiB"
    )
    assert 0.9 * weights < unique < 1.1 * weights
    # Sampling may miss a peak, the kernel does not.
    assert resident < 1.1 * weights
    return loaded.bytes_read


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_takes_no_more_memory_than_the_weights(
    family: str, tmp_path: Path, large_folder: Path
) -> None:
    total = write_large(family, large_folder)
    assert total >= 1_000_000_000
    tiny = write_tiny(family, tmp_path / "tiny", dtype=torch.bfloat16)
    workers = list(zip(worker_specs(tiny), worker_specs(large_folder), strict=True))
    loaded = [check_growth(idle, spec, planned) for (idle, _), (spec, planned) in workers]
    assert loaded == [planned for _, (_, planned) in workers]
    assert sum(loaded) == total
    # Half the size in memory, and no more than that on the way there.
    experts = zip(worker_specs(tiny, "int8"), worker_specs(large_folder, "int8"), strict=True)
    for (idle, _), (spec, planned) in experts:
        if spec.role is Role.EXPERT:
            assert check_growth(idle, spec, planned // 2) == planned


@pytest.mark.e2e
def test_the_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    port = free_port()
    command = [sys.executable, "-m", "deploy.cli", "serve", "nano-dbrx", "--port", str(port)]
    command += ["--stages", "2", "--expert-shards", "2"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    env.pop("RAY_ADDRESS", None)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=env)
    os.close(theirs)
    shown: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(ours, shown), daemon=True)
    reader.start()
    watchdog = threading.Timer(START_TIMEOUT_S, server.kill)
    watchdog.start()
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == f"ready on http://127.0.0.1:{port}\n"
        time.sleep(0.2)  # what follows the bar's end would still be on its way
        screen = b"".join(shown).decode()
        server.send_signal(signal.SIGTERM)
        assert server.stdout.read() == ""
        assert server.wait() == 0
    finally:
        watchdog.cancel()
        server.kill()
        reader.join(timeout=10)
        os.close(ours)
    # The five workers' bytes add up to the whole checkpoint.
    assert "loading nano-dbrx" in screen
    assert re.search(r"0\.0/6\.4 .*MiB", screen)
    assert re.search(r"6\.4/6\.4 .*MiB", screen)
    bar, _, after = screen.rpartition("\x1b[2K")
    assert "loading nano-dbrx" in bar, "the bar's line is erased in the end"
    kernels, caches = after.splitlines()
    assert re.fullmatch(r"conclave: kernels: \S+, threads per actor: \d+", kernels)
    measured = "conclave: the KV cache holds 16,384 tokens in blocks of 16 (measured: "
    assert caches.startswith(measured), after


def _read_all(descriptor: int, into: list[bytes]) -> None:
    while True:
        try:
            data = os.read(descriptor, 4096)
        except OSError:  # how a terminal says that its other end is closed
            return
        into.append(data)
