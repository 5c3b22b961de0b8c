"""The long-context figures as a plot; needs matplotlib, which the `bench` extra brings."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.long_context_run import Series, line_through

COLOURS = {"phimoe": "#1f6f8b", "jamba": "#c8553d"}


def draw(series: Sequence[Series], path: Path) -> None:
    """Three panels over the context: a prefill chunk's time, a decoded token's time, memory."""
    importlib.import_module("matplotlib").use("svg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for one in series:
        _draw_chunks(panels[0], one)
        _draw_decodes(panels[1], one)
        _draw_memory(panels[2], one)
    titles = ("prefill: ms per chunk", "decode: ms per token", "memory beyond the weights, MiB")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.set_xlabel("thousands of tokens in context")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_chunks(panel: Any, one: Series) -> None:
    whole = [c for c in one.chunks if c.tokens == one.chunks[0].tokens]
    at, ms = [c.start / 1e3 for c in whole], [c.seconds * 1e3 for c in whole]
    base, slope, _ = line_through(at, ms)
    colour = COLOURS[one.family]
    panel.plot(at, ms, ".", color=colour, markersize=4)
    ends = [at[0], at[-1]]
    label = f"{one.family}: {base:.0f} + {slope:.2f} per 1000 tokens"
    panel.plot(ends, [base + slope * x for x in ends], color=colour, label=label)


def _draw_decodes(panel: Any, one: Series) -> None:
    at = [decode.context / 1e3 for decode in one.decodes]
    ms = [decode.seconds * 1e3 for decode in one.decodes]
    panel.plot(at, ms, "o-", color=COLOURS[one.family], label=one.family)


def _draw_memory(panel: Any, one: Series) -> None:
    ends = [chunk.start + chunk.tokens for chunk in one.chunks]
    at, colour = [end / 1e3 for end in ends], COLOURS[one.family]
    held = [chunk.peak_bytes / 2**20 for chunk in one.chunks]
    cache = [end * one.bytes_per_token / 2**20 for end in ends]
    panel.plot(at, held, color=colour, label=f"{one.family}: all")
    panel.plot(at, cache, "--", color=colour, label=f"{one.family}: keys and values")
