"""Stage `benchmark`: latency and memory of exported models, each alone on one core, and in turns with the teacher."""

from __future__ import annotations

from nonn.core.artifacts import ModelManifest, SoloManifest
from nonn.core.files import existing, read_json, write_json
from nonn.core.params import SOLO, Params
from nonn.core.paths import Paths
from nonn.core.system import describe_system
from nonn.testbed.latency import measure_models, measure_ratios

#: The teacher's file, as the stage `export` names it; dvc.yaml lists it too.
TEACHER_FILE = "teacher.onnx"


def run(params: Params, paths: Paths, name: str) -> None:
    folder = paths.export(name)
    manifest = read_json(folder / "manifest.json", SoloManifest if name == SOLO else ModelManifest)
    # A network's manifest lists its students; the solo manifest has one for each model.
    models = (
        {key: m["students"][0] for key, m in manifest.items()}
        if name == SOLO
        else {str(position): student for position, student in enumerate(manifest["students"])}
    )
    files = {key: folder / entry["file"] for key, entry in models.items()}
    measured = measure_models(files, params.benchmark)
    others = {key: file for key, file in files.items() if (name, key) != (SOLO, "teacher")}
    ratios = measure_ratios(existing(paths.export(SOLO) / TEACHER_FILE), others, params.benchmark)
    rows = {key: entry["cost"] | measured[key] | ratios.get(key, {}) for key, entry in models.items()}
    write_json(paths.benchmark(name), {"system": describe_system(), "models": rows})
