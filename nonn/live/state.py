"""The state of a running cluster for the live page: pictures in turn, and devices that can be silenced.

A device is silenced by stopping its process (SIGSTOP), so its connection stays open and no answer comes,
as from a device that hangs. Viewers see how the coordinator handles that: the next images wait for the
deadline, then the breaker opens and they are fast again. When the process continues (SIGCONT), the device
rejoins by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nonn.core.errors import UserError
from nonn.live.pictures import ShownPicture, as_png
from nonn.runtime.cluster import Cluster
from nonn.runtime.coordinator import TOLERATED_FAILURES, Answer, Coordinator, NobodyAnsweredError, NodeConnection
from nonn.runtime.inversion import describe_inversion, looks_inverted
from nonn.runtime.processes import UP, Child

#: Pictures a second at first, and the bounds of a viewer's choice.
RATE, SLOWEST, FASTEST = 1.0, 0.1, 20.0
#: The latest answers, of which the median latency is shown.
RECENT = 100
#: Seconds that nodes have to start before pictures go out without them.
START_TIMEOUT_S = 10.0


@dataclass
class DeviceCard:
    """One node: its process, the coordinator's connection to it, and its part in the last image."""

    child: Child
    connection: NodeConnection | None = None
    silent: bool = False
    absences: int = 0
    reason: str = ""
    share: float | None = None
    features: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def took_part(self, features: np.ndarray, share: float) -> None:
        self.features, self.share, self.reason = [round(float(number), 4) for number in features], share, ""
        if self.connection and self.connection.latency_ms is not None:
            self.recent.append(self.connection.latency_ms)

    def was_absent(self, reason: str) -> None:
        self.features, self.share, self.reason = [], None, reason
        self.absences += 1

    def describe(self) -> dict:
        child, connection = self.child, self.connection
        return {
            "name": child.node.name,
            "model": child.node.model,
            "address": child.node.address,
            "state": child.state,
            "silent": self.silent and not child.has_exited,
            "breaker": "open" if connection and connection.breaker_is_open else "closed",
            "failures_in_a_row": connection.failures if connection else 0,
            "latency_ms": self.recent[-1] if self.recent else None,
            "p50_ms": statistics.median(self.recent) if self.recent else None,
            "requests": child.requests,
            "failures": child.failures,
            "absences": self.absences,
            "reason": self.reason,
            "share": self.share,
            "features": self.features,
        }


class LiveCluster:
    """Shows pictures to a running cluster in turn, without end; `changed` waits for a new `snapshot` of its state."""

    def __init__(self, cluster: Cluster, children: Sequence[Child], pictures: Sequence[ShownPicture]):
        self.cluster, self.pictures = cluster, pictures
        self.manifest, _ = cluster.placed()
        self.devices = {child.node.name: DeviceCard(child) for child in children}
        self.rate, self.held = RATE, False
        self.version = 0
        self._position = 0
        self._sent: ShownPicture | None = None
        self._picture: dict | None = None
        self._prediction: dict | None = None
        self._problem = "the nodes are starting"
        self._changed, self._woken = asyncio.Condition(), asyncio.Event()

    async def run(self) -> None:
        """Show pictures until cancelled; silenced nodes then continue."""
        try:
            await self._publish()
            await self._wait_for_nodes()
            async with Coordinator(self.cluster) as coordinator:
                for connection in coordinator.connections:
                    self.devices[connection.name].connection = connection
                while True:
                    await self._classify(coordinator)
                    await self._publish()
                    await self._pause()
        finally:
            for name in self.devices:
                with contextlib.suppress(UserError):
                    self.silence(name, silent=False)

    async def changed(self, version: int) -> int:
        """Wait until the version of the snapshot is newer than this one; returns it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.version > version)
        return self.version

    def snapshot(self) -> dict:
        return {
            "network": self.cluster.export.resolve().name,
            "deadline_ms": self.cluster.deadline_ms,
            "tolerated_failures": TOLERATED_FAILURES,
            "classes": self.manifest.classes,
            "calibrated": bool(self.manifest.temperatures),
            "border": self.manifest.image.border,
            "rate": self.rate,
            "held": self.held,
            "picture": self._picture,
            "prediction": self._prediction,
            "problem": self._problem,
            "devices": [device.describe() for device in self.devices.values()],
        }

    def silence(self, name: str, silent: bool) -> None:
        """Stop a node's process, or let it go on, and classify the picture again; a `UserError` if it has ended."""
        device = self.devices.get(name)
        if device is None:
            raise UserError(f"there is no node {name[:64]!r}")
        if device.silent == silent:
            return
        if device.child.has_exited:
            raise UserError(f"{name} has exited")
        device.child.process.send_signal(signal.SIGSTOP if silent else signal.SIGCONT)
        device.silent = silent
        self._woken.set()

    def play(self, held: bool | None = None, rate: float | None = None, step: bool = False) -> None:
        """Hold the picture or go on, set the pictures a second, or show the next one now."""
        if step or held is False:
            self._sent = None
        self.held = self.held if held is None else held
        self.rate = self.rate if rate is None else rate
        self._position += step
        self._woken.set()

    def submit(self, picture: ShownPicture) -> None:
        """Show a viewer's picture, and hold it until a viewer asks for the next one."""
        self._sent, self.held = picture, True
        self._woken.set()

    async def _wait_for_nodes(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                while not all(d.child.state == UP or d.child.has_exited for d in self.devices.values()):
                    await asyncio.sleep(0.05)

    async def _pause(self) -> None:
        """Wait until the next picture is due, or a viewer asks for something else."""
        try:
            await asyncio.wait_for(self._woken.wait(), 1 / self.rate)
        except TimeoutError:
            self._position += not self.held
        self._woken.clear()

    async def _classify(self, coordinator: Coordinator) -> None:
        """Read and classify a picture; viewers see what went wrong."""
        number, loop = self._position % len(self.pictures), asyncio.get_running_loop()
        picture = self._sent or self.pictures[number]
        try:
            pixels = await asyncio.to_thread(picture.read)
            place = None if self._sent else f"{number + 1} of {len(self.pictures)}"
            self._picture = {"place": place, "name": picture.name, "truth": picture.truth, "png": as_png(pixels)}
            hint = describe_inversion(self.manifest.image) if looks_inverted(pixels, self.manifest.image) else ""
            self._picture["hint"] = hint
            start = loop.time()
            answer = await coordinator.classify(pixels)
        except NobodyAnsweredError:
            self._prediction, self._problem = None, "no device answered"
            for device in self.devices.values():
                device.was_absent(device.connection.reason if device.connection else "")
        except UserError as error:
            self._prediction, self._problem = None, str(error)
        else:
            self._take_over(answer, (loop.time() - start) * 1000)

    def _take_over(self, answer: Answer, took_ms: float) -> None:
        prediction = answer.prediction
        self._problem = ""
        self._prediction = {
            "label": prediction.label,
            "probability": prediction.probability,
            "probabilities": [round(probability, 5) for probability in prediction.probabilities],
            "present": answer.present,
            "took_ms": took_ms,
        }
        for name, share in zip(answer.present, prediction.shares, strict=True):
            self.devices[name].took_part(answer.features[name], share)
        for name, reason in answer.absent.items():
            self.devices[name].was_absent(reason)

    async def _publish(self) -> None:
        async with self._changed:
            self.version += 1
            self._changed.notify_all()
