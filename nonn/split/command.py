"""The command ``nonn split``: plan a split, describe it, write it for the devices."""

from __future__ import annotations

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


def run(options) -> None:
    """The command ``nonn split``."""
    plan = plan_split(options.model, options.devices, options.method, options.recomputed)
    print(describe(plan))
    if options.output:
        plan.save(options.output)
        log(f"{options.output}: a plan for {plan.n_devices} devices; run each with `nonn split-node`")
