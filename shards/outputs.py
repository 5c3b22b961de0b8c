"""The arrays one sequence was asked for, put together from the rows that its steps return."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router.step import Want, WantedRows


class Outputs:
    """I/O-free. Rows may come in any cut and more than once: the same rows have the same bits."""

    def __init__(self, want: Want, num_prompt: int) -> None:
        self.arrays: dict[str, NDArray[np.generic]] = {}
        self._num_prompt = num_prompt
        self._num_logits = len(want.logits_positions) or num_prompt

    def put(self, rows: WantedRows) -> None:
        """Write some rows of one array."""
        values = np.frombuffer(rows.data, dtype=rows.dtype).reshape(rows.shape)
        array = self.arrays.get(rows.name)
        if array is None:
            shape = (self._num_rows(rows.name), *rows.shape[1:])
            array = self.arrays[rows.name] = np.zeros(shape, dtype=rows.dtype)
        array[rows.start : rows.start + len(values)] = values

    def _num_rows(self, name: str) -> int:
        match name.split(".")[0]:
            case "logits":
                return self._num_logits
            case "score":
                return 1
            case "prompt_logprobs" | "prompt_top_ids" | "prompt_ranks":
                return self._num_prompt - 1
        return self._num_prompt
