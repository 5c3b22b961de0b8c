"""A plan for a person: tables of actors and nodes, and the figures around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.printable import printable
from deploy.ranges import ranges_text
from shards.cache_budget import size_text

_SHOWN = 4
"""Reasons that are printed; others are counted."""


def print_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Print the object that `plan_report.report` makes."""
    console.print(_summary(plan))
    console.print(_actors(plan))
    console.print(_nodes(plan))
    for note in plan["notes"]:
        _line(console, f"note: {note}")
    if plan["fits"]:
        _line(console, "fits")
        return
    for reason in plan["reasons"][:_SHOWN]:
        _line(console, f"does not fit: {reason}")
    if plan["reasons"][_SHOWN:]:
        _line(console, f"does not fit: {len(plan['reasons']) - _SHOWN} more like these")
    if not plan["alternatives"]:
        _line(console, "nothing near these machines and options fits")
    for number, other in enumerate(plan["alternatives"]):
        _line(console, f"{'also fits' if number else 'nearest that fits'}: {other['command']}")


def _line(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, soft_wrap=True, highlight=False)


def _summary(plan: Mapping[str, Any]) -> Table:
    model, weights, options = plan["model"], plan["weights"], plan["options"]
    moved, bounds = plan["traffic"], plan["roofline"]
    one, many = bounds["decode_batch_1"], bounds["decode_concurrency"]
    experts = f"{model['num_experts']} in {model['moe_layers']} layers, {model['top_k']} per token"
    rows = {
        "family": model["family"],
        "parameters": f"{model['parameters']:,}, {model['active_parameters']:,} per token",
        "layers": f"{model['num_layers']}: {model['attention_layers']} with attention, "
        f"{model['state_layers']} recurrent",
        "experts": experts if model["moe_layers"] else "none",
        "weights": f"{size_text(weights['bytes'])} as {_dtypes(options)}",
        "KV per token": size_text(weights["kv_bytes_per_token"]),
        "state per sequence": size_text(weights["state_bytes_per_sequence"]),
        "planned for": f"{_count(options['concurrency'], 'sequence')} of "
        f"{options['context']:,} tokens",
        "topology": f"{_count(options['stages'], 'stage')}, "
        f"{_count(options['expert_shards'], 'expert shard')}, {options['layout']}, "
        f"executor {options['executor']}, dispatch {options['dispatch']}",
        "moved per token": f"{size_text(moved['bytes'])}: stages {size_text(moved['stage_bytes'])} "
        f"in {_count(moved['stage_hops'], 'hop')}, experts {size_text(moved['dispatch_bytes'])} "
        f"in {moved['dispatch_hops']}",
        "decode, batch 1": _bound(one),
        f"decode, {many['sequences']} sequences": _bound(many),
        "prefill": f"at most {bounds['prefill']['tokens_per_second']:,.0f} tokens/s "
        f"({bounds['prefill']['flops_per_token'] / 1e9:,.1f} GFLOP per token)",
    }
    # A folder's name is no markup, which a plain string would be.
    table = Table(title=Text(printable(model["name"]), style="table.title"), show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _bound(bound: Mapping[str, Any]) -> str:
    return (
        f"at most {bound['tokens_per_second']:,.1f} tokens/s "
        f"({size_text(bound['weight_bytes_per_token'])} of weights and "
        f"{size_text(bound['cache_bytes_per_token'])} of caches per token)"
    )


def _dtypes(options: Mapping[str, Any]) -> str:
    dtype: str = options["dtype"]
    match options["quantization"]:
        case "int8":
            return f"{dtype}, experts int8"
        case "int8-all":
            return f"{dtype}, linears int8"
    return dtype


def _actors(plan: Mapping[str, Any]) -> Table:
    largest = max(sum(actor["memory"].values()) for actor in plan["actors"])
    unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    table = Table(title=f"actors, memory in {unit}", box=SIMPLE, padding=0, pad_edge=False)
    for name in ("actor", "place", "layers", "experts"):
        table.add_column(name, no_wrap=True)
    for name in ("weights", "caches", "activations", "on GPU", "on host"):
        table.add_column(name, justify="right")
    for actor in plan["actors"]:
        memory, layers = actor["memory"], actor["layers"]
        sizes = (
            memory["weights"],
            memory["kv"] + memory["state"],
            memory["activations"],
            actor["gpu_memory_bytes"],
            actor["cpu_memory_bytes"],
        )
        table.add_row(
            actor["name"],
            _place(actor),
            ranges_text(range(*layers)) if layers else "",
            ranges_text(actor["experts"]),
            *(f"{num_bytes / size:,.1f}" if num_bytes else "" for num_bytes in sizes),
        )
    return table


def _place(actor: Mapping[str, Any]) -> str:
    gpus = "".join(f" GPU {gpu}" for gpu in actor["gpus"])
    return f"node {actor['node']}{gpus}"


def _nodes(plan: Mapping[str, Any]) -> Table:
    table = Table(title="nodes")
    for name in ("node", "GPUs", "GPU memory, fullest", "host memory", "cores"):
        table.add_column(name, justify="right")
    for node in plan["nodes"]:
        fullest = max((gpu["gpu_memory_bytes"] for gpu in node["gpus"]), default=0)
        table.add_row(
            str(node["index"]),
            str(node["gpu_count"]),
            size_text(fullest),
            size_text(node["cpu_memory_bytes"]),
            str(node["cpu_cores"]),
        )
    return table
