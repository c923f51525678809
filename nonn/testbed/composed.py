"""What an image costs devices that work together, composed of its parts: each device's computing and the link.

The stage `distributed` uses it for what cannot be timed here: devices on their own boards. Everything
is calculated, from parts that were measured alone and from counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession

from nonn.core.boards import Board, find_board
from nonn.core.cost import memory_bytes
from nonn.core.energy import compute_seconds, inference_energy
from nonn.core.links import Link, Transfers, link_seconds
from nonn.core.names import COORDINATOR
from nonn.core.params import DistributedParams, Precision
from nonn.core.system import pinned_to
from nonn.runtime.exported import read_manifest
from nonn.split.plan import SplitPlan, open_sessions, run_in_process

#: Images whose computing is timed segment by segment.
COMPUTE_RUNS = 50


@dataclass(frozen=True)
class Workload:
    """The costs of one image on the devices of a deployment, apart from the link; bytes without framing."""

    seconds: np.ndarray  # (rounds, N), of computing, measured alone on one core of this machine
    macs: np.ndarray  # (rounds, N)
    memory_bytes: int  # weights and activations of the device that needs most
    payload: Sequence[Transfers]  # what devices send each other after each round but the last
    image_bytes: float  # what one device gets in broadcast
    answer_bytes: Sequence[float]  # what each device sends the coordinator
    precision: Precision = "float32"  # of the calculation; a board without a measurement is charged by it
    boards: Sequence[Board] | None = None  # of the devices; None: all are `distributed.board`
    sent_once: bool = False  # on a shared medium all devices hear what one sends

    @property
    def n_devices(self) -> int:
        return self.seconds.shape[1]

    def request_bytes(self, scenario: str) -> float:
        """Bytes of the request to one device: the image, or the index of a sensor image."""
        return self.image_bytes if scenario == "broadcast" else 8.0

    def transfers(self, scenario: str) -> list[Transfers]:
        """Everything that is sent for one image, in order: the request, the exchanges, the answers."""
        devices = [str(device) for device in range(self.n_devices)]
        request = {(COORDINATOR, device): self.request_bytes(scenario) for device in devices}
        answer = {(device, COORDINATOR): sent for device, sent in zip(devices, self.answer_bytes, strict=True)}
        return [request, *self.payload, answer]

    def on_the_air(self, sent: Transfers) -> Transfers:
        """The transmissions by which every device gets its part: if `sent_once`, each sender's largest alone."""
        if not self.sent_once:
            return sent
        return {(sender, "all"): max(n for (other, _), n in sent.items() if other == sender) for sender, _ in sent}


def payload_bytes(transfers: Sequence[Transfers]) -> float:
    return sum(sum(sent.values()) for sent in transfers)


def compose(
    workload: Workload, link: Link, scenario: str, framing: float, final_s: float, params: DistributedParams
) -> dict[str, Any]:
    """Latency and energy of one image, from each part alone.

    Parameters
    ----------
    framing : float
        Bytes on the wire for each byte of payload, as counted live.
    final_s : float
        Seconds of the final layer.

    Returns
    -------
    dict
        Milliseconds, bytes and millijoules: ``compute_ms`` (of the slowest device, round by round),
        ``link_ms``, ``final_ms``, ``total_ms``; ``wire_bytes``; for the device that needs most, and for
        all together, ``energy_node_mj`` and ``energy_total_mj``, each ``[low, high]``: what the image adds. The same
        with what a device draws anyway while it computes, ``…_computing_mj``, or until the answer,
        ``…_with_idle_mj``. There is no energy where the power of a board is not known. ``boards`` names the devices'
        boards, and ``precision`` is the one that they calculate in.
    """
    boards = workload.boards or [find_board(params.board).for_composing(workload.precision)] * workload.n_devices
    compute = _compute_times(workload, boards, params.slowdown)
    transfers = workload.transfers(scenario)
    transmitted = [workload.on_the_air(sent) for sent in transfers]
    on_link = sum(link_seconds(link, {pair: size * framing for pair, size in sent.items()}) for sent in transmitted)
    computing = compute.max(axis=1).sum()
    total = computing + on_link + final_s
    traffic = _traffic(transmitted, transfers, workload.n_devices, framing)
    return {
        "precision": workload.precision,
        "boards": [board.name for board in boards],
        "compute_ms": 1e3 * computing,
        "link_ms": 1e3 * on_link,
        "final_ms": 1e3 * final_s,
        "total_ms": 1e3 * total,
        "wire_bytes": framing * payload_bytes(transmitted),
        **_energies(boards, compute.sum(axis=0), traffic, total),
    }


def _compute_times(workload: Workload, boards: Sequence[Board], slowdown: float) -> np.ndarray:
    """Seconds of computing, of shape (rounds, N)."""
    rounds = zip(workload.macs, workload.seconds, strict=True)
    times = [
        [compute_seconds(*device, slowdown) for device in zip(boards, macs, seconds, strict=True)]
        for macs, seconds in rounds
    ]
    return np.array(times, float)


def _traffic(
    transmitted: Sequence[Transfers], transfers: Sequence[Transfers], n_devices: int, framing: float
) -> list[float]:
    """Bytes on the wire that each device transmits and receives."""
    return [
        framing
        * (
            sum(n for sent in transmitted for (sender, _), n in sent.items() if sender == device)
            + sum(n for sent in transfers for (_, receiver), n in sent.items() if receiver == device)
        )
        for device in map(str, range(n_devices))
    ]


def _energies(
    boards: Sequence[Board], compute_s: np.ndarray, traffic: Sequence[float], total_s: float
) -> dict[str, list[float]]:
    """The energies of `compose`, from the computing (N,) and the traffic of each device, and the time of the image."""
    energies: dict[str, list[float]] = {}
    if any(board.active_w is None for board in boards):
        return energies
    for suffix, idle in (("", 0 * compute_s), ("_computing", compute_s), ("_with_idle", total_s + 0 * compute_s)):
        devices = [inference_energy(*device) for device in zip(boards, compute_s, idle, traffic, strict=True)]
        worst = max(devices, key=lambda energy: energy.high)
        energies[f"energy_node{suffix}_mj"] = [1e3 * worst.low, 1e3 * worst.high]
        energies[f"energy_total{suffix}_mj"] = [1e3 * sum(e.low for e in devices), 1e3 * sum(e.high for e in devices)]
    return energies


def network_workload(export: Path, benchmark: Mapping, precision: Precision) -> Workload:
    """What one image costs the devices of an exported network, each as `nonn.testbed.latency` measured it alone."""
    manifest = read_manifest(export)
    students = [benchmark[student.model] for student in manifest.students]
    image = manifest.image
    return Workload(
        seconds=np.array([[student["latency_p50_ms"] / 1e3 for student in students]]),
        macs=np.array([[student["macs"] for student in students]]),
        memory_bytes=max(map(memory_bytes, students)),
        payload=[],
        image_bytes=image.channels * image.size**2,
        answer_bytes=[4 * student.n_features for student in manifest.students],
        precision=precision,
    )


def split_workload(plan: SplitPlan, core: int) -> Workload:
    """What one image costs the devices of a split network; each segment timed on one pinned core.

    Activations are counted as the inputs and outputs of a device's largest segment: what lives in
    between is left out, in favour of the split.
    """
    image = plan.parts[0].image
    pixels = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    sessions = [open_sessions(models) for models in plan.models]
    with pinned_to(core):
        runs = [run_in_process(plan, pixels, sessions).seconds for _ in range(COMPUTE_RUNS)]
    payload: list[Counter[tuple[str, str]]] = [Counter() for _ in range(plan.rounds)]
    for message in plan.messages:
        payload[message.round][str(message.sender), str(message.receiver)] += message.n_bytes

    def activations(session: InferenceSession) -> int:
        values = [*session.get_inputs(), *session.get_outputs()]
        return sum(math.prod(value.shape) * (1 if value.type == "tensor(uint8)" else 4) for value in values)

    largest = [max((activations(session) for session in device if session), default=0) for device in sessions]
    return Workload(
        seconds=np.median(runs, axis=0).T,
        macs=np.array([[segment.macs if segment else 0 for segment in part.segments] for part in plan.parts]).T,
        memory_bytes=max(part.weight_bytes + n_bytes for part, n_bytes in zip(plan.parts, largest, strict=True)),
        payload=payload,
        image_bytes=image.channels * image.size**2,
        answer_bytes=[4 * part.n_features for part in plan.parts],
        precision=plan.precision,
    )
