"""The engine beside Transformers' `generate`, in one run, in one process, on the same threads.

.venv/bin/python -m benchmarks.engine --families dbrx phimoe jamba --threads 2 --rounds 3
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.mid_checkpoints import CONFIGS, write_mid
from models.layers.rowwise import linear
from models.registry import load_config
from router.engine import EngineCore
from router.limits import EngineLimits
from router.step import Admit, SamplingParams
from shards.local_executor import LocalExecutor


@dataclass
class Timed:
    """What one batch took: until every first token, after it, and what planning took of that."""

    prefill: float = 0.0
    decode: float = 0.0
    steps: int = 0
    planning: list[float] = field(default_factory=list)


class Engine:
    """EngineCore and LocalExecutor in a loop, as the engine worker runs them."""

    def __init__(self, folder: Path, max_num_seqs: int) -> None:
        config = load_config(folder)
        kinds = {config.cache_shape(i).kind for i in range(config.num_layers)}
        self.limits = EngineLimits(
            block_size=16,
            num_blocks=4096,
            num_state_slots=max_num_seqs if "state" in kinds else 0,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=512,
            max_model_len=16384,
            prefix_caching=True,
            num_snapshots=8,
        )
        self._executor = LocalExecutor(config, folder, torch.bfloat16, self.limits)
        self._epoch = 0

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, cold: bool = True) -> Timed:
        """Generate `num_tokens` for each prompt; `cold` forgets every prefix first."""
        if cold:
            self._epoch += 1
            self._core = EngineCore(self.limits)
            self._core.reset(self._epoch)
            self._next_id = 0
        for prompt in prompts:
            self._next_id += 1
            admit = Admit(
                seq_id=self._next_id,
                epoch=self._epoch,
                prompt=tuple(prompt),
                sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0),
            )
            assert self._core.admit(admit) is None
        return self._loop(len(prompts))

    def _loop(self, num_sequences: int) -> Timed:
        timed, first_tokens = Timed(), 0
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
            first_tokens += sum(token.position == 0 for token in tokens)
            if first_tokens == num_sequences and not timed.prefill:
                timed.prefill = time.perf_counter() - begin
        timed.decode = time.perf_counter() - begin - timed.prefill
        return timed


class Peer:
    """Transformers' own model and `generate`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model.eval()

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Timed:
        """Prefill is timed as a generation of one token."""
        ids = torch.tensor([list(prompt) for prompt in prompts])
        prefill = self._seconds(ids, 1)
        return Timed(prefill=prefill, decode=self._seconds(ids, num_tokens) - prefill)

    def _seconds(self, ids: torch.Tensor, num_tokens: int) -> float:
        begin = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - begin


def prompts_of(batch: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of one length, so that Transformers needs no padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 30000, (batch, length), generator=generator).tolist()


def compare(family: str, args: argparse.Namespace) -> None:
    """One family's table: tokens per second of both, and their ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = write_mid(family, folder)
        engine, peer = Engine(folder, max(args.batches)), Peer(folder)
        print(f"\n{family}: {parameters / 1e9:.2f} B parameters, bfloat16")
        print("batch  prefill tok/s  (Transformers)  decode tok/s  (Transformers)  ratio  plan ms")
        for batch in args.batches:
            prompts = prompts_of(batch, args.prompt)
            runs: dict[str, list[Timed]] = {"ours": [], "theirs": []}
            for _ in range(args.rounds):
                runs["ours"].append(engine.run(prompts, args.tokens))
                runs["theirs"].append(peer.run(prompts, args.tokens))
            print(row(batch, args, runs["ours"], runs["theirs"]))
        del peer
        prefix(engine, args)


def row(
    batch: int, args: argparse.Namespace, ours: Sequence[Timed], theirs: Sequence[Timed]
) -> str:
    """Medians over the rounds."""
    decoded = batch * (args.tokens - 1)
    prefill = [
        batch * args.prompt / statistics.median(t.prefill for t in r) for r in (ours, theirs)
    ]
    decode = [decoded / statistics.median(t.decode for t in r) for r in (ours, theirs)]
    planning = statistics.median(ms * 1000 for t in ours for ms in t.planning)
    return (
        f"{batch:5}  {prefill[0]:13.1f}  {prefill[1]:14.1f}  {decode[0]:12.1f}  {decode[1]:14.1f}"
        f"  {decode[0] / decode[1]:5.2f}  {planning:7.3f}"
    )


def prefix(engine: Engine, args: argparse.Namespace) -> None:
    """Time to the first token of a long prompt, cold and with all but its end cached."""
    (prompt,) = prompts_of(1, args.prefix, seed=9)
    cold = engine.run([prompt], 1).prefill
    warm = engine.run([[*prompt[:-8], *range(5, 13)]], 1, cold=False).prefill
    print(f"first token of {args.prefix} tokens: cold {cold:.2f} s, cached {warm:.3f} s", end="")
    print(f" ({warm / cold:.4f} of it)")


def invariance(args: argparse.Namespace) -> None:
    """One bfloat16 product in fixed row tiles beside the plain operator."""
    print("\none [1792, 1024] bfloat16 product: microseconds in row tiles, plain, ratio")
    weight = torch.randn(1792, 1024).to(torch.bfloat16)
    for rows in (16, 32, 128, 512):
        x = torch.randn(rows, 1024).to(torch.bfloat16)
        ours = microseconds(lambda x=x: linear(x, weight))
        plain = microseconds(lambda x=x: F.linear(x, weight))
        print(f"{rows:5} rows: {ours:8.0f} {plain:8.0f} {ours / plain:6.2f}")


def microseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--prefix", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch", end=" ")
    print(torch.__version__)
    for family in args.families:
        compare(family, args)
    invariance(args)


if __name__ == "__main__":
    main()
