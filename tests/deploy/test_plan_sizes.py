"""What a plan counts, against published figures, Transformers' own modules, files and memory."""

from __future__ import annotations

import json
import shutil
import struct
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deploy.config import parse_args
from deploy.demo import NANO_MODELS, nano_checkpoint
from deploy.plan import make_plan
from deploy.plan_model import planned_model
from deploy.plan_options import PlanArgs
from deploy.plan_sizes import Numeric, weight_sizes
from deploy.published import find_published, published_models
from deploy.resolve import resolve
from models.registry import load_config, parse_config
from shards.checkpoint import open_model
from shards.kv_cache import allocate_caches
from shards.load_plan import plan_loading
from shards.loading import load_experts, load_stage
from tests.tiny import FAMILIES, write_tiny

# As the checkpoints' cards and index files state them, or as their configurations work out by hand:
# parameters, those that a token meets, bytes of the checkpoint in bfloat16, bytes with int8 experts
# (without scales), bytes of one expert, of a token's keys and values, of a sequence's conv + SSM.
PUBLISHED: dict[str, tuple[int, ...]] = {
    "dbrx": (
        *(131_596_523_520, 36_469_708_800, 263_193_047_040, 136_357_294_080),
        *(396_361_728, 163_840, 0),
    ),
    "phi-3.5-moe": (
        *(41_873_153_344, 6_640_999_744, 83_746_306_688, 43_480_988_288),
        *(157_286_400, 131_072, 0),
    ),
    "phi-mini-moe": (
        *(7_647_632_704, 2_362_809_664, 15_295_265_408, 9_255_467_648),
        *(23_592_960, 131_072, 0),
    ),
    "phi-tiny-moe": (
        *(3_755_220_288, 1_288_969_536, 7_510_440_576, 4_691_868_288),
        *(11_010_048, 65_536, 0),
    ),
    "jamba-v0.1": (
        *(51_570_323_328, 12_110_311_296, 103_140_646_656, 58_043_490_048),
        *(352_321_536, 16_384, 1_376_256 + 14_680_064),
    ),
    "jamba-mini": (
        *(51_570_323_328, 12_110_311_296, 103_140_646_656, 58_043_490_048),
        *(352_321_536, 16_384, 1_376_256 + 14_680_064),
    ),
    "jamba-large": (
        *(398_555_145_696, 94_149_338_592, 797_110_291_392, 449_217_940_416),
        *(1_207_959_552, 36_864, 6_193_152 + 66_060_288),
    ),
    "jamba-3b": (
        *(3_029_337_472, 3_029_337_472, 6_058_674_944, 0),
        *(0, 1_024, 798_720 + 8_519_680),
    ),
}
BFLOAT16 = Numeric(itemsize=2, quantization="none")


def plan(model: str, **options: Any) -> dict[str, Any]:
    args = PlanArgs(model=model, **options)
    return make_plan(args, planned_model(model))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    parameters, active, stored, int8, one_expert, kv, state = PUBLISHED[name]
    found = plan(name, nodes=16)
    assert found["model"]["parameters"] == parameters
    assert found["model"]["active_parameters"] == active
    weights = found["weights"]
    assert weights["checkpoint_bytes"] == stored
    assert weights["one_expert_bytes"] == one_expert
    assert weights["kv_bytes_per_token"] == kv
    assert weights["state_bytes_per_sequence"] == state
    if int8:
        weights = plan(name, nodes=16, quantization="int8")["weights"]
        assert weights["expert_bytes"] + weights["other_bytes"] == int8


def test_every_bundled_model_has_its_published_figures() -> None:
    assert [model.name for model in published_models()] == list(PUBLISHED)


def test_scales_of_int8_experts() -> None:
    """DBRX: a float32 scale for each of an expert's 2·10752 + 6144 rows, 640 experts."""
    scales = plan("dbrx", nodes=2, quantization="int8")["weights"]["scale_bytes"]
    assert scales == 640 * (2 * 10752 + 6144) * 4


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_has_as_many_parameters(name: str) -> None:
    found = find_published(name)
    assert found is not None
    raw = {k: v for k, v in found.config.items() if k not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    counted = weight_sizes(parse_config(found.config), BFLOAT16).parameters
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("DBRX", "dbrx"),
        ("databricks/dbrx-instruct", "dbrx"),
        ("phi-tiny-moe-INSTRUCT", "phi-tiny-moe"),
        ("ai21labs/AI21-Jamba-1.5-Large", "jamba-large"),
    ],
)
def test_published_models_have_several_names(spelling: str, name: str) -> None:
    found = find_published(spelling)
    assert found is not None
    assert found.name == name


TINY: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("jamba", {"num_experts": 1, "num_experts_per_tok": 1}),
    ("jamba", {"tie_word_embeddings": True, "mamba_proj_bias": True, "mamba_conv_bias": False}),
    ("phimoe", {"tie_word_embeddings": True, "attention_bias": False}),
    ("phimoe", {"classifier": True}),
]


@pytest.mark.parametrize(("family", "options"), TINY)
def test_counts_of_tiny_checkpoints_are_those_of_their_files(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    folder = write_tiny(family, tmp_path, **options)
    found = plan(str(folder), gpus_per_node=0)
    header = _header(folder / "model.safetensors")
    elements = sum(prod(entry["shape"]) for entry in header.values())
    assert found["model"]["parameters"] == elements
    assert found["weights"]["checkpoint_bytes"] == 4 * elements
    assert found["model"]["source"] == "checkpoint"
    assert not any("the files hold" in note for note in found["notes"])


def test_a_head_of_its_own_counts_though_the_flag_ties_it(tmp_path: Path) -> None:
    folder = write_tiny("jamba", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    found = plan(str(folder), gpus_per_node=0)
    elements = sum(prod(e["shape"]) for e in _header(folder / "model.safetensors").values())
    assert found["model"]["parameters"] == elements
    (note,) = [n for n in found["notes"] if "tie_word_embeddings" in n]
    assert "lm_head.weight of its own" in note


@pytest.mark.parametrize("name", NANO_MODELS)
def test_counts_of_nano_checkpoints_are_those_of_their_files(name: str) -> None:
    headers = [_header(file) for file in nano_checkpoint(name).glob("*.safetensors")]
    elements = sum(prod(entry["shape"]) for header in headers for entry in header.values())
    assert plan(name, gpus_per_node=0)["model"]["parameters"] == elements


@pytest.mark.parametrize("quantization", ["none", "int8", "int8-all"])
@pytest.mark.parametrize("name", NANO_MODELS)
def test_memory_of_actors_is_what_they_allocate(name: str, quantization: str) -> None:
    options = {"stages": 2, "expert_shards": 3, "quantization": quantization}
    found = plan(name, gpus_per_node=0, concurrency=3, context=40, **options)
    actors = {actor["name"]: actor for actor in found["actors"]}
    config, checkpoint = open_model(nano_checkpoint(name))
    for index in range(2):
        actor = actors[f"stage-{index}"]
        first, last = actor["layers"]
        stage = load_stage(
            config, checkpoint, first, last, torch.float32, quantization=quantization
        )
        held = sum(_stage_bytes(config, checkpoint, (first, last), quantization))
        assert stage.layers[0].layer_idx == first
        assert actor["memory"]["weights"] == held
        caches = allocate_caches(
            config,
            range(first, last),
            num_blocks=3 * 3,  # 40 tokens take three blocks of 16
            block_size=16,
            num_state_rows=3,
            dtype=torch.float32,
        )
        tensors = [getattr(cache, n) for cache in caches for n in cache.__dataclass_fields__]
        taken = actor["memory"]["kv"] + actor["memory"]["state"]
        assert taken == sum(tensor.nbytes for tensor in tensors)
    for index in range(3):
        actor = actors[f"expert-{index}"]
        bank = load_experts(
            config, checkpoint, actor["experts"], torch.float32, quantization=quantization
        )
        assert actor["memory"]["weights"] == bank.num_bytes


def _stage_bytes(config: Any, checkpoint: Any, layers: tuple[int, int], quantization: str) -> Any:
    """Of the tensors that a stage is given, caught on their way to it."""
    seen: dict[str, torch.Tensor] = {}
    stage = config.build_stage(*layers, torch.float32)

    class Config:
        def __getattr__(self, name: str) -> Any:
            return getattr(config, name)

        def build_stage(self, *args: Any) -> Any:
            return Recorder()

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(stage, name)

        def load(self, weights: dict[str, torch.Tensor]) -> None:
            seen.update(weights)

    load_stage(Config(), checkpoint, *layers, torch.float32, quantization=quantization)  # type: ignore[arg-type]
    return [tensor.nbytes for tensor in seen.values()]


@pytest.mark.parametrize("name", NANO_MODELS)
def test_weights_of_actors_are_what_check_says_they_read(name: str) -> None:
    options = {"stages": 3, "expert_shards": 4, "expert_replicas": 2}
    spec = resolve(parse_args({"model": name, **options})).spec
    config, checkpoint = open_model(nano_checkpoint(name))
    read = {f"{w.role}-{w.index}": w.num_bytes for w in plan_loading(spec, config, checkpoint)}
    actors = plan(name, gpus_per_node=0, **options)["actors"]
    held = {a["name"]: a["memory"]["weights"] for a in actors if a["memory"]["weights"]}
    assert held == read


def test_a_configuration_without_weights_is_enough(tmp_path: Path) -> None:
    shutil.copy(nano_checkpoint("nano-jamba") / "config.json", tmp_path)
    found = plan(str(tmp_path), gpus_per_node=0)
    assert found["model"]["source"] == "config"
    assert found["weights"] == plan("nano-jamba", gpus_per_node=0)["weights"]


def test_files_that_hold_another_model_are_noted(tmp_path: Path) -> None:
    folder = write_tiny("dbrx", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    raw["n_layers"] = 2
    (folder / "config.json").write_text(json.dumps(raw))
    layer = sum(prod(part.shape) for part in load_config(folder).layer_tensors(0).values())
    layer += 4 * 3 * 48 * 64
    counted = plan(str(folder), gpus_per_node=0)["model"]["parameters"]
    (note,) = [n for n in plan(str(folder), gpus_per_node=0)["notes"] if "the files hold" in n]
    assert f"{counted + layer:,}" in note
    assert f"{counted:,}" in note


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header
