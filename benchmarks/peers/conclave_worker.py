"""Conclave in the worker's process: EngineCore and LocalExecutor, as its engine runs them."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from benchmarks.contestants import BLOCK_SIZE
from benchmarks.contestants import Engine as Contestant
from benchmarks.peers.worker import Load, Prompts, Run, Scores, serve
from shards.threads import dtype_of, use_threads

MAX_BATCHED_TOKENS = 4096  # as vLLM's default


class Conclave:
    """The contestant behind the protocol."""

    def __init__(self, load: Load) -> None:
        use_threads(load.threads)
        self._engine = Contestant(
            Path(load.folder),
            load.max_batch,
            dtype=dtype_of(load.dtype),
            max_batched_tokens=MAX_BATCHED_TOKENS,
            max_tokens=load.max_tokens,
            prefix_caching=False,  # as in vLLM and the servers: no prompt comes twice
            num_blocks=load.max_batch * (load.max_tokens // BLOCK_SIZE + 2),
        )
        self.notes: list[str] = []

    def run(self, prompts: Prompts, num_tokens: int) -> Run:
        """As Engine's."""
        timed = self._engine.run(prompts, num_tokens)
        return Run(times=timed.times, tokens=timed.tokens)

    def score(self, prompts: Prompts, num_tokens: int) -> Scores:
        """As Engine's."""
        timed = self._engine.run(prompts, num_tokens, logprobs=0)
        return Scores(tokens=timed.tokens, logprobs=timed.logprobs)

    def experts_touched(self, prompts: Prompts, per_token: int) -> dict[str, float]:
        """Distinct experts per MoE layer that the prompts' last tokens need, on average."""
        layers = self._engine.last_gates(prompts).values()
        touched = [len(set(scores.topk(per_token).indices.flatten().tolist())) for scores in layers]
        return {"experts": statistics.fmean(touched)}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve(Conclave)
