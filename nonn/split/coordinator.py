"""The coordinator of a split network, and the commands of its devices.

Unlike a NoNN, a split network needs every device for every image: if one is missing there is no
answer at all, only an error that says which.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nonn.core.errors import UserError
from nonn.core.names import COORDINATOR
from nonn.runtime.channel import LATE, open_channel, reason_of, wait_all_connected
from nonn.runtime.cluster import LONGEST_DEADLINE_MS, Node
from nonn.runtime.coordinator import NodeConnection
from nonn.runtime.processes import nonn_command
from nonn.runtime.protocol import check_image
from nonn.runtime.tls import Identity
from nonn.split.node import REPORTING_S, SUPERSEDED, devices_at
from nonn.split.plan import SplitPlan


class SplitFailedError(UserError):
    """An image without an answer: a device is missing, late or has failed."""


class SplitCoordinator:
    """Classifies images with the devices of a split network, at ``host:port`` by position; use it in ``async with``.

    Raises
    ------
    UserError
        There are not as many addresses as devices, or the deadline is impossible.
    """

    def __init__(self, plan: SplitPlan, addresses: Sequence[str], deadline_ms: float, identity: Identity | None = None):
        if len(addresses) != plan.n_devices:
            raise UserError(f"the plan is for {plan.n_devices} devices, not {len(addresses)}")
        if not 0 < deadline_ms <= LONGEST_DEADLINE_MS:
            raise UserError(f"a deadline of {deadline_ms:g} ms is not in reach; give up to {LONGEST_DEADLINE_MS}")
        self.plan, self.nodes, self.identity = plan, devices_at(addresses), identity
        self.timeout = deadline_ms / 1000
        self.connections: list[NodeConnection] = []
        # Unique, since devices keep slices that arrive before their image.
        self._ids = (f"{secrets.token_hex(6)}-{count}" for count in itertools.count())
        self._one_at_a_time = asyncio.Lock()

    async def __aenter__(self) -> SplitCoordinator:
        for node, part in zip(self.nodes, self.plan.parts, strict=True):
            channel = open_channel(node, part.message_limit, self.identity)
            self.connections.append(NodeConnection(node, part.contract, channel, self.timeout))
        await wait_all_connected(connection.channel for connection in self.connections)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(connection.close() for connection in self.connections))
        self.connections = []

    async def classify(self, image: np.ndarray | np.integer) -> np.ndarray:
        """Logits (C,) of an image, uint8 (channels, size, size), or the sensor image with that index, by the deadline.

        An index is for devices with sensors of their own; see `nonn.runtime.sensor`.

        Raises
        ------
        SplitFailedError
            Names the devices that did not answer, or the errors of those that did.
        ValueError
            The image is of another type or shape.
        """
        check_image(self.plan.parts[0].contract, image)
        async with self._one_at_a_time:
            return self.plan.logits(await self._collect(image))

    async def _collect(self, image: np.ndarray | np.integer) -> list[np.ndarray]:
        """Features of all devices, each of shape (F_d,)."""
        image_id, seconds = next(self._ids), self.timeout + REPORTING_S
        calls = [asyncio.create_task(connection.infer(image, seconds, image_id)) for connection in self.connections]
        try:
            # One failed device fails the image, so the others are not waited for.
            _, late = await asyncio.wait(calls, timeout=self.timeout, return_when=asyncio.FIRST_EXCEPTION)
            failed = any(call.done() and call.exception() for call in calls)
            if not late and not failed:
                return [call.result() for call in calls]
            if not failed:
                await asyncio.wait(late, timeout=REPORTING_S)  # now they say which peers they have waited for
            reasons = {
                node.name: reason_of(failure) if call.done() and (failure := call.exception()) else LATE
                for node, call in zip(self.nodes, calls, strict=True)
                if (call in late and not failed) or (call.done() and call.exception())
            }
        finally:
            for call in calls:
                call.cancel()  # no effect on those that are done
        # Silent devices first: the others may only have waited for them.
        names = sorted(reasons, key=lambda name: reasons[name] != LATE)
        complaints = "; ".join(f"{name}: {reasons[name]}" for name in names)
        remedy = "A split network needs all its devices: start them again."
        if all(SUPERSEDED in reason for reason in reasons.values()):
            remedy = "It works on one image at a time: ask it by a single coordinator."
        raise SplitFailedError(f"no class ({complaints}). {remedy}")


def device_commands(
    folder: Path,
    addresses: Sequence[str],
    certificates: Path | None = None,
    prefixes: Iterable[Sequence[str]] = (),
    sensor: Path | None = None,
) -> dict[Node, list[str]]:
    """Commands that serve the devices of a plan in `folder`; see `nonn.runtime.processes.node_commands`.

    Devices are ready once they have reached each other. The certificates are those of the coordinator and of
    ``device-<position>``; without them all is plain text.
    """
    commands = {}
    for node, prefix in zip(devices_at(addresses), itertools.chain(prefixes, itertools.repeat(())), strict=False):
        arguments = ("split-node", str(folder / node.model), "--devices", *addresses)
        identity = Identity.of(node.name, certificates) if certificates else None
        commands[node] = [*prefix, *nonn_command(*arguments, identity=identity, caller=COORDINATOR, sensor=sensor)]
    return commands
