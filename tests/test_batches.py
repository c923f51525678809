"""Images that wait for the same node share messages, and nobody waits for company."""

import asyncio

import numpy as np
import pytest
from clusters import CHANNELS, N_FEATURES, PATIENCE, SIZE, make_image, plain_node, refusal, stub_of, two_and, until
from grpc import StatusCode, aio

from nonn.runtime.batches import PIPELINED, Batches
from nonn.runtime.coordinator import TOLERATED_FAILURES
from nonn.runtime.protocol import MAX_BATCH, Contract, make_request, read_response
from nonn.runtime.session import run_onnx


class Recorder:
    """Stands in for a node: answers with each image's mean, when it is let."""

    def __init__(self):
        self.sizes, self.may_answer, self.error = [], asyncio.Event(), None

    async def send(self, images, _deadline):
        self.sizes.append(len(images))
        await self.may_answer.wait()
        if self.error:
            raise self.error
        return images.reshape(len(images), -1).mean(axis=1, keepdims=True), 1e-3


def quick_batches(node):
    """Batches that know the node to be quick, so that images which wait share a message."""
    batches = Batches(node.send, largest=8)
    batches._seconds = 1e-3
    return batches


def picture(value):
    return np.full((CHANNELS, SIZE, SIZE), value, np.uint8)


async def asked(batches, values, seconds=10.0):
    deadline = asyncio.get_running_loop().time() + seconds
    tasks = [asyncio.create_task(batches.infer(picture(value), deadline)) for value in values]
    await asyncio.sleep(0.01)
    return tasks


def test_the_first_are_sent_at_once_and_the_rest_together():
    async def scenario():
        node = Recorder()
        batches = quick_batches(node)
        tasks = await asked(batches, range(PIPELINED + 5))
        assert node.sizes == [1] * PIPELINED
        node.may_answer.set()
        answers = await asyncio.gather(*tasks)
        assert node.sizes == [1] * PIPELINED + [5]
        assert [answer.item() for answer in answers] == list(range(PIPELINED + 5))

    asyncio.run(scenario())


@pytest.mark.parametrize(("seconds_an_image", "size"), [(1e-3, 8), (0.5, 5), (100.0, 1)])
def test_a_slow_node_gets_as_many_as_it_can_answer_in_time(seconds_an_image, size):
    async def scenario():
        node = Recorder()
        batches = Batches(node.send, largest=8)
        tasks = await asked(batches, range(PIPELINED))
        tasks += await asked(batches, range(20), seconds=4 * 5.5 * 0.5)
        batches._seconds = seconds_an_image
        batches._go_on()
        assert batches._room() == size
        batches.close()
        await asyncio.gather(*tasks[:PIPELINED], return_exceptions=True)
        for task in tasks:
            task.cancel()

    asyncio.run(scenario())


def test_an_error_is_that_of_all_in_the_message_and_nobody_else():
    async def scenario():
        node = Recorder()
        batches = quick_batches(node)
        tasks = await asked(batches, range(PIPELINED + 3))
        node.error = ValueError("broken")
        node.may_answer.set()
        assert all(isinstance(e, ValueError) for e in await asyncio.gather(*tasks, return_exceptions=True))
        node.error = None
        (task,) = await asked(batches, [7])
        assert await task == 7

    asyncio.run(scenario())


def test_a_server_that_takes_only_one_image_gets_one():
    class Single(Recorder):
        async def send(self, images, deadline):
            features = await super().send(images, deadline)
            if len(images) > 1:
                raise aio.AioRpcError(StatusCode.INVALID_ARGUMENT, aio.Metadata(), aio.Metadata())
            return features

    async def scenario():
        node = Single()
        batches = quick_batches(node)
        tasks = await asked(batches, range(PIPELINED + 3))
        node.may_answer.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.item() for answer in answers] == list(range(PIPELINED + 3))
        assert node.sizes == [1] * PIPELINED + [3, 1, 1, 1]

    asyncio.run(scenario())


def test_an_image_takes_at_least_as_long_as_was_waited_for_it():
    async def scenario():
        node = Recorder()
        batches = quick_batches(node)
        tasks = await asked(batches, range(PIPELINED))
        await asyncio.sleep(0.1)
        node.error = aio.AioRpcError(StatusCode.DEADLINE_EXCEEDED, aio.Metadata(), aio.Metadata())
        node.may_answer.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert batches._seconds >= 0.1

    asyncio.run(scenario())


def test_a_node_that_comes_back_gets_several_images_again(network_folder, monkeypatch, capfd):
    """What listens at its address may be another server by then."""
    monkeypatch.setattr("nonn.runtime.coordinator.FIRST_PAUSE_S", 0.01)

    async def scenario():
        async with plain_node(network_folder, 2) as (third, _), two_and(network_folder, third) as coordinator:
            connection = coordinator.connections[2]
            largest = connection.batches.largest
            refused = aio.AioRpcError(StatusCode.INVALID_ARGUMENT, aio.Metadata(), aio.Metadata())

            async def refuse(images, _):
                if len(images) > 1:
                    raise refused
                return np.zeros((1, N_FEATURES[2])), 1e-3

            send, connection.batches.send, connection.batches._seconds = connection.batches.send, refuse, 1e-6
            await asyncio.gather(*(coordinator.classify(make_image()) for _ in range(9)))
            assert (largest > 1, connection.batches.largest) == (True, 1)
            connection.batches.send = send
            for _ in range(TOLERATED_FAILURES):
                connection.failed("imagined")
            await until(lambda: not connection.breaker_is_open)
            assert connection.batches.largest == largest

    asyncio.run(scenario())
    assert "node-2: refuses" in capfd.readouterr().err


def test_who_has_given_up_is_not_sent():
    async def scenario():
        node = Recorder()
        batches = quick_batches(node)
        tasks = await asked(batches, range(PIPELINED + 3))
        tasks[-1].cancel()
        await asyncio.sleep(0.01)
        node.may_answer.set()
        await asyncio.gather(*tasks[:-1])
        assert node.sizes == [1] * PIPELINED + [2]

    asyncio.run(scenario())


def test_time_that_is_up_for_one_who_has_left_takes_none_from_the_others():
    async def scenario():
        node = Recorder()
        batches = quick_batches(node)
        first = await asked(batches, range(PIPELINED))
        (gone,) = await asked(batches, [7], seconds=-1.0)
        rest = await asked(batches, range(4))
        gone.cancel()
        await asyncio.sleep(0.01)
        node.may_answer.set()
        await asyncio.gather(*first, *rest)
        assert node.sizes == [1] * PIPELINED + [4]

    asyncio.run(scenario())


def test_a_node_answers_several_images_as_it_would_each(network_folder):
    images = np.stack([make_image(i) for i in range(3)])
    batched = Contract("0", CHANNELS, SIZE, N_FEATURES[0], largest_batch=3)

    async def scenario():
        async with plain_node(network_folder) as (address, _), stub_of(address) as stub:
            request = make_request(batched, images)
            answer = await stub.ModelInfer(request, timeout=PATIENCE)
            version = answer.model_version
            contract = Contract("0", CHANNELS, SIZE, N_FEATURES[0], version=version, largest_batch=3)
            features = read_response(contract, answer, n_images=3)
            np.testing.assert_array_equal(features, run_onnx(network_folder / "0.onnx", images))
            too_many = make_request(batched, np.zeros((MAX_BATCH + 1, CHANNELS, SIZE, SIZE), np.uint8))
            status, details = await refusal(stub.ModelInfer(too_many, timeout=PATIENCE))
            assert "expected the shape" in details
            assert status.name == "INVALID_ARGUMENT"
            request.raw_input_contents[0] = images[:2].tobytes()
            assert "expected 48 bytes, not 32" in (await refusal(stub.ModelInfer(request, timeout=PATIENCE)))[1]

    asyncio.run(scenario())
