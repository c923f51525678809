rule baseline:
    input:
        lambda wildcards: inputs(baseline_stage(wildcards)),
    output:
        f"{RESULTS}/baselines/seed{{seed}}/{{network}}/{{method}}.safetensors",
        f"{RESULTS}/baselines/seed{{seed}}/{{network}}/{{method}}.json",
        f"{RESULTS}/baselines/seed{{seed}}/{{network}}/{{method}}.csv",
    log:
        "logs/baseline/{network}-{method}-{seed}.log",
    # The longest jobs first: the short ones then fill the cores to the end.
    priority: 2
    conda:
        "../envs/nonn.yaml"
    threads: 1
    params:
        stage=baseline_stage,
        knobs=lambda wildcards: knobs(baseline_stage(wildcards)),
    message:
        "baseline {wildcards.network}/{wildcards.method}, seed {wildcards.seed}"
    shell:
        REPRO
