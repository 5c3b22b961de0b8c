"""The C files under the address and undefined-behaviour sanitizers, over the kernels' own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.built import VARIANTS, needs_kernels

FOLDER = Path(__file__).parent
PRELOADED = ("libasan.so", "libstdc++.so.6")
"""Before Python: what watches malloc, and what its own start looks for exceptions in."""

pytestmark = needs_kernels


def found(library: str) -> str | None:
    """Where the compiler has a library; it answers with the bare name of one that is not there."""
    command = [os.environ.get("CC", "cc"), f"-print-file-name={library}"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


def run(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Instrumented kernels in a process of their own; tensors are heap memory, and watched."""
    libraries = [found(library) for library in PRELOADED]
    if None in libraries or found("libubsan.so") is None:
        pytest.skip("this compiler has no sanitizers' runtime")
    environment = {
        # Which kernels this run of the tests chose is no matter of the C files'.
        **{name: value for name, value in os.environ.items() if name != "CONCLAVE_KERNELS"},
        "LD_PRELOAD": " ".join(filter(None, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's are not ours
        "OMP_WAIT_POLICY": "passive",
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(FOLDER.parents[1]),
    }
    program = [sys.executable, str(FOLDER / "sanitized.py"), *arguments]
    return subprocess.run(program, capture_output=True, text=True, env=environment)


def test_nothing_is_wrong_over_random_shapes(tmp_path: Path) -> None:
    """Every function of two variants, with the shapes that their tests against float64 draw."""
    tests = sorted(map(str, FOLDER.glob("test_native_*.py")))
    assert len(tests) >= 5
    chosen = "not (blocks or long) or shape0 or 5-2-1500"  # one shape of what is large
    done = run(tmp_path, "-q", "-s", "-k", chosen, *tests)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    assert len(list(tmp_path.rglob("*.so"))) == min(2, len(VARIANTS))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("((char *)memset(malloc(5), 1, 6 + tiles))[4]", "heap-buffer-overflow"),
        ("tiles + __INT_MAX__ + (tiles == 0)", "signed integer overflow"),
    ],
)
def test_what_is_wrong_would_be_found(tmp_path: Path, wrong: str, said: str) -> None:
    (tmp_path / "wrong.c").write_text(
        "#include <stdlib.h>\n#include <string.h>\n"
        '__attribute__((visibility("default"))) int conclave_ready(int tiles)\n'
        f"{{ return {wrong}; }}\n"
    )
    done = run(tmp_path, "--sources", str(tmp_path))
    assert done.returncode != 0
    assert said in done.stderr, done.stderr[-2000:]
