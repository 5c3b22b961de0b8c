"""`conclave quantize MODEL OUTDIR`: a checkpoint whose experts are int8 already."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from deploy.config import ConfigError
from deploy.printable import printable
from deploy.resolve import model_folder
from models.quantization_config import QUANTIZATIONS, effective_quantization, quantization_config
from shards.checkpoint import open_model
from shards.checkpoint_writer import PlannedTensor, write_checkpoint
from shards.quantized_checkpoint import plan_quantized
from shards.verify import verify

_CONFIG_FILE = "config.json"
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_INDEX_SUFFIX = ".index.json"
_MAX_SHARD_BYTES = 5 * 10**9


def quantize_model(
    model: str, outdir: Path, quantization: str, *, max_shard_bytes: int = _MAX_SHARD_BYTES
) -> int:
    """Write the quantised checkpoint; 0 when done, 1 with reasons when the model cannot be read.

    OUTDIR appears, or has its config.json, only when it is complete. Raises ConfigError.
    """
    if quantization not in QUANTIZATIONS[1:]:
        raise ConfigError(
            f"quantization={quantization}: allowed values are {', '.join(QUANTIZATIONS[1:])}"
        )
    folder = model_folder(model)
    target = _check_outdir(outdir)
    console = Console()
    try:
        config, checkpoint = open_model(folder)
        verify(config, checkpoint)
    except (ValueError, OSError) as error:
        return _refuse(console, error)
    if config.quantization != "none":
        raise ConfigError(f"model={model}: its files hold {config.quantization} already")
    try:
        tensors = plan_quantized(config, checkpoint, effective_quantization(quantization, config))
        with _complete_folder(target) as partial, _progress(console, tensors) as on_written:
            write_checkpoint(
                partial, tensors, max_shard_bytes=max_shard_bytes, on_written=on_written
            )
            _copy_the_rest(folder, partial, quantization)
    except (ValueError, OSError) as error:
        return _refuse(console, error)
    before, after = checkpoint.bytes_read, sum(tensor.num_bytes for tensor in tensors)
    sizes = f"{before / 2**20:,.1f} MiB of weights became {after / 2**20:,.1f} MiB"
    console.print(
        f"{printable(str(outdir))}: {quantization}, {sizes}", markup=False, soft_wrap=True
    )
    return 0


def _refuse(console: Console, error: Exception) -> int:
    reason = printable(" ".join(str(error).split()))
    console.print(f"cannot be quantised: {reason}", markup=False, soft_wrap=True)
    return 1


def _check_outdir(outdir: Path) -> Path:
    """OUTDIR without the symbolic links on its way. Raises ConfigError."""
    allowed = "allowed is a folder that is empty or not there yet"
    try:
        target = outdir.resolve()
        usable = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"outdir={outdir}: {reason}; {allowed}") from None
    if not usable:
        raise ConfigError(f"outdir={outdir}: {allowed}")
    return target


@contextmanager
def _complete_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` at the end, and goes where that fails.

    Where `target` is there, its content moves: a mount point or the working directory stays.
    """
    there = target.exists()
    parent = target if there else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".conclave-", dir=parent))
    try:
        yield partial
        if there:
            _move_up(partial)
        else:
            partial.chmod(0o755)
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_up(partial: Path) -> None:
    """Move the files to the parent, config.json last; all or none."""
    files = sorted(partial.iterdir(), key=lambda file: file.name == _CONFIG_FILE)
    try:
        for file in files:
            file.rename(partial.parent / file.name)
    except BaseException:
        for file in files:
            if not file.exists():
                (partial.parent / file.name).unlink(missing_ok=True)
        raise


@contextmanager
def _progress(console: Console, tensors: list[PlannedTensor]) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, nothing elsewhere; told the bytes written."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("quantize", total=sum(tensor.num_bytes for tensor in tensors))
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _copy_the_rest(folder: Path, target: Path, quantization: str) -> None:
    """Tokenizer, chat template, generation defaults; config.json says what was quantised."""
    for file in sorted(folder.iterdir()):
        weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(_INDEX_SUFFIX)
        if file.is_file() and not weights and file.name != _CONFIG_FILE:
            shutil.copyfile(file, target / file.name)
    raw = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    text = json.dumps({**raw, **quantization_config(quantization)}, indent=2, ensure_ascii=False)
    (target / _CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
