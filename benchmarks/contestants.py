"""Who is measured on one checkpoint: the engine, and Transformers in its two ways."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plain_operators import plain_operators
from models.registry import load_config
from router.engine import EngineCore
from router.limits import EngineLimits
from router.step import Admit, SamplingParams, Want
from shards.local_executor import LocalExecutor
from shards.memory_policy import loading
from shards.vocabulary import Vocabulary

Prompts = Sequence[Sequence[int]]
BLOCK_SIZE = 16
MAX_BATCHED_TOKENS = 512


@dataclass
class Timed:
    """What one batch took: seconds until every first token and after it, how many tokens came
    after it, and the seconds of each step that went into planning.

    Of the engine also, by sequence: seconds to each token, the tokens, their log probabilities.
    """

    prefill: float = 0.0
    decode: float = 0.0
    decoded: int = 0
    planning: list[float] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)


class Engine:
    """EngineCore and LocalExecutor in a loop, as the engine worker runs them."""

    name = "engine"

    def __init__(
        self,
        folder: Path,
        max_num_seqs: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        max_batched_tokens: int = MAX_BATCHED_TOKENS,
        max_tokens: int = 16384,
        num_blocks: int = 4096,
        quantization: str = "none",
        prefix_caching: bool = True,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`max_tokens` is the longest prompt with its answer."""
        config = load_config(folder)
        kinds = {config.cache_shape(i).kind for i in range(config.num_layers)}
        self.limits = EngineLimits(
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            num_state_slots=max_num_seqs if "state" in kinds else 0,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_batched_tokens,
            max_model_len=max_tokens,
            prefix_caching=prefix_caching,
            num_snapshots=8 if prefix_caching else 0,
        )
        with loading():
            self._executor = LocalExecutor(
                config, folder, dtype, self.limits, quantization=quantization, vocabulary=vocabulary
            )
        self._epoch = 0

    def run(
        self,
        prompts: Prompts,
        num_tokens: int,
        *,
        cold: bool = True,
        logprobs: int | None = None,
        grammar: str | None = None,
        on_prefilled: Callable[[], None] = lambda: None,
    ) -> Timed:
        """Generate `num_tokens` for each prompt; `cold` forgets every prefix first."""
        if cold:
            self._forget()
        for prompt in prompts:
            self._next_id += 1
            admit = Admit(
                seq_id=self._next_id,
                epoch=self._epoch,
                prompt=tuple(prompt),
                sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=logprobs),
                grammar=grammar,
            )
            assert self._core.admit(admit) is None
        return self._loop(len(prompts), on_prefilled)

    def last_gates(self, prompts: Prompts) -> dict[str, torch.Tensor]:
        """By MoE layer, the gate's scores of each prompt's last token: [prompts, E] float32."""
        self._forget()
        rows: dict[str, list[torch.Tensor]] = {}
        for seq_id, prompt in enumerate(prompts, 1):
            nothing = SamplingParams(max_tokens=0)
            admit = Admit(
                seq_id=seq_id,
                epoch=self._epoch,
                prompt=tuple(prompt),
                sampling=nothing,
                want=Want(router_logits=True),
            )
            assert self._core.admit(admit) is None
        while self._core.has_work:
            plan = self._core.schedule()
            assert plan is not None
            self._executor.submit(plan)
            result = self._executor.poll(None)
            assert result is not None
            for wanted in result.wanted:
                scores = np.frombuffer(wanted.data, dtype=wanted.dtype).reshape(wanted.shape)
                if wanted.start + len(scores) == len(prompts[wanted.seq_id - 1]):
                    rows.setdefault(wanted.name, []).append(torch.from_numpy(scores[-1].copy()))
            self._core.apply(result)
        return {name: torch.stack(last) for name, last in rows.items()}

    def _forget(self) -> None:
        self._epoch += 1
        self._core = EngineCore(self.limits)
        self._core.reset(self._epoch)
        self._next_id = 0

    def _loop(self, num_sequences: int, on_prefilled: Callable[[], None]) -> Timed:
        timed, first_tokens = Timed(), 0
        first_id = self._next_id - num_sequences + 1
        timed.times = [[] for _ in range(num_sequences)]
        timed.tokens = [[] for _ in range(num_sequences)]
        timed.logprobs = [[] for _ in range(num_sequences)]
        begin = time.perf_counter()
        while self._core.has_work:
            planning = time.perf_counter()
            plan = self._core.schedule()
            planned = time.perf_counter() - planning
            assert plan is not None
            self._executor.submit(plan)
            result = self._executor.poll(None)
            assert result is not None
            planning = time.perf_counter()
            tokens = self._core.apply(result)
            timed.planning.append(planned + time.perf_counter() - planning)
            now = time.perf_counter() - begin
            for token in tokens:
                sequence = token.seq_id - first_id
                timed.times[sequence].append(now)
                timed.tokens[sequence].append(token.token_id)
                if token.logprob is not None:
                    timed.logprobs[sequence].append(token.logprob)
            if timed.prefill:
                timed.decoded += len(tokens)
            first_tokens += sum(token.position == 0 for token in tokens)
            if first_tokens == num_sequences and not timed.prefill:
                timed.prefill = time.perf_counter() - begin
                on_prefilled()
        timed.decode = time.perf_counter() - begin - timed.prefill
        return timed


class PlainEngine:
    """The same engine with operators that do not keep a row's bits: what invariance costs."""

    name = "engine, plain operators"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, prompts: Prompts, num_tokens: int) -> Timed:
        """As the engine's."""
        with plain_operators():
            return self._engine.run(prompts, num_tokens)


class Generate:
    """Transformers' own model and `generate`."""

    name = "Transformers generate"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.eval()

    @torch.inference_mode()
    def run(self, prompts: Prompts, num_tokens: int) -> Timed:
        """Every sequence takes every step: all have their first token at once."""
        ids = torch.tensor([list(prompt) for prompt in prompts])
        stamps: list[float] = []

        def stamp(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool)

        begin = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[stamp],
        )
        assert len(stamps) == num_tokens, (len(stamps), num_tokens)
        return Timed(
            prefill=stamps[0] - begin,
            decode=stamps[-1] - stamps[0],
            decoded=len(prompts) * (num_tokens - 1),
        )


class ContinuousBatching:
    """Transformers' continuous batching, with the engine's own page size and token budget.

    `refusal` says why it does not run on this model; None where it does.
    """

    name = "Transformers continuous batching"

    def __init__(self, model: Any) -> None:
        # It warns about what only GPUs and psutil could give, at every start.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        self._model = model
        self.refusal: str | None = None
        try:
            self.run([[5, 6, 7]], 2)
        except Exception as error:  # whatever it is, it is printed in the place of figures
            self.refusal = f"{type(error).__name__}: {error}".splitlines()[0]

    def run(self, prompts: Prompts, num_tokens: int) -> Timed:
        """Timed from the first request handed over, its generation loop already running."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        longest = max(map(len, prompts)) + num_tokens
        generation = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        batching = ContinuousBatchingConfig(
            page_size=BLOCK_SIZE,
            num_blocks=(len(prompts) + 1) * (longest // BLOCK_SIZE + 2),
            max_batch_tokens=MAX_BATCHED_TOKENS,
            allow_block_sharing=False,
            use_cuda_graph=False,
        )
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching, warmup=False
        ) as manager:
            self._finished(manager, [[9, 8, 7]], 1)  # so that its caches are there
            begin = time.perf_counter()
            stamps = self._finished(manager, prompts, num_tokens)
        prefill_ends = max(times[0] for times in stamps)
        ends = max(times[-1] for times in stamps)
        return Timed(
            prefill=prefill_ends - begin,
            decode=ends - prefill_ends,
            decoded=sum(stamp > prefill_ends for times in stamps for stamp in times),
        )

    def _finished(self, manager: Any, prompts: Prompts, num_tokens: int) -> list[list[float]]:
        """When each token of each request came."""
        manager.add_requests(
            inputs=[list(prompt) for prompt in prompts],
            max_new_tokens=num_tokens,
            record_timestamps=True,
        )
        stamps: list[list[float]] = []
        while len(stamps) < len(prompts):
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running():
                raise RuntimeError("its generation loop ended")
            if output is None:
                continue
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.is_finished():
                assert len(output.generated_tokens) == num_tokens, output
                stamps.append(output.timestamps)
        return stamps
