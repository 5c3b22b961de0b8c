"""Generation defaults: whose end-of-sequence tokens and temperature win."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deploy.demo import nano_checkpoint
from deploy.served_model import load_defaults, load_served_model
from deploy.tokenizer import load_tokenizer


def write(folder: Path, name: str, value: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, (7, 8)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": None}, {"eos_token_id": [9]}, (9,)),
        ({}, {}, ()),
    ],
)
def test_eos(
    tmp_path: Path,
    generation: dict[str, Any],
    config: dict[str, Any],
    expected: tuple[int, ...],
) -> None:
    write(tmp_path, "generation_config.json", generation)
    write(tmp_path, "config.json", config)
    defaults, warnings = load_defaults(tmp_path, None)
    assert defaults.eos_token_ids == expected
    assert bool(warnings) == (not expected)


def test_eos_of_the_tokenizer_when_nothing_else_says(tmp_path: Path) -> None:
    source = nano_checkpoint("nano-dbrx")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    tokenizer, _ = load_tokenizer(tmp_path)
    defaults, _ = load_defaults(tmp_path, tokenizer)
    assert tokenizer is not None
    assert defaults.eos_token_ids == (tokenizer.token_id("<|endoftext|>"),)


def test_sampling_defaults(tmp_path: Path) -> None:
    values = {"temperature": 0.3, "top_k": 20, "top_p": 0.8, "eos_token_id": 1}
    for do_sample, temperature in ((True, 0.3), (None, 0.3), (False, 1.0)):
        write(tmp_path, "generation_config.json", {**values, "do_sample": do_sample})
        defaults, _ = load_defaults(tmp_path, None)
        assert defaults.temperature == temperature
        assert (defaults.top_k, defaults.top_p) == ((20, 0.8) if temperature == 0.3 else (0, 1.0))
    write(tmp_path, "generation_config.json", {"eos_token_id": 1, "repetition_penalty": 1.2})
    assert "repetition_penalty" in load_defaults(tmp_path, None)[1][0]


def test_bare_folder_is_served_with_warnings(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"eos_token_id": 2})
    model = load_served_model("m", str(tmp_path), 10, 20)
    assert model.tokenizer is None
    assert model.template is None
    assert len(model.warnings) == 2
