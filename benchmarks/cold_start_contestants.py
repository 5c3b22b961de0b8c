"""One process that loads a checkpoint and says how long that took: `KIND FOLDER THREADS`.

`reader` reads all weights as a worker does, `conclave` makes a token with the engine and all
layers in its process, `transformers` with Transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shards.process_birth import age_s

PROMPT = (5, 6, 7, 8, 9, 10, 11, 12)


def read(folder: Path, threads: int) -> dict[str, float]:
    """Seconds between the first header and the last byte of weights, and how many bytes."""
    import torch

    from models.kernels.native import use_kernels
    from shards.checkpoint import open_model
    from shards.load_progress import LoadProgress
    from shards.loading import load_experts, load_stage
    from shards.memory_policy import loading
    from shards.threads import use_threads

    use_threads(threads)
    use_kernels("auto")
    progress = LoadProgress("reader", None)
    with loading():
        config, checkpoint = open_model(folder, progress.on_read)
        dtype = torch.bfloat16
        kept = (
            load_stage(config, checkpoint, 0, config.num_layers, dtype),
            load_experts(config, checkpoint, range(config.num_experts), dtype),
        )
    del kept
    return {"read_s": progress.seconds, "bytes": checkpoint.bytes_read, "seconds": age_s()}


def conclave(folder: Path, threads: int) -> dict[str, float]:
    """Seconds from the process's beginning to its first token."""
    from dataclasses import replace

    from deploy.config import parse_args
    from deploy.resolve import resolve
    from router.engine import EngineCore
    from router.step import Admit, SamplingParams
    from shards.local_executor import load_local_executor
    from shards.memory_policy import loading

    options = {"model": str(folder), "executor": "local", "threads": threads, "max_num_seqs": 1}
    spec = resolve(parse_args({**options, "max_model_len": 64})).spec
    resolved = age_s()
    with loading():
        executor = load_local_executor(spec)
    loaded = age_s()
    limits = replace(spec.limits, lookahead=False)
    executor.allocate(limits)
    core = EngineCore(limits)
    core.reset(1)
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    assert core.admit(Admit(seq_id=1, epoch=1, prompt=PROMPT, sampling=sampling)) is None
    plan = core.schedule()
    assert plan is not None
    executor.submit(plan)
    result = executor.poll(None)
    assert result is not None
    (token,) = core.apply(result)
    parts = {"checked_s": resolved, "loaded_s": loaded, "token": token.token_id}
    return {"seconds": age_s(), **parts}


def transformers(folder: Path, threads: int) -> dict[str, float]:
    """The same of "load everything, generate one token"."""
    import torch
    from transformers import AutoModelForCausalLM

    imported = age_s()
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    loaded = age_s()
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=1, do_sample=False)
    parts = {"imported_s": imported, "loaded_s": loaded, "token": int(ids[0, -1])}
    return {"seconds": age_s(), **parts}


if __name__ == "__main__":
    contestant = {"reader": read, "conclave": conclave, "transformers": transformers}[sys.argv[1]]
    print(json.dumps(contestant(Path(sys.argv[2]), int(sys.argv[3]))))
