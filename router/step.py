"""The wire contract: what engine, stages and ingress say to each other.

Every message is a frozen dataclass of plain values; tensors travel beside it as frame buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.step_trace import StageTrace, StepTrace

NO_TOKEN = -2
"""Token id of the row that ends a sequence without a token: its prompt is computed and nothing
more is wanted (`max_tokens` 0), or there is nothing to choose from."""

LAST_SAMPLED = -1
"""Placeholder token id: what this sequence's previous step sampled, known to the last stage."""


class FinishReason(StrEnum):
    """Why a sequence ended, in the API's own words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    """There is nothing to choose from: the token's `error` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens of one sequence are chosen; `temperature` 0 is greedy.

    `top_k` 0 means all, `logprobs` None means none and k means the sampled token plus k best.
    `stop_token_ids` already holds the EOS ids unless the caller ignores them. `bad_words` are
    token sequences that must not appear, empty `allowed_token_ids` allow all.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    seed: int = 0
    sample_idx: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """Which arrays a sequence's steps return beside its tokens, one row per position.

    All but `prompt_logprobs` need `max_tokens` 0: a sequence that is computed and not continued.
    """

    logits: bool = False
    """`logits` [n, V]: of `logits_positions`, or of every position where that is empty."""
    logits_positions: tuple[int, ...] = ()
    """Rising positions."""
    hidden_states: bool = False
    """`hidden_states.{i}` [n, D], i in 0..num_layers: what enters layer i; the last is normed."""
    router_logits: bool = False
    """`router_logits.{layer}` [n, E] of every MoE layer."""
    score_position: int | None = None
    """`score` [1, num_labels]: the classification head at this position."""
    prompt_logprobs: int | None = None
    """Rows of positions 1 and up, for k alternatives: `prompt_logprobs` [n, 1 + k] float32 and
    `prompt_top_ids` [n, 1 + k] int64, the prompt's own token first, and `prompt_ranks` [n] int64
    of that token, from 1."""


NOTHING = Want()
"""Tokens and nothing beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """Ingress to engine: start a sequence, or resume it with what it has already emitted."""

    seq_id: int
    epoch: int
    prompt: tuple[int, ...]
    emitted: tuple[int, ...] = ()
    sampling: SamplingParams
    priority: int = 0
    want: Want = NOTHING
    grammar: str | None = None
    cache_salt: str = ""
    """Only sequences of the same salt share cached prefixes."""
    traced: bool = False
    """Whether its steps are reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Ingress to engine: the client is gone or a stop string was found; free everything."""

    seq_id: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One emitted token; `position` counts the sequence's emitted tokens from 0."""

    seq_id: int
    position: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None
    error: str = ""
    """With finish ERROR: which of the request's own wishes leave nothing to choose from; empty
    where the model computed a value that is not finite."""
    num_cached: int = 0
    """First token, or end without one: prompt tokens that a cached prefix saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Engine to ingress: this sequence can never be served here, and why."""

    seq_id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What the engine holds right now; sent with every batch of tokens."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    used_slots: int = 0
    total_slots: int = 0
    used_snapshots: int = 0
    total_snapshots: int = 0
    preemptions: int = 0
    prefix_tokens: int = 0
    """Tokens of all sequences that started, preempted ones again."""
    prefix_hit_tokens: int = 0
    """Those of them that a cached prefix saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedRows:
    """Some rows of one array that `Want` names, from row `start` of the whole array.

    `data` holds them C-contiguous; `dtype` is float32 or int64. Rows that come again (after a
    preemption or in a new epoch) have the same bits.
    """

    seq_id: int
    name: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedBatch:
    """Wanted rows on their way: beside a plan, a result or a batch of tokens."""

    rows: tuple[WantedRows, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Engine to ingress, once per step: the journal's rows."""

    epoch: int
    tokens: tuple[Token, ...] = ()
    wanted: tuple[WantedRows, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    started: tuple[int, ...] = ()
    """Sequences that are now in a step in flight and were in none before, or not of late."""
    load: EngineLoad = EngineLoad()
    steps: tuple[StepTrace, ...] = ()
    """Those that are traced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """A sequence the stages do not know yet (or forgot when it was preempted).

    `state_slot` is -1 for models without recurrent state.
    """

    seq_id: int
    prompt: tuple[int, ...]
    emitted: tuple[int, ...]
    sampling: SamplingParams
    state_slot: int = -1
    want: Want = NOTHING
    grammar: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSequence:
    """`num_tokens` tokens of one sequence from absolute position `start`.

    `token_ids` has `num_tokens` entries, a single one may be LAST_SAMPLED. `new_blocks` are
    appended to the sequence's block table before the step. `length` is the sequence's own number
    of known tokens (prompt + emitted): it decides the LongRoPE regime, never the batch. `samples`
    is true when the chunk reaches the last known token, so that the last stage samples the next.
    """

    seq_id: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    length: int
    new_blocks: tuple[int, ...] = ()
    samples: bool = False


class StateOpKind(StrEnum):
    """What happens to recurrent-state slots before a step runs."""

    ZERO = "zero"
    COPY = "copy"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateOp:
    """ZERO clears `target`; COPY and SNAPSHOT copy `source` into `target`."""

    kind: StateOpKind
    target: int
    source: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One scheduled forward. Stages apply `released`, then `new`, then `state_ops`, then run.

    A sequence is in at most one step in flight, or in two whose results come in their order: the
    second then begins with what the first samples. Tokens are packed in the order of `scheduled`.
    """

    epoch: int
    step_id: int
    new: tuple[NewSequence, ...] = ()
    scheduled: tuple[ScheduledSequence, ...] = ()
    state_ops: tuple[StateOp, ...] = ()
    released: tuple[int, ...] = ()
    trace: tuple[StageTrace, ...] | None = None
    """What the stages so far have taken; None: nobody asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the last stage chose for one sequence with `samples` set."""

    seq_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    ends: bool = False
    """The grammar is complete: nothing may follow, and nothing is missing."""
    error: str = ""
    """With NO_TOKEN: as in `Token`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Last stage to engine: the tokens of one step, in the plan's order."""

    epoch: int
    step_id: int
    sampled: tuple[Sampled, ...] = ()
    wanted: tuple[WantedRows, ...] = ()
    trace: tuple[StageTrace, ...] = ()
    """What the stages have taken, if the plan has asked."""
