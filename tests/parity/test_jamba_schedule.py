"""Jamba: which layer is attention, which is Mamba, and which of them have experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import JambaConfig

from deploy.config import ConfigError as OptionError
from deploy.config import parse_args
from deploy.resolve import resolve
from models.registry import ConfigError, parse_config
from tests.parity.cases import case
from tests.parity.jamba import RECURRENT, SEQUENCES, SHORT, assert_parity, jamba, schedule
from tests.parity.remedies import edit_config, load

TWISTS = {
    "attention second of three, experts first of three": schedule((3, 1), (3, 0), 4),
    "attention last of three, experts third of four": schedule((3, 2), (4, 2), 4),
    "both offsets zero": schedule((2, 0), (3, 0), 4),
    "attention and experts everywhere": schedule((1, 0), (1, 0), 2),
    "attention everywhere, experts nowhere": schedule((1, 0), (4, 3), 2),
    "no attention layer in range": RECURRENT,
    "no attention, experts everywhere": schedule((8, 4), (1, 0), 2),
}


@case(40, "Jamba", "base schedule: attention third of four, experts every second layer")
@pytest.mark.parametrize("stages", [2, 4], ids=["two stages", "four stages"])
def test_base(tmp_path: Path, stages: int) -> None:
    folder = jamba(tmp_path, **schedule((4, 2), (2, 1), 7))
    assert_parity(folder, stages=stages)


@case(41, "Jamba", "other schedules: any offset, attention everywhere, attention nowhere")
@pytest.mark.parametrize("keys", TWISTS.values(), ids=TWISTS.keys())
def test_schedule(tmp_path: Path, keys: dict[str, int]) -> None:
    assert_parity(jamba(tmp_path, **keys))


@case(41, "Jamba", "other schedules: any offset, attention everywhere, attention nowhere")
def test_transformers_caches_no_stack_without_attention(tmp_path: Path, full_forward: Any) -> None:
    model = load(jamba(tmp_path, **RECURRENT))
    with pytest.raises(ValueError, match="Attention layers"):
        model(input_ids=torch.tensor([SEQUENCES[2]]), use_cache=True)
    assert full_forward(model, SEQUENCES[2]).logits.isfinite().all()


@case(42, "Jamba", "an offset that is not below its period is refused, for either pair")
@pytest.mark.parametrize("kind", ["attn", "expert"])
@pytest.mark.parametrize(
    ("period", "offset"), [(5, 5), (1, 1), (2, 7)], ids=["equal", "equal to one", "above"]
)
def test_offset_must_be_below_the_period(
    tmp_path: Path, kind: str, period: int, offset: int
) -> None:
    keys = {f"{kind}_layer_period": period, f"{kind}_layer_offset": offset}
    with pytest.raises(Exception, match="must be smaller than"):
        JambaConfig(**keys)
    words = rf"{kind}_layer_offset is {offset}, but must be below {kind}_layer_period \({period}\)"
    with pytest.raises(ConfigError, match=words):
        parse_config({"model_type": "jamba", **keys})
    folder = jamba(tmp_path, **SHORT)
    edit_config(folder, **keys)
    with pytest.raises(OptionError, match=words):
        resolve(parse_args({"model": str(folder)}))


@case(42, "Jamba", "an offset that is not below its period is refused, for either pair")
@pytest.mark.parametrize("kind", ["attn", "expert"])
def test_offset_against_the_default_period(kind: str) -> None:
    """The other key of the pair may be missing: its default counts."""
    with pytest.raises(ConfigError, match=rf"{kind}_layer_offset is 9, .*{kind}_layer_period"):
        parse_config({"model_type": "jamba", f"{kind}_layer_offset": 9})
    with pytest.raises(ConfigError, match=rf"{kind}_layer_offset is not given, .*\(1\)"):
        parse_config({"model_type": "jamba", f"{kind}_layer_period": 1})


@case(42, "Jamba", "an offset that is not below its period is refused, for either pair")
@pytest.mark.parametrize(
    ("key", "value", "least"),
    [("period", 0, 1), ("offset", -1, 0), ("period", 2.5, 1)],
    ids=["no period", "negative offset", "fractional period"],
)
@pytest.mark.parametrize("kind", ["attn", "expert"])
def test_periods_and_offsets_are_counts(kind: str, key: str, value: float, least: int) -> None:
    name = f"{kind}_layer_{key}"
    words = rf"{name} is {value}, but must be an integer of at least {least}"
    with pytest.raises(ConfigError, match=words):
        parse_config({"model_type": "jamba", name: value})
