"""Kernels compiled beforehand: found without a compiler, and only where nobody else can write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.kernels.prebuilt import VARIABLE, prebuilt
from models.kernels.variants import VARIANTS, supported_variants

ROOT = Path(__file__).resolve().parents[2]
CHOICE = "from models.kernels.choice import resolve_kernels; print(resolve_kernels('auto'))"

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None or not supported_variants(),
    reason="nothing can be built here",
)


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with an empty cache and nothing of this test's environment but the path of modules."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("image") / "kernels"
    done = run(["-m", "models.kernels.prebuild", str(made)], PATH=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    return made


@needs_compiler
def test_every_variant_is_built_whatever_this_processor_is(folder: Path) -> None:
    built = {path.name.split("-")[0] for path in folder.iterdir()}
    assert built == {variant.name for variant in VARIANTS}


@needs_compiler
def test_they_are_found_without_a_compiler(folder: Path, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""}
    without = run(["-c", CHOICE], **home)
    assert without.stdout.strip() == "torch", without.stderr
    found = run(["-c", CHOICE], **home, CONCLAVE_PREBUILT_KERNELS=str(folder))
    assert found.stdout.strip() == supported_variants()[0].name, found.stderr
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_a_library_of_other_sources_is_not_taken(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        shutil.copy(path, tmp_path / f"{path.name.split('-')[0]}-{'0' * 32}.so")
    home = {"HOME": str(tmp_path), "PATH": "", "CONCLAVE_PREBUILT_KERNELS": str(tmp_path)}
    assert run(["-c", CHOICE], **home).stdout.strip() == "torch"


def test_without_a_compiler_the_command_says_so(tmp_path: Path) -> None:
    done = run(["-m", "models.kernels.prebuild", str(tmp_path)], PATH="")
    assert (done.returncode, done.stdout) in ((1, ""), (0, done.stdout))
    assert "no C compiler" in done.stderr or "no kernels for" in done.stdout


def test_what_others_can_write_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o755)
    library = kept / "avx2-1.so"
    library.write_bytes(b"")
    library.chmod(0o644)
    monkeypatch.setenv(VARIABLE, str(kept))
    assert prebuilt("avx2-1.so") == library
    assert prebuilt("avx2-2.so") is None
    library.chmod(0o666)
    assert prebuilt("avx2-1.so") is None
    library.chmod(0o644)
    kept.chmod(0o777)
    assert prebuilt("avx2-1.so") is None
    kept.chmod(0o755)
    (tmp_path / "link").symlink_to(kept)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "link"))
    assert prebuilt("avx2-1.so") is None
    monkeypatch.setenv(VARIABLE, "relative")
    assert prebuilt("avx2-1.so") is None
    monkeypatch.delenv(VARIABLE)
    assert prebuilt("avx2-1.so") is None
