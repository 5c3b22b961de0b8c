"""What workers do not need they do not import: asked of real worker processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.demo import NANO_MODELS
from router.step import SamplingParams
from tests.groups import ask, running_group
from tests.module_list import modules_of, telling_environment
from tests.tiny import write_tiny

NEVER_USED = """
    deploy ray fastapi starlette uvicorn httpx pydantic jinja2 openai typer rich yaml
    prometheus_client transformers tokenizers tiktoken sentencepiece
"""
GREEDY = SamplingParams(max_tokens=3, temperature=0.0)


@pytest.mark.parametrize("executor", ["local", "pipeline"])
async def test_workers_import_what_they_need(executor: str, tmp_path: Path) -> None:
    family = "phimoe" if executor == "local" else "dbrx"
    folder, asked = write_tiny(family, tmp_path / "model"), tmp_path / "asked"
    asked.mkdir()
    options = {"executor": executor, "warm_spare": False}
    with running_group(folder, processes=True, env=telling_environment(asked), **options) as group:
        await ask(group, (5, 6, 7), GREEDY)  # what is imported late is imported now
        workers = {worker.role: modules_of(worker.pid, asked) for worker in group.workers()}
    roles = {"engine"} if executor == "local" else {"engine", "stage", "dispatcher", "expert"}
    assert workers.keys() == roles
    for modules in workers.values():
        assert "shards.worker" in modules
        assert "torch._dynamo" not in modules
        assert {m.partition(".")[0] for m in modules} & set(NEVER_USED.split()) == set()
    if executor == "pipeline":
        # It only plans: nothing that computes, and nothing that reads weights.
        assert not {"torch", "numpy", "safetensors", "models.dbrx"} & workers["engine"]
        assert "llguidance" not in workers["expert"]
        assert "shards.model_runner" not in workers["expert"] | workers["dispatcher"]


@pytest.mark.parametrize("name", NANO_MODELS)
def test_checking_a_model_imports_no_compiler(name: str) -> None:
    program = (
        "import sys; from deploy.config import parse_args; from deploy.resolve import resolve; "
        f"resolve(parse_args({{'model': '{name}'}})); print(*sys.modules, sep=chr(10))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    absent = {"torch._dynamo", "torch._inductor", "sympy", "ray", "fastapi", "transformers"}
    assert absent & set(done.stdout.split()) == set()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "deploy.cli",
            "torch numpy ray fastapi starlette rich yaml jinja2 transformers",
        ),
        ("deploy.config", "torch numpy ray fastapi starlette typer rich jinja2 transformers"),
        ("deploy.proxy_request_id", "torch numpy ray fastapi pydantic typer jinja2 transformers"),
        ("shards.worker_main", "torch numpy ray fastapi pydantic jinja2 transformers deploy"),
        ("shards.actors", "torch fastapi starlette ray.serve jinja2 transformers deploy"),
        ("deploy.app", "torch transformers tokenizers tiktoken sentencepiece openai typer"),
        ("deploy.guardian", "asyncio json logging socket subprocess pydantic torch numpy"),
    ],
)
def test_entries_import_nothing_heavy(module: str, absent: str) -> None:
    program = f"import sys, {module}; print(*sys.modules, sep=chr(10))"
    command = [sys.executable, *(["-I", "-S"] if module == "deploy.guardian" else []), "-c"]
    if module == "deploy.guardian":  # run by its path, as `conclave serve` does
        program = (
            "import sys, runpy; runpy.run_path('deploy/guardian.py', run_name='x'); "
            "print(*sys.modules, sep=chr(10))"
        )
    done = subprocess.run([*command, program], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert not imported & set(absent.split()), imported & set(absent.split())
