"""`conclave check MODEL`: can it be served, and how, without reading its weights."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy.config import ConfigError, parse_args
from deploy.resolve import ResolvedArgs, model_folder, resolve
from deploy.served_model import ServedModel, load_served_model


def check_model(model: str) -> int:
    """Print a table; 0 when the model can be served (warnings included), 1 with reasons if not."""
    console = Console()
    try:
        folder = model_folder(model)
        resolved = resolve(parse_args({"model": model}))
        limits = resolved.spec.limits
        served = load_served_model(
            resolved.served_model_name, str(folder), resolved.vocab_size, limits.max_model_len
        )
    except (ConfigError, ValueError) as error:
        console.print(f"cannot be served: {error}", markup=False, soft_wrap=True)
        return 1
    console.print(_table(resolved, served, folder))
    for warning in served.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    console.print("can be served")
    return 0


def _table(resolved: ResolvedArgs, served: ServedModel, folder: Path) -> Table:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    experts = "none" if resolved.num_experts < 2 else f"{resolved.num_experts} per MoE layer"
    rows = {
        "family": resolved.family,
        "layers": str(resolved.num_layers),
        "experts": experts,
        "vocabulary": f"{resolved.vocab_size:,}",
        "dtype": resolved.spec.dtype,
        "longest sequence": f"{served.max_model_len:,} tokens",
        "weights on disk": f"{weights / 2**20:,.1f} MiB",
        "tokenizer": "yes" if served.tokenizer else "no",
        "chat template": "yes" if served.template else "no",
        "end of sequence": ", ".join(map(str, served.defaults.eos_token_ids)) or "none",
    }
    table = Table(title=resolved.served_model_name, show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    return table
