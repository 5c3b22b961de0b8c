"""What a family gives and what it is given: the seam between `models` and `shards`.

Importing this or a family's configuration does not import torch, which takes seconds: what only
counts and places parameters does without.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from models.gate import Gate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.kernels.program import Program


@dataclass(frozen=True, slots=True)
class Routing:
    """A gate's decision for T tokens: `expert_ids` [T, k] int64, `weights` [T, k] model dtype.

    `logits` [T, E] are the raw gate scores. Column order is the routing order of the combine.
    """

    expert_ids: Tensor
    weights: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMeta:
    """A packed batch of B sequences with T tokens in all, padded to R >= T rows.

    R is a multiple of `models.layers.rowwise.row_tile(dtype)`; rows T..R-1 are padding with finite
    values whose results nobody reads. Sequence b owns rows query_starts[b]..query_starts[b+1]-1.
    """

    num_tokens: int
    num_rows: int
    query_starts: tuple[int, ...]
    """B + 1 row offsets."""
    starts: tuple[int, ...]
    """Absolute position of each sequence's first row: how many tokens its caches already hold."""
    lengths: tuple[int, ...]
    """Each sequence's own number of known tokens: decides its LongRoPE regime."""
    positions: Tensor
    """[R] int64 absolute positions (0 in padding)."""
    slot_mapping: Tensor
    """[T] int64 flat KV index (block * block_size + offset) that each token is written to."""
    block_tables: Tensor
    """[B, max_blocks] int64, padded with 0."""
    state_slots: tuple[int, ...]
    """[B] recurrent-state slot of each sequence, -1 where the model has none."""
    program: Program | None = None
    """Where layers leave their kernels' calls; None: they are run at once."""

    def settle(self) -> None:
        """Run what waits: to be called before rows are read other than by a kernel."""
        if self.program is not None:
            self.program.run()


@dataclass(frozen=True, slots=True)
class KVCache:
    """Paged keys and values of one attention layer: both [num_blocks, G, block_size, h].

    What one head reads of a block lies together.
    """

    key: Tensor
    value: Tensor

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.key.shape[2]


@dataclass(frozen=True, slots=True)
class StateCache:
    """Recurrent state of one Mamba layer: `conv` [slots, I, K-1], `ssm` [slots, I, N] float32.

    A slot that was zeroed is the state of an empty sequence.
    """

    conv: Tensor
    ssm: Tensor


LayerCache = KVCache | StateCache


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What one layer must remember: per-token KV elements and per-sequence state shapes."""

    kind: str
    """`kv` or `state`."""
    num_kv_heads: int = 0
    head_dim: int = 0
    conv_shape: tuple[int, int] = (0, 0)
    """(I, K-1)."""
    ssm_shape: tuple[int, int] = (0, 0)
    """(I, N)."""


class DecoderLayer(Protocol):
    """One decoder layer without its routed experts; a layer never calls experts itself."""

    layer_idx: int
    is_moe: bool
    chooser: Gate | None
    """MoE layers only, once they are loaded: what `gate` computes."""

    def mix(self, x: Tensor, meta: BatchMeta, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Norm, attention or Mamba, residual add, second norm: [R, D] → (residual, h), both [R, D].

        Writes this batch's keys/values or state into `cache`.
        """

    def gate(self, h: Tensor) -> Routing:
        """MoE layers only: scores of [R, D] rows."""

    def dense(self, residual: Tensor, h: Tensor, meta: BatchMeta) -> Tensor:
        """Dense layers only: close the layer with residual + FFN(h), [R, D]."""

    def combine(self, residual: Tensor, outputs: Tensor) -> Tensor:
        """Close a MoE layer: residual + experts' output, [R, D]."""


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One place a parameter may be read from: rows `start`..`stop` of tensor `name`.

    `index` first picks one matrix of a stacked 3-D tensor (Transformers 5 fused experts).
    `start` and `stop` are both None when all rows are wanted. `transpose` swaps the two dimensions
    after reading (the result is made contiguous).
    """

    name: str
    start: int | None = None
    stop: int | None = None
    index: int | None = None
    transpose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """Where one parameter comes from: the first of `sources` whose name the checkpoint holds.

    The hub's spelling comes first. A fused parameter has `parts` instead, read one below the other.
    """

    sources: tuple[TensorSource, ...] = ()
    shape: tuple[int, ...]
    """Shape in memory, after slicing and transposing."""
    parts: tuple[TensorSlice, ...] = ()
    """Slices that add up to `shape` along the first dimension; parts have no parts."""

    @property
    def leaves(self) -> tuple[TensorSlice, ...]:
        """The slices that come from one tensor each: its parts, or itself."""
        return self.parts or (self,)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert of one layer: gate and up [F, D], down [D, F]; act(x·gateᵀ) ⊙ (x·upᵀ) ·downᵀ.

    An int8 matrix comes with the float32 scale of each of its rows.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_scale: Tensor | None = None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None


class StageModel(Protocol):
    """The layers first..last-1 of a model, with embedding and head where the stage owns them."""

    layers: tuple[DecoderLayer, ...]

    def embed(self, token_ids: Tensor) -> Tensor:
        """First stage: [R] int64 → [R, D]."""

    def norm(self, x: Tensor) -> Tensor:
        """Last stage: the final norm, [R', D] → [R', D]; R' is any multiple of the row tile."""

    def logits(self, normed: Tensor) -> Tensor:
        """Last stage, `lm` head: [R', D] normed rows → [R', V] in model dtype."""

    def scores(self, normed: Tensor) -> Tensor:
        """Last stage, `score` head: [R', D] normed rows → [R', num_labels] in model dtype."""

    def tensors(self) -> dict[str, TensorSlice]:
        """Every parameter this stage owns, by its own name, and where it is read from."""

    def quantizable(self) -> frozenset[str]:
        """The parameters that may be int8: attention projections and dense FFN linears."""

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the parameters named by `tensors()`, already in the model dtype.

        A quantizable one may be int8; the scale of its rows is then there as `<name>_scale`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """A sequence-classification head as Transformers' config.json describes it."""

    labels: tuple[str, ...]
    """Label names by id (`id2label`)."""
    problem_type: str | None
    """regression, single_label_classification, multi_label_classification, or None: decided by
    the labels that a loss is asked for."""
    pad_token_id: int | None
    """Pooling reads the rightmost token with another id; None: the last token."""


class ModelConfig(Protocol):
    """A parsed, validated config.json; the families' frozen dataclasses implement it."""

    @property
    def family(self) -> str:
        """dbrx, phimoe or jamba."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_experts(self) -> int:
        """Routed experts per MoE layer; 1 means that no layer is MoE (Jamba)."""

    @property
    def top_k(self) -> int: ...
    @property
    def activation(self) -> str:
        """The experts' activation, one of ACTIVATION_NAMES."""

    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def reprefill_length(self) -> int | None:
        """LongRoPE: a sequence that grows past this many tokens must be prefilled again."""

    @property
    def sliding_window(self) -> int | None:
        """Keys that a token sees in every attention layer, its own included; None for all."""

    @property
    def dtype_name(self) -> str:
        """Dtype the checkpoint declares: float32, bfloat16 or float16."""

    @property
    def quantization(self) -> str:
        """What the checkpoint's files hold as int8: none, int8 (routed experts) or int8-all."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know: keys without effect, a head that contradicts its flag."""

    @property
    def heads(self) -> frozenset[str]:
        """What the model ends in: `lm` (next-token logits), `score` (classification) or both."""

    @property
    def classifier(self) -> Classifier | None:
        """The classification head; None without one."""

    @property
    def aux_loss_coef(self) -> float:
        """Weight of the load-balancing loss in the total loss."""

    def with_tensors(self, names: frozenset[str]) -> ModelConfig:
        """The same model with every head that a checkpoint of these tensors holds.

        Raises ConfigError when they hold a head that the family does not have.
        """

    def is_moe_layer(self, layer_idx: int) -> bool: ...
    def cache_shape(self, layer_idx: int) -> CacheShape: ...
    @property
    def quantizable(self) -> frozenset[str]:
        """Names of `layer_tensors` that may be int8: attention projections, dense FFN linears."""

    def layer_tensors(self, layer_idx: int) -> dict[str, TensorSlice]:
        """One layer's parameters by its own names, without routed experts."""

    def embedding_tensor(self) -> TensorSlice:
        """The table [V, D] that the first stage reads rows of."""

    def head_tensors(self) -> dict[str, TensorSlice]:
        """What the last stage holds besides its layers: the final norm and the heads."""

    def build_stage(self, first: int, last: int, dtype: torch.dtype) -> StageModel:
        """Layers first..last-1; embedding when first == 0, head when last == num_layers."""

    def expert_tensors(self, layer_idx: int, expert: int) -> dict[str, TensorSlice]:
        """`gate`, `up`, `down` of one routed expert."""

    def ignored_tensors(self, names: Iterable[str]) -> set[str]:
        """Checkpoint tensors that are known to be redundant (rotary buffers, a tied head)."""
