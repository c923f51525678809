"""Calls that send no message: they end, and take nobody's place."""

import asyncio
import contextlib

import pytest
from clusters import CHANNELS, FEATURE_LIMIT, N_FEATURES, PATIENCE, SIZE, make_image, stub_of, until
from grpc import StatusCode, aio

from nonn.runtime import guard
from nonn.runtime.channel import MODEL_INFER
from nonn.runtime.node import ServedStudent
from nonn.runtime.protocol import Contract, make_request
from nonn.runtime.serving import serving
from nonn.runtime.tls import Identity

CONTRACT = Contract("0", CHANNELS, SIZE, N_FEATURES[0], FEATURE_LIMIT)


def test_who_sends_no_message_takes_nobodys_place(network_folder, certificates, monkeypatch):
    """64 calls of headers alone, by a stranger and then by the coordinator: all end, and others are answered."""
    monkeypatch.setattr(guard, "MESSAGE_TIMEOUT_S", 0.5)

    async def silent():
        await asyncio.sleep(PATIENCE)
        yield b""

    async def scenario():
        identity, request = Identity.of("node-0", certificates), make_request(CONTRACT, make_image())
        student = ServedStudent(network_folder / "0.onnx")
        async with serving(student, "127.0.0.1:0", identity, ["coordinator"]) as (port, _):
            address, own = f"127.0.0.1:{port}", Identity.of("coordinator", certificates).for_client()
            for name, status in (
                ("stranger", StatusCode.PERMISSION_DENIED),
                ("coordinator", StatusCode.DEADLINE_EXCEEDED),
            ):
                credentials = Identity.of(name, certificates).for_client()
                async with aio.secure_channel(address, credentials) as channel, stub_of(address, own) as stub:
                    calls = [channel.stream_unary(MODEL_INFER)(silent()) for _ in range(64)]
                    ended = [asyncio.ensure_future(call.code()) for call in calls]
                    assert (await stub.ModelInfer(request, timeout=PATIENCE)).outputs
                    assert set(await asyncio.gather(*ended)) == {status}
            assert student.admission.waiting == 0

    asyncio.run(scenario())


def test_calls_without_a_message_are_few_on_all_connections_together(network_folder, monkeypatch):
    """Beyond, the oldest is ended: whoever sends his message is answered, however many there are."""
    monkeypatch.setattr(guard, "MAX_SILENT", 4)
    monkeypatch.setattr(guard, "MESSAGE_TIMEOUT_S", 10.0 * PATIENCE)

    async def silent():
        await asyncio.sleep(PATIENCE)
        yield b""

    async def scenario():
        student = ServedStudent(network_folder / "0.onnx")
        async with contextlib.AsyncExitStack() as stack:
            port, meters = await stack.enter_async_context(serving(student, "127.0.0.1:0"))
            options = [("grpc.use_local_subchannel_pool", 1)]
            channels = [aio.insecure_channel(f"127.0.0.1:{port}", options) for _ in range(3)]
            for channel in channels:
                await stack.enter_async_context(channel)
            calls = [channel.stream_unary(MODEL_INFER)(silent()) for channel in channels for _ in range(3)]
            ended = [asyncio.ensure_future(call.code()) for call in calls]
            await until(lambda: sum(code.done() for code in ended) == 5)
            stub = await stack.enter_async_context(stub_of(f"127.0.0.1:{port}"))
            for _ in range(3):
                assert (await stub.ModelInfer(make_request(CONTRACT, make_image()), timeout=PATIENCE)).outputs
            await until(lambda: sum(code.done() for code in ended) == 6)
            codes = {code.result() for code in ended if code.done()}
            assert codes == {StatusCode.RESOURCE_EXHAUSTED}
            assert meters.rejections._value.get() == sum(code.done() for code in ended) == 6
            for call in calls:
                call.cancel()

    asyncio.run(scenario())


def test_a_message_may_take_as_long_as_its_call_has(network_folder, monkeypatch):
    """By a slow link, a photograph takes longer than a call without a deadline may."""
    monkeypatch.setattr(guard, "MESSAGE_TIMEOUT_S", 0.1)
    request = make_request(CONTRACT, make_image()).SerializeToString()

    async def slowly():
        await asyncio.sleep(0.5)
        yield request

    async def scenario():
        async with (
            serving(ServedStudent(network_folder / "0.onnx"), "127.0.0.1:0", None, []) as (port, _),
            aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            call = channel.stream_unary(MODEL_INFER)
            assert await call(slowly(), timeout=PATIENCE)
            with pytest.raises(aio.AioRpcError, match=r"no message came within 0\.1 s"):
                await call(slowly())

    asyncio.run(scenario())


def test_a_call_that_is_silent_leaves_its_place(network_folder, monkeypatch):
    monkeypatch.setattr(guard, "PROMPT_S", 0.01)

    async def late():
        await spoken.wait()
        yield make_request(CONTRACT, make_image()).SerializeToString()

    spoken = asyncio.Event()

    async def scenario():
        student = ServedStudent(network_folder / "0.onnx")
        async with serving(student, "127.0.0.1:0") as (port, _), aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            student.admission.check = lambda *_: 0.0
            entered = []
            take = student.admission.admitted
            student.admission.admitted = lambda *given: entered.append(given) or take(*given)
            call = asyncio.ensure_future(channel.stream_unary(MODEL_INFER)(late()))
            await until(lambda: bool(entered) and student.admission.waiting == 0)
            spoken.set()
            assert await call

    asyncio.run(scenario())
