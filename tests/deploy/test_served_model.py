"""Generation defaults: whose end-of-sequence tokens and temperature win."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import GenerationConfig

from deploy.demo import nano_checkpoint
from deploy.openai_errors import ApiError
from deploy.served_model import SamplingDefaults, load_defaults, load_served_model
from deploy.tokenizer import load_tokenizer


def write(folder: Path, name: str, value: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, (7, 8)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({"eos_token_id": 0}, {"eos_token_id": 9}, (0,)),
        ({"eos_token_id": [7, 8, 7]}, {}, (7, 8)),
        ({}, {"eos_token_id": 9}, (9,)),
        ({"temperature": 0.5}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": None}, {"eos_token_id": [9]}, (9,)),
        ({"eos_token_id": []}, {"eos_token_id": [9]}, (9,)),
        ({}, {}, ()),
        # Derived from config.json by an old Transformers, it still counts alone.
        ({"_from_model_config": True, "eos_token_id": 2}, {"eos_token_id": [2, 518]}, (2,)),
        # The published files: dbrx-instruct, Phi-3.5-MoE and Jamba 1.5.
        ({"eos_token_id": [100257, 100279]}, {}, (100257, 100279)),
        (
            {"bos_token_id": 1, "eos_token_id": [32000, 32001, 32007], "pad_token_id": 32000},
            {"eos_token_id": 32000},
            (32000, 32001, 32007),
        ),
        ({"eos_token_id": [2, 518], "pad_token_id": 0}, {"eos_token_id": [2, 518]}, (2, 518)),
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


def test_eos_of_config_without_a_generation_config(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"eos_token_id": [3, 4]})
    assert load_defaults(tmp_path, None)[0].eos_token_ids == (3, 4)


def test_eos_of_the_tokenizer_when_nothing_else_says(tmp_path: Path) -> None:
    source = nano_checkpoint("nano-dbrx")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    tokenizer, _ = load_tokenizer(tmp_path)
    defaults, _ = load_defaults(tmp_path, tokenizer)
    assert tokenizer is not None
    assert defaults.eos_token_ids == (tokenizer.token_id("<|endoftext|>"),)


SAMPLING = {"temperature": 0.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05}


@pytest.mark.parametrize("do_sample", [True, None])
def test_sampling_defaults(tmp_path: Path, do_sample: bool | None) -> None:
    write(tmp_path, "config.json", {"temperature": 0.9, "top_k": 3})
    values = {**SAMPLING, "do_sample": do_sample, "eos_token_id": 1, "max_new_tokens": 5}
    write(tmp_path, "generation_config.json", values)
    defaults, warnings = load_defaults(tmp_path, None)
    assert defaults == SamplingDefaults(eos_token_ids=(1,), **SAMPLING)
    assert warnings == []


@pytest.mark.parametrize(
    "generation", [{}, dict.fromkeys(SAMPLING), {**SAMPLING, "do_sample": False}]
)
def test_openais_sampling_where_the_checkpoint_is_silent(
    tmp_path: Path, generation: dict[str, Any]
) -> None:
    write(tmp_path, "config.json", {**SAMPLING, "eos_token_id": 1})
    write(tmp_path, "generation_config.json", generation)
    assert load_defaults(tmp_path, None)[0] == SamplingDefaults(
        eos_token_ids=(1,), temperature=1.0, top_p=1.0, top_k=0, min_p=0.0
    )


@pytest.mark.parametrize(("top_k", "expected"), [(0, 0), (-1, 0), (1, 1)])
def test_top_k_of_none_or_minus_one_means_all(tmp_path: Path, top_k: int, expected: int) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": 1, "top_k": top_k})
    assert load_defaults(tmp_path, None)[0].top_k == expected


def test_temperature_zero_is_greedy(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": 1, "temperature": 0})
    assert load_defaults(tmp_path, None)[0].temperature == 0.0


@pytest.mark.parametrize("do_sample", [True, False, None])
def test_repetition_penalty_is_for_greedy_answers_too(
    tmp_path: Path, do_sample: bool | None
) -> None:
    for penalty, expected in ((1.2, 1.2), (1, 1.0), (None, 1.0)):
        values = {"eos_token_id": 1, "repetition_penalty": penalty, "do_sample": do_sample}
        write(tmp_path, "generation_config.json", values)
        assert load_defaults(tmp_path, None)[0].repetition_penalty == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("eos_token_id", v) for v in ("2", 2.0, True, -1, [2, "3"], [None], [[2]], {"a": 1})),
        *(("eos_token_id", v) for v in (2**63, [10**30, 498])),
        *(("temperature", v) for v in ("0.5", True, -0.1, [1], math.nan, math.inf, 10**400)),
        *(("top_p", v) for v in ("1", 0, 1.5, -1, False)),
        *(("min_p", v) for v in ("0", -0.1, 1.1, 10**400)),
        *(("top_k", v) for v in ("5", 5.0, -2, True, 2**63, 10**30)),
        *(("do_sample", v) for v in ("false", 0, 1)),
        *(("repetition_penalty", v) for v in ("1", 0, -1.0, True, 10**400)),
    ],
)
def test_malformed_values_are_named(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": 1, key: value})
    with pytest.raises(ValueError, match=rf"generation_config\.json: {key}: "):
        load_defaults(tmp_path, None)


def test_a_malformed_eos_of_config_is_named(tmp_path: Path) -> None:
    for value, shown in (("2", "'2'"), (10**30, "10000")):
        write(tmp_path, "config.json", {"eos_token_id": value})
        with pytest.raises(ValueError, match=rf"config\.json: eos_token_id: .*{shown}"):
            load_defaults(tmp_path, None)
    # It is not read where the other file says it.
    write(tmp_path, "generation_config.json", {"eos_token_id": 1})
    assert load_defaults(tmp_path, None)[0].eos_token_ids == (1,)


@pytest.mark.parametrize("content", ["{", "[]", "3", '"a"', "[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json: "):
        load_defaults(tmp_path, None)


def test_every_value_that_passes_fits_the_wire(tmp_path: Path) -> None:
    values = {"eos_token_id": [2**63 - 1, 5], "top_k": 2**63 - 1, "temperature": 10**308}
    write(tmp_path, "generation_config.json", values)
    defaults, _ = load_defaults(tmp_path, None)
    encoded = msgspec.msgpack.encode(defaults)
    assert msgspec.msgpack.decode(encoded, type=SamplingDefaults) == defaults


@pytest.mark.parametrize(
    ("eos", "kept", "warned"),
    [([9], (9,), None), ([10, 9], (9,), "10"), (10, (), "10"), ([2**40, 11], (), str(2**40))],
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_eos_that_the_vocabulary_lacks_is_told(
    tmp_path: Path, name: str, eos: object, kept: tuple[int, ...], warned: str | None
) -> None:
    write(tmp_path, name, {"eos_token_id": eos})
    model = load_served_model("m", str(tmp_path), 10, 20)
    assert model.defaults.eos_token_ids == kept
    warnings = [text for text in model.warnings if "end-of-sequence" in text]
    assert bool(warnings) == (warned is not None)
    assert all(str(warned) in text and "0..9" in text for text in warnings)
    assert all(("max_tokens" in text) == (not kept) for text in warnings)


# Values that change what Transformers generates, by the arguments' own documentation.
DROPPED: dict[str, object] = {
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
    "bad_words_ids": [[3]],
    "sequence_bias": [[[3], -1.0]],
    "stop_strings": "x",
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "min_new_tokens": 1,
    "min_length": 1,
    "num_beams": 2,
    "no_repeat_ngram_size": 2,
    "typical_p": 0.9,
    "top_h": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "guidance_scale": 1.5,
    "exponential_decay_length_penalty": [5, 1.5],
}


@pytest.mark.parametrize("key", DROPPED)
def test_what_is_not_honoured_is_named(tmp_path: Path, key: str) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": 1, key: DROPPED[key]})
    [warning] = load_defaults(tmp_path, None)[1]
    assert warning == f"generation_config.json: not honoured: {key}"


def test_all_that_is_not_honoured_is_named_at_once(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": 1, **DROPPED})
    [warning] = load_defaults(tmp_path, None)[1]
    assert all(key in warning for key in DROPPED)
    # Greedy search knows no cut-offs.
    greedy = {"eos_token_id": 1, "do_sample": False, "typical_p": 0.9, "eta_cutoff": 0.1}
    write(tmp_path, "generation_config.json", greedy)
    assert load_defaults(tmp_path, None)[1] == []


def test_neutral_values_are_no_news(tmp_path: Path) -> None:
    # Transformers' own defaults, written out in full.
    defaults = GenerationConfig()._get_default_generation_params()
    empty = dict.fromkeys(DROPPED) | {"bad_words_ids": [], "suppress_tokens": [], "min_length": 0}
    for values in (defaults, empty):
        write(tmp_path, "generation_config.json", {**values, "eos_token_id": 1})
        assert load_defaults(tmp_path, None)[1] == []


def test_a_missing_tokenizer_says_where_token_ids_are_accepted(tmp_path: Path) -> None:
    model = load_served_model("m", str(tmp_path), 10, 20)
    with pytest.raises(ApiError, match=r"token ids .* input of /v1/classify") as error:
        model.need_tokenizer("input")
    assert error.value.param == "input"


def test_bare_folder_is_served_with_warnings(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"eos_token_id": 2})
    model = load_served_model("m", str(tmp_path), 10, 20)
    assert model.tokenizer is None
    assert model.template is None
    assert len(model.warnings) == 2
