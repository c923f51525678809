"""Deployments: a method on its devices, what is started for it, and what it costs."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import save

from nonn.core.artifacts import SoloManifest
from nonn.core.boards import find_board
from nonn.core.files import read_json, sha256_of, write_json
from nonn.core.params import SOLO, Params
from nonn.core.progress import log
from nonn.core.system import pinned_to
from nonn.runtime.exported import read_manifest
from nonn.runtime.final import FinalLayer, predict
from nonn.split.planner import plan_split
from nonn.testbed.composed import Workload, split_workload

SPLITS = ("channels", "rows")


def as_network(solo: Path, name: str, folder: Path) -> Path:
    """An exported model that classifies alone, as a network of one student whose features are the logits."""
    manifest = read_json(solo / "manifest.json", SoloManifest)[name]
    (student,) = manifest["students"]
    model = onnx.load(solo / student["file"])
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["features" if value == output.name else value for value in node.output]
    output.name = "features"
    folder.mkdir(parents=True)
    path, blocks, n_classes = folder / "0.onnx", folder / "final.safetensors", len(manifest["classes"])
    onnx.save(model, path)
    blocks.write_bytes(save(FinalLayer({0: (np.eye(n_classes), np.zeros(n_classes))}).tensors()))
    student = {"file": path.name, "sha256": sha256_of(path), "n_features": n_classes, "feature_limit": None}
    final = {
        "file": blocks.name,
        "sha256": sha256_of(blocks),
        "blocks": blocks.name,
        "blocks_sha256": sha256_of(blocks),
    }
    write_json(
        folder / "manifest.json",
        {
            "classes": manifest["classes"],
            "image": manifest["image"],
            "students": [student],
            "final": final,
            "quantisation": manifest.get("quantisation"),
        },
    )
    return folder


@dataclass(frozen=True)
class Deployment:
    """A method on its devices: what is started, what it costs, and what the coordinator does at the end."""

    method: str
    folder: Path  # the exported network, or the plan of the split
    is_split: bool
    workload: Workload
    final_s: float  # seconds of the final layer
    like: str = ""  # the method whose messages it sends, if that is another


def on_boards(deployments: Iterable[Deployment], params: Params, name: str) -> list[Deployment]:
    """Deployments of a network, or of `SOLO`, on the boards that the devices state, see `Params.boards_of`.

    Deployments that have boards keep them. A line of the log names boards of which a figure is not known.
    """
    boards = params.boards_of(name)
    if boards is None:
        return list(deployments)
    named = {} if name == SOLO else {budget.board: budget for budget in params.budgets_of(name) if budget.board}
    if unknown := [board for board, budget in named.items() if not budget.mmacs_per_s]:
        speed = f"{params.design.precision} speed of {', '.join(unknown)}"
        log(f"note: {name}: {speed}: not known, counted as that of {params.distributed.board}")
    if unknown := [board for board in named if find_board(board).active_w is None]:
        log(f"note: {name}: power of {', '.join(unknown)}: not known, so no energy is composed")
    return [
        replace(
            each,
            workload=replace(
                each.workload, boards=each.workload.boards or params.boards_of(name, each.workload.precision)
            ),
        )
        for each in deployments
    ]


def sent_once(split: Deployment) -> Deployment:
    """A split whose devices send a map once to all others, as on a radio they could; composed only.

    The devices here send each other every message apart, over TCP.
    """
    return replace(
        split,
        method=f"{split.method}_multicast",
        like=split.method.removeprefix("reference_"),
        workload=replace(split.workload, sent_once=True),
    )


def time_final(folder: Path, core: int) -> float:
    """Seconds that the coordinator takes for an answer once all features have arrived."""
    manifest = read_manifest(folder)
    layer = FinalLayer.load(folder, manifest)
    features = {i: np.ones(student.n_features, np.float32) for i, student in enumerate(manifest.students)}
    return _seconds(lambda: predict(manifest, layer, features), core)


def _seconds(work: Callable[[], object], core: int) -> float:
    """Of a short piece of work: the median on one pinned core, as of what devices calculate."""
    with pinned_to(core):
        return statistics.median(timeit.repeat(work, number=20, repeat=10)) / 20


def split_deployment(method: str, model: Path, n_devices: int, folder: Path, core: int) -> Deployment:
    """One model that classifies alone, split over devices; its plan is written to `folder`."""
    plan = plan_split(model, n_devices, method.removeprefix("reference_"))  # type: ignore[arg-type]
    plan.save(folder)
    features = [np.ones(part.n_features, np.float32) for part in plan.parts]
    return Deployment(method, folder, True, split_workload(plan, core), _seconds(lambda: plan.logits(features), core))
