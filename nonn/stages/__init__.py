"""One file, one stage of ``dvc.yaml``: read, call one function, write. No stage imports another."""

#: In the order in which they run.
STAGES = (
    *("dataset", "teacher", "signals", "graph", "design", "partition", "distill", "assemble", "baseline"),
    *("evaluate", "export", "benchmark", "distributed", "figures", "emulate"),
)
