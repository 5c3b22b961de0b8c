"""llama.cpp through its C interface: batches of all sequences. Runs in its own environment."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.worker import Load, Prompts, Run, Scores, serve

MAX_BATCHED_TOKENS = 2048
MICRO_BATCH = 512


class LlamaCpp:
    """One model; a context per shape of batch, the last one kept."""

    def __init__(self, load: Load) -> None:
        self.notes: list[str] = []
        path = Path(load.folder) / f"{load.dtype}.gguf"
        if not path.exists():
            write_gguf(Path(load.folder), path, load.dtype)
        self._load = load
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError("llama.cpp did not load the model")
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._context: Any = None
        self._batch: Any = None
        self._shape = (0, 0)

    def run(self, prompts: Prompts, num_tokens: int) -> Run:
        """As Engine's."""
        times, tokens, _ = self._generate(prompts, num_tokens)
        return Run(times=times, tokens=tokens)

    def score(self, prompts: Prompts, num_tokens: int) -> Scores:
        """As Engine's; one prompt at a time."""
        results = [self._generate([prompt], num_tokens) for prompt in prompts]
        tokens = [answer for _, answers, _ in results for answer in answers]
        return Scores(tokens=tokens, logprobs=[_logprobs(rows, ids[0]) for _, ids, rows in results])

    def _generate(self, prompts: Prompts, num_tokens: int) -> Any:
        self._prepare(len(prompts), len(prompts[0]) + num_tokens)
        tokens: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        kept: list[np.ndarray] = []
        pending = [
            (token, i, position, position == len(prompt) - 1)
            for i, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        begin = time.perf_counter()
        while pending:
            entries, pending = pending[:MAX_BATCHED_TOKENS], pending[MAX_BATCHED_TOKENS:]
            rows = self._decode(entries)
            now = time.perf_counter() - begin
            for i, row in rows:
                tokens[i].append(int(row.argmax()))
                times[i].append(now)
                kept += [row.copy()] if len(prompts) == 1 else []
            if not pending and len(tokens[0]) < num_tokens:
                pending = [
                    (answer[-1], i, len(prompts[i]) + len(answer) - 1, True)
                    for i, answer in enumerate(tokens)
                ]
        return times, tokens, kept

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> Any:
        """Run (token, sequence, position, wanted); the logits of each wanted one."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for k, (token, sequence, position, wanted) in enumerate(entries):
            batch.token[k], batch.pos[k] = token, position
            batch.n_seq_id[k], batch.seq_id[k][0] = 1, sequence
            batch.logits[k] = wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        llama_cpp.llama_synchronize(self._context)
        return [
            (sequence, self._logits(k))
            for k, (_, sequence, _, wanted) in enumerate(entries)
            if wanted
        ]

    def _logits(self, k: int) -> np.ndarray:
        address = llama_cpp.llama_get_logits_ith(self._context, k)
        return np.ctypeslib.as_array(address, shape=(self._num_vocab,))

    def _prepare(self, batch: int, length: int) -> None:
        if self._context is None or self._shape != (batch, length):
            if self._context is not None:
                llama_cpp.llama_batch_free(self._batch)
                llama_cpp.llama_free(self._context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = batch * (-(-length // 256) * 256)
            params.n_batch, params.n_ubatch = MAX_BATCHED_TOKENS, MICRO_BATCH
            params.n_seq_max = batch
            params.n_threads = params.n_threads_batch = self._load.threads
            if self._load.dtype == "float32":
                params.type_k = params.type_v = 0
            self._context = llama_cpp.llama_init_from_model(self._model, params)
            if not self._context:
                raise RuntimeError("llama.cpp made no context")
            self._batch = llama_cpp.llama_batch_init(MAX_BATCHED_TOKENS, 0, 1)
            self._shape = (batch, length)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)


def _logprobs(rows: Sequence[np.ndarray], tokens: Sequence[int]) -> list[float]:
    answers = []
    for row, token in zip(rows, tokens, strict=True):
        shifted = row.astype(np.float64) - row.max()
        answers.append(float(shifted[token] - np.log(np.exp(shifted).sum())))
    return answers


if __name__ == "__main__":
    serve(LlamaCpp)
