"""Stage `distributed`: a network on its devices, against one network split over the same devices.

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

Methods: ``nonn``; ``channels`` and ``rows``, the student of the network's total budget split over the
devices by output channels (an all-gather after each convolution) or by rows (halo exchange); ``teacher``
and ``kd`` on a single device; ``reference_channels`` and ``reference_rows``, another network split in the
same ways, composed only. Scenarios: every device has a ``sensor`` of its own, or the coordinator sends
the image to each (``broadcast``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import timeit
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import save_file

from nonn.benchmark import describe_system
from nonn.composed import Load, compose, load_of_network, load_of_split, payload_bytes
from nonn.files import read_json, sha256_of, write_json
from nonn.params import SOLO, Distributed, Params
from nonn.paths import Paths
from nonn.progress import log, track
from nonn.runtime.certs import write_certificates
from nonn.runtime.cluster import COORDINATOR
from nonn.runtime.exported import read_manifest
from nonn.runtime.final import FinalLayer
from nonn.runtime.links import PRESETS, Network, emulated_network, missing_privileges
from nonn.runtime.split import plan_split
from nonn.runtime.trial import PORT, Measured, Trial, measure

SPLITS = ("channels", "rows")
#: Name of the link that is none: all devices on this machine, nothing delayed.
LOOPBACK = "loopback"
#: Bytes of IP's and TCP's headers in each packet, with timestamps; and of a message's own framing, where it
#: cannot be counted.
HEADERS, ENVELOPE = 52, 200
#: Images that a device of a test bed holds, and the coordinator has.
N_IMAGES = 16


def as_network(solo: Path, name: str, folder: Path) -> Path:
    """An exported model that classifies alone, as a network of one student whose features are the logits."""
    manifest = read_json(solo / "manifest.json")[name]
    (student,) = manifest["students"]
    model = onnx.load(solo / student["file"])
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["features" if value == output.name else value for value in node.output]
    output.name = "features"
    folder.mkdir(parents=True)
    path, blocks, n_classes = folder / "0.onnx", folder / "final.safetensors", len(manifest["classes"])
    onnx.save(model, path)
    zeros = np.zeros((1, n_classes), np.float32)
    identity = {"weights.0": np.eye(n_classes, dtype=np.float32), "biases.0": zeros[0]}
    save_file(identity | {"scales": np.ones(1, np.float32), "fills": zeros}, blocks)
    write_json(
        folder / "manifest.json",
        {
            "classes": manifest["classes"],
            "image": manifest["image"],
            "students": [
                {"file": path.name, "sha256": sha256_of(path), "n_features": n_classes, "feature_limit": None}
            ],
            "final": {"file": blocks.name, "blocks": blocks.name, "blocks_sha256": sha256_of(blocks)},
        },
    )
    return folder


@dataclass(frozen=True)
class Layout:
    """A method on its devices: what is started, what it costs, and what the coordinator does at the end.

    Attributes
    ----------
    method : str
    folder : Path
        The exported network, or the plan of the split.
    is_split : bool
    load : Load
    final_s : float
        Seconds of the final layer.
    """

    method: str
    folder: Path
    is_split: bool
    load: Load
    final_s: float


def time_final(folder: Path) -> float:
    """Seconds that the coordinator takes for the final layer, for the class and its probability."""
    manifest = read_manifest(folder)
    layer = FinalLayer.load(folder, manifest)
    features = {i: np.ones(student.n_features, np.float32) for i, student in enumerate(manifest.students)}
    return _seconds(lambda: layer.logits(layer.contributions(features)))


def _seconds(work) -> float:
    return min(timeit.repeat(work, number=20, repeat=10)) / 20


def split_layout(method: str, model: Path, n_devices: int, folder: Path, core: int) -> Layout:
    """One model that classifies alone, split over devices; its plan is written to `folder`."""
    plan = plan_split(model, n_devices, method.removeprefix("reference_"))
    plan.save(folder)
    features = [np.ones(part.n_features, np.float32) for part in plan.parts]
    return Layout(method, folder, True, load_of_split(plan, core), _seconds(lambda: plan.logits(features)))


def network_layouts(params: Params, paths: Paths, name: str, scratch: Path) -> Iterator[Layout]:
    """A network of networks, the student of its total budget split over its devices, and the reference split."""
    folder, solo = paths.export(name), paths.export(SOLO)
    core, n_devices = params.benchmark.core, len(params.networks[name])
    load = load_of_network(folder, read_json(paths.benchmark(name))["models"])
    yield Layout("nonn", folder, False, load, time_final(folder))
    if params.design.bytes_per_value == 1:
        log("note: networks are split in float32 only; where devices run int8, there is none to compare with")
        return
    total = read_json(solo / "manifest.json").get(f"{name}-total")
    if total is None:
        log(f"note: there is no baseline {name}/total, so there is no network to split over the devices of {name}")
        return
    student = total["students"][0]
    # A network that also sees the mirror image is split as one that does not: half the work, in its favour.
    model = solo / student.get("single_pass", student["file"])
    for method in SPLITS:
        yield split_layout(method, model, n_devices, scratch / method, core)


def solo_layouts(params: Params, paths: Paths, scratch: Path) -> Iterator[Layout]:
    """The teacher, and one KD student, each on a single device."""
    benchmark = read_json(paths.benchmark(SOLO))["models"]
    for method, name in (("teacher", "teacher"), ("kd", params.ensemble.pool.replace("/", "-"))):
        folder = as_network(paths.export(SOLO), name, scratch / method)
        yield Layout(method, folder, False, load_of_network(folder, {"0": benchmark[name]}), time_final(folder))


def reference_layouts(params: Params, paths: Paths, name: str, scratch: Path) -> Iterator[Layout]:
    """A well-known architecture split over the devices; its weights are random, which costs the same."""
    architecture = params.distributed.reference
    if architecture is None:
        return
    import torch

    from nonn.models import Network as Model
    from nonn.onnx_files import Logits, export_onnx

    info = read_json(paths.dataset_info)
    torch.manual_seed(0)
    model = Logits(Model(architecture, info["channels"], len(info["classes"])))
    example = torch.zeros(1, info["channels"], info["size"], info["size"], dtype=torch.uint8)
    path = scratch / "reference.onnx"
    export_onnx(model, example, path, "image", "logits")
    for method in SPLITS:
        folder = scratch / f"reference_{method}"
        n_devices = len(params.networks[name])
        yield split_layout(folder.name, path, n_devices, folder, params.benchmark.core)


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


def describe_latencies(latencies_ms: np.ndarray) -> dict[str, float]:
    p50, p95, p99 = np.percentile(latencies_ms, [50, 95, 99])
    return {"images": len(latencies_ms), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


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


class Bed:
    """Where trials take place: certificates, images, and hosts on one link after another.

    Parameters
    ----------
    scratch : Path
        An empty folder.
    params : Distributed
    image_shape : (channels, size, size)
    """

    def __init__(self, scratch: Path, params: Distributed, image_shape: tuple[int, ...]):
        self.certificates, self.sensor, self.params = scratch / "certificates", scratch / "images.npy", params
        self.named: set[str] = set()
        pixels = np.random.default_rng(0).integers(0, 256, (N_IMAGES, *image_shape), dtype=np.uint8)
        np.save(self.sensor, pixels)

    def measure(self, layout: Layout, network: Network, broadcast: bool, **echo: int) -> Measured:
        """Time a layout's images on the hosts of a network, or plain echoes of so many bytes."""
        hosts = network.hosts[1 : 1 + layout.load.n_devices]
        prefix = "device" if layout.is_split else "node"
        names = [f"{prefix}-{position}" for position in range(len(hosts))]
        if missing := {COORDINATOR, *names} - self.named:
            write_certificates(self.certificates, sorted(missing))
            self.named |= missing
        # On loopback all hosts have one address, and share it with whatever else runs on this machine.
        ports = [PORT] * len(hosts) if network.is_emulated else free_ports(len(hosts))
        trial = Trial(
            method="echo" if echo else "split" if layout.is_split else "nonn",
            folder=layout.folder.resolve(),
            names=names,
            addresses=[f"{network.address(host)}:{port}" for host, port in zip(hosts, ports, strict=True)],
            prefixes=[[*network.prefix(host), *on_one_core(i)] for i, host in enumerate(hosts)],
            certificates=self.certificates.resolve(),
            sensor=self.sensor.resolve(),
            broadcast=broadcast,
            runs=self.params.images,
            seconds=self.params.seconds,
            **echo,
        )
        return measure(trial, network)

    def overhead(self, layout: Layout, network: Network, measured: Measured, broadcast: bool) -> dict[str, float]:
        """What coordinator and nodes add to the slowest node's inference and the link's round trip.

        The round trip is that of plain TCP messages of the same sizes, of all devices at once.
        """
        asked = layout.load.request_bytes("broadcast" if broadcast else "sensor") + ENVELOPE
        answered = layout.load.answer_bytes + ENVELOPE
        if measured.traffic:  # what the messages really took, without the headers of TCP and IP
            images, node = len(measured.latencies_ms), measured.traffic[network.hosts[1]]
            asked = (node.received_bytes - HEADERS * node.received_packets) / images
            answered = (node.sent_bytes - HEADERS * node.sent_packets) / images
        echo = self.measure(layout, network, broadcast, request_bytes=round(asked), response_bytes=round(answered))
        ideal = 1e3 * layout.load.seconds.max() + float(np.median(echo.latencies_ms))
        total = float(np.median(measured.latencies_ms))
        return {"ideal_ms": ideal, "overhead_ms": total - ideal, "ideal_over_total": ideal / total}


def measure_live(layouts: Sequence[Layout], bed: Bed, params: Distributed) -> list[dict]:
    """Time every layout on every link: one row each.

    On loopback first, where a network of networks shows what its coordinator and nodes take; then the
    fastest link, since there the bytes are counted that tell whether a slower one would take longer
    than `params.longest` an image: then the row says so instead. Where links cannot be emulated,
    everything runs on loopback and there alone.
    """
    n_devices = max(layout.load.n_devices for layout in layouts)
    hosts = [COORDINATOR, *(f"host-{position}" for position in range(n_devices))]
    cases = [(layout, scenario) for layout in layouts for scenario in scenarios(layout)]
    links = sorted(params.links, key=lambda name: -PRESETS[name].rate_bps)
    if reason := missing_privileges():
        log(f"note: {reason}. Measuring on loopback only, without any link's rate and delay.")
        links, on_loopback = [], cases
    else:
        on_loopback = [case for case in cases if case[0].method == "nonn"]
    rows: list[dict] = []
    progress = iter(track(range(len(on_loopback) + len(links) * len(cases)), "distributed"))
    for layout, scenario in on_loopback:
        next(progress)
        rows.append(measure_case(layout, scenario, bed, Network(tuple(hosts))) | {"link": LOOPBACK})
    for name in links:
        with emulated_network(hosts, PRESETS[name]) as network:
            for layout, scenario in cases:
                next(progress)
                framing = framing_of(layout, scenario, rows)
                expected = compose(layout.load, PRESETS[name], scenario, framing, 0.0, params)["link_ms"]
                if expected <= 1e3 * params.longest:
                    row = measure_case(layout, scenario, bed, network)
                else:
                    row = {"method": layout.method, "scenario": scenario, "images": 0, "expected_ms": expected}
                rows.append(row | {"link": name})
    next(progress, None)
    return rows


def measure_case(layout: Layout, scenario: str, bed: Bed, network: Network) -> dict[str, Any]:
    """Latencies, absences and traffic of one layout on one link, and of a network of networks its overhead."""
    broadcast = scenario == "broadcast"
    measured = bed.measure(layout, network, broadcast)
    row = {"method": layout.method, "scenario": scenario, "emulated": network.is_emulated, "absent": measured.absent}
    row |= describe_latencies(measured.latencies_ms) | describe_traffic(measured)
    if measured.traffic:
        row["framing"] = row["wire_bytes"] / payload_bytes(layout.load.transfers(scenario))
    if layout.method == "nonn":
        row |= bed.overhead(layout, network, measured, broadcast)
    return row


def scenarios(layout: Layout) -> tuple[str, ...]:
    """What is measured live; a split network in broadcast is the same after one more round, which `compose` adds."""
    return ("sensor",) if layout.is_split else ("sensor", "broadcast")


def framing_of(layout: Layout, scenario: str, live: Sequence[Mapping]) -> float:
    """Bytes on the wire for each byte of payload, counted on the fastest link.

    Of the layout itself if it ran in this scenario, else in another, else of the same kind of split;
    1 if nothing was counted, which flatters whoever sends many small messages.
    """
    kind = layout.method.removeprefix("reference_")
    rows = [row for row in live if row["method"] == kind and row.get("framing")]
    rows.sort(key=lambda row: row["scenario"] != scenario)  # stable: the fastest link stays first
    return rows[0]["framing"] if rows else 1.0


def compose_all(layouts: Sequence[Layout], live: Sequence[Mapping], params: Distributed) -> Iterator[dict]:
    """A row for every layout, link and scenario."""
    for layout in layouts:
        load = layout.load
        about = {"method": layout.method, "n_devices": load.n_devices, "rounds": len(load.payload)}
        about |= {"memory_bytes": load.memory_bytes, "macs": int(load.macs.sum(axis=0).max())}
        for link in params.links:
            for scenario in ("sensor", "broadcast"):
                framing = framing_of(layout, scenario, live)
                composed = compose(load, PRESETS[link], scenario, framing, layout.final_s, params)
                yield about | {"link": link, "scenario": scenario, "framing": framing} | composed


def run(params: Params, paths: Paths, name: str) -> None:
    info = read_json(paths.dataset_info)
    with tempfile.TemporaryDirectory() as folder:
        scratch, reference = Path(folder), []
        if name == SOLO:
            layouts = list(solo_layouts(params, paths, scratch))
        else:
            layouts = list(network_layouts(params, paths, name, scratch))
            reference = list(reference_layouts(params, paths, name, scratch))
        bed = Bed(scratch, params.distributed, (info["channels"], info["size"], info["size"]))
        live = measure_live(layouts, bed, params.distributed)
    composed = list(compose_all([*layouts, *reference], live, params.distributed))
    write_json(paths.distributed(name), {"system": describe_system(), "live": live, "composed": composed})
