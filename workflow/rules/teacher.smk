rule dataset:
    input:
        inputs("dataset"),
    output:
        f"{RESULTS}/dataset.safetensors",
        f"{RESULTS}/dataset.json",
    log:
        "logs/dataset.log",
    conda:
        "../envs/nonn.yaml"
    params:
        stage="dataset",
        knobs=knobs("dataset"),
    message:
        "dataset: read, check and split the images"
    shell:
        REPRO


rule teacher:
    input:
        inputs("teacher"),
    output:
        f"{RESULTS}/teacher.safetensors",
        f"{RESULTS}/teacher.json",
        f"{RESULTS}/teacher.csv",
    log:
        "logs/teacher.log",
    conda:
        "../envs/nonn.yaml"
    threads: PARAMS.teacher.threads
    params:
        stage="teacher",
        knobs=knobs("teacher"),
    message:
        "teacher: train or import"
    shell:
        REPRO


rule signals:
    input:
        inputs("signals"),
    output:
        f"{RESULTS}/signals.safetensors",
    log:
        "logs/signals.log",
    conda:
        "../envs/nonn.yaml"
    threads: PARAMS.signals.threads
    params:
        stage="signals",
        knobs=knobs("signals"),
    message:
        "signals: run the teacher on every view"
    shell:
        REPRO


rule graph:
    input:
        inputs("graph"),
    output:
        f"{RESULTS}/graph.safetensors",
        f"{RESULTS}/graph.json",
    log:
        "logs/graph.log",
    conda:
        "../envs/nonn.yaml"
    params:
        stage="graph",
        knobs=knobs("graph"),
    message:
        "graph: link the teacher's filters"
    shell:
        REPRO
