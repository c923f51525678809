import sys
from pathlib import Path

from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo

from nonn.errors import UserError
from nonn.params import load_params
from nonn.leftovers import remove_leftovers
from nonn.paths import Paths

try:
    PARAMS = load_params()
except UserError as error:
    sys.exit(str(error))

RESULTS = f"results/{PARAMS.experiment}"
STAGES = {stage.addressing: stage for stage in Repo(".").index.stages}
OUTPUTS = [Path(str(out)) for stage in STAGES.values() for out in stage.outs]

# Not known where nothing is run, by --report, or where jobs go to other machines.
ALL_CORES = workflow.resource_settings.cores or 1

# Stages run in the environment of Snakemake, unless Snakemake has made one for them.
shell.prefix(
    f"""case "$(printenv CONDA_PREFIX)" in */.snakemake/conda/*) ;; *) export PATH='{Path(sys.executable).parent}':"$PATH" ;; esac; """
)

# Touched, because DVC brings unchanged outputs back with their old times.
REPRO = "(dvc --wait-for-lock repro -q --single-item {params.stage} && touch {output}) > {log} 2>&1"


wildcard_constraints:
    network="|".join(PARAMS.networks),
    student=r"\d+",
    seed=r"\d+",
    method="[a-z_]+",
    name="|".join([*PARAMS.networks, "solo"]),


onstart:
    remove_leftovers(PARAMS, Paths(PARAMS.experiment))


def inputs(stage):
    """Files that a stage reads, as the rules write them: a folder for a file in it, and files for a folder of several."""
    files = []
    for dependency in STAGES[stage].deps:
        if isinstance(dependency, ParamsDependency):
            continue
        path = Path(str(dependency))
        written = [out for out in OUTPUTS if out == path or out in path.parents or path in out.parents]
        files += written or [path]
    return [str(path) for path in files]


def knobs(stage):
    """Parameters that a stage depends on, with their values."""
    tracked = [d for d in STAGES[stage].deps if isinstance(d, ParamsDependency)]
    return {key: value for dependency in tracked for key, value in dependency.read_params().items()}


def student_stage(wildcards):
    """Stage that trains a student: those trained once have their own."""
    student = f"{wildcards.network}/{wildcards.student}"
    return f"distill_once@{student}" if student in PARAMS.students_once else f"distill@{student}-{wildcards.seed}"


def network_stage(wildcards):
    """Stage that assembles a network: those assembled once have their own."""
    network = wildcards.network
    return f"assemble_once@{network}" if network in PARAMS.assembled_once else f"assemble@{network}-{wildcards.seed}"


def baseline_stage(wildcards):
    """Stage that trains a baseline: those trained once, and the further seeds of the ensembles' pool, have their own."""
    baseline = f"{wildcards.network}/{wildcards.method}"
    if baseline == PARAMS.ensemble.pool and int(wildcards.seed) in PARAMS.ensemble.seeds:
        return f"ensemble@{wildcards.seed}"
    if baseline in PARAMS.baselines_once and int(wildcards.seed) == PARAMS.seeds[0]:
        return f"baseline_once@{baseline}"
    return f"baseline@{baseline}-{wildcards.seed}"


def named_stage(stage, name):
    """Stage of a network, or of the models that run alone."""
    return f"{stage}_solo" if name == "solo" else f"{stage}@{name}"


def kept(path):
    """An output that is in git and not in DVC's cache: if DVC finds it current, it must still be there."""
    return update(path)


def reported(figure):
    """A figure as an output, with its caption in the report."""
    path = f"{RESULTS}/figures/{figure}.{PARAMS.figures.format}"
    shown = report(path, caption=f"../report/{figure}.rst", category="Figures")
    return kept(shown)
