"""The command ``nonn split``: plan a split, describe it, write it for the devices."""

from __future__ import annotations

from pathlib import Path

from nonn.core.progress import log
from nonn.split.plan import SplitPlan
from nonn.split.planner import plan_split


def describe(plan: SplitPlan) -> str:
    """What each device holds, computes and sends for one image."""
    lines = [
        f"split over {plan.n_devices} by {plan.method}; for one image rounds: {plan.rounds}, "
        f"messages: {len(plan.messages)}, bytes between devices: {plan.payload_bytes():,}",
        "{:<10} {:>10} {:>12} {:>9} {:>12} {:>9}".format("device", "params", "MACs", "messages", "sent", "features"),
    ]
    for part in plan.parts:
        sent = plan.payload_bytes(sender=part.position)
        count = sum(m.sender == part.position for m in part.messages)
        row = (part.name, f"{part.params:,}", f"{part.macs:,}", count, f"{sent:,}", part.n_features)
        lines.append("{:<10} {:>10} {:>12} {:>9} {:>12} {:>9}".format(*row))
    return "\n".join(lines)


def add_arguments(parser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="of the export `solo`")
    parser.add_argument("-n", "--devices", type=int, required=True, help="over how many to split it")
    parser.add_argument("--method", choices=["channels", "rows"], required=True, help="what each device has a part of")
    parser.add_argument(
        "--recomputed", type=int, default=0, metavar="K", help="leading convolutions that every device does for itself"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the plan there, a folder for each device")
    parser.epilog = "example: nonn split export/solo/teacher.onnx -n 4 --method rows --output plan"


def run(options) -> None:
    """The command ``nonn split``."""
    plan = plan_split(options.model, options.devices, options.method, options.recomputed)
    print(describe(plan))
    if options.output:
        plan.save(options.output)
        log(f"{options.output}: a plan for {plan.n_devices} devices; run each with `nonn split-node`")
