import re
import shlex
import sys
from pathlib import Path

from snakemake.cli import get_argument_parser

from nonn.core.files import STATE, read_json

# Stages run in the environment of Snakemake, unless Snakemake has made one for them. Snakemake replaces what is in
# braces here, and a path may hold some. A prefix takes the place of Snakemake's own, by which a failure counts that is
# not of the last command.
shell.prefix(
    """set -euo pipefail; case "$(printenv CONDA_PREFIX)" in */.snakemake/conda/*) ;; *) export PATH="""
    + shlex.quote(str(Path(sys.executable).parent)).replace("{", "{{").replace("}", "}}")
    + """:"$PATH" ;; esac; """
)

# Captions of what the report shows, beside the rules wherever these are.
CAPTIONS = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parent / "report"

# Touched, because DVC brings unchanged outputs back with their old times; what is not there is not made.
JOB = "(python -m nonn job {params.address:q} --writes {output:q} && touch -c {output:q}) 2>&1 | tee {log:q} >&2"

# Description of each stage, for processes that Snakemake starts for one job: see `own_stage`.
STAGES_FILE = STATE / "stages.json"

# Not known where nothing is run, by --report, or where jobs go to other machines.
ALL_CORES = workflow.resource_settings.cores or 1


class Stage:
    """One rule: a stage of ``dvc.yaml``, with what differs between its jobs as the wildcard `job`.

    `about` is its part of `STAGES_FILE`. `keys` are the values of the wildcard, or [""] where there is one job alone.
    """

    def __init__(self, about, keys, inputs=lambda address: []):
        self.name, self.is_keyed, self.inputs_of = about["name"], keys != [""], inputs
        self.outputs = [self.output(*output) for output in about["outputs"]]
        self.pattern = "|".join(map(re.escape, keys)) or "-"
        self.log = f"logs/{self.name}/{{job}}.log" if self.is_keyed else f"logs/{self.name}.log"
        self.message = f"{self.name}{' {wildcards.job}' * self.is_keyed}: {about['description']}"
        self.priority = about["priority"]
        self.threads = ALL_CORES if about["threads"] == "all" else about["threads"]

    def output(self, name, is_cached):
        # Not in DVC's cache but in git: if DVC finds it current, it must still be there.
        flags = [] if is_cached else [update]
        if Path(name).suffix == "":
            flags.append(directory)
        caption = CAPTIONS / f"{Path(name).stem}.rst"
        if caption.is_file():
            category = "Figures" if Path(name).parent.name == "figures" else "Tables"
            if Path(name).suffix in (".png", ".md"):
                flags.append(lambda name: report(name, caption=str(caption), category=category))
        for flag in flags:
            name = flag(name)
        return name

    def address(self, wildcards):
        return f"{self.name}@{wildcards.job}" if self.is_keyed else self.name

    def inputs(self, wildcards):
        return self.inputs_of(self.address(wildcards))


def own_stage():
    """The stage of the one job that this process was started for, by another one; None where that is not so.

    Such a process, as clusters start two for each job, needs no more than the rule: reading ``dvc.yaml`` would take a
    second, and more where there are many jobs.
    """
    targets = get_argument_parser().parse_known_args()[0].target_jobs
    if workflow.is_main_process or not targets or len(targets) > 1:
        return None
    about = {stage["name"]: stage for stage in read_json(STAGES_FILE)}[targets[0].rulename]
    return Stage(about, list(targets[0].wildcards_dict.values()) or [""])


if stage := own_stage():
    STAGES, FINAL = [stage], []
else:

    include: "plan.smk"
