"""Each module is a stage of ``dvc.yaml``: it reads, calls one function, and writes. No stage imports another."""

#: In the order in which they run.
STAGES = (
    *("dataset", "teacher", "signals", "graph", "design", "partition", "distill", "assemble", "baseline"),
    *("evaluate", "export", "benchmark", "distributed", "figures", "emulate"),
)
