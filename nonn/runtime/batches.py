"""Batches: images that wait for the same node share a message.

A message costs its sender and its receiver more than a small student costs the device, so under load images share
messages. An image that comes while few messages are under way is sent at once: with one caller nothing waits. A slow
student gets only as many images in a message as it can answer in a part of the time that is left to the first of them.
A server that takes only one image, such as Triton with an exported student, gets one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import numpy as np
from grpc import StatusCode, aio

from nonn.core.progress import log

#: Messages under way at once: while the answer to one travels, the node computes the other.
PIPELINED = 2
#: Share of the time left that one message may be expected to take, and the weight of the newest measurement in that
#: expectation.
TIME_SHARE, NEWEST = 0.25, 1 / 8

#: An image, the time by which its answer is wanted, and the answer.
Waiting = tuple[np.ndarray, float, "asyncio.Future[np.ndarray]"]


class Batches:
    """The images that wait for one node.

    Parameters
    ----------
    send
        Asks for the features of images, uint8 of shape (k, channels, size, size), by a deadline (event-loop time).
        Returns the features, (k, F_i), or (F_i,) of a single image, and the seconds that it took.
    largest
        Most images of one message.
    name
        Of the node, for the log.
    """

    def __init__(
        self, send: Callable[[np.ndarray, float], Awaitable[tuple[np.ndarray, float]]], largest: int, name: str = "node"
    ):
        self.send, self.largest, self.name = send, largest, name
        self._seconds = 0.0  # that an image takes, there and back; 0 until measured
        self._waiting: deque[Waiting] = deque()
        self._under_way: set[asyncio.Task[None]] = set()

    async def infer(self, image: np.ndarray, deadline: float) -> np.ndarray:
        """Features (F_i,) of an image, or what `send` raises."""
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((image, deadline, answer))
        self._go_on()
        return await answer

    def _room(self) -> int:
        """How many of the images that wait the next message may hold."""
        left = self._waiting[0][1] - asyncio.get_running_loop().time()
        return max(1, min(self.largest, int(TIME_SHARE * left / self._seconds))) if self._seconds else 1

    def _go_on(self) -> None:
        while self._waiting and len(self._under_way) < PIPELINED:
            batch: list[Waiting] = []
            # Where the deadline of the first has passed, that says nothing of the others.
            while self._waiting and self._waiting[0][-1].done():
                self._waiting.popleft()
            room = self._room() if self._waiting else 0
            while self._waiting and len(batch) < room:
                waiting = self._waiting.popleft()
                if not waiting[-1].done():  # cancelled: its caller has given up
                    batch.append(waiting)
            if batch:
                task = asyncio.create_task(self._send(*zip(*batch, strict=True)))
                self._under_way.add(task)
                task.add_done_callback(self._sent)

    async def _send(self, images, deadlines, answers) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            features, seconds = await self.send(np.stack(images), max(deadlines))
        except asyncio.CancelledError:  # the channel has been closed
            for answer in answers:
                answer.cancel()
            raise
        except Exception as error:  # each caller handles it, whatever it is
            code = error.code() if isinstance(error, aio.AioRpcError) else None
            if code == StatusCode.DEADLINE_EXCEEDED:  # it takes longer than that
                self._seconds = max(self._seconds, (loop.time() - start) / len(images))
            if len(images) > 1 and code == StatusCode.INVALID_ARGUMENT:
                log(f"{self.name}: refuses {len(images)} images in one message; it gets one at a time.")
                self.largest = 1
                self._waiting.extendleft(reversed(list(zip(images, deadlines, answers, strict=True))))
                return
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
            return
        taken = seconds / len(images)
        self._seconds += NEWEST * (taken - self._seconds) if self._seconds else taken
        for answer, row in zip(answers, features.reshape(len(images), -1), strict=True):
            if not answer.done():
                answer.set_result(row)

    def close(self) -> None:
        for task in self._under_way:
            task.cancel()

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._go_on()
