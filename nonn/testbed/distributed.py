"""A network on its devices, against one network split over the same devices.

Two kinds of results, kept apart:

live
    Every device is a process, all run at once over an emulated link: real messages over real sockets.
    Each is held on one core of this machine, in turns. Latencies, bytes on the wire and absences are
    what happened. On a machine with fewer cores than devices the processes wait for each other, which
    real devices would not.
composed
    The computing of each device alone on one pinned core (or from its multiply-accumulates, for a
    board that cannot be measured here), the time on the link from the bytes that were counted live:
    round by round, the slowest device's computing + the link, then the final layer. Energy follows.

Methods: ``nonn``; ``channels`` and ``rows``, the student of the network's total budget split over the devices by output
channels (an all-gather after each convolution) or by rows (halo exchange); ``teacher`` and ``kd`` on a single device;
``reference_channels`` and ``reference_rows``, another network split in the same ways, composed only, as are the further
boards of `nonn.testbed.placing`. Scenarios: every device has a ``sensor`` of its own, or the coordinator sends the
image to each (``broadcast``).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nonn.core.links import IP_HEADER, PRESETS, TCP_HEADER
from nonn.core.names import COORDINATOR
from nonn.core.params import DistributedParams
from nonn.core.progress import log, track
from nonn.runtime.certs import write_certificates
from nonn.runtime.exported import read_manifest
from nonn.testbed.composed import compose, payload_bytes
from nonn.testbed.deployments import Deployment
from nonn.testbed.emulation import EmulatedNetwork, emulated_network, missing_privileges
from nonn.testbed.trial import PORT, Dialogue, Measured, Scenario, Trial, measure

#: Name of the absence of a link: all devices on this machine, nothing delayed.
LOOPBACK = "loopback"
#: Bytes of a message's framing, where it cannot be counted.
FRAMING = 200
#: Images that each device of a test bed and the coordinator have.
N_IMAGES = 16
SCENARIOS: tuple[Scenario, ...] = ("sensor", "broadcast")


def describe_traffic(measured: Measured) -> dict[str, Any]:
    """Bytes and packets on the wire for one image; None on loopback, where nothing is counted."""
    if not measured.traffic:
        return dict.fromkeys(("wire_bytes", "wire_packets", "device_bytes"))
    images, counters = len(measured.latencies_ms), measured.traffic
    devices = [c for host, c in counters.items() if host != COORDINATOR]
    return {
        "wire_bytes": measured.wire_bytes(),
        "wire_packets": sum(c.sent_packets for c in counters.values()) / images,
        "device_bytes": max(c.sent_bytes + c.received_bytes for c in devices) / images,
    }


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def on_one_core(position: int) -> list[str]:
    """What to put before a device's command so that it has one core, as most small devices have; Linux only.

    Its threads then wake each other where they are: across the cores of a virtual machine every such
    call is a matter for the hypervisor.
    """
    if not shutil.which("taskset"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "--cpu-list", str(cores[position % len(cores)])]


class TrialBed:
    """Where trials take place: certificates, images (channels, size, size), and hosts on one link after another."""

    def __init__(self, scratch: Path, params: DistributedParams, image_shape: tuple[int, ...]):
        self.scratch, self.certificates, self.params = scratch, scratch / "certificates", params
        self.image_shape = image_shape
        self.named: set[str] = set()

    def sensor(self, deployment: Deployment) -> Path:
        """File of random images for the devices of a deployment; a teacher may take larger ones than students."""
        shape = self.image_shape
        if not deployment.is_split:
            shape = read_manifest(deployment.folder).image.shape
        path = self.scratch / f"images-{shape[-1]}.npy"
        if not path.exists():
            content = io.BytesIO()  # NumPy does not say why a file cannot be written
            np.save(content, np.random.default_rng(0).integers(0, 256, (N_IMAGES, *shape), dtype=np.uint8))
            path.write_bytes(content.getvalue())
        return path

    def measure(
        self, deployment: Deployment, network: EmulatedNetwork, exchanges: Sequence[Dialogue], is_echo: bool = False
    ) -> list[Measured]:
        """Time a deployment's images on the hosts of a network in each exchange, or plain echoes."""
        hosts = network.hosts[1 : 1 + deployment.workload.n_devices]
        prefix = "device" if deployment.is_split else "node"
        names = [f"{prefix}-{position}" for position in range(len(hosts))]
        if missing := {COORDINATOR, *names} - self.named:
            write_certificates(self.certificates, sorted(missing))
            self.named |= missing
        # On loopback all hosts have one address, and share it with whatever else runs on this machine.
        ports = [PORT] * len(hosts) if network.is_emulated else free_ports(len(hosts))
        trial = Trial(
            method="echo" if is_echo else "split" if deployment.is_split else "nonn",
            exchanges=list(exchanges),
            folder=deployment.folder.resolve(),
            names=names,
            addresses=[f"{network.address(host)}:{port}" for host, port in zip(hosts, ports, strict=True)],
            prefixes=[[*network.prefix(host), *on_one_core(i)] for i, host in enumerate(hosts)],
            certificates=self.certificates.resolve(),
            sensor=self.sensor(deployment).resolve(),
            runs=self.params.images,
            seconds=self.params.seconds,
        )
        return measure(trial, network)


def echo_sizes(deployment: Deployment, scenario: Scenario, measured: Measured, node: str) -> tuple[int, int]:
    """Bytes of a request to the host `node` and its answer, without headers of TCP and IP: as counted, or expected."""
    if not measured.traffic:
        asked = deployment.workload.request_bytes(scenario) + FRAMING
        return round(asked), round(max(deployment.workload.answer_bytes) + FRAMING)
    images, counters, headers = len(measured.latencies_ms), measured.traffic[node], IP_HEADER + TCP_HEADER
    asked = (counters.received_bytes - headers * counters.received_packets) / images
    answered = (counters.sent_bytes - headers * counters.sent_packets) / images
    return round(asked), round(answered)


def overhead(deployment: Deployment, measured: Measured, echo: Measured) -> dict[str, float]:
    """What coordinator and nodes add to the slowest node's inference and the link's round trip.

    The round trip is that of plain TCP messages of the same sizes, of all devices at once.
    """
    ideal = 1e3 * deployment.workload.seconds.max() + float(np.median(echo.latencies_ms))
    total = float(np.median(measured.latencies_ms))
    return {"ideal_ms": ideal, "overhead_ms": total - ideal, "ideal_over_total": ideal / total}


def measure_live(deployments: Sequence[Deployment], bed: TrialBed, params: DistributedParams) -> list[dict]:
    """Time every deployment on every link: one row each.

    On loopback first, where a network of networks shows what its coordinator and nodes take; then the
    fastest link, since there the bytes are counted that tell whether a slower one would take longer
    than `params.longest` an image: then the row says so instead. Where links cannot be emulated,
    everything runs on loopback and there alone.
    """
    n_devices = max(deployment.workload.n_devices for deployment in deployments)
    hosts = (COORDINATOR, *(f"host-{position}" for position in range(n_devices)))
    if reason := missing_privileges():
        log(f"note: {reason}. Measuring on loopback only, without any link's rate and delay.")
        deployments_on = {LOOPBACK: deployments}
    else:
        deployments_on = {LOOPBACK: [deployment for deployment in deployments if deployment.method == "nonn"]}
        deployments_on |= dict.fromkeys(sorted(params.links, key=lambda name: -PRESETS[name].rate_bps), deployments)
    rows: list[dict] = []
    progress = iter(track(range(sum(map(len, deployments_on.values()))), "distributed"))
    for name, measured_there in deployments_on.items():
        link = PRESETS.get(name)
        with emulated_network(hosts, link) if link else contextlib.nullcontext(EmulatedNetwork(hosts)) as network:
            for deployment in measured_there:
                next(progress)
                rows += [row | {"link": name} for row in measure_deployment(deployment, bed, network, rows)]
    next(progress, None)
    return rows


def measure_deployment(
    deployment: Deployment, bed: TrialBed, network: EmulatedNetwork, live: Sequence[Mapping]
) -> list[dict[str, Any]]:
    """A row for each scenario of one deployment on one link; `live` are the rows so far.

    With latencies, absences and traffic, and of a network of networks its overhead. Where an image would take too long,
    with what it is expected to take.
    """
    expected = {scenario: expected_ms(deployment, scenario, network, live, bed.params) for scenario in SCENARIOS}
    if deployment.is_split:
        del expected["broadcast"]  # the same after one more round, which `compose` adds
    timed = [scenario for scenario, ms in expected.items() if ms <= 1e3 * bed.params.longest]
    found = dict(zip(timed, bed.measure(deployment, network, timed), strict=True)) if timed else {}
    echoes = {}
    if deployment.method == "nonn" and timed:
        sizes = [echo_sizes(deployment, scenario, found[scenario], network.hosts[1]) for scenario in timed]
        echoes = dict(zip(timed, bed.measure(deployment, network, sizes, is_echo=True), strict=True))
    rows = []
    for scenario, ms in expected.items():
        row: dict[str, Any] = {"method": deployment.method, "scenario": scenario}
        if scenario in found:
            row |= describe(deployment, scenario, found[scenario], network.is_emulated)
        else:
            row |= {"images": 0, "expected_ms": ms}
        if scenario in echoes:
            row |= overhead(deployment, found[scenario], echoes[scenario])
        rows.append(row)
    return rows


def expected_ms(
    deployment: Deployment,
    scenario: Scenario,
    network: EmulatedNetwork,
    live: Sequence[Mapping],
    params: DistributedParams,
) -> float:
    """Milliseconds of an image on the link, from the bytes counted so far; 0 on loopback."""
    if not network.link:
        return 0.0
    framing = framing_of(deployment, scenario, live)
    return compose(deployment.workload, network.link, scenario, framing, 0.0, params)["link_ms"]


def describe(deployment: Deployment, scenario: Scenario, measured: Measured, is_emulated: bool) -> dict[str, Any]:
    """Latencies, absences and traffic."""
    p50, p95, p99 = np.percentile(measured.latencies_ms, [50, 95, 99])
    row: dict[str, Any] = {"emulated": is_emulated, "absent": measured.absent}
    row |= {"images": len(measured.latencies_ms), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}
    row |= describe_traffic(measured)
    if measured.traffic:
        row["framing"] = row["wire_bytes"] / payload_bytes(deployment.workload.transfers(scenario))
    return row


def framing_of(deployment: Deployment, scenario: str, live: Sequence[Mapping]) -> float:
    """Bytes on the wire for each byte of payload, counted on the fastest link.

    Of the deployment itself, or what it is like, if it ran in this scenario, else in another, else of the same kind of
    split; 1 if nothing was counted, which favours deployments of many small messages.
    """
    kind = deployment.like or deployment.method.removeprefix("reference_")
    rows = [row for row in live if row["method"] == kind and row.get("framing")]
    rows.sort(key=lambda row: row["scenario"] != scenario)  # stable: the fastest link stays first
    return rows[0]["framing"] if rows else 1.0


def compose_all(
    deployments: Sequence[Deployment], live: Sequence[Mapping], params: DistributedParams
) -> Iterator[dict]:
    """A row for every deployment, link and scenario."""
    for deployment in deployments:
        workload = deployment.workload
        about = {"method": deployment.method, "n_devices": workload.n_devices, "rounds": len(workload.payload)}
        about |= {"memory_bytes": workload.memory_bytes, "macs": int(workload.macs.sum(axis=0).max())}
        for link in params.links:
            if workload.sent_once and not PRESETS[link].shared:
                continue
            for scenario in SCENARIOS:
                framing = framing_of(deployment, scenario, live)
                composed = compose(workload, PRESETS[link], scenario, framing, deployment.final_s, params)
                yield about | {"link": link, "scenario": scenario, "framing": framing} | composed
