"""How many tokens of a step are few to expert actors, and how many are too many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy.config import ConfigError
from router.transport.framing import MAX_FRAME_BYTES

if TYPE_CHECKING:
    from models.interface import ModelConfig

_CHOICE_BYTES = 16
"""Of each row of a token: the expert chosen, its weight, where the row came from."""


_FEW_ROWS = 64
"""Rows that an expert computes in about the time in which its weights are read."""


def few_tokens(config: ModelConfig) -> int:
    """Tokens whose experts take as long, whatever part of them is asked for (`EngineLimits`)."""
    return _FEW_ROWS * config.num_experts // config.top_k


def check_exchange(max_num_batched_tokens: int, config: ModelConfig, itemsize: int) -> None:
    """Raises ConfigError when all rows of a step, on their way to one shard, are too much."""
    row_bytes = config.hidden_size * itemsize + _CHOICE_BYTES
    most = MAX_FRAME_BYTES // (config.top_k * row_bytes)
    if max_num_batched_tokens > most:
        raise ConfigError(
            f"max_num_batched_tokens={max_num_batched_tokens}: allowed values are at most {most} "
            f"with experts in other processes: a message to one of them holds "
            f"{MAX_FRAME_BYTES >> 30} GiB"
        )
