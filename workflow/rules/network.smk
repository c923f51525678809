rule design:
    input:
        lambda wildcards: inputs(f"design@{wildcards.network}"),
    output:
        f"{RESULTS}/sizes/{{network}}.json",
        directory(f"{RESULTS}/design/{{network}}"),
    log:
        "logs/design/{network}.log",
    conda:
        "../envs/nonn.yaml"
    params:
        stage=lambda wildcards: f"design@{wildcards.network}",
        knobs=lambda wildcards: knobs(f"design@{wildcards.network}"),
    message:
        "design {wildcards.network}: fit students to the devices"
    shell:
        REPRO


rule partition:
    input:
        lambda wildcards: inputs(f"partition@{wildcards.network}"),
    output:
        directory(f"{RESULTS}/partition/{{network}}"),
    log:
        "logs/partition/{network}.log",
    conda:
        "../envs/nonn.yaml"
    params:
        stage=lambda wildcards: f"partition@{wildcards.network}",
        knobs=lambda wildcards: knobs(f"partition@{wildcards.network}"),
    message:
        "partition {wildcards.network}: share out the filters"
    shell:
        REPRO


rule distill:
    input:
        lambda wildcards: inputs(student_stage(wildcards)),
    output:
        f"{RESULTS}/students/seed{{seed}}/{{network}}/{{student}}.safetensors",
        f"{RESULTS}/students/seed{{seed}}/{{network}}/{{student}}.csv",
    log:
        "logs/distill/{network}-{student}-{seed}.log",
    priority: 1
    conda:
        "../envs/nonn.yaml"
    threads: 1
    params:
        stage=student_stage,
        knobs=lambda wildcards: knobs(student_stage(wildcards)),
    message:
        "distill {wildcards.network}/{wildcards.student}, seed {wildcards.seed}"
    shell:
        REPRO


rule assemble:
    input:
        lambda wildcards: inputs(network_stage(wildcards)),
    output:
        f"{RESULTS}/networks/seed{{seed}}/{{network}}.safetensors",
        f"{RESULTS}/networks/seed{{seed}}/{{network}}.json",
    log:
        "logs/assemble/{network}-{seed}.log",
    conda:
        "../envs/nonn.yaml"
    threads: 1
    params:
        stage=network_stage,
        knobs=lambda wildcards: knobs(network_stage(wildcards)),
    message:
        "assemble {wildcards.network}, seed {wildcards.seed}"
    shell:
        REPRO
