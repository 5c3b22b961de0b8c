"""Pages that people follow by hand: what they name is there, what can run here runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from k8s.render import FOLDER, overlays
from tests.k8s.manifests import documents, group, ray, worker

ROOT = FOLDER.parent
PAGES = (
    *("kuberay", "laptop", "observability", "operating", "ray-cluster", "rehearsal", "runbook"),
    *("security", "traces", "troubleshooting"),
)
each_page = pytest.mark.parametrize("page", PAGES)


def text(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text()


def commands(page: str) -> list[list[str]]:
    """Lines behind `$` in console blocks, as words; comments left out."""
    blocks = re.findall(r"```console\n(.*?)```", text(page), flags=re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


@cache
def sources() -> str:
    files = [
        file for name in ("deploy", "shards", "models") for file in (ROOT / name).rglob("*.py")
    ]
    return "\n".join(file.read_text() for file in files)


def conclave(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@cache
def options_of(command: str) -> frozenset[str]:
    return frozenset(re.findall(r"--[a-z-]+", conclave(command, "--help").stdout))


@each_page
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text(page)):
        assert (ROOT / "docs" / target).exists(), target


@each_page
def test_what_commands_name_is_there(page: str) -> None:
    for words in commands(page):
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        if words[0] == "conclave":
            asked = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert asked <= options_of(words[1]), words
        for flag, folder in pairwise(words):
            if folder.endswith(".yaml") and "/" in folder:
                assert (ROOT / folder).is_file(), words
            elif flag == "-k" or folder.startswith("k8s/overlays"):
                assert (ROOT / folder / "kustomization.yaml").is_file(), words
            if flag == "-m":
                assert (ROOT / (folder.replace(".", "/") + ".py")).is_file(), words


def test_there_are_commands_to_check() -> None:
    assert {words[0] for page in PAGES for words in commands(page)} >= {"conclave", "kubectl"}


@pytest.mark.parametrize(
    "words",
    [
        words[1:]
        for words in commands("laptop")
        if words[0] == "conclave" and words[1] in ("check", "plan")
    ],
    ids=" ".join,
)
def test_commands_of_the_laptop_run(words: list[str]) -> None:
    done = conclave(*words)
    assert done.returncode == 0, done.stderr


def test_the_linter_runs_as_said() -> None:
    (words,) = [w for w in commands("kuberay") if "k8s.lint" in w and "--crds" not in w]
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
def test_kubectl_renders_as_said() -> None:
    (words,) = [w for w in commands("kuberay") if w[:2] == ["kubectl", "kustomize"]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_messages_are_those_of_the_code() -> None:
    page = text("troubleshooting")
    starting, serving = page.split("## ")[1:3]
    messages = re.findall(r"^\| `([^`]+)`", starting, flags=re.M)
    codes = re.findall(r"^\| (\d{3}) `([a-z_]+)`", serving, flags=re.M)
    assert len(messages) >= 8
    assert len(codes) >= 7
    assert [m for m in messages if m not in sources()] == []
    assert [code for _, code in codes if f'code="{code}"' not in sources()] == []


def test_the_table_of_overlays_is_complete_and_right() -> None:
    rows = re.findall(r"^\| `([a-z0-9.-]+)` \|([^|]*)\|", text("kuberay"), flags=re.M)
    said = {name: size for name, size in rows if (FOLDER / "overlays" / name).is_dir()}
    assert said.keys() == {overlay.name for overlay in overlays()} - {"nano"}
    for name, size in said.items():
        if found := re.match(r" (\d+) × (\d+)", size):
            manifest = documents(name)
            gpus = ray(worker(manifest))["resources"]["limits"]["nvidia.com/gpu"]
            assert [int(found[1]), int(found[2])] == [group(manifest)["replicas"], int(gpus)]


def test_no_page_is_long() -> None:
    assert [page for page in PAGES if len(text(page).splitlines()) > 150] == []


def test_every_folder_of_manifests_is_named() -> None:
    named = text("kuberay")
    for folder in (*(FOLDER / "components").iterdir(), *(FOLDER / "weights").iterdir()):
        if Path(folder).name not in ("gpu", "placement", "ha"):
            assert folder.name in named, folder
