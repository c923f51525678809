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
        lambda wildcards: inputs("distill@{network}/{student}-{seed}".format(**wildcards)),
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
        stage=lambda wildcards: "distill@{network}/{student}-{seed}".format(**wildcards),
        knobs=lambda wildcards: knobs("distill@{network}/{student}-{seed}".format(**wildcards)),
    message:
        "distill {wildcards.network}/{wildcards.student}, seed {wildcards.seed}"
    shell:
        REPRO


rule assemble:
    input:
        lambda wildcards: inputs("assemble@{network}-{seed}".format(**wildcards)),
    output:
        f"{RESULTS}/networks/seed{{seed}}/{{network}}.safetensors",
        f"{RESULTS}/networks/seed{{seed}}/{{network}}.json",
    log:
        "logs/assemble/{network}-{seed}.log",
    conda:
        "../envs/nonn.yaml"
    threads: 1
    params:
        stage=lambda wildcards: "assemble@{network}-{seed}".format(**wildcards),
        knobs=lambda wildcards: knobs("assemble@{network}-{seed}".format(**wildcards)),
    message:
        "assemble {wildcards.network}, seed {wildcards.seed}"
    shell:
        REPRO
