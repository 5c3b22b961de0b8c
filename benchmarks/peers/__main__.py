"""Conclave beside Transformers, vLLM and llama.cpp in one run, on the same cores and threads.

.venv/bin/python -m benchmarks.peers --engines conclave,transformers,vllm,llamacpp

Engines take turns within every round; figures are medians over the rounds. Who is absent, wrong or
fails is named. `benchmarks.peer_environments` makes the peers' environments.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import signal
import sys
from typing import Any

from benchmarks.peers.comparison import Comparison
from benchmarks.peers.options import Options, parse_options
from benchmarks.peers.report import bandwidth_of, table, verdicts


def main() -> None:
    options = parse_options(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.peers", *sys.argv[1:]]),
        "size": options.size,
        "threads": options.threads,
        "families": [],
    }
    print(f"{results['machine']}; {options.threads} threads; load {os.getloadavg()[0]:.1f}")
    for name in options.families:
        with options.log.open("ab") as log:
            measured = Comparison(name, options, log).run()
        results["families"].append(json.loads(json.dumps(measured)))
        save(results, options)
        print_family(results["families"][-1], options)
    print("\nprefill / decode tok/s (share of the ceiling); first token, between tokens p50 / p99")
    print("\n".join(table(results["families"])))


def print_family(family: dict[str, Any], options: Options) -> None:
    """What decides how to read the figures, and the verdicts."""
    before, after = family["bandwidth_before"] / 1e9, family["bandwidth_after"] / 1e9
    print(f"{family['family']}: {family['parameters'] / 1e6:.0f} M parameters;", end=" ")
    print(f"reads {before:.1f} GB/s before, {after:.1f} after", end="; ")
    print(f"load {family['load_before']:.1f} before, {family['load_after']:.1f} after")
    touched = ", ".join(f"{n:.1f} at batch {b}" for b, n in family["experts_touched"].items())
    print(
        f"experts touched per layer: {touched}; ceiling from {bandwidth_of(family) / 1e9:.1f} GB/s"
    )
    burnt = max((cell["idle_cpu_seconds"] for cell in family["cells"]), default=0.0)
    print(f"waiting engines used at most {burnt:.2f} CPU seconds during another's turn")
    for engine, notes in family["notes"].items():
        if notes:
            print(f"{engine}: {'; '.join(notes)}")
    for combination in family["left_out"]:
        print(f"left out: {combination} (more than {options.most_prompt_tokens} prompt tokens)")
    for verdict in verdicts(family, options.size):
        print(verdict.line())


def save(results: dict[str, Any], options: Options) -> None:
    """After every family, so that a broken run leaves what it had."""
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1))


def machine() -> str:
    """Processor and number of cores, as the system calls them."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


if __name__ == "__main__":
    main()
