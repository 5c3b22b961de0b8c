"""The image's recipe, as far as it can be tried without Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.api_keys import VARIABLE as API_KEY
from deploy.version import VERSION
from k8s.render import FOLDER
from models.kernels.prebuilt import VARIABLE as PREBUILT

ROOT = FOLDER.parent
DOCKERFILE = FOLDER / "Dockerfile"
PACKAGES = ("deploy", "models", "router", "shards")
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"

needs_hadolint = pytest.mark.skipif(
    shutil.which(HADOLINT) is None, reason="hadolint is not installed: .[dev] has it"
)


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) in order, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    split = [line.partition(" ") for line in joined.splitlines() if line]
    return [(keyword, rest) for keyword, _, rest in split]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name → (what it starts from, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    body: list[tuple[str, str]] = []
    for keyword, rest in instructions():
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            body = []
            found[name] = (base, body)
        else:
            body.append((keyword, rest))
    return found


def lineage(name: str) -> list[tuple[str, str]]:
    """All instructions that a target consists of."""
    base, body = stages()[name]
    return (lineage(base) if base in stages() else []) + body


def variables(name: str) -> dict[str, str]:
    pairs = [part for kw, rest in lineage(name) if kw == "ENV" for part in rest.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "--no-color", file], capture_output=True, text=True)


@needs_hadolint
def test_the_linter_finds_nothing() -> None:
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


@needs_hadolint
@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("RUN_IMAGE} AS run", "RUN_IMAGE} AS kernels", "DL3024"),
        ("FROM ${RUN_IMAGE}", "FROM python:latest", "DL3007"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("WORKDIR /opt", "WORKDIR opt", "DL3000"),
        ('CMD ["conclave", "serve", "nano-jamba", "--host", "0.0.0.0"]', "CMD conclave", "DL3025"),
    ],
)
def test_the_linter_finds_planted_mistakes(old: str, new: str, rule: str, tmp_path: Path) -> None:
    changed = tmp_path / "Dockerfile"
    assert old in DOCKERFILE.read_text()
    changed.write_text(DOCKERFILE.read_text().replace(old, new))
    assert rule in hadolint(changed).stdout


def test_base_images_are_arguments_with_full_tags() -> None:
    arguments = dict(rest.split("=", 1) for keyword, rest in instructions()[:2])
    assert [keyword for keyword, _ in instructions()[:3]] == ["ARG", "ARG", "FROM"]
    assert all(re.fullmatch(r"python:3\.11-\S+", image) for image in arguments.values())
    bases = {base for base, _ in stages().values()}
    assert bases <= {f"${{{name}}}" for name in arguments} | stages().keys()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_targets_run_as_a_plain_user_and_serve(target: str) -> None:
    recipe = lineage(target)
    assert [rest for keyword, rest in recipe if keyword == "USER"] == ["1000:1000"]
    (command,) = [json.loads(rest) for keyword, rest in recipe if keyword == "CMD"]
    assert command == ["conclave", "serve", "nano-jamba", "--host", "0.0.0.0"]
    assert not [rest for keyword, rest in recipe if keyword == "RUN" and "useradd" not in rest]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_targets_say_where_things_are(target: str) -> None:
    said = variables(target)
    (home,) = {rest for keyword, rest in lineage(target) if keyword == "WORKDIR"}
    assert said["PYTHONPATH"] == home
    assert said["HF_HUB_OFFLINE"] == "1"
    assert API_KEY not in said
    (made,) = [rest for keyword, rest in stages()["kernels"][1] if keyword == "RUN"]
    assert made == f"python -m models.kernels.prebuild {said[PREBUILT]}"
    assert ("COPY", f"--from=kernels {said[PREBUILT]} {said[PREBUILT]}") in lineage(target)
    environment = f"--from=environment-{target} /opt/venv /opt/venv"
    assert ("COPY", environment) in lineage(target)
    assert said["PATH"].startswith("/opt/venv/bin:")


def test_the_default_target_is_for_cpus_and_named_by_the_version() -> None:
    assert list(stages())[-1] == "cpu"
    assert f"-t conclave:{VERSION} ." in DOCKERFILE.read_text()


def test_what_is_copied_is_enough_to_start(tmp_path: Path) -> None:
    copied = [rest.split()[:-1] for kw, rest in stages()["run"][1] if kw == "COPY"]
    names = [name for sources in copied for name in sources if not name.startswith("-")]
    for name in (name for name in names if not name.startswith("/")):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    assert set(PACKAGES) <= {path.name for path in tmp_path.iterdir()}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "check", "nano-jamba"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_context_holds_what_is_copied() -> None:
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        name
        for _, body in stages().values()
        for keyword, rest in body
        if keyword == "COPY" and not rest.startswith("--from")
        for name in rest.split()[:-1]
    }
    assert "*" in ignored
    assert copied == kept
