"""One replica in virtual time: steps of chunked prefill and a batch that decodes."""

from __future__ import annotations

import heapq
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.autoscale_traces import Request
from deploy.admission import Admission, AdmissionLimits, Ticket, Work
from deploy.load_report import LoadReporter
from deploy.openai_errors import ApiError
from deploy.scaling_policy import ReplicaLoad
from router.step import EngineLoad

_WAITING_PER_SEAT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Measured of a model on a machine; a step takes base + decode * batch + prefill * chunk."""

    model: str
    startup_s: float
    """From the decision to have one more replica to its first answer."""
    base_s: float
    decode_s: float
    prefill_s: float
    seats: int = 32
    chunk_tokens: int = 2048
    kv_blocks: int = 4096
    block_size: int = 16

    def step_s(self, batch: int, chunk: int) -> float:
        """Seconds of a step."""
        return self.base_s + self.decode_s * batch + self.prefill_s * chunk

    @classmethod
    def read(cls, file: Path) -> Costs:
        """From a file that `benchmarks.autoscale_costs` wrote."""
        fields = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


class Served:
    """A request on its way through a replica; times are None until they have come."""

    __slots__ = ("blocks", "end", "first", "left", "refused", "request", "ticket")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.left = request.prompt
        """Prompt tokens that are not computed."""
        self.blocks = 0
        self.first: float | None = None
        self.end: float | None = None
        self.refused = False
        self.ticket: Ticket | None = None

    def meets(self, ttft_s: float, token_s: float) -> bool:
        """Whether its first token and then, on average, its others came in time."""
        if self.first is None or self.end is None:
            return False
        others = max(1, self.request.answer - 1)
        in_time = self.first - self.request.arrival <= ttft_s
        return in_time and (self.end - self.first) / others <= token_s


class Replica:
    """First come first served; a sequence's blocks are set aside for all of it when it is seated.

    Admission, rates and reports are the shipped ones; of admission only the bound on the number of
    sequences, the forecast of waits is left out.
    """

    def __init__(self, costs: Costs, now: float) -> None:
        self.costs = costs
        self.begun = now
        self.draining = False
        self.until = math.inf
        """When what is being computed is done; it may be several steps of the same batch."""
        limits = AdmissionLimits(
            num_seats=costs.seats,
            max_waiting=_WAITING_PER_SEAT * costs.seats,
            block_size=costs.block_size,
        )
        self._admission = Admission(limits)
        self._reporter = LoadReporter(self._admission, startup_s=costs.startup_s, now=now)
        self.waiting: deque[Served] = deque()
        self.prefilling: list[Served] = []
        self.decoding: list[tuple[int, int, Served]] = []
        """A heap by the step that ends them."""
        self._order = 0
        self._step = 0
        self._planned = 0
        self._started = 0.0
        self._each_s = 0.0
        self._chunk: list[tuple[Served, int]] = []
        self.free_blocks = costs.kv_blocks

    @property
    def live(self) -> int:
        """Requests under way."""
        return self._admission.live

    @property
    def running(self) -> int:
        """Sequences that have a seat."""
        return len(self.prefilling) + len(self.decoding)

    def report(self, now: float) -> ReplicaLoad:
        """What the shipped replica says of itself."""
        return self._reporter.report(now, self._load())

    def arrive(self, served: Served, now: float) -> bool:
        """Take a request or refuse it; whether `until` has changed."""
        request = served.request
        work = Work(prompt_tokens=request.prompt, max_tokens=request.answer)
        if self.live >= (1 + _WAITING_PER_SEAT) * self.costs.seats:
            served.refused = True
            try:
                self._admission.check([work], now, self._load())
            except ApiError:
                return False
            raise AssertionError("admission lets in more than it may")
        [served.ticket] = self._admission.begin([work], now)
        self.waiting.append(served)
        if self.until == math.inf:
            self._plan(now)
            return True
        if self._planned > 1 and self._has_room(served):
            # It joins after the step that is being computed.
            steps = max(1, math.ceil((now - self._started) / self._each_s))
            if steps < self._planned:
                self._planned = steps
                self.until = self._started + steps * self._each_s
                return True
        return False

    def advance(self) -> list[Served]:
        """What was planned is done, at `until`: those that have ended. Plans what follows."""
        now, ended = self.until, []
        self._step += self._planned
        for served, tokens in self._chunk:
            served.left -= tokens
            if served.left == 0:
                self.prefilling.remove(served)
                self._first_token(served, now)
        while self.decoding and self.decoding[0][0] <= self._step:
            ended.append(heapq.heappop(self.decoding)[2])
        for served in ended:
            self._end(served, now)
        self._plan(now)
        return ended

    def _first_token(self, served: Served, now: float) -> None:
        served.first = now
        assert served.ticket is not None
        self._admission.first_token(served.ticket, now)
        self._order += 1
        last = self._step + served.request.answer - 1
        heapq.heappush(self.decoding, (last, self._order, served))

    def _end(self, served: Served, now: float) -> None:
        served.end = now
        assert served.ticket is not None
        served.ticket.emitted = served.request.answer
        self._admission.end(served.ticket, now)
        self.free_blocks += served.blocks

    def _has_room(self, served: Served) -> bool:
        return self.running < self.costs.seats and self._blocks(served) <= self.free_blocks

    def _blocks(self, served: Served) -> int:
        request, costs = served.request, self.costs
        return min(costs.kv_blocks, -(-(request.prompt + request.answer) // costs.block_size))

    def _plan(self, now: float) -> None:
        while self.waiting and self._has_room(self.waiting[0]):
            served = self.waiting.popleft()
            served.blocks = self._blocks(served)
            self.free_blocks -= served.blocks
            self.prefilling.append(served)
        batch = len(self.decoding)
        room = self.costs.chunk_tokens - batch
        self._chunk = []
        for served in self.prefilling:
            if room <= 0:
                break
            tokens = min(served.left, room)
            self._chunk.append((served, tokens))
            room -= tokens
        if not self._chunk and not batch:
            self.until = math.inf
            return
        self._planned = 1 if self._chunk else max(1, self.decoding[0][0] - self._step)
        self._started = now
        self._each_s = self.costs.step_s(batch, sum(tokens for _, tokens in self._chunk))
        self.until = now + self._planned * self._each_s

    def _load(self) -> EngineLoad:
        return EngineLoad(
            running=self.running,
            waiting=len(self.waiting),
            used_blocks=self.costs.kv_blocks - self.free_blocks,
            total_blocks=self.costs.kv_blocks,
        )


def emptier(replicas: Sequence[Replica], first: int, second: int) -> Replica:
    """Serve's choice: of two drawn at random the one with fewer requests."""
    a, b = replicas[first], replicas[second]
    return a if a.live <= b.live else b
