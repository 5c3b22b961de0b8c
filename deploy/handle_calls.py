"""Calls over Python handles: what HTTP answers, as plain dicts; counted and logged like it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from deploy.openai_errors import ApiError, Json, internal_error
from deploy.patient_stream import PatientStream
from deploy.request_json import check_json
from deploy.request_record import RequestRecord, begin, finish, new_id
from deploy.service import ApiService

log = logging.getLogger("conclave.ingress")


class HandleCalls:
    """Errors are answers too: callers get the OpenAI error body instead of an exception."""

    def __init__(self, service: ApiService) -> None:
        self._service = service

    async def answer(self, name: str, body: object) -> Any:
        """What the service's method `name` makes of `body`: one answer."""
        call = _Call(self._service, name)
        try:
            return await call.run(body)
        finally:
            call.finish()

    async def generate(self, name: str, body: object) -> Any:
        """The same; where `body` asks for a stream an async generator of chunks."""
        if not _streams(body):
            return await self.answer(name, body)
        return self._stream(name, body)

    async def _stream(self, name: str, body: object) -> AsyncGenerator[Json, None]:
        # All of it happens inside, so that a call that is cancelled at any time ends here.
        call = _Call(self._service, name)
        stream = None
        try:
            stream = await call.run(body)
            if not isinstance(stream, PatientStream):
                yield stream
                return
            async for chunk in call.chunks(stream):
                yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            call.record.client_gone = True
            raise
        finally:
            if isinstance(stream, PatientStream):
                await stream.aclose()
            call.finish()


class _Call:
    """One call and its record."""

    def __init__(self, service: ApiService, name: str) -> None:
        self._service = service
        self._method = getattr(service, name)
        self._takes_json = name != "forward"  # which takes arrays and checks them itself
        self.record = RequestRecord(request_id=new_id(), route=f"handle.{name}", status=200)
        if service.tracing is not None:
            self.record.trace = service.tracing.begin(self.record)
        begin(service.metrics, self.record)

    async def run(self, body: object) -> Any:
        """The answer, or an error's body."""
        try:
            if self._takes_json:
                check_json(body)
            return await self._method(body)
        except ApiError as error:
            return self._failed(error)
        except asyncio.CancelledError:
            self.record.client_gone = True
            raise
        except Exception:
            log.exception("a handle call failed")
            return self._failed(internal_error())

    async def chunks(self, stream: PatientStream) -> AsyncGenerator[Json, None]:
        """The chunks of a stream; an error inside it is the last of them."""
        try:
            async for chunk in stream:
                yield chunk
        except ApiError as error:
            yield self._failed(error)
        except Exception:
            log.exception("a stream failed")
            yield self._failed(internal_error())

    def finish(self) -> None:
        """It is over."""
        finish(self._service.metrics, self.record)

    def _failed(self, error: ApiError) -> Json:
        self.record.fail(error)
        self.record.status = error.status
        body = error.body()
        if error.retry_after is not None:  # which HTTP says in headers
            body["error"]["retry_after_s"] = error.retry_after
        return body


def _streams(body: object) -> bool:
    value = body.get("stream") if isinstance(body, dict) else None
    return isinstance(value, int) and value != 0
