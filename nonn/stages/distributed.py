"""Stage `distributed`: networks and their rivals on emulated links, see `nonn.testbed.distributed`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nonn.core.artifacts import BenchmarkInfo, DatasetInfo, SoloManifest
from nonn.core.files import read_json, scratch_folder, write_json
from nonn.core.params import SOLO, Params, Precision
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.core.system import describe_system
from nonn.split.graph import UnsplittableError, read_network
from nonn.testbed.composed import network_workload
from nonn.testbed.deployments import (
    SPLITS,
    Deployment,
    as_network,
    on_boards,
    sent_once,
    split_deployment,
    time_final,
)
from nonn.testbed.distributed import TrialBed, compose_all, measure_live
from nonn.testbed.placing import placed_teachers, with_the_teacher


def network_deployments(params: Params, paths: Paths, name: str, scratch: Path) -> Iterator[Deployment]:
    """A network of networks, the student of its total budget split over its devices, and the reference split."""
    folder, solo = paths.export(name), paths.export(SOLO)
    core, n_devices = params.benchmark.core, len(params.networks[name].devices)
    benchmark = read_json(paths.benchmark(name), BenchmarkInfo)["models"]
    workload = network_workload(folder, benchmark, params.design.precision)
    yield Deployment("nonn", folder, False, workload, time_final(folder, core))
    total = read_json(solo / "manifest.json", SoloManifest).get(f"{name}-total")
    if total is None:
        log(f"note: there is no baseline {name}/total, so there is no network to split over the devices of {name}")
        return
    student = total["students"][0]
    # A network that also sees the mirror image is split without that: half the work, in favour of the split.
    model = solo / student.get("single_pass", student["file"])
    try:
        read_network(model)
    except UnsplittableError as error:
        log(f"note: {error}")
        return
    for method in SPLITS:
        yield split_deployment(method, model, n_devices, scratch / method, core)


def solo_deployments(params: Params, paths: Paths, scratch: Path) -> Iterator[Deployment]:
    """The teachers, and one KD student, each on a single device."""
    benchmark, precision = read_json(paths.benchmark(SOLO), BenchmarkInfo)["models"], params.design.precision
    alone: dict[str, tuple[str, Precision]] = {"teacher": ("teacher", "float32")}
    if "teacher_int8" in benchmark:
        alone["teacher_int8"] = "teacher_int8", "int8"
    if params.pool:
        alone["kd"] = "-".join(params.pool), precision
    for method, (name, own) in alone.items():
        folder = as_network(paths.export(SOLO), name, scratch / method)
        workload = network_workload(folder, {"0": benchmark[name]}, own)
        like = "teacher" if method == "teacher_int8" else ""  # it sends the same, and is not run here
        yield Deployment(method, folder, False, workload, time_final(folder, params.benchmark.core), like)


def reference_deployments(params: Params, paths: Paths, name: str, scratch: Path) -> Iterator[Deployment]:
    """A well-known architecture split over the devices; its weights are random, which costs the same."""
    architecture = params.distributed.reference
    if architecture is None:
        return
    from nonn.deploy.reference import export_reference  # imports torch

    path = scratch / "reference.onnx"
    export_reference(architecture, read_json(paths.dataset_info, DatasetInfo), params.design.precision, path)
    for method in SPLITS:
        folder = scratch / f"reference_{method}"
        n_devices = len(params.networks[name].devices)
        yield split_deployment(folder.name, path, n_devices, folder, params.benchmark.core)


def placed(deployments: list[Deployment], params: Params, paths: Paths, name: str) -> list[Deployment]:
    """Deployments of a network, or of `SOLO`, to be composed, and the same on other boards."""
    solo = paths.export(SOLO)
    if name != SOLO:
        by_radio = [sent_once(each) for each in deployments if each.method == "channels"]
        return [*deployments, *by_radio, *with_the_teacher(deployments[0], params, solo)]
    teachers = {each.method: each for each in deployments if each.method != "kd"}
    rest = [each for each in deployments if each.method == "kd"]
    return [*placed_teachers(teachers, params, solo), *rest]


def run(params: Params, paths: Paths, name: str) -> None:
    info = read_json(paths.dataset_info, DatasetInfo)
    with scratch_folder() as scratch:
        reference = []
        if name == SOLO:
            deployments = list(solo_deployments(params, paths, scratch))
        else:
            deployments = list(network_deployments(params, paths, name, scratch))
            reference = list(reference_deployments(params, paths, name, scratch))
        bed = TrialBed(scratch, params.distributed, (info["channels"], info["size"], info["size"]))
        live = measure_live([each for each in deployments if each.method != "teacher_int8"], bed, params.distributed)
    everything = on_boards([*placed(deployments, params, paths, name), *reference], params, name)
    composed = list(compose_all(everything, live, params.distributed))
    write_json(paths.distributed(name), {"system": describe_system(), "live": live, "composed": composed})
