"""One family: who is right on it, and how fast each engine is, in turn on the same cores."""

from __future__ import annotations

import os
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.mid_checkpoints import CONFIGS, write_checkpoint
from benchmarks.peers.bandwidth import (
    expected_experts,
    read_bandwidth,
    weight_sizes,
)
from benchmarks.peers.options import Options
from benchmarks.peers.processes import Failed, Worker, interpreter
from benchmarks.peers.rightness import Rightness, judge
from benchmarks.peers.serving import measure_servers
from benchmarks.peers.timings import Figures, figures, medians

LOAD_TIMEOUT = 300.0
RUN_TIMEOUT = 400.0
PAUSE = 0.3
"""Seconds between engines: threads that spin for a while after their work have gone to sleep."""
PROBE_PROMPTS, PROBE_LENGTH, PROBE_TOKENS = 6, 24, 12
REPAIRED = {("vllm", "dbrx")}
"""Engines that only run with code of ours: they never count as right peers."""


def random_prompts(batch: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Prompts of one length, so that Transformers needs no padding."""
    draw = random.Random(seed)
    return [[draw.randrange(300, vocab) for _ in range(length)] for _ in range(batch)]


def checkpoint(options: Options, size: str, family: str) -> tuple[Path, int]:
    """Folder and number of parameters; written unless there already."""
    folder = options.checkpoints / f"{size}-{family}"
    count = folder / "parameters"
    if not count.exists():
        count_of = write_checkpoint(size, family, folder)
        count.write_text(str(count_of))
    return folder, int(count.read_text())


def cell_line(family: str, cell: dict[str, Any]) -> str:
    """One engine's figures of one cell, as the table prints them."""
    return (
        f"{family:7} {cell['engine']:13} batch {cell['batch']:3} prompt {cell['prompt']:5}"
        f"  prefill {cell['prefill']:8.1f}  decode {cell['decode']:7.1f} tok/s"
        f"  first token {cell['first_token_p50'] * 1e3:8.1f} ms"
        f"  between {cell['inter_token_p50'] * 1e3:6.1f} / {cell['inter_token_p99'] * 1e3:6.1f} ms"
    )


class Comparison:
    """All engines on one family."""

    def __init__(self, family: str, options: Options, log: IO[bytes]) -> None:
        self.family, self._options, self._log = family, options, log
        self.raw = CONFIGS[options.size][family]
        self.rightness: dict[str, Rightness] = {}

    def run(self) -> dict[str, Any]:
        """Everything measured, as JSON has it."""
        folder, parameters = checkpoint(self._options, self._options.size, self.family)
        before = read_bandwidth(self._options.threads)
        load_before = os.getloadavg()[0]
        self._judge_all()
        workers = self._load_all(folder)
        try:
            cells, left_out, touched = self._measure(workers)
            notes = {name: worker.ask("describe", 60)["notes"] for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
        return {
            "family": self.family,
            "parameters": parameters,
            "sizes": weight_sizes(self.raw, parameters),
            "bandwidth_before": before,
            "bandwidth_after": read_bandwidth(self._options.threads),
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "rightness": {name: asdict(state) for name, state in self.rightness.items()},
            "notes": notes,
            "cells": cells,
            "left_out": left_out,
            "servers": self._servers(folder),
            "repaired": sorted(name for name, of in REPAIRED if of == self.family),
            "experts_touched": touched,
        }

    def _start(self, engine: str, folder: Path, dtype: str, batch: int, tokens: int) -> Worker:
        python = interpreter(engine, self._options.environments)
        assert python is not None
        worker = Worker(engine, python, self._options.threads, self._log)
        try:
            worker.ask(
                "load", LOAD_TIMEOUT, folder=str(folder), family=self.family, dtype=dtype,
                threads=self._options.threads, max_batch=batch, max_tokens=tokens,
            )  # fmt: skip
        except Failed:
            worker.close()
            raise
        return worker

    def _judge_all(self) -> None:
        """Fill `rightness` from the tiny checkpoint in float32."""
        if self._options.skip_rightness:
            for engine in self._options.engines:
                there = interpreter(engine, self._options.environments) is not None
                state = "unchecked" if there else "absent"
                self.rightness[engine] = Rightness(state=state, words=state)
            return
        folder, _ = checkpoint(self._options, "tiny", self.family)
        vocab = CONFIGS["tiny"][self.family]["vocab_size"]
        prompts = random_prompts(PROBE_PROMPTS, PROBE_LENGTH, vocab, seed=1)
        reference = self._start("transformers", folder, "float32", PROBE_PROMPTS, 64)
        for engine in self._options.engines:
            if interpreter(engine, self._options.environments) is None:
                self.rightness[engine] = Rightness(state="absent", words="absent")
                continue
            try:
                self.rightness[engine] = self._judge(engine, folder, prompts, reference)
            except Failed as failure:
                self.rightness[engine] = Rightness(state="fails", words=f"fails: {failure}")
            print(f"{self.family:7} {engine:13} {self.rightness[engine].words}", flush=True)
        reference.close()

    def _judge(
        self, engine: str, folder: Path, prompts: list[list[int]], reference: Worker
    ) -> Rightness:
        worker = self._start(engine, folder, "float32", PROBE_PROMPTS, 64)
        try:
            own = worker.ask("score", RUN_TIMEOUT, prompts=prompts, num_tokens=PROBE_TOKENS)
        finally:
            worker.close()
        expected = reference.ask("reference", RUN_TIMEOUT, prompts=prompts, answers=own["tokens"])
        return judge(own["logprobs"], expected["chosen"])

    def _load_all(self, folder: Path) -> dict[str, Worker]:
        longest = max(self._options.prompts) + self._options.tokens
        workers = {}
        for engine in self._options.engines:
            if self.rightness[engine].state in ("absent", "fails"):
                continue
            try:
                workers[engine] = self._start(
                    engine, folder, "bfloat16", max(self._options.batches), longest
                )
            except Failed as failure:
                self.rightness[engine] = Rightness(state="fails", words=f"fails: {failure}")
        return workers

    def _servers(self, folder: Path) -> dict[str, Any]:
        if self._options.skip_server:
            return {}
        engines = [
            engine
            for engine in self._options.engines
            if self.rightness[engine].state not in ("absent", "fails")
        ]
        vocab = self.raw["vocab_size"]
        return measure_servers(engines, folder.absolute(), vocab, self._options, self._log)

    def _measure(self, workers: dict[str, Worker]) -> tuple[list[Any], list[str], dict[int, float]]:
        cells, left_out, touched = [], [], {}
        for prompt in self._options.prompts:
            for batch in self._options.batches:
                if batch * prompt > self._options.most_prompt_tokens:
                    left_out.append(f"batch {batch}, prompts of {prompt} tokens")
                    continue
                prompts = random_prompts(batch, prompt, self.raw["vocab_size"])
                if batch not in touched:
                    touched[batch] = self._touched(workers, prompts)
                cells += self._cell(workers, prompts, touched[batch])
        return cells, left_out, touched

    def _touched(self, workers: dict[str, Worker], prompts: list[list[int]]) -> float:
        """Distinct experts per layer and decode step: counted where Conclave runs."""
        sizes = weight_sizes(self.raw, 0)
        if "conclave" in workers:
            answer = workers["conclave"].ask(
                "experts_touched", RUN_TIMEOUT, prompts=prompts, per_token=sizes["per_token"]
            )
            return float(answer["experts"])
        return expected_experts(sizes["experts"], sizes["per_token"], len(prompts))

    def _cell(
        self, workers: dict[str, Worker], prompts: list[list[int]], touched: float
    ) -> list[dict[str, Any]]:
        """All engines in turn, every round; the first, untimed, warms up."""
        options, batch, prompt = self._options, len(prompts), len(prompts[0])
        rounds = options.rounds_of(batch * prompt)
        runs: dict[str, list[Figures]] = {name: [] for name in workers}
        idle = 0.0
        for turn in range(rounds + 1):
            for name, worker in list(workers.items()):
                time.sleep(PAUSE)
                others = [other for other in workers.values() if other is not worker]
                burnt = sum(other.cpu_seconds() for other in others)
                tokens = options.tokens if turn else min(3, options.tokens)
                try:
                    answer = worker.ask("run", RUN_TIMEOUT, prompts=prompts, num_tokens=tokens)
                except Failed as failure:
                    self.rightness[name] = Rightness(state="fails", words=f"fails: {failure}")
                    worker.close()
                    del workers[name]
                    continue
                idle = max(idle, sum(other.cpu_seconds() for other in others) - burnt)
                if turn:
                    runs[name].append(figures(answer["times"], prompt))
        cells = [
            {"engine": name, "batch": batch, "prompt": prompt, "rounds": len(taken),
             "idle_cpu_seconds": idle, **asdict(medians(taken))}
            for name, taken in runs.items() if taken
        ]  # fmt: skip
        for cell in cells:
            print(cell_line(self.family, cell), flush=True)
        return cells
