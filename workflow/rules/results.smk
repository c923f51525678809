rule evaluate:
    input:
        inputs("evaluate"),
    output:
        f"{RESULTS}/evaluation.json",
    log:
        "logs/evaluate.log",
    conda:
        "../envs/nonn.yaml"
    threads: PARAMS.evaluate.threads
    params:
        stage="evaluate",
        knobs=knobs("evaluate"),
    message:
        "evaluate: score everything on the test images"
    shell:
        REPRO


rule export:
    input:
        lambda wildcards: inputs(named_stage("export", wildcards.name)),
    output:
        directory(f"{RESULTS}/export/{{name}}"),
    log:
        "logs/export/{name}.log",
    conda:
        "../envs/nonn.yaml"
    threads: 1
    params:
        stage=lambda wildcards: named_stage("export", wildcards.name),
        knobs=lambda wildcards: knobs(named_stage("export", wildcards.name)),
    message:
        "export {wildcards.name}: write ONNX and score it again"
    shell:
        REPRO


rule cluster:
    input:
        lambda wildcards: inputs(f"cluster@{wildcards.network}"),
    output:
        f"{RESULTS}/cluster/{{network}}.yaml",
    log:
        "logs/cluster/{network}.log",
    conda:
        "../envs/nonn.yaml"
    threads: 1
    params:
        stage=lambda wildcards: f"cluster@{wildcards.network}",
        knobs=lambda wildcards: knobs(f"cluster@{wildcards.network}"),
    message:
        "cluster {wildcards.network}: describe its nodes"
    shell:
        REPRO


rule benchmark:
    input:
        lambda wildcards: inputs(named_stage("benchmark", wildcards.name)),
    output:
        f"{RESULTS}/benchmark/{{name}}.json",
    log:
        "logs/benchmark/{name}.log",
    conda:
        "../envs/nonn.yaml"
    # All cores, so that nothing else runs while a latency is measured.
    threads: ALL_CORES
    params:
        stage=lambda wildcards: named_stage("benchmark", wildcards.name),
        knobs=lambda wildcards: knobs(named_stage("benchmark", wildcards.name)),
    message:
        "benchmark {wildcards.name}: latency and memory on one core"
    shell:
        REPRO


rule distributed:
    input:
        lambda wildcards: inputs(named_stage("distributed", wildcards.name)),
    output:
        f"{RESULTS}/distributed/{{name}}.json",
    log:
        "logs/distributed/{name}.log",
    conda:
        "../envs/nonn.yaml"
    # All cores, so that nothing else runs while latencies are measured.
    threads: ALL_CORES
    params:
        stage=lambda wildcards: named_stage("distributed", wildcards.name),
        knobs=lambda wildcards: knobs(named_stage("distributed", wildcards.name)),
    message:
        "distributed {wildcards.name}: devices at once, over emulated links"
    shell:
        REPRO


rule figures:
    input:
        inputs("figures"),
    output:
        kept(f"{RESULTS}/claims.json"),
        kept(f"{RESULTS}/distributed.csv"),
        kept(f"{RESULTS}/metrics.json"),
        kept(f"{RESULTS}/missing.csv"),
        kept(f"{RESULTS}/ratios.json"),
        kept(f"{RESULTS}/summary.csv"),
        kept(f"{RESULTS}/summary.tex"),
        kept(report(f"{RESULTS}/summary.md", caption="../report/summary.rst", category="Tables")),
        reported("accuracy_memory"),
        reported("missing_devices"),
        reported("communication"),
        reported("latency"),
        reported("scaling"),
        reported("ratios"),
        reported("filter_graph"),
        reported("adjacency"),
        reported("top_k"),
        reported("training"),
    log:
        "logs/figures.log",
    conda:
        "../envs/nonn.yaml"
    threads: 1
    params:
        stage="figures",
        knobs=knobs("figures"),
    message:
        "figures: draw and tabulate"
    shell:
        REPRO
