"""Transformers' `generate`, and Transformers in float32 as the reference of every engine."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.worker import Load, Prompts, Run, Scores, serve

EXPERTS = ("eager", "grouped_mm")
"""Implementations that are tried. `batched_mm` copies the experts' matrices for every token: 128
tokens of the mid DBRX take 5.6 GB a layer."""
TRIAL_TOKENS = 3


class Transformers:
    """One model; the implementation of its experts is the one that decodes this batch fastest."""

    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        torch.set_grad_enabled(False)
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[load.dtype]
        model: Any = AutoModelForCausalLM.from_pretrained(load.folder, dtype=dtype)
        self.notes: list[str] = []
        if load.family == "dbrx":  # it takes the base from a key that DBRX's files do not have
            config = model.config
            config.rope_parameters["rope_theta"] = float(config.attn_config.rope_theta)
            model = model.from_pretrained(load.folder, config=config, dtype=dtype)
            self.notes.append("with the RoPE base of attn_config")
        self._model = model.eval()
        self._best: dict[tuple[int, int], str] = {}

    def run(self, prompts: Prompts, num_tokens: int) -> Run:
        """As Engine's; the first run of a shape chooses the experts' implementation."""
        shape = len(prompts), len(prompts[0])
        if not self._model._can_set_experts_implementation():
            return self._run(prompts, num_tokens)
        if shape not in self._best:
            self._best[shape] = min(EXPERTS, key=lambda name: self._trial(name, prompts))
            self.notes.append(f"{shape[0]} x {shape[1]}: {self._best[shape]}")
        self._model.set_experts_implementation(self._best[shape])
        return self._run(prompts, num_tokens)

    def _trial(self, experts: str, prompts: Prompts) -> float:
        """Seconds per decode step, with short prompts."""
        self._model.set_experts_implementation(experts)
        short = [prompt[:16] for prompt in prompts]
        self._run(short, TRIAL_TOKENS)
        times = self._run(short, TRIAL_TOKENS).times[0]
        return times[-1] - times[0]

    def _run(self, prompts: Prompts, num_tokens: int) -> Run:
        stamps: list[float] = []

        def stamp(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool)

        begin = time.perf_counter()
        output = self._generate(prompts, num_tokens, stopping_criteria=[stamp])
        times = [stamp - begin for stamp in stamps]
        tokens = output[:, len(prompts[0]) :].tolist()
        return Run(times=[times] * len(prompts), tokens=tokens)

    def score(self, prompts: Prompts, num_tokens: int) -> Scores:
        """As Engine's."""
        tokens, logprobs = [], []
        for prompt in prompts:
            answer = self._generate([prompt], num_tokens, return_dict_in_generate=True,
                                    output_scores=True)  # fmt: skip
            ids = answer.sequences[0, len(prompt) :].tolist()
            rows = [row[0].float().log_softmax(-1) for row in answer.scores]
            tokens.append(ids)
            logprobs.append([float(row[i]) for row, i in zip(rows, ids, strict=True)])
        return Scores(tokens=tokens, logprobs=logprobs)

    def reference(self, prompts: Prompts, answers: Prompts) -> dict[str, Any]:
        """Of every answered token: its log probability after all before it, and the best one's."""
        chosen, best = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = self._model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
            rows = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
            chosen.append([float(row[i]) for row, i in zip(rows, answer, strict=True)])
            best.append([float(row.max()) for row in rows])
        return {"chosen": chosen, "best": best}

    def _generate(self, prompts: Prompts, num_tokens: int, **options: Any) -> Any:
        ids = torch.tensor(prompts)
        return self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


if __name__ == "__main__":
    serve(Transformers)
