"""One measurement of devices that work together: timed at the coordinator, counted at the network interfaces.

`measure` starts this module as a process on the coordinator's host of a `nonn.testbed.emulation` network.
That process starts the devices on their hosts, warms up, and waits for permission to start and to end, so
that only the bytes of the timed images are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nonn.core.errors import UserError
from nonn.core.names import COORDINATOR
from nonn.runtime.attached import ending_with_parent
from nonn.runtime.cluster import Cluster, Node, Tls
from nonn.runtime.coordinator import Coordinator, NobodyAnsweredError
from nonn.runtime.exported import Record, read_manifest
from nonn.runtime.processes import node_commands, running
from nonn.runtime.tls import Identity
from nonn.split.coordinator import SplitCoordinator, device_commands
from nonn.split.plan import SplitPlan
from nonn.testbed.echo import tcp_echoes
from nonn.testbed.emulation import Counters, EmulatedNetwork

#: Port of every device on its host.
PORT = 7100
DEADLINE_MS = 60_000.0
#: Images before the timed ones: connections, allocations, and TCP windows settle.
WARMUP = 20
#: Seconds after which no further one of them is sent, and seconds between attempts to reach all devices.
LONGEST_WARMUP, PAUSE_S = 2.0, 0.2
#: Fewest images to time, however long they take.
FEWEST = 2
#: Seconds for starting the devices, warming up and finishing the last image.
SLACK = 240.0

#: What is sent for one image: to each device the index of an image that it has (sensor) or the image itself
#: (broadcast), or an echo of so many bytes there and back.
Scenario = Literal["sensor", "broadcast"]
Dialogue = Scenario | tuple[int, int]
Ask = Callable[[Any], Awaitable[int]]  # sends one input of an exchange; returns the number of devices that took part


class Trial(Record):
    """The settings of a measurement, which go to the process as JSON."""

    method: Literal["nonn", "split", "echo"]  # split: one network over the devices; echo: the link alone
    exchanges: list[Dialogue]  # timed one after the other, with the same running devices
    folder: Path  # the exported network, or the plan of the split
    names: list[str]  # of each device
    addresses: list[str]  # ``host:port``
    prefixes: list[list[str]]  # command that runs each device's process on its host
    certificates: Path  # folder with those of the devices and of the coordinator
    sensor: Path  # a ``.npy`` file of images (n, channels, size, size), uint8, that each device holds
    runs: int  # images to time
    seconds: float  # after which no further one is begun


@dataclass(frozen=True)
class Measured:
    """The results of a trial."""

    latencies_ms: np.ndarray  # (images,)
    absent: int  # answers that did not come in time, over all images
    traffic: dict[str, Counters]  # of each host during these images; empty on loopback, where nothing is counted

    def wire_bytes(self) -> float | None:
        """Bytes of IP packets on the link for one image, of all senders."""
        if not self.traffic:
            return None
        return sum(counters.sent_bytes for counters in self.traffic.values()) / len(self.latencies_ms)


@contextlib.asynccontextmanager
async def running_network(trial: Trial) -> AsyncIterator[Ask]:
    """A network of networks: its nodes on their hosts, asked by a coordinator on this one."""
    devices = zip(trial.names, trial.addresses, read_manifest(trial.folder).students, strict=True)
    nodes = [Node(name=name, address=address, model=student.model) for name, address, student in devices]
    tls = Tls(folder=trial.certificates)
    cluster = Cluster(export=trial.folder, deadline_ms=DEADLINE_MS, tls=tls, sensor=trial.sensor, nodes=nodes)

    async def ask(image: np.ndarray | np.integer) -> int:
        return len((await coordinator.classify(image)).present)

    async with running(node_commands(cluster, trial.prefixes)), Coordinator(cluster) as coordinator:
        yield ask


@contextlib.asynccontextmanager
async def running_split(trial: Trial) -> AsyncIterator[Ask]:
    """One network split over its devices, asked by its coordinator on this host."""
    plan, identity = SplitPlan.load(trial.folder), Identity.of(COORDINATOR, trial.certificates)

    async def ask(image: np.ndarray | np.integer) -> int:
        await coordinator.classify(image)
        return plan.n_devices

    commands = device_commands(trial.folder, trial.addresses, trial.certificates, trial.prefixes, trial.sensor)
    async with running(commands), SplitCoordinator(plan, trial.addresses, DEADLINE_MS, identity) as coordinator:
        yield ask


def running_echo(trial: Trial) -> AbstractAsyncContextManager[Ask]:
    return tcp_echoes(trial.addresses, trial.prefixes)


OPENERS = {"nonn": running_network, "split": running_split, "echo": running_echo}


def inputs_of(exchange: Dialogue, images: np.ndarray) -> Sequence | np.ndarray:
    """What is asked in turns."""
    if exchange == "sensor":
        return np.arange(len(images))
    return images if exchange == "broadcast" else [exchange]


async def warm_up(ask: Ask, inputs: Sequence | np.ndarray, n_devices: int) -> None:
    """Ask until all devices take part, since handshakes take seconds on a slow link, and a few times more."""
    while True:
        with contextlib.suppress(NobodyAnsweredError):
            if await ask(inputs[0]) == n_devices:
                break
        await asyncio.sleep(PAUSE_S)
    begin = time.monotonic()
    for number in range(WARMUP):
        await ask(inputs[number % len(inputs)])
        if time.monotonic() - begin > LONGEST_WARMUP:
            break


async def carry_out(trial: Trial) -> None:
    """Measure each exchange, in step with the process that counts: ready - go - result - enough."""
    images = np.load(trial.sensor)
    async with OPENERS[trial.method](trial) as ask:
        for exchange in trial.exchanges:
            inputs = inputs_of(exchange, images)
            await warm_up(ask, inputs, len(trial.addresses))
            print("ready", flush=True)
            sys.stdin.readline()
            print(json.dumps(await time_images(ask, inputs, trial)), flush=True)
            sys.stdin.readline()


async def time_images(ask: Ask, inputs: Sequence | np.ndarray, trial: Trial) -> dict[str, Any]:
    latencies: list[float] = []
    absent, end = 0, time.monotonic() + trial.seconds
    while len(latencies) < trial.runs and (len(latencies) < FEWEST or time.monotonic() < end):
        start = time.perf_counter()
        present = await ask(inputs[len(latencies) % len(inputs)])
        latencies.append(1e3 * (time.perf_counter() - start))
        absent += len(trial.addresses) - present
    return {"latencies_ms": latencies, "absent": absent}


def measure(trial: Trial, network: EmulatedNetwork) -> list[Measured]:
    """Carry out a trial from the coordinator's host of a network, and count what each exchange sends.

    Raises
    ------
    UserError
        It failed, or took far longer than it was given.
    """
    command = ending_with_parent([*network.prefix(COORDINATOR), sys.executable, "-m", "nonn.testbed.trial"])
    watchdog = threading.Timer(len(trial.exchanges) * trial.seconds + SLACK, lambda: process.kill())
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            watchdog.start()
            try:
                _say(process, trial.model_dump_json())
                return [_count(process, trial, network) for _ in trial.exchanges]
            except KeyboardInterrupt:
                process.kill()  # its devices end when it has
                raise
    except BrokenPipeError:
        raise _failure(trial) from None
    finally:
        watchdog.cancel()


def _count(process: subprocess.Popen, trial: Trial, network: EmulatedNetwork) -> Measured:
    _hear(process, trial)
    before = network.counters()
    _say(process, "go")
    result = json.loads(_hear(process, trial))
    after = network.counters()
    _say(process, "enough")
    traffic = {host: after[host] - before[host] for host in after}
    return Measured(np.array(result["latencies_ms"]), result["absent"], traffic)


def _say(process: subprocess.Popen, line: str) -> None:
    assert process.stdin is not None  # a pipe
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen, trial: Trial) -> str:
    assert process.stdout is not None  # a pipe
    if not (line := process.stdout.readline()):
        raise _failure(trial)
    return line


def _failure(trial: Trial) -> UserError:
    return UserError(f"measuring {trial.method} on {len(trial.names)} devices failed; its messages stand above.")


if __name__ == "__main__":
    try:
        asyncio.run(carry_out(Trial.model_validate_json(sys.stdin.readline())))
    except UserError as error:
        sys.exit(str(error))
