"""vLLM's engine in the worker's process, stepped by hand. Runs in vLLM's own environment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from benchmarks.peers.worker import Load, Prompts, Run, Scores, serve

MAX_BATCHED_TOKENS = 4096


def repair_dbrx_loader() -> None:
    """Its loader looks for the experts' matrices where an earlier version had them."""
    from vllm.model_executor.models import dbrx

    original: Callable[..., Any] = dbrx.DbrxModel.load_weights

    def load_weights(self: Any, weights: Iterable[tuple[str, Any]]) -> Any:
        moved = (
            (name.replace(".experts.mlp.", ".experts.routed_experts.mlp."), weight)
            for name, weight in weights
        )
        return original(self, moved)

    dbrx.DbrxModel.load_weights = load_weights


class Vllm:
    """One LLMEngine."""

    def __init__(self, load: Load) -> None:
        from vllm import EngineArgs, LLMEngine

        self.notes: list[str] = []
        if load.family == "dbrx":
            repair_dbrx_loader()
            self.notes.append("with its loader repaired")
        self._num_requests = 0
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=load.folder,
                dtype=load.dtype,
                skip_tokenizer_init=True,
                enforce_eager=True,
                max_model_len=load.max_tokens,
                max_num_seqs=load.max_batch,
                max_num_batched_tokens=max(MAX_BATCHED_TOKENS, load.max_tokens),
                enable_prefix_caching=False,
                disable_log_stats=True,
            )
        )
        self.run([[5, 6, 7, 8]] * load.max_batch, 3)

    def run(self, prompts: Prompts, num_tokens: int) -> Run:
        """As Engine's."""
        times, tokens, _ = self._loop(prompts, num_tokens, None)
        return Run(times=times, tokens=tokens)

    def score(self, prompts: Prompts, num_tokens: int) -> Scores:
        """As Engine's."""
        _, tokens, outputs = self._loop(prompts, num_tokens, 0)
        rows = [output.logprobs for output in outputs]
        logprobs = [
            [float(row[i].logprob) for row, i in zip(some, ids, strict=True)]
            for some, ids in zip(rows, tokens, strict=True)
        ]
        return Scores(tokens=tokens, logprobs=logprobs)

    def _loop(self, prompts: Prompts, num_tokens: int, logprobs: int | None) -> Any:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
        )
        first = self._num_requests
        self._num_requests += len(prompts)
        times: list[list[float]] = [[] for _ in prompts]
        outputs: list[Any] = [None] * len(prompts)
        begin = time.perf_counter()
        for i, prompt in enumerate(prompts):
            self._engine.add_request(str(first + i), {"prompt_token_ids": prompt}, sampling)
        while self._engine.has_unfinished_requests():
            stepped = self._engine.step()
            now = time.perf_counter() - begin
            for request in stepped:
                i = int(request.request_id) - first
                outputs[i] = request.outputs[0]
                times[i] += [now] * (len(outputs[i].token_ids) - len(times[i]))
        return times, [list(output.token_ids) for output in outputs], outputs


if __name__ == "__main__":
    serve(Vllm)
