"""`conclave quantize`: the copy is a whole checkpoint, and gives the bits of quantising at load."""

from __future__ import annotations

import errno
import json
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quantization import all_logits
from deploy.config import ConfigError, parse_args
from deploy.demo import nano_checkpoint
from deploy.quantize import quantize_model
from deploy.resolve import resolve
from models.interface import TensorSlice
from models.registry import load_config
from shards.checkpoint import Checkpoint, CheckpointError, open_model
from shards.verify import verify
from tests.groups import running_group
from tests.shards.int8_oracle import output_dim, spread_channels
from tests.tiny import FAMILIES, VOCAB_SIZE, write_tiny

INT8 = ("int8", "int8-all")
PROMPTS = [tuple((7 * i + j) % VOCAB_SIZE for j in range(3 + 9 * i)) for i in range(3)]


def read_all(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        held = load_file(folder / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(held)
        tensors.update(held)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


async def logits_of(folder: Path, **options: Any) -> list[bytes]:
    with running_group(folder, **options) as group:
        return [logits.tobytes() for logits in await all_logits(group, PROMPTS)]


@pytest.mark.parametrize("quantization", INT8)
@pytest.mark.parametrize("family", FAMILIES)
async def test_the_copy_serves_the_same_bits(
    family: str, quantization: str, tmp_path: Path
) -> None:
    folder = write_tiny(family, tmp_path / "full", dtype=torch.bfloat16, max_shard_size="60KB")
    copy = tmp_path / "new" / "copy"
    assert quantize_model(str(folder), copy, quantization, max_shard_bytes=30_000) == 0
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    at_load = await logits_of(folder, quantization=quantization)
    assert at_load != await logits_of(folder)
    assert at_load == await logits_of(copy)
    spread = {"stages": 2, "expert_shards": 3, "dispatch": "direct"}
    assert at_load == await logits_of(copy, quantization=quantization, **spread)


@pytest.mark.parametrize("quantization", INT8)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_copy_holds(family: str, quantization: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "full", dtype=torch.bfloat16)
    spread_channels(folder)
    quantize_model(str(folder), tmp_path / "copy", quantization)
    before, after = load_file(folder / "model.safetensors"), read_all(tmp_path / "copy")
    scales = {f"{name}_scale" for name in before if output_dim(name, quantization) is not None}
    assert after.keys() == before.keys() | scales
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape
        dim = output_dim(name, quantization)
        if dim is None:
            assert after[name].dtype is torch.bfloat16
            assert torch.equal(after[name], tensor)
            continue
        scale = after[f"{name}_scale"]
        assert (after[name].dtype, scale.dtype) == (torch.int8, torch.float32)
        blocks = scale.shape[0] if dim else 1  # DBRX's w2 has one row of scales per expert
        values = after[name].double().view(blocks, -1, tensor.shape[1])
        steps = scale.double()[:, None] if dim else scale.double()[None, :, None]
        error = (values * steps - tensor.double().view(values.shape)).abs()
        assert (error <= steps * 0.5001).all(), name
        assert scale.shape == ((4, 64) if dim else tensor.shape[:1])


@pytest.mark.parametrize("family", ["phimoe", "jamba"])
def test_a_classification_head_stays_as_it_is(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "full", classifier=True)
    assert quantize_model(str(folder), tmp_path / "copy", "int8-all") == 0
    before, after = load_file(folder / "model.safetensors"), read_all(tmp_path / "copy")
    assert torch.equal(after["score.weight"], before["score.weight"])
    verify(*open_model(tmp_path / "copy"))


async def test_fused_names_become_the_hubs(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path / "hub", tie_word_embeddings=True)
    quantize_model(str(folder), tmp_path / "of_hub", "int8-all")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    experts: dict[str, dict[int, Tensor]] = {}
    for name in [n for n in tensors if ".experts." in n]:
        prefix, expert, part = re.fullmatch(
            r"(.*\.experts\.)(\d+)\.(.*)_proj\.weight", name
        ).groups()  # type: ignore[union-attr]
        experts.setdefault(f"{prefix}{part}", {})[int(expert)] = tensors.pop(name)
    for name, matrices in experts.items():
        stack = torch.stack([matrices[expert] for expert in range(4)])
        if name.endswith("down"):
            tensors[f"{name}_proj"] = stack
        elif name.endswith("gate"):
            ups = experts[f"{name.removesuffix('gate')}up"]
            up = torch.stack([ups[expert] for expert in range(4)])
            tensors[f"{name.removesuffix('gate')}gate_up_proj"] = torch.cat([stack, up], dim=1)
    fused = tmp_path / "fused"
    fused.mkdir()
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    (fused / "config.json").write_text((folder / "config.json").read_text())
    quantize_model(str(fused), tmp_path / "of_fused", "int8-all")
    expected, found = read_all(tmp_path / "of_hub"), read_all(tmp_path / "of_fused")
    assert "lm_head.weight" not in found
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert await logits_of(fused, quantization="int8-all") == await logits_of(tmp_path / "of_fused")


def test_the_folder_is_complete(tmp_path: Path) -> None:
    folder, copy = nano_checkpoint("nano-jamba"), tmp_path / "copy"
    copy.mkdir()  # empty, so allowed
    assert quantize_model("nano-jamba", copy, "int8") == 0
    for file in folder.iterdir():
        if file.name != "config.json" and not file.name.startswith("model"):
            assert (copy / file.name).read_bytes() == file.read_bytes()
    config = json.loads((copy / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "conclave",
        "quantization": "int8",
    }
    assert config == json.loads((folder / "config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    spec = resolve(parse_args({"model": str(copy)})).spec
    assert spec.quantization == "int8"
    assert sum(f.stat().st_size for f in copy.glob("*.safetensors")) < 0.5 * sum(
        f.stat().st_size for f in folder.glob("*.safetensors")
    )


def test_refusals(tmp_path: Path) -> None:
    copy, full, dense = tmp_path / "copy", tmp_path / "full", tmp_path / "dense"
    with pytest.raises(ConfigError, match="quantization=fp8: allowed values are int8, int8-all"):
        quantize_model("nano-dbrx", copy, "fp8")
    with pytest.raises(ConfigError, match="quantization=none"):
        quantize_model("nano-dbrx", copy, "none")
    full.mkdir()
    (full / "notes.txt").touch()
    for outdir in (full, full / "notes.txt"):
        with pytest.raises(
            ConfigError, match=rf"outdir={outdir}: allowed is a folder that is empty"
        ):
            quantize_model("nano-dbrx", outdir, "int8")
    assert quantize_model("nano-dbrx", copy, "int8") == 0
    with pytest.raises(ConfigError, match="its files hold int8 already"):
        quantize_model(str(copy), tmp_path / "again", "int8")
    with pytest.raises(ConfigError, match=r"quantization=int8-all: .*quantised already"):
        resolve(parse_args({"model": str(copy), "quantization": "int8-all"}))
    write_tiny("jamba", dense, num_experts=1, num_experts_per_tok=1)
    assert quantize_model(str(dense), tmp_path / "again", "int8") == 1
    assert quantize_model(str(dense), tmp_path / "all", "int8-all") == 0
    assert not (tmp_path / "again").exists()


def test_a_broken_source_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny("dbrx", tmp_path / "full")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.blocks.2.ffn.experts.mlp.w2"
    tensors[name][100, 3] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert quantize_model(str(folder), tmp_path / "copy", "int8") == 1
    assert f"tensor {name}: a value is not finite" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def a_link_to_nowhere(where: Path) -> Path:
    (where / "link").symlink_to(where / "new")
    return where / "link"


def a_link_to_an_empty_folder(where: Path) -> Path:
    (where / "new").mkdir()
    return a_link_to_nowhere(where)


def an_empty_folder(where: Path) -> Path:
    return a_link_to_an_empty_folder(where).resolve()


def the_working_folder(where: Path) -> Path:
    os.chdir(an_empty_folder(where))
    return Path(".")


OUTDIRS = (a_link_to_nowhere, a_link_to_an_empty_folder, an_empty_folder, the_working_folder)


@pytest.mark.parametrize("outdir", OUTDIRS)
def test_the_folder_may_be_there_already(
    outdir: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # and back at the end
    target = outdir(tmp_path)
    before = target.stat().st_ino if target.exists() else None
    assert quantize_model("nano-jamba", target, "int8") == 0
    verify(*open_model(tmp_path / "new"))
    assert before in (None, (tmp_path / "new").stat().st_ino), "a mount point cannot be replaced"
    copied = {f.name for f in nano_checkpoint("nano-jamba").iterdir() if f.suffix != ".safetensors"}
    weights = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert {file.name for file in target.iterdir()} == copied | weights
    assert {path.name for path in tmp_path.iterdir()} <= {"new", "link"}


@pytest.mark.parametrize("outdir", OUTDIRS)
def test_a_full_disk_leaves_nothing_behind(
    outdir: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    target = outdir(tmp_path)
    rename = Path.rename

    def full(self: Path, to: Path) -> Path:
        if self.name == "config.json":
            assert (to.parent / "model.safetensors.index.json").exists(), "config.json is the last"
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, to)

    def never(self: Path, to: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    monkeypatch.setattr(Path, "replace", never)
    assert quantize_model("nano-jamba", target, "int8") == 1
    assert "No space left" in capsys.readouterr().out
    assert not target.exists() or not list(target.iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"new", "link"}


def test_an_outdir_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, reason in (("x" * 300, "File name too long"), ("loop", "Symlink loop")):
        with pytest.raises(ConfigError, match=f"outdir=.*{name}: {reason}"):
            quantize_model("nano-jamba", tmp_path / name, "int8")


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_accepts_exactly_the_marked_layout(family: str, tmp_path: Path) -> None:
    folder, copy = write_tiny(family, tmp_path / "full"), tmp_path / "copy"
    quantize_model(str(folder), copy, "int8")
    config, marked = load_config(folder), load_config(copy)
    verify(marked, Checkpoint(copy))
    with pytest.raises(CheckpointError, match=r"has dtype torch\.int8; allowed: floating-point"):
        verify(config, Checkpoint(copy))
    with pytest.raises(CheckpointError, match=r"unexpected tensors: .*_scale"):
        verify(config, Checkpoint(copy))
    with pytest.raises(CheckpointError, match=r"missing tensors: .*_scale"):
        verify(marked, Checkpoint(folder))
    with pytest.raises(CheckpointError, match=r"has dtype torch\.float32; allowed: int8"):
        verify(marked, Checkpoint(folder))


def test_one_piece_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = write_tiny("dbrx", tmp_path / "full"), Checkpoint.read
    alive: list[weakref.ref[Tensor]] = []

    def watched(self: Checkpoint, wanted: TensorSlice, dtype: torch.dtype, *rest: Any) -> Tensor:
        assert sum(piece() is not None for piece in alive) <= 1
        piece = read(self, wanted, dtype, *rest)
        alive.append(weakref.ref(piece))
        return piece

    monkeypatch.setattr(Checkpoint, "read", watched)
    assert quantize_model(str(folder), tmp_path / "copy", "int8-all") == 0
    # Every expert's part of a stacked matrix is a piece.
    assert len(alive) == 3 * (5 + 3 * 4) + 3
