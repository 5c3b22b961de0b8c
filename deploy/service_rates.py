"""How fast this replica has been of late: what predictions of waiting are made of."""

from __future__ import annotations

_KEEP = 0.9
"""Weight of all that was seen before, against 1 - _KEEP for the newest."""
_KEEP_LONG = 0.995
"""The same for what needs different loads to be seen."""
_SPREAD = 1.0
"""Variance of the number of running sequences below which nothing is said of its effect."""


class _Ratio:
    """Average of a quotient: old observations fade, large ones weigh more."""

    def __init__(self) -> None:
        self._above = self._below = 0.0

    def see(self, above: float, below: float) -> None:
        """One more observation."""
        self._above = _KEEP * self._above + above
        self._below = _KEEP * self._below + below

    @property
    def value(self) -> float | None:
        """None before anything was seen."""
        return self._above / self._below if self._below else None


class _Line:
    """A straight line through observations, of which old ones fade."""

    def __init__(self) -> None:
        self._count = self._x = self._y = self._xx = self._xy = 0.0

    def see(self, x: float, y: float) -> None:
        """One more observation."""
        for name, value in (("count", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, f"_{name}", _KEEP_LONG * getattr(self, f"_{name}") + value)

    @property
    def rise(self) -> float:
        """Slope in units of the value at 0; 0 where the observations do not tell."""
        spread = self._count * self._xx - self._x**2
        if spread <= _SPREAD * self._count**2:
            return 0.0
        slope = (self._count * self._xy - self._x * self._y) / spread
        start = (self._y - slope * self._x) / self._count
        return slope / start if slope > 0 and start > 0 else 0.0


class ServiceRates:
    """Moving averages; all are 0 until something was observed. No clock."""

    def __init__(self) -> None:
        self._prefill = _Ratio()
        self._decode = _Ratio()
        self._output = _Ratio()
        self._prompt = _Ratio()
        self._company = _Line()

    def saw_prompt(self, num_tokens: int) -> None:
        """A sequence with such a prompt has ended, its prompt computed."""
        self._prompt.see(num_tokens, 1)

    def saw_prefill(self, num_tokens: int, seconds: float) -> None:
        """A prompt's computation kept the replica busy for so long; cached prefixes make it short.

        Prompts of the same step share their time: the others come with 0 seconds.
        """
        self._prefill.see(seconds, num_tokens)

    def saw_answer(self, num_tokens: int, decode_s: float, running: float = 1.0) -> None:
        """A sequence ended after so many tokens; the time is that between first and last.

        `running` is how many sequences, itself among them, ran meanwhile on average.
        """
        if num_tokens > 1:
            self._decode.see(decode_s, num_tokens - 1)
            self._company.see(running, decode_s / (num_tokens - 1))
        self._output.see(num_tokens, 1)

    @property
    def prefill_s_per_token(self) -> float:
        """Seconds of the whole replica."""
        return self._prefill.value or 0.0

    @property
    def decode_s_per_token(self) -> float:
        """Seconds of one sequence among those that usually run."""
        return self._decode.value or 0.0

    @property
    def tokens_per_prompt(self) -> float:
        """How long prompts are."""
        return self._prompt.value or 0.0

    @property
    def tokens_per_answer(self) -> float:
        """How many tokens answers have, whatever their `max_tokens` allow."""
        return self._output.value or 0.0

    @property
    def slowdown(self) -> float:
        """By what part of a lone sequence's step each further one lengthens it."""
        return self._company.rise
