"""`conclave check DIR`: every layout is accepted, every fault is one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from deploy.cli import app
from deploy.config import ConfigError
from deploy.quantize import quantize_model
from deploy.resolve import model_folder
from tests.layouts import fuse, read_tensors, split_dbrx_experts, write_tensors
from tests.tiny import FAMILIES, write_tiny

ROOT = Path(__file__).resolve().parents[2]


def check(folder: Path) -> tuple[int, str]:
    """Exit code and output of the command, in this process."""
    ran = CliRunner().invoke(app, ["check", str(folder)], terminal_width=200)
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran.exit_code, ran.output


def edit_config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in keys.items():
        both = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if both else value
    file.write_text(json.dumps(config))


def spell_phimoe_as_the_hub(folder: Path) -> None:
    edit_config(folder, architectures=["PhiMoEForCausalLM"])


LAYOUTS: dict[str, tuple[str, dict[str, Any], Callable[[Path], None] | None]] = {
    **{f"{family}, one file": (family, {}, None) for family in FAMILIES},
    **{f"{family}, sharded": (family, {"max_shard_size": "60KB"}, None) for family in FAMILIES},
    **{f"{family}, bfloat16": (family, {"dtype": torch.bfloat16}, None) for family in FAMILIES},
    "jamba, float16": ("jamba", {"dtype": torch.float16}, None),
    "phimoe, the hub's spelling": ("phimoe", {}, spell_phimoe_as_the_hub),
    "phimoe, fused": ("phimoe", {}, fuse),
    "jamba, fused": ("jamba", {}, fuse),
    "dbrx, experts one by one": ("dbrx", {}, split_dbrx_experts),
    "phimoe, tied": ("phimoe", {"tie_word_embeddings": True}, None),
    "jamba, tied": ("jamba", {"tie_word_embeddings": True}, None),
    "phimoe, classifier": ("phimoe", {"classifier": True, "num_labels": 3}, None),
    "jamba, classifier": ("jamba", {"classifier": True, "num_labels": 3}, None),
    "jamba, all dense": ("jamba", {"num_experts": 1}, None),
    "jamba, no attention": ("jamba", {"num_hidden_layers": 2}, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_can_be_served(layout: str, tmp_path: Path) -> None:
    family, options, change = LAYOUTS[layout]
    folder = write_tiny(family, tmp_path, **options)
    if change is not None:
        change(folder)
    code, said = check(folder)
    assert code == 0, said
    assert family in said
    assert said.endswith("can be served\n")
    dtype = options.get("dtype", torch.float32)
    assert str(dtype).removeprefix("torch.") in said
    assert ("one of 3 labels" in said) == ("num_labels" in options)
    assert "warning: no tokenizer" in said
    assert "warning: no chat template" in said
    assert "not known" not in said
    assert ("mamba backend is not mamba_ssm, because" in said) == (family == "jamba")


def drop_tensor(folder: Path) -> None:
    tensors = read_tensors(folder)
    del tensors["model.final_layernorm.weight"]
    write_tensors(folder, tensors)


def add_tensor(folder: Path) -> None:
    write_tensors(folder, {**read_tensors(folder), "model.stranger": torch.zeros(3)})


def bend_tensor(folder: Path) -> None:
    write_tensors(folder, {**read_tensors(folder), "model.final_layernorm.weight": torch.zeros(63)})


def truncate_shard(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-7])


def point_nowhere(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (drop_tensor, "missing tensors: model.final_layernorm.weight"),
    "extra tensor": (add_tensor, "unexpected tensors: model.stranger"),
    "wrong shape": (
        bend_tensor,
        "tensors of a wrong shape: model.final_layernorm.weight is [63], not [64]",
    ),
    "truncated shard": (truncate_shard, "corrupt or truncated file"),
    "index pointing nowhere": (point_nowhere, "missing file"),
    "wrong dtype": (
        lambda folder: edit_config(folder, dtype="bf16"),
        "dtype is 'bf16', but must be one of float32, bfloat16, float16",
    ),
    "unknown architecture": (
        lambda folder: edit_config(folder, architectures=["MambaForCausalLM"]),
        "architectures names 'MambaForCausalLM', but must name one of DbrxForCausalLM, ",
    ),
    "bad value": (
        lambda folder: edit_config(folder, attn_layer_offset=4),
        "attn_layer_offset is 4, but must be below attn_layer_period (4)",
    ),
    "absurd value": (
        lambda folder: edit_config(folder, num_hidden_layers=10_000_000),
        "missing tensors: model.layers.4.",
    ),
    "no JSON": (cut_config, "is not JSON"),
    "no weights": (
        remove_weights,
        "neither model.safetensors nor model.safetensors.index.json is there",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_one_line(name: str, tmp_path: Path) -> None:
    damage, reason = FAULTS[name]
    folder = write_tiny("jamba", tmp_path, max_shard_size="60KB")
    damage(folder)
    code, said = check(folder)
    assert code == 1
    assert said.count("\n") == 1
    assert said.startswith("cannot be served: ")
    assert reason in said


@pytest.mark.parametrize(
    ("family", "keys", "reason"),
    [
        ("phimoe", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, but must be 2"),
        ("dbrx", {"tie_word_embeddings": True}, "tie_word_embeddings is True, but must be false"),
        ("jamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but must be one of silu"),
        ("dbrx", {"architectures": ["DbrxForSequenceClassification"]}, "no classification head"),
        ("phimoe", {"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    ],
)
def test_bad_values_are_named_by_key(
    family: str, keys: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = write_tiny(family, tmp_path)
    edit_config(folder, **keys)
    code, said = check(folder)
    assert (code, said.count("\n")) == (1, 1)
    assert reason in said


def test_unknown_keys_and_own_heads_are_warned_about(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path, use_mamba_kernels=False)
    edit_config(folder, tie_word_embeddings=True, frobnicate=1)
    code, said = check(folder)
    assert code == 0
    assert "warning: config.json: not known and without effect: frobnicate" in said
    assert "warning: tie_word_embeddings is true, but the checkpoint holds an lm_head" in said
    assert "mamba backend" not in said


HOSTILE = "a\ud800\x1b[31mb"
ESCAPED = r"a\ud800\x1b[31mb"


def test_names_that_no_terminal_shows(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path / "[bold]\x9b:smile:[x]", max_shard_size="60KB")
    edit_config(folder, **{HOSTILE: 1})
    code, said = check(folder)
    assert code == 0
    assert rf"not known and without effect: {ESCAPED}" in said
    assert r"[bold]\x9b:smile:[x]" in said
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][HOSTILE] = f"{HOSTILE}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, said = check(folder)
    assert (code, said.count("\n")) == (1, 1)
    assert ESCAPED in said
    assert "\x1b" not in said


@contextmanager
def without_search_permission(folder: Path) -> Iterator[Path]:
    """The folder as a user sees it who may not look inside, as root always may."""
    user = os.geteuid()
    folder.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)
        yield folder
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


def test_a_folder_nobody_may_look_into(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    with without_search_permission(tmp_path):
        for model in (tmp_path, tmp_path / "below"):
            with pytest.raises(ConfigError, match=rf"model={model}: .*Permission denied"):
                model_folder(str(model))
        with pytest.raises(ConfigError, match=r"outdir=.*/new: Permission denied"):
            quantize_model("nano-jamba", tmp_path / "new", "int8")


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/x"])
def test_a_name_that_no_folder_has(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model={name}: "):
        model_folder(name)


def test_the_program_starts_no_ray_and_leaves_stderr_clean(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path)
    add_tensor(folder)
    code = (
        "import sys; sys.argv = ['conclave', 'check', sys.argv[1]]\n"
        "from deploy.cli import main\n"
        "try: main()\n"
        "finally: print('ray' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
    assert "unexpected tensors: model.stranger" in done.stdout
    assert done.stderr == "False\n"
