"""What a long prompt costs as it grows: time of a prefill chunk, memory, time of a decoded token.

.venv/bin/pip install -e .[bench]
.venv/bin/python -m benchmarks.long_context --threads 2 --json /tmp/long.json \\
    --svg benchmarks/long_context.svg
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import load_line, prompts_of
from benchmarks.long_context_plot import draw
from benchmarks.long_context_run import Decode, LongRun, Series, line_through
from benchmarks.mid_checkpoints import write_checkpoint

LENGTHS = {"phimoe": 32768, "jamba": 65536}
HALF = 64
"""Half of head_dim in all mids."""
CHANGES: dict[str, dict[str, Any]] = {
    # Phi-3.5-MoE's own LongRoPE but for the factors, which only have the same range.
    "phimoe": {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0 + 2.0 * i / HALF for i in range(HALF)],
            "long_factor": [64.0 ** (i / (HALF - 1)) for i in range(HALF)],
            "short_mscale": 1.243163121016122,
            "long_mscale": 1.243163121016122,
        },
    },
    "jamba": {"max_position_embeddings": 262144},
}


def measure(family: str, args: argparse.Namespace) -> Series:
    """One family's series: a prompt of the whole length, then decodes at rising contexts."""
    length = min(LENGTHS[family], args.length)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parameters = write_checkpoint("mid", family, folder, changes=CHANGES[family])
        print(f"\n{family}: {parameters / 1e9:.2f} B parameters, bfloat16; {load_line()}")
        run = LongRun(folder, length + args.tokens, args.chunk)
    (prompt,) = prompts_of(1, length)
    run.chunks(prompt[: 2 * args.chunk], 4)  # what is allocated once
    run.forget()
    chunks = run.chunks(prompt, 1)
    contexts = [1 << power for power in range(10, 32) if 1 << power <= length]
    decodes = [run.decode(prompt[:context], args.tokens) for context in contexts]
    series = Series(family, length, run.bytes_per_token, chunks, decodes)
    show(series)
    return series


def show(series: Series) -> None:
    """One family's table, and what it comes to."""
    print("context  prefill tok/s  ms per chunk  ms per token  memory MiB: cache + the rest")
    decoded = {decode.context: decode for decode in series.decodes}
    for context, decode in decoded.items():
        near = [c for c in series.chunks if context * 7 / 8 <= c.start + c.tokens <= context]
        near = near or series.chunks[:1]
        speed = statistics.median(c.tokens / c.seconds for c in near)
        chunk = statistics.median(c.seconds for c in near) * 1e3
        cache = series.bytes_per_token * context / 2**20
        rest = near[-1].peak_bytes / 2**20 - cache
        print(
            f"{context:7}  {speed:13.0f}  {chunk:12.1f}  {decode.seconds * 1e3:12.2f}  "
            f"{cache:18.1f} + {rest:.1f}"
        )
    chunk_line(series)
    decode_line(series.decodes)


def chunk_line(series: Series) -> None:
    """A chunk's time as a straight line over its position."""
    whole = [c for c in series.chunks if c.tokens == series.chunks[0].tokens]
    base, slope, error = line_through([c.start for c in whole], [c.seconds for c in whole])
    end = slope * series.length
    total = sum(c.seconds for c in series.chunks)
    print(
        f"a chunk takes {base * 1e3:.0f} ms + {slope * 1e6:.2f} ms per 1000 tokens in front of it "
        f"({end / base:.2f} of the first part at the end), give or take {error * 1e3:.0f} ms; "
        f"{series.length} tokens took {total:.1f} s, {series.length / total:.0f} tok/s"
    )


def decode_line(decodes: list[Decode]) -> None:
    first, last = decodes[0], decodes[-1]
    print(
        f"a token takes {last.seconds / first.seconds:.2f} times as long at {last.context} as at "
        f"{first.context}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--length", type=int, default=1 << 20, help="at most, of every family")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24, help="decoded at every context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    machine = f"{platform.processor() or platform.machine()}, {args.threads} threads"
    print(f"{machine}, torch {torch.__version__}; {load_line()}")
    begin = time.perf_counter()
    series = [measure(family, args) for family in args.families]
    print(f"\ntook {time.perf_counter() - begin:.0f} s; {load_line()}")
    if args.json:
        record = {"machine": machine, "cores": os.cpu_count(), "series": [*map(asdict, series)]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.svg:
        draw(series, args.svg)


if __name__ == "__main__":
    main()
