"""gRPC interceptor: checks the caller, applies admission control, and makes sure that a request message arrives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode, aio

from nonn.runtime.admission import RETRY_AFTER, Admission, OverloadedError, Place
from nonn.runtime.channel import MODEL_INFER, STATED
from nonn.runtime.metrics import Meters
from nonn.runtime.tls import may_call

#: Seconds within which a call without a deadline must send its message; and after which a call without a message no
#: longer counts among those that wait for an answer.
MESSAGE_TIMEOUT_S, PROMPT_S = 5.0, 0.05
#: Most calls at once whose message has not come, on all connections together; beyond it the oldest is ended.
MAX_SILENT = 1024
#: Cap in seconds on the deadline that a call states. A photograph of 224 pixels a side takes 5 seconds over
#: IEEE 802.15.4, and several times as long where devices share the channel.
MAX_CALL_S = 60.0


def stated_seconds(context: aio.ServicerContext) -> float | None:
    """The deadline that a call states, in seconds from when it was sent, up to `MAX_CALL_S`; None without a number."""
    for name, value in context.invocation_metadata() or ():
        if name == STATED:
            with contextlib.suppress(ValueError):
                seconds = float(value) / 1000
                return min(seconds, MAX_CALL_S) if seconds >= 0 else None
    return None


class Guard(aio.ServerInterceptor):
    """Lets through what a node answers: one request, one response, from a caller on the allow-list.

    A caller's name is its certificate's common name: the alternative names hold ``localhost`` in
    every certificate of a test bed, so they tell nobody apart. Streams are refused altogether: one
    that is left open would hold a place among the few calls that a node takes at once. Where there are no
    certificates, there is no list.

    gRPC runs a handler of unary calls only when a message has come, so a caller that sends none would never be checked.
    Here all handlers are registered for streams of requests, which is the same on the wire, and read one message.
    """

    def __init__(self, names: Collection[str] | None, admission: Admission | None = None, meters: Meters | None = None):
        self.names = names if names is None else frozenset(name.encode() for name in names)
        self.admission, self.meters = admission, meters
        self._silent: dict[asyncio.Timeout, None] = {}  # of calls whose message has not come, the oldest first

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return None
        admission = self.admission if handler_call_details.method == MODEL_INFER else None

        async def answer(_: Any, context: aio.ServicerContext) -> Any:
            await self._check(context)  # before waiting for anything that a stranger sends
            try:
                if admission is None:
                    return await self._answer(handler, context)
                with admission.admitted(context.time_remaining(), context.peer(), stated_seconds(context)) as place:
                    return await self._answer(handler, context, place)
            except OverloadedError as overloaded:
                if self.meters:
                    self.meters.refusals.inc()
                when = ((RETRY_AFTER, str(overloaded.retry_after_ms)),)
                await context.abort(StatusCode.RESOURCE_EXHAUSTED, str(overloaded), when)

        return grpc.stream_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)

    async def _check(self, context: aio.ServicerContext) -> None:
        if self.names is not None and not may_call(context, self.names):
            await self._reject(
                context, StatusCode.PERMISSION_DENIED, "this certificate's name is not on the allow-list"
            )

    async def _reject(self, context: aio.ServicerContext, code: StatusCode, reason: str) -> None:
        """End a call of which no message was read, with an error."""
        if self.meters:
            self.meters.rejections.inc()
        await context.abort(code, reason)

    @contextlib.contextmanager
    def _counted(self, timeout: asyncio.Timeout) -> Iterator[None]:
        """Count a call among the silent ones while the block runs: one too many ends the oldest."""
        self._silent[timeout] = None
        if len(self._silent) > MAX_SILENT:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            if not oldest.expired():
                oldest.reschedule(asyncio.get_running_loop().time())
        try:
            yield
        finally:
            self._silent.pop(timeout, None)

    async def _answer(
        self, handler: grpc.RpcMethodHandler, context: aio.ServicerContext, place: Place | None = None
    ) -> Any:
        late = asyncio.get_running_loop().call_later(PROMPT_S, place.leave) if place else None
        left = context.time_remaining()
        seconds = MESSAGE_TIMEOUT_S if left is None else min(left, MAX_CALL_S)
        try:
            async with asyncio.timeout(seconds) as timeout:
                end = timeout.when()
                with self._counted(timeout):
                    content = await context.read()
        except TimeoutError:
            if timeout.when() != end:
                await self._reject(context, StatusCode.RESOURCE_EXHAUSTED, "too many calls without a message")
            await self._reject(context, StatusCode.DEADLINE_EXCEEDED, f"no message came within {seconds:g} s")
        if place and late:
            late.cancel()
            place.keep()
        if content is aio.EOF:
            await self._reject(context, StatusCode.INVALID_ARGUMENT, "a call without a message")
        try:
            request = handler.request_deserializer(content)
        except DecodeError:
            await self._reject(context, StatusCode.INVALID_ARGUMENT, "this is no message of the protocol")
        return await handler.unary_unary(request, context)
