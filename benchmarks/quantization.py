"""What int8 weights cost: drift on the nano checkpoints, and the time of one matrix product.

Drift is the share of right answers and the KL divergence per token.

.venv/bin/python -m benchmarks.quantization --tasks 270
.venv/bin/python -m benchmarks.quantization --products
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from deploy.demo import NANO_MODELS, nano_checkpoint
from deploy.demo.tasks import Task, held_out_tasks, is_correct
from deploy.served_model import ServedModel, load_served_model
from models.layers.rowwise import linear, row_tile
from models.quantization_config import QUANTIZATIONS
from models.registry import load_config
from router.step import SamplingParams, Want
from shards.group import ModelGroup
from shards.quantization import quantize_rows
from tests.groups import Answer, ask_all, running_group

Tokens = tuple[int, ...]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Dialogues:
    """Tasks as token ids: the question alone, and followed by its right answer."""

    model: ServedModel
    tasks: Sequence[Task]
    prompts: list[Tokens]
    answered: list[Tokens]


def load_dialogues(name: str, num_tasks: int) -> Dialogues:
    """Held-out tasks in the turn format of a nano checkpoint."""
    folder = nano_checkpoint(name)
    config = load_config(folder)
    model = load_served_model(
        name, str(folder), config.vocab_size, max_model_len=config.max_position_embeddings
    )
    tokenizer, template = model.need_tokenizer("model"), model.need_template()
    tasks = held_out_tasks(seed=7, n=num_tasks)
    texts = [template.render(task.chat(), add_generation_prompt=True) for task in tasks]
    pairs = list(zip(texts, (task.answer for task in tasks), strict=True))
    return Dialogues(
        model=model,
        tasks=tasks,
        prompts=[tokenizer.encode(text, add_special_tokens=False) for text, _ in pairs],
        answered=[
            tokenizer.encode(text + answer, add_special_tokens=False) for text, answer in pairs
        ],
    )


def kl_per_token(reference: Logits, other: Logits) -> NDArray[np.float64]:
    """KL(reference ‖ other) in nats at each position of [T, V] logits: [T]."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference, other))
    divergence: NDArray[np.float64] = (p.exp() * (p - q)).sum(-1).numpy()
    return divergence


async def all_logits(group: ModelGroup, sequences: Sequence[Tokens]) -> list[Logits]:
    """Next-token logits [T, V] at every position of each sequence, as served."""

    async def one(tokens: Tokens) -> Logits:
        stream = group.generate(tokens, SamplingParams(max_tokens=0), want=Want(logits=True))
        async for _ in stream:
            continue
        logits: Logits = stream.outputs["logits"].astype(np.float32)
        return logits

    return list(await asyncio.gather(*map(one, sequences)))


def measure(
    dialogues: Dialogues, quantization: str, dtype: str
) -> tuple[list[Logits], list[Answer]]:
    """Logits of the answered dialogues and greedy answers to the questions."""
    model = dialogues.model
    sampling = SamplingParams(
        max_tokens=40, temperature=0.0, stop_token_ids=model.defaults.eos_token_ids
    )
    with running_group(model.path, quantization=quantization, dtype=dtype) as group:

        async def both() -> tuple[list[Logits], list[Answer]]:
            logits = await all_logits(group, dialogues.answered)
            return logits, await ask_all(group, dialogues.prompts, sampling)

        return asyncio.run(both())


def accuracy(dialogues: Dialogues, answers: Sequence[Answer]) -> float:
    """Share of right answers."""
    tokenizer = dialogues.model.need_tokenizer("model")
    texts = [tokenizer.decode(answer.token_ids) for answer in answers]
    return float(np.mean([is_correct(*pair) for pair in zip(dialogues.tasks, texts, strict=True)]))


def print_rows(name: str, num_tasks: int, dtype: str) -> None:
    """One row of the table per setting, each against `none` of the same dtype."""
    dialogues = load_dialogues(name, num_tasks)
    reference, said = measure(dialogues, QUANTIZATIONS[0], dtype)
    for quantization in QUANTIZATIONS:
        logits, answers = measure(dialogues, quantization, dtype)
        kl = np.concatenate(list(map(kl_per_token, reference, logits)))
        same = np.mean([a.token_ids == b.token_ids for a, b in zip(said, answers, strict=True)])
        right = accuracy(dialogues, answers)
        drift = f"{kl.mean():.1e} | {np.quantile(kl, 0.99):.1e} | {kl.max():.1e}"
        print(f"| {name} | {quantization} | {right:.1%} | {same:.1%} | {drift} |", flush=True)


def print_products() -> None:
    """Milliseconds of products with Phi-3.5-MoE's `w1` [6400, 4096], on one thread."""
    torch.set_num_threads(1)
    print("| dtype | rows | full precision, ms | int8, ms | ratio |\n|---|---|---|---|---|")
    weight = torch.randn(6400, 4096)
    values, scale = quantize_rows(weight)
    for dtype in (torch.float32, torch.bfloat16):
        full = weight.to(dtype)
        for rows in (row_tile(dtype), 256):
            x = torch.randn(rows, 4096).to(dtype)
            fast, int8 = _best_ms(partial(linear, x, full), partial(linear, x, values, scale=scale))
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {rows} | {fast:.1f} | {int8:.1f} | {int8 / fast:.2f} |", flush=True)


def _best_ms(*calls: Callable[[], object], turns: int = 20) -> list[float]:
    """The best of some turns of each, in turn: the machine's other work can only add time."""
    best = [float("inf")] * len(calls)
    for _ in range(turns):
        for index, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            best[index] = min(best[index], 1000 * (time.perf_counter() - begin))
    return best


def main() -> None:
    """Parse arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=270, help="held-out tasks per model")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16")
    parser.add_argument("--products", action="store_true", help="time products instead")
    options = parser.parse_args()
    if options.products:
        print_products()
        return
    print(
        f"{options.tasks} tasks, {options.dtype}, {platform.machine()}, torch {torch.__version__}"
    )
    print("| model | quantization | right answers | same answers | KL mean | KL 99 % | KL max |")
    print("|---|---|---|---|---|---|---|")
    for name in NANO_MODELS:
        print_rows(name, options.tasks, options.dtype)


if __name__ == "__main__":
    main()
