"""`conclave plan` as a command: exit codes, one JSON object, no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.test_cli import ROOT, conclave


def test_json_is_all_of_the_output() -> None:
    done = conclave("plan", "nano-jamba", "--json", "--gpus-per-node", "0", "--stages", "2")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["schema"], found["fits"], found["servable"]) == (1, True, True)


def test_documented_keys_are_those_of_the_object() -> None:
    """docs/plan.md's first column, and every key that it lists in braces."""
    found = json.loads(conclave("plan", "dbrx", "--json", "--gpus-per-node", "2").stdout)
    text = (ROOT / "docs" / "plan.md").read_text()
    table = text.split("## `actors[]`")[0]
    rows = re.findall(r"^\| (`.*?`) \| (.*) \|$", table, re.MULTILINE)
    assert {key for first, _ in rows for key in re.findall(r"`(\w+)`", first)} == found.keys()
    for first, meaning in rows:
        value = found[first.strip("`")]
        braces = re.search(r"`\{(.*?)\}`", meaning)
        if braces is not None and isinstance(value, dict):
            assert set(re.findall(r'"(\w+)"', braces[1])) == value.keys(), first
    rest = text.split("## `actors[]`")[1].split("## `bundles[]`")[0]
    rows = re.findall(r"^\| (`.*?`) \|", rest, re.MULTILINE)
    named = {key for first in rows for key in re.findall(r"`(\w+)`", first)}
    assert all(actor.keys() == named for actor in found["actors"])
    for part, key in (("## `bundles[]`", "bundles"), ("## `nodes[]`", "nodes")):
        listed = re.findall(r'"(\w+)"', text.split(part)[1].split("}`.")[0])
        for entry in found[key]:
            assert entry.keys() <= set(listed), key
    for key in ("stage_bytes", "dispatch_bytes", "bytes", "stage_hops", "dispatch_hops"):
        assert key in found["traffic"]


def test_what_does_not_fit_ends_with_1_and_the_nearest() -> None:
    done = conclave("plan", "jamba-large")
    assert done.returncode == 1
    assert "does not fit: GPU 0 of node 0" in done.stdout
    nearest = "nearest that fits: conclave plan jamba-large --nodes 2 --gpus-per-node 8"
    assert nearest in done.stdout
    assert "serving on CUDA is not available in this version" in done.stdout


def test_a_bad_checkpoint_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = conclave("plan", str(tmp_path))
    assert done.returncode == 1
    assert "model_type is 'llama'" in done.stderr
    (tmp_path / "config.json").write_text('{"model_type": "dbrx"}')
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    done = conclave("plan", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "weights cannot be read" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["plan"], "model"),
        (["plan", "nano-dbrx", "--nodes", "0"], "nodes=0"),
        (["plan", "nano-dbrx", "--stages", "99", "--gpus-per-node", "0"], "stages=99"),
        (["plan", "nothing"], "model=nothing"),
    ],
)
def test_usage_errors_end_with_2(args: list[str], word: str) -> None:
    done = conclave(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr
    assert done.stderr.count("\n") == 1


def test_planning_imports_neither_torch_nor_ray() -> None:
    program = """
import sys
from deploy.plan import plan_model
for model in ("dbrx", "nano-phimoe", "jamba-large"):
    plan_model({"model": model}, as_json=True)
sys.exit(1 if {"torch", "ray"} & sys.modules.keys() else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
