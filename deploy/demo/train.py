"""Train one nano checkpoint: `python -m deploy.demo.train nano-jamba --out DIR`."""

from __future__ import annotations

import argparse
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from deploy.demo import NANO_MODELS
from deploy.demo.configs import published_config
from deploy.demo.reference import build_model, greedy_answers
from deploy.demo.tasks import (
    SYSTEM_PROMPTS,
    Task,
    held_out_dialogues,
    held_out_tasks,
    is_correct,
    train_tasks,
)
from deploy.demo.tasks import chance as chance_level
from deploy.demo.tokenizer_build import CHAT_FORMATS, write_json, write_tokenizer

IGNORED = -100
SHARD_SIZE = "3MB"
# Enough turns to pass PhiMoE's LongRoPE boundary in every dialogue.
LONG_TURNS = 8


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train; lengths are drawn in proportion to their weights."""

    steps: int
    peak_rate: float
    tokens_per_step: int
    lengths: dict[int, float]


# Beyond 96 tokens PhiMoE rotates with its long factors, so it sees more long dialogues.
RECIPES = {
    "nano-dbrx": Recipe(1600, 3e-3, 2048, {64: 0.75, 128: 0.15, 256: 0.10}),
    "nano-phimoe": Recipe(3000, 3e-3, 2048, {64: 0.6, 96: 0.1, 160: 0.15, 256: 0.15}),
    "nano-jamba": Recipe(2600, 3e-3, 1536, {64: 0.75, 128: 0.15, 256: 0.10}),
}


class Dialogues:
    """Stitches tasks into dialogues and marks the tokens the model is to learn to say."""

    def __init__(self, name: str, tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(f"dialogues/{seed}")
        self._tasks = train_tasks(seed)
        chat = CHAT_FORMATS[name]
        self._header = self._encode(chat.assistant_header)
        self._end = self._encode(chat.turn_end)[0]
        self._pad = int(tokenizer.pad_token_id)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, tasks: list[Task], system: str | None) -> list[int]:
        messages = [] if system is None else [{"role": "system", "content": system}]
        for task in tasks:
            messages += [*task.chat(), {"role": "assistant", "content": task.answer}]
        return self._encode(self._tokenizer.apply_chat_template(messages, tokenize=False))

    def _labels(self, ids: list[int]) -> list[int]:
        """Keep what follows each assistant header, up to and including the end of the turn."""
        labels = [IGNORED] * len(ids)
        width = len(self._header)
        inside = False
        for i, token in enumerate(ids):
            inside = inside or ids[max(0, i - width) : i] == self._header
            if inside:
                labels[i] = token
                inside = token != self._end
        return labels

    def _dialogue(self, length: int) -> list[int]:
        """Add turns until the next would pass the length."""
        system = self._rng.choice(SYSTEM_PROMPTS) if self._rng.random() < 0.15 else None
        tasks = [next(self._tasks)]
        ids = self._render(tasks, system)
        while True:
            tasks.append(next(self._tasks))
            longer = self._render(tasks, system)
            if len(longer) > length:
                return ids[:length]
            ids = longer

    def batch(self, length: int, tokens: int) -> dict[str, torch.Tensor]:
        """Return right-padded dialogues of at most `length` tokens with their labels."""
        rows = [self._dialogue(length) for _ in range(max(1, tokens // length))]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._pad)
        labels = torch.full((len(rows), width), IGNORED)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, : len(row)] = torch.tensor(self._labels(row))
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def batches(dialogues: Dialogues, recipe: Recipe, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield one batch per step, the lengths drawn by their weights."""
    rng = random.Random(f"lengths/{seed}")
    lengths, weights = list(recipe.lengths), list(recipe.lengths.values())
    for _ in range(recipe.steps):
        yield dialogues.batch(rng.choices(lengths, weights)[0], recipe.tokens_per_step)


def rate_at(step: int, recipe: Recipe) -> float:
    """Warm up linearly over the first 4 % of the steps, then decay by a cosine."""
    warmup = max(1, recipe.steps // 25)
    if step < warmup:
        return recipe.peak_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.peak_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def save(name: str, model: Any, published: dict[str, Any], folder: Path) -> None:
    """Write the shards under hub names, and beside them the config as published."""
    staging = folder / ".staging"
    model.save_pretrained(staging, max_shard_size=SHARD_SIZE)
    for old in folder.glob("model*"):
        old.unlink()
    for new in sorted(staging.glob("model*")):
        new.chmod(0o644)
        new.replace(folder / new.name)
    shutil.rmtree(staging)
    write_json(folder / "config.json", published)


def measure(model: Any, tokenizer: Any, tasks: list[Task]) -> dict[str, float]:
    """Return held-out accuracy per kind, and overall under "all"."""
    right: dict[str, list[bool]] = defaultdict(list)
    for task, answer in zip(tasks, greedy_answers(model, tokenizer, tasks), strict=True):
        right[task.kind].append(is_correct(task, answer))
        right["all"].append(is_correct(task, answer))
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def train(name: str, folder: Path, seed: int, recipe: Recipe, every: int) -> None:
    """Train from scratch, saving at every measurement so an early stop still leaves a model."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    published = published_config(name, write_tokenizer(name, folder))
    model = build_model(name, published)
    save(name, model, published, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = CHAT_FORMATS[name]
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in chat.eos]
    total = sum(weight.numel() for weight in model.parameters())
    print(f"{name}: {total:,} parameters, {recipe.steps} steps", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    # Processor time, so that the figure does not depend on what else the machine is doing.
    started = time.process_time()
    losses: list[float] = []
    dialogues = Dialogues(name, tokenizer, seed)
    for step, batch in enumerate(batches(dialogues, recipe, seed), start=1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step - 1, recipe)
        # The output carries the balancing loss, already added with the config's coefficient.
        loss = model(**batch, output_router_logits=True, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
        if step % 50 == 0:
            recent = sum(losses[-50:]) / 50
            minutes = (time.process_time() - started) / 60
            print(f"step {step} loss {recent:.4f} minutes {minutes:.1f}", flush=True)
        if step % every == 0 or step == recipe.steps:
            scores = measure(model, tokenizer, held_out_tasks(seed, 180))
            print(f"step {step} " + report(scores), flush=True)
            save(name, model, published, folder)
    minutes = (time.process_time() - started) / 60
    scores = measure(model, tokenizer, held_out_tasks(seed + 1, 900))
    print(f"final, {minutes:.1f} processor minutes: {report(scores)}", flush=True)
    scores = measure(model, tokenizer, held_out_dialogues(seed + 1, 180, LONG_TURNS))
    print(f"after {LONG_TURNS - 1} earlier turns: {report(scores)}", flush=True)


def report(scores: dict[str, float]) -> str:
    """Format accuracies, each kind beside its chance level."""
    parts = [f"held-out {scores['all']:.3f}"]
    parts += [
        f"{kind} {value:.2f} (chance {chance_level(kind):.2f})"
        for kind, value in scores.items()
        if kind != "all"
    ]
    return " | ".join(parts)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NANO_MODELS)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--measure-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.name]
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    train(options.name, options.out, options.seed, recipe, options.measure_every)


if __name__ == "__main__":
    main()
