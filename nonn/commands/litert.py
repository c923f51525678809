"""The command ``nonn litert``: a trained network's students as int8 files for TensorFlow Lite Micro."""

from __future__ import annotations

import argparse
from pathlib import Path

from nonn.core.errors import UserError
from nonn.core.numerics import set_numerics
from nonn.core.options import add_network, at_least, refuse_unknown_networks
from nonn.core.params import load_params
from nonn.core.paths import Paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser, help="an exported network of params.yaml, in int8")
    parser.add_argument("--out", type=Path, default=Path("litert"), metavar="FOLDER", help="(default: litert)")
    parser.add_argument(
        "--images",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="compare N test images with ONNX Runtime (default: 1000)",
    )
    parser.epilog = "example: nonn litert 4s"


def run(options: argparse.Namespace) -> None:
    params = load_params()
    set_numerics(params.numerics)
    refuse_unknown_networks(params, [options.network])
    if params.design.precision != "int8":
        raise UserError("params.yaml: design.precision: is float32, and these files are int8. Set it to int8.")

    import torch

    from nonn.core.files import write_json
    from nonn.data.dataset import load_dataset
    from nonn.data.image_store import spaced
    from nonn.method.final_layer import logits_of
    from nonn.method.joining import features_of
    from nonn.method.litert import check_litert, write_litert
    from nonn.method.loading import load_network
    from nonn.report.firmware_plots import draw_accuracies
    from nonn.report.plots import drawing_style, save_figure
    from nonn.runtime.session import run_onnx
    from nonn.training.networks import accuracy

    paths = Paths(params.experiment)
    data = load_dataset(paths)
    test, labels = data.subset("test")
    few = spaced(len(test), options.images)
    images, labels = test[few].numpy(), labels[few]
    network = load_network(paths.network(options.network, seed=0), data)
    folder, entries = options.out / options.network, []
    folder.mkdir(parents=True, exist_ok=True)
    in_onnx, in_litert = [], []
    for position, student in enumerate(network.students):
        path = folder / f"{position}.tflite"
        exported = paths.export(options.network) / f"{position}.onnx"
        write_litert(student, data, path, exported)
        in_onnx.append(run_onnx(exported, images))
        entry, features_of_student = check_litert(student, path, images, in_onnx[-1])
        in_litert.append(features_of_student)
        entries.append(entry)
        print("\n".join(describe(options.network, entry)))
        write_json(folder / "litert.json", entries)
    of_all = {
        "float32": features_of(network.students, torch.from_numpy(images)),
        "int8, ONNX Runtime": [torch.from_numpy(features) for features in in_onnx],
        "int8, LiteRT": [torch.from_numpy(features) for features in in_litert],
    }
    scores = {form: round(accuracy(logits_of(network.final, features), labels), 4) for form, features in of_all.items()}
    print(f"{options.network}, right of {len(labels)} images: " + "; ".join(f"{k} {v:.2%}" for k, v in scores.items()))
    accuracies = {"network": options.network, "images": len(labels), "accuracy": scores}
    write_json(folder / "accuracy.json", accuracies)
    with drawing_style():
        save_figure(draw_accuracies([accuracies]), folder / "accuracy", params.figures)


def describe(network: str, entry: dict) -> list[str]:
    """The figures of one student in a few lines."""
    lines = [f"{network}/{entry['file']}: {entry['file_bytes']:,} bytes, arena {entry['arena_bytes']:,} bytes"]
    lines.append(f"  {', '.join(entry['operators'])}")
    lines.append(
        f"  {entry['within_one_step']:.2%} of the features of {entry['images_checked']} images are within one step of "
        f"those of ONNX Runtime, the others within {entry['largest_steps']:g}"
    )
    return lines
