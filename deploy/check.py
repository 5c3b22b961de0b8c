"""`conclave check MODEL`: can it be served, and how, without reading its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.config import parse_args
from deploy.printable import printable
from deploy.ranges import ranges_text
from deploy.resolve import ResolvedArgs, model_folder, resolve
from deploy.served_model import ServedModel, load_served_model

if TYPE_CHECKING:
    from models.interface import ModelConfig
    from shards.load_plan import WorkerLoad


def check_model(options: Mapping[str, Any]) -> int:
    """Print tables; 0 when the model can be served (warnings included), 1 with reasons if not.

    `options` are those of `conclave serve`, by their names with underscores.
    """
    from shards.checkpoint import open_model
    from shards.load_plan import plan_loading

    console = Console()
    try:
        args = parse_args(options)
        folder = model_folder(args.model)
        resolved = resolve(args)
        limits = resolved.spec.limits
        served = load_served_model(
            resolved.served_model_name, str(folder), resolved.vocab_size, limits.max_model_len
        )
        config, checkpoint = open_model(folder)
        loads = plan_loading(resolved.spec, config, checkpoint)
    except (ValueError, OSError) as error:
        reason = printable(" ".join(str(error).split()))
        console.print(f"cannot be served: {reason}", markup=False, soft_wrap=True)
        return 1
    console.print(_table(resolved, served, folder, config))
    console.print(_load_table(loads))
    for warning in (*resolved.warnings, *served.warnings):
        console.print(f"warning: {printable(warning)}", markup=False, soft_wrap=True)
    console.print("can be served")
    return 0


def _heads(config: ModelConfig) -> str:
    heads = ["next tokens"] if "lm" in config.heads else []
    if config.classifier:
        heads.append(f"one of {len(config.classifier.labels)} labels")
    return " or ".join(heads)


def _load_table(loads: Sequence[WorkerLoad]) -> Table:
    """One row per actor that reads weights, and their sum."""
    table = Table(title="read by each actor", show_footer=len(loads) > 1)
    table.add_column("actor", "all")
    table.add_column("layers")
    table.add_column("experts")
    total = sum(load.num_bytes for load in loads)
    table.add_column("bytes", f"{total:,}", justify="right")
    for load in loads:
        layers = ranges_text(range(*load.layers)) if load.layers else ""
        actor = f"{load.role}-{load.index}"
        table.add_row(actor, layers, ranges_text(load.experts), f"{load.num_bytes:,}")
    return table


def _table(resolved: ResolvedArgs, served: ServedModel, folder: Path, config: ModelConfig) -> Table:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    experts = "none" if resolved.num_experts < 2 else f"{resolved.num_experts} per MoE layer"
    rows = {
        "family": resolved.family,
        "layers": str(resolved.num_layers),
        "experts": experts,
        "answers with": _heads(config),
        "vocabulary": f"{resolved.vocab_size:,}",
        "dtype": resolved.spec.dtype,
        "longest sequence": f"{served.max_model_len:,} tokens",
        "weights on disk": f"{weights / 2**20:,.1f} MiB",
        "tokenizer": "yes" if served.tokenizer else "no",
        "chat template": "yes" if served.template else "no",
        "end of sequence": ", ".join(map(str, served.defaults.eos_token_ids)) or "none",
    }
    # A folder's name is no markup, which a plain string would be.
    title = Text(printable(resolved.served_model_name), style="table.title")
    table = Table(title=title, show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    return table
