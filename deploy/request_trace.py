"""The spans of one request: itself, the queue, prefill, decoding, and the exchanges of both."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from router.step import NOTHING, SamplingParams, Want
from shards.sequence_trace import Phase, SequenceTrace

if TYPE_CHECKING:
    from deploy.request_record import RequestRecord
    from shards.client import TokenSource, TokenStream

MAX_SEQUENCES = 16
"""The first sequences of a request have spans of their own."""

Attributes = dict[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class TraceClock:
    """One moment on two clocks: all times of a request are counted from it."""

    unix_ns: int
    monotonic: float

    @classmethod
    def now(cls) -> TraceClock:
        """This moment."""
        return cls(time.time_ns(), time.monotonic())

    def unix(self, monotonic: float) -> int:
        """Nanoseconds since 1970."""
        return self.unix_ns + round((monotonic - self.monotonic) * 1e9)


class RequestTrace:
    """Collects while the request is answered; its spans are made when it is over."""

    def __init__(self, tracer: Tracer, span: Span, clock: TraceClock) -> None:
        self._tracer = tracer
        self._span = span
        self._clock = clock
        self._sequences: list[SequenceTrace] = []
        self._num_sequences = 0

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def watched(self, source: TokenSource) -> TokenSource:
        """The same source; what is started there belongs to this request."""
        return _Watched(source, self)

    def sequence(self, num_prompt: int) -> SequenceTrace | None:
        """What is to hear of one more sequence; None where there are too many."""
        self._num_sequences += 1
        if self._num_sequences > MAX_SEQUENCES:
            return None
        trace = SequenceTrace(num_prompt, time.monotonic())
        self._sequences.append(trace)
        return trace

    def finish(self, record: RequestRecord) -> None:
        """The request is over: send its spans on their way."""
        now = time.monotonic()
        inside = set_span_in_context(self._span, Context())
        for index, sequence in enumerate(self._sequences):
            self._add_sequence(inside, index, sequence, now)
        self._span.set_attributes(_request_attributes(record, self._num_sequences))
        failed = record.status >= 500 or (record.error_code is not None and record.status < 400)
        if failed:
            self._span.set_status(Status(StatusCode.ERROR, record.error_code))
        self._span.end(self._clock.unix(now))

    def _add_sequence(
        self, inside: Context, index: int, sequence: SequenceTrace, now: float
    ) -> None:
        common: Attributes = {"conclave.sequence.index": index}
        for at in sequence.restarts:
            self._span.add_event("restart", common, self._clock.unix(at))
        prefill = sequence.prefill
        if prefill is None and sequence.begun is not None:
            prefill = Phase(began=sequence.begun, ended=now)  # the step never came back
        waited_until = now if prefill is None else prefill.began
        restarts: Attributes = {"conclave.restarts": sequence.num_restarts}
        self._add(inside, "queue", sequence.made, waited_until, common | restarts)
        if prefill is not None:
            # What a cached prefix saved is not in any step.
            prompt: Attributes = {"conclave.prompt_tokens": sequence.num_prompt}
            self._add_phase(inside, "prefill", prefill, common, prompt)
        if sequence.decode is not None:
            self._add_phase(inside, "decode", sequence.decode, common, {})

    def _add_phase(
        self, inside: Context, name: str, phase: Phase, common: Attributes, own: Attributes
    ) -> None:
        span = self._tracer.start_span(
            name,
            context=inside,
            attributes=common | own | _phase_attributes(phase),
            start_time=self._clock.unix(phase.began),
        )
        for note in phase.notes:
            step: Attributes = {
                "conclave.tokens": note.tokens,
                "conclave.batch_tokens": note.batch_tokens,
                "conclave.batch_sequences": note.batch_sequences,
                "conclave.seconds": note.ended - note.began,
            }
            span.add_event("step", step, self._clock.unix(note.began))
        if phase.layers:
            # As long as exchanges were under way, at the beginning of the phase.
            began, ended = phase.began, phase.began + phase.exchange_s
            within = set_span_in_context(span, Context())
            self._add(within, "dispatch", began, ended, common | _dispatch_attributes(phase))
        span.end(self._clock.unix(phase.ended))

    def _add(
        self, inside: Context, name: str, began: float, ended: float, attributes: Attributes
    ) -> None:
        span = self._tracer.start_span(
            name, context=inside, attributes=attributes, start_time=self._clock.unix(began)
        )
        span.end(self._clock.unix(ended))


class _Watched:
    """A TokenSource that tells a trace of what is started."""

    def __init__(self, source: TokenSource, trace: RequestTrace) -> None:
        self._source = source
        self._trace = trace

    def generate(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        want: Want = NOTHING,
        grammar: str | None = None,
        cache_salt: str = "",
        trace: SequenceTrace | None = None,
    ) -> TokenStream:
        """As the source does it."""
        return self._source.generate(
            prompt,
            sampling,
            priority=priority,
            want=want,
            grammar=grammar,
            cache_salt=cache_salt,
            trace=trace or self._trace.sequence(len(prompt)),
        )


def _request_attributes(record: RequestRecord, num_sequences: int) -> Attributes:
    every: dict[str, AttributeValue | None] = {
        "http.route": record.route,
        "http.response.status_code": record.status,
        "conclave.request_id": record.request_id,
        "conclave.stream": record.stream or None,
        "conclave.sequences": num_sequences or None,
        "conclave.time_to_first_token_seconds": record.first_token_s,
        "conclave.client_gone": record.client_gone or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens or None,
        "gen_ai.usage.output_tokens": record.completion_tokens or None,
        "gen_ai.response.finish_reasons": record.finish_reasons[:MAX_SEQUENCES] or None,
        "error.type": record.error_code,
    }
    return {key: value for key, value in every.items() if value is not None}


def _phase_attributes(phase: Phase) -> Attributes:
    attributes: Attributes = {
        "conclave.steps": phase.steps,
        "conclave.tokens": phase.tokens,
        "conclave.batch_tokens": phase.batch_tokens,
        "conclave.slowest_step_seconds": phase.slowest_s,
    }
    if phase.stage_s:
        attributes["conclave.stage_seconds"] = [s for _, s in sorted(phase.stage_s.items())]
    return attributes


def _dispatch_attributes(phase: Phase) -> Attributes:
    layers = sorted(phase.layers.items())
    return {
        "conclave.dispatch.exchanges": sum(each.exchanges for _, each in layers),
        "conclave.dispatch.bytes": sum(each.num_bytes for _, each in layers),
        "conclave.dispatch.microseconds": round(1e6 * sum(each.seconds for _, each in layers)),
        "conclave.dispatch.layers": [layer for layer, _ in layers],
        "conclave.dispatch.layer_bytes": [each.num_bytes for _, each in layers],
        "conclave.dispatch.layer_microseconds": [round(1e6 * each.seconds) for _, each in layers],
    }
