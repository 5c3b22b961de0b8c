"""Jamba: tied tables, old keys of config.json, and which Mamba backend runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.config import ConfigError as OptionError
from deploy.config import parse_args
from deploy.resolve import resolve
from models.registry import ConfigError, load_config, parse_config
from shards.checkpoint import CheckpointError, open_model
from shards.verify import verify
from tests.models.driver import read_checkpoint
from tests.models.oracle import write_checkpoint
from tests.parity.battery import assert_everywhere
from tests.parity.cases import case
from tests.parity.jamba import SEQUENCES, SHORT, assert_parity, jamba, reference
from tests.parity.remedies import edit_config, load

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@case(56, "Jamba", "tied tables over stages: head absent, identical, different; untied and missing")
@pytest.mark.parametrize("head", ["absent", "identical", "different"])
def test_tied(tmp_path: Path, head: str) -> None:
    """A head that the file holds counts (Transformers 5), whatever config.json says."""
    folder = jamba(tmp_path, **SHORT, tie_word_embeddings=True)
    tensors = read_checkpoint(folder)
    assert HEAD not in tensors
    table = tensors[TABLE]
    other = 0.2 * torch.randn(table.shape, generator=torch.Generator().manual_seed(7))
    written = {"absent": {}, "identical": {HEAD: table.clone()}, "different": {HEAD: other}}[head]
    write_checkpoint(folder, {**tensors, **written})
    effective = load(folder).lm_head.weight
    assert torch.equal(effective, other if head == "different" else table), "the reference's head"
    assert_parity(folder)
    warnings = resolve(parse_args({"model": str(folder)})).warnings
    noted = [w for w in warnings if "tie_word_embeddings" in w]
    assert len(noted) == (head != "absent")
    assert all(HEAD in w for w in noted)


@case(56, "Jamba", "tied tables over stages: head absent, identical, different; untied and missing")
def test_untied_without_a_head(tmp_path: Path) -> None:
    folder = jamba(tmp_path, **SHORT)
    tensors = read_checkpoint(folder)
    del tensors[HEAD]
    write_checkpoint(folder, tensors)
    with pytest.raises(CheckpointError, match=rf"missing tensors: {HEAD}$"):
        verify(*open_model(folder))
    with pytest.raises(OptionError, match=rf"missing tensors: {HEAD}$"):
        resolve(parse_args({"model": str(folder)}))


@case(57, "Jamba", "use_mamba_kernels where there are none; keys of older versions")
@pytest.mark.parametrize("wanted", [True, False], ids=["wanted", "not wanted"])
def test_mamba_kernels(tmp_path: Path, wanted: bool) -> None:
    """Start-up says which backend runs, and why not the one that the checkpoint asks for."""
    folder = jamba(tmp_path, **SHORT)
    edit_config(folder, use_mamba_kernels=wanted)
    warnings = resolve(parse_args({"model": str(folder)})).warnings
    about = [w for w in warnings if "use_mamba_kernels" in w]
    assert len(about) == wanted
    assert all("mamba backend is not mamba_ssm, because" in warning for warning in about)
    assert_parity(folder, SEQUENCES[2:])


@case(57, "Jamba", "use_mamba_kernels where there are none; keys of older versions")
def test_mamba_kernels_that_are_demanded(tmp_path: Path) -> None:
    folder = jamba(tmp_path, **SHORT)
    options = {"model": str(folder), "mamba_backend": "mamba_ssm"}
    with pytest.raises(
        OptionError, match=r"mamba_backend=mamba_ssm .*mamba_ssm.*: allowed .*torch"
    ):
        resolve(parse_args(options))


LEGACY: dict[str, Any] = {
    "n_ctx": 262144,
    "calc_logits_for_entire_prompt": False,
    "num_logits_to_keep": 1,
    "mamba_inner_layernorms": True,
    "sliding_window": None,
    "use_mambapy": True,
    "use_associative_scan": False,
    "auto_map": {"AutoConfig": "configuration_jamba.JambaConfig"},
}


@case(57, "Jamba", "use_mamba_kernels where there are none; keys of older versions")
def test_legacy_keys_change_nothing(tmp_path: Path) -> None:
    folder = jamba(tmp_path, **SHORT)
    expected = reference(folder)
    edit_config(folder, **LEGACY)
    assert load_config(folder).notes == ()
    assert_everywhere(folder, SEQUENCES, expected)


@case(57, "Jamba", "use_mamba_kernels where there are none; keys of older versions")
@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("mamba_inner_layernorms", False, "true"),
        ("sliding_window", 4096, "null"),
        ("hidden_act", "gelu", "one of silu, swish"),
        ("use_mamba_kernels", "yes", "true or false"),
    ],
)
def test_keys_that_ask_for_another_model(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} is {value!r}, but must be {allowed}"):
        parse_config({"model_type": "jamba", key: value})
