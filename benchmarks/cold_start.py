"""Cold starts: how fast weights are read beside `dd`, the first token beside Transformers, and
what a start of `conclave serve` is made of.

.venv/bin/python -m benchmarks.cold_start --folder /tmp/mid-dbrx --rounds 3

The folder is written where it is not there: a random bfloat16 checkpoint of 1.6 GB. Its files are
dropped from the page cache before every run. Contestants take turns; printed are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.page_cache import drop

READ_GOAL = 0.9
TOKEN_GOAL = 0.25
READY_GOAL_S, OWN_GOAL_S = 20.0, 6.0
Numbers = dict[str, float]


def dd(folder: Path) -> Numbers:
    """Seconds that `dd` takes for the weights' files, and their bytes."""
    files = sorted(folder.glob("*.safetensors"))
    began = time.perf_counter()
    for file in files:
        command = ["dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"]
        subprocess.run(command, check=True)
    seconds = time.perf_counter() - began
    return {"read_s": seconds, "bytes": sum(file.stat().st_size for file in files)}


def contestant(kind: str, folder: Path, threads: int) -> Numbers:
    """What a process of its own says."""
    command = [sys.executable, "-m", "benchmarks.cold_start_contestants", kind, str(folder)]
    done = subprocess.run([*command, str(threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
    found: Numbers = json.loads(done.stdout.splitlines()[-1])
    return found


def served(model: str, options: Sequence[str] = ()) -> tuple[Numbers, dict[str, Any]]:
    """`conclave serve`: seconds from the command to `ready` and to a first token; its profile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "deploy.cli", "serve", model, "--port", str(port)]
        command += ["--profile-startup-json", str(file), *options]
        env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("ready on "):
                raise RuntimeError(f"conclave serve {model} does not start")
            ready = time.perf_counter() - began
            _complete(f"http://127.0.0.1:{port}/v1/completions")
            token = time.perf_counter() - began
            profile = json.loads(file.read_text())
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    return {"ready_s": ready, "seconds": token}, profile


def _complete(url: str) -> None:
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 1, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert json.load(reply)["usage"]["completion_tokens"] == 1


def median(runs: Sequence[Numbers], key: str) -> float:
    """Of one number over all rounds."""
    return statistics.median(run[key] for run in runs)


def compare_reading(folder: Path, rounds: int, threads: int) -> None:
    """Our reader and `dd` in turn, from a cold page cache."""
    dds: list[Numbers] = []
    ours: list[Numbers] = []
    for number in range(rounds):
        left = drop(folder)
        dds.append(dd(folder))
        left = max(left, drop(folder))
        ours.append(contestant("reader", folder, threads))
        speeds = [run["bytes"] / run["read_s"] / 1e9 for run in (dds[-1], ours[-1])]
        print(f"  round {number}: dd {speeds[0]:.2f} GB/s, ours {speeds[1]:.2f} GB/s", end="")
        print(f"; {left:.1%} stayed in the page cache", flush=True)
    speed = [statistics.median(r["bytes"] / r["read_s"] for r in runs) for runs in (dds, ours)]
    share = speed[1] / speed[0]
    print(f"read: {share:.2f} of dd's bandwidth; goal {READ_GOAL}")


def compare_first_tokens(folder: Path, rounds: int, threads: int) -> None:
    """From nothing to a token, in process and through the server, beside Transformers."""
    ours: list[Numbers] = []
    server: list[Numbers] = []
    theirs: list[Numbers] = []
    for _ in range(rounds):
        for kind, runs in (("conclave", ours), ("transformers", theirs)):
            drop(folder)
            runs.append(contestant(kind, folder, threads))
            print(f"  {kind}: {runs[-1]}", flush=True)
        drop(folder)
        server.append(served(str(folder), ["--executor", "local"])[0])
        print(f"  conclave serve: {server[-1]}", flush=True)
    reference = median(theirs, "seconds")
    for name, runs in (("in process", ours), ("through the server", server)):
        seconds = median(runs, "seconds")
        print(
            f"first token {name}: {seconds:.2f} s, Transformers {reference:.2f} s: "
            f"{seconds / reference:.2f}; goal {TOKEN_GOAL}"
        )


def measure_ready(model: str, rounds: int, options: Sequence[str]) -> None:
    """From the command to `ready`, and how much of it is ours."""
    runs = []
    for _ in range(rounds):
        times, profile = served(model, options)
        runs.append({**times, "own_s": profile["own_seconds"], "ray_s": profile["ray_seconds"]})
        print(f"  {runs[-1]}", flush=True)
        for part in profile["parts"]:
            print(f"    {part['name']:<12} {part['where']:<12} {part['seconds']:6.2f}")
    ready, own = median(runs, "ready_s"), median(runs, "own_s")
    print(f"{model}: ready after {ready:.1f} s (goal {READY_GOAL_S:g}), ", end="")
    print(f"{own:.1f} s of them ours (goal {OWN_GOAL_S:g})")


def main() -> None:
    """Everything, or the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--nano", default="nano-jamba")
    parser.add_argument("--options", nargs="*", default=[], help="of the nano model's server")
    parser.add_argument("--parts", nargs="+", default=["read", "token", "ready"])
    args = parser.parse_args()
    if not (args.folder / "config.json").is_file():
        from benchmarks.mid_checkpoints import write_checkpoint

        write_checkpoint("mid", "dbrx", args.folder)
    if "read" in args.parts:
        compare_reading(args.folder, args.rounds, args.threads)
    if "token" in args.parts:
        compare_first_tokens(args.folder, args.rounds, args.threads)
    if "ready" in args.parts:
        measure_ready(args.nano, args.rounds, args.options)


if __name__ == "__main__":
    main()
