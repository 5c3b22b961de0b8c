"""The table and the verdicts of a comparison, from its results alone; pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.peers.bandwidth import decode_bytes
from benchmarks.peers.verdicts import Verdict, decode_verdict, prefill_verdict, tiny_verdicts

Family = dict[str, Any]


def bandwidth_of(family: Family) -> float:
    """The faster of the probes before and after: the stricter ceiling."""
    return float(max(family["bandwidth_before"], family["bandwidth_after"]))


def ceiling(family: Family, batch: int) -> float:
    """Decode tokens per second if a step only read the weights that it touches, once."""
    touched = family["experts_touched"][str(batch)]
    return batch * bandwidth_of(family) / decode_bytes(family["sizes"], touched)


def table(families: list[Family]) -> Iterator[str]:
    """Lines of Markdown: a row per family, batch and prompt, a column per engine."""
    engines = list(dict.fromkeys(c["engine"] for f in families for c in f["cells"]))
    yield "| model | prompt | batch | " + " | ".join(engines) + " | ceiling |"
    yield "|---" * (4 + len(engines)) + "|"
    for family in families:
        for prompt, batch in dict.fromkeys((c["prompt"], c["batch"]) for c in family["cells"]):
            cells = {
                c["engine"]: c
                for c in family["cells"]
                if (c["prompt"], c["batch"]) == (prompt, batch)
            }
            most = ceiling(family, batch)
            shown = [_cell(cells.get(engine), most) for engine in engines]
            yield f"| {family['family']} | {prompt} | {batch} | {' | '.join(shown)} | {most:.0f} |"


def _cell(cell: dict[str, Any] | None, most: float) -> str:
    if cell is None:
        return "–"
    names = ("first_token_p50", "inter_token_p50", "inter_token_p99")
    times = " / ".join(f"{cell[name] * 1e3:.0f}" for name in names)
    share = cell["decode"] / most
    return f"{cell['prefill']:.0f} / {cell['decode']:.1f} ({share:.0%}); {times} ms"


def verdicts(family: Family, size: str) -> list[Verdict]:
    """Every target that the results of one family decide."""
    found: list[Verdict] = []
    keys = dict.fromkeys((c["prompt"], c["batch"]) for c in family["cells"])
    for prompt, batch in keys:
        cells = {
            c["engine"]: c for c in family["cells"] if (c["prompt"], c["batch"]) == (prompt, batch)
        }
        ours = cells.pop("conclave", None)
        if ours is None or not cells:
            continue
        what = f"{family['family']}, prompt {prompt}, batch {batch}"
        decode = {name: cell["decode"] for name, cell in cells.items()}
        prefill = {name: cell["prefill"] for name, cell in cells.items()}
        if size == "tiny":
            found += tiny_verdicts(f"{what}, decode", ours["decode"], decode) if batch == 1 else []
            continue
        right = {name: rate for name, rate in decode.items() if counts_as_right(family, name)}
        found.append(
            decode_verdict(
                f"{what}, decode", batch, ours["decode"], right, decode, ceiling(family, batch)
            )
        )
        found.append(
            prefill_verdict(f"{what}, prefill", family["family"], ours["prefill"], prefill)
        )
    return found


def counts_as_right(family: Family, engine: str) -> bool:
    """Right as it is installed; an engine that runs with our repair alone only sets the 1.0."""
    return (
        family["rightness"][engine]["state"] in ("right", "nearly")
        and engine not in family["repaired"]
    )
