"""The comparison as a figure: decode by batch and prefill, a row per family.

.venv/bin/python -m benchmarks.peers.plot results.json docs/peers.svg

Needs matplotlib: `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

TITLES = {"dbrx": "DBRX", "phimoe": "PhiMoE", "jamba": "Jamba"}
LABELS = {
    "conclave": "Conclave",
    "transformers": "Transformers",
    "vllm": "vLLM",
    "llamacpp": "llama.cpp",
}
COLORS = {
    "conclave": "#0b6e4f",
    "transformers": "#f2a65a",
    "vllm": "#5b8fb9",
    "llamacpp": "#a4a4a4",
}
NOT_RIGHT = ("wrong",)
WIDTH = 0.2


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of the shortest prompt; hatched where an engine's numbers are wrong."""
    families = results["families"]
    figure, axes = plt.subplots(len(families), 2, figsize=(9, 2.6 * len(families)), squeeze=False)
    for row, family in zip(axes, families, strict=True):
        for axis, name in zip(row, ("decode", "prefill"), strict=True):
            _bars(axis, family, name)
            axis.set_title(f"{TITLES[family['family']]}: {name}, tokens/s", fontsize=10, loc="left")
    handles = [Rectangle((0, 0), 1, 1, color=COLORS[engine]) for engine in LABELS]
    handles.append(Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="black", hatch="////"))
    names = [*LABELS.values(), "wrong numbers"]
    figure.legend(handles, names, ncols=len(names), loc="lower center", frameon=False, fontsize=9)
    figure.suptitle(f"{results['machine']}, {results['threads']} threads, bfloat16", fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path)


def _bars(axis: Any, family: dict[str, Any], name: str) -> None:
    prompt = min(cell["prompt"] for cell in family["cells"])
    cells = [cell for cell in family["cells"] if cell["prompt"] == prompt]
    batches = sorted({cell["batch"] for cell in cells})
    for place, engine in enumerate(LABELS):
        rates = {cell["batch"]: cell[name] for cell in cells if cell["engine"] == engine}
        state = family["rightness"].get(engine, {"state": "absent"})["state"]
        for group, batch in enumerate(batches):
            if batch in rates:
                where = group + (place - 1.5) * WIDTH
                _bar(axis, where, rates[batch], engine, is_right=state not in NOT_RIGHT)
    axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches], fontsize=9)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_minor_formatter("")
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(y=0.15)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _bar(axis: Any, where: float, rate: float, engine: str, *, is_right: bool) -> None:
    axis.bar(
        where,
        rate,
        WIDTH * 0.92,
        color=COLORS[engine],
        hatch=None if is_right else "////",
        edgecolor="white",
        linewidth=0,
    )
    axis.text(where, rate, f"{rate:,.0f}", ha="center", va="bottom", fontsize=6.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.figure)


if __name__ == "__main__":
    main()
