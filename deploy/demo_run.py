"""`conclave demo`: three nano models on one machine, each over several actors, asked questions."""

from __future__ import annotations

import json
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.config import parse_args
from deploy.demo import NANO_MODELS
from deploy.demo.tasks import Task, chance, held_out_tasks, is_correct
from deploy.local_ray import ray_session
from deploy.resolve import ResolvedArgs, resolve

if TYPE_CHECKING:
    from openai import OpenAI

_TOPOLOGY = {"stages": 2, "expert_shards": 2}
# 3 models of 8 processes at 0.1 CPU each.
_NUM_CPUS = 3
_STREAMED = 3
_CONCURRENT = 8
_SEED = 20
# How far above always giving the most frequent answer counts as having learnt the tasks.
_MARGIN = 0.3


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one question, and how fast."""

    task: Task
    text: str
    first_token_s: float
    total_s: float
    num_tokens: int


def run_demo(num_questions: int, port: int | None) -> int:
    """0 when every model answered everything, far better than chance; 1 otherwise."""
    console = Console(highlight=False)
    started = time.monotonic()
    port = port or _free_port()
    console.print("Starting Ray and three models, each over 2 stages and 2 expert actors ...")
    # Reading the models imports torch, which takes as long as starting Ray: both at once.
    with ThreadPoolExecutor(1) as pool:
        resolving = pool.submit(_resolve_all)
        with ray_session(_NUM_CPUS):
            _deploy(resolving.result(), port)
            good = []
            for name in _as_they_start():
                console.print(f"{name} is ready after {time.monotonic() - started:.1f} s.")
                good.append(_show(console, name, port, num_questions))
    console.print(f"Done after {time.monotonic() - started:.1f} s.")
    return 0 if len(good) == len(NANO_MODELS) and all(good) else 1


def _resolve_all() -> list[ResolvedArgs]:
    return [resolve(parse_args({"model": name, **_TOPOLOGY})) for name in NANO_MODELS]


def _deploy(models: list[ResolvedArgs], port: int) -> None:
    """Start all applications at the same time, without waiting for them."""
    from ray import serve

    from deploy.app import application

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run_many(
        [
            serve.RunTarget(
                target=application(model),
                name=model.served_model_name,
                route_prefix=f"/{model.served_model_name}",
            )
            for model in models
        ],
        wait_for_applications_running=False,
    )


def _as_they_start() -> Iterator[str]:
    """Names of the models in the order in which they can answer; failed ones are left out."""
    from ray import serve

    starting = set(NANO_MODELS)
    while starting:
        applications = serve.status().applications
        for name in sorted(starting):
            status = applications[name].status
            if status == "RUNNING":
                starting.discard(name)
                yield name
            elif status == "DEPLOY_FAILED":
                starting.discard(name)
                print(f"{name} did not start: {applications[name].message}", file=sys.stderr)
        time.sleep(0.2)


def _show(console: Console, name: str, port: int, num_questions: int) -> bool:
    """Ask one model and print what it said and who computed it; true when it did well."""
    from openai import OpenAI

    base = f"http://127.0.0.1:{port}/{name}"
    console.rule(f"[bold]{name}")
    console.print(_actor_table(base))
    client = OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=60)
    tasks = held_out_tasks(_SEED, num_questions)
    answers = [_ask(client, name, task, console) for task in tasks[:_STREAMED]]
    began = time.monotonic()
    with ThreadPoolExecutor(_CONCURRENT) as pool:
        rest = list(pool.map(lambda task: _ask(client, name, task), tasks[_STREAMED:]))
    elapsed = time.monotonic() - began
    return _summary(console, answers, rest, elapsed)


def _ask(client: OpenAI, name: str, task: Task, console: Console | None = None) -> Answer:
    """One streamed chat completion, shown as it comes where a console is given."""
    if console is not None:
        for turn in task.chat():
            console.print(f"[cyan]{turn['role']}:[/cyan] {escape(turn['content'])}")
        console.print("[green]answer:[/green] ", end="")
    began = time.monotonic()
    first: float | None = None
    text, num_tokens = "", 0
    messages: Any = task.chat()
    for chunk in client.chat.completions.create(
        model=name,
        messages=messages,
        temperature=0,
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
    ):
        first = first or time.monotonic()
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
        piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
        text += piece
        if console is not None:
            console.print(escape(piece), end="")
    ended = time.monotonic()
    if console is not None:
        console.print("" if is_correct(task, text) else f"  [dim](expected {task.answer})[/dim]")
    return Answer(task, text, (first or ended) - began, ended - began, num_tokens)


def _actor_table(base: str) -> Table:
    with urllib.request.urlopen(f"{base}/v1/experts", timeout=30) as response:
        actors = json.load(response)["actors"]
    table = Table("role", "index", "pid", "layers", "experts")
    for actor in actors:
        layers = "" if actor["layers"] is None else "{}..{}".format(*actor["layers"])
        experts = ", ".join(map(str, actor["experts"]))
        table.add_row(actor["role"], str(actor["index"]), str(actor["pid"]), layers, experts)
    return table


def _summary(
    console: Console, streamed: list[Answer], concurrent: list[Answer], elapsed: float
) -> bool:
    answers = [*streamed, *concurrent]
    right = sum(is_correct(answer.task, answer.text) for answer in answers) / len(answers)
    level = sum(chance(answer.task.kind) for answer in answers) / len(answers)
    alone = sum(a.num_tokens for a in streamed) / sum(a.total_s for a in streamed)
    console.print(
        f"time to first token {median(a.first_token_s for a in streamed) * 1000:.0f} ms, "
        f"{alone:.0f} tokens/s one at a time"
    )
    if concurrent:
        together = sum(answer.num_tokens for answer in concurrent) / elapsed
        console.print(f"{together:.0f} tokens/s with up to {_CONCURRENT} questions at once")
    answered = sum(answer.num_tokens > 0 for answer in answers)
    console.print(
        f"{answered} of {len(answers)} held-out questions answered, {right:.0%} right "
        f"(chance {level:.0%})"
    )
    return answered == len(answers) and right >= level + _MARGIN


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
