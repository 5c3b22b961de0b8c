"""vLLM's OpenAI server, with its DBRX loader repaired. Runs in vLLM's own environment.

The repair stands outside the guard: the engine's process, which is spawned, imports this file too.
"""

from __future__ import annotations

import os
import runpy

os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"

from benchmarks.peers.vllm_worker import repair_dbrx_loader

os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
repair_dbrx_loader()

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
