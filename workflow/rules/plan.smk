# Which jobs of which rules have to run. Snakemake's first process needs this, and so does one that a cluster starts for
# a group of jobs, but not one for a single job: see `own_stage` in common.smk.
import csv
import re
import time
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import SCMError
from ruamel.yaml import YAML

from nonn.commands.job import begin_run, merge_entries
from nonn.commands.verify import distrust, mend_state
from nonn.core.errors import UserError, one_line, refusal
from nonn.core.files import write_json, write_text
from nonn.core.jobs import check_named_files, write_jobs
from nonn.core.params import load_params
from nonn.core.paths import Paths, remove_leftovers
from nonn.core.schema import get_key
from nonn.firmware.build import missing_program
from nonn.method.durations import guess_seconds
from nonn.method.feasibility import check_budgets

# Newer than all outputs: an input of each job that has to run, and of no other.
CHANGED = STATE / "changed"
MISSING = object()


class ChangedJobs:
    """Which jobs of ``dvc.yaml`` have to run: those that DVC finds changed, and what reads their outputs.

    Where it is known beforehand that an output will be written with the bytes that it has, its readers stay as they
    are: `design` is calculated here, since an edit of a budget seldom changes every student. A process that Snakemake
    has started for one job, as clusters do, does not ask: that the job has to run is why it is there.
    """

    def __init__(self, params, jobs):
        self.jobs = {job.addressing: job for job in jobs}
        self.names = [job.name for job in jobs]
        self.writer = {path(out): job.addressing for job in jobs for out in job.outs}
        self.inside = defaultdict(list)  # what is written into a folder: a search for each would take a minute
        for out, writer in self.writer.items():
            for folder in out.parents:
                self.inside[folder].append((out, writer))
        self.changed, self.new_designs = set(), {}
        self.hashes, self.parameters = {}, {}
        for job in self.in_order() if workflow.is_main_process else ():
            if self.is_changed(job) or any(self.is_news(dependency) for dependency in files(job)):
                self.changed.add(job.addressing)
                stage, _, network = job.addressing.partition("@")
                if stage == "design" and not self.changed & {"dataset", "graph"}:
                    self.new_designs[job.addressing] = new_designs(params, network)

    def in_order(self):
        """Jobs, each after those whose outputs it reads."""
        writers = {
            address: {writer for dependency in files(job) for _, writer in self.written(dependency)}
            for address, job in self.jobs.items()
        }
        return [self.jobs[address] for address in TopologicalSorter(writers).static_order()]

    @cache
    def written(self, dependency):
        """Outputs that are a dependency, hold it, or lie in it, and the job that writes each."""
        if writer := self.writer.get(dependency):
            return [(dependency, writer)]
        if holder := next((out for out in dependency.parents if out in self.writer), None):
            return [(holder, self.writer[holder])]
        return self.inside.get(dependency, [])

    def is_news(self, dependency):
        """Whether a dependency may be written anew with other content."""
        for writer in {writer for _, writer in self.written(dependency)} & self.changed:
            new = self.new_designs.get(writer, [dependency])
            if any(dependency == file or dependency in file.parents for file in new):
                return True
        return False

    def is_changed(self, job):
        """Whether DVC would run a job: as `Stage.changed`, but each file is looked at once, and without a lock."""
        return job.changed_stage() or any(map(self.differs, [*job.deps, *job.outs]))

    def differs(self, entry):
        """Whether a dependency or an output is not what ``dvc.lock`` says."""
        if isinstance(entry, ParamsDependency):
            now = {key: value for key in entry.params if (value := self.value_of(str(entry), key)) is not MISSING}
            return now != entry.hash_info.value
        if (key := path(entry)) not in self.hashes:
            self.hashes[key] = entry.get_hash() if entry.exists else None
        return self.hashes[key] is None or self.hashes[key] != entry.hash_info

    def value_of(self, file, key):
        """Parameter by its dotted key."""
        if file not in self.parameters:
            self.parameters[file] = YAML(typ="safe").load(Path(file))
        return get_key(self.parameters[file], key, MISSING)

    @cache
    def inputs(self, address):
        """What a job reads, as Snakemake knows it: outputs of other jobs, and `CHANGED` if it has to run."""
        news = defaultdict(bool)
        for dependency in files(self.jobs[address]):
            for out, writer in self.written(dependency):
                news[out] |= writer in self.changed and self.is_news(dependency)
        has_to_run = address in self.changed
        marked = [str(CHANGED)] if has_to_run else []
        # DVC compares contents; times count only for what is written while this runs. A job that has to run waits for all
        # of that, whether it is news or not: Snakemake leaves it out if what it waits for is ancient.
        return marked + [str(out) if is_new or has_to_run else ancient(str(out)) for out, is_new in news.items()]


def path(entry):
    return Path(str(entry))


def files(job):
    """Files and folders that a job reads."""
    return [path(dependency) for dependency in job.deps if not isinstance(dependency, ParamsDependency)]


def new_designs(params, network):
    """Files that the stage `design` would write with other content than they have."""
    from nonn.stages.design import design_files

    designs = design_files(params, Paths(params.experiment), network)
    return [file for file, content in designs.items() if not file.is_file() or read_json(file) != content]


def pattern_of(out, key):
    """A job's output with a wildcard for its key, with which the path ends; folders before it may have the same name."""
    return re.sub(rf"(?<=/){re.escape(key)}(?=(\.[a-z]+)?$)", "{job}", str(out)) if key else str(out)


def about_stage(name, jobs):
    """What `Stage` needs to know of a stage, and the part of its jobs' outputs in which they differ."""
    first, keys = jobs[0], [job.addressing.partition("@")[2] for job in jobs]
    meta = first.meta or {}
    outputs = [(pattern_of(path(out), keys[0]), out.use_cache) for out in first.outs]
    about = {
        "name": name,
        "outputs": outputs,
        "description": first.desc,
        "priority": meta.get("priority", 0),
        "threads": meta.get("threads", 1),
    }
    return about, keys


def read_stages():
    """The parameters, the jobs that have to run, the stages, and the outputs of the target `all`."""
    params = load_params()
    jobs = begin(params) if workflow.is_main_process else own_jobs()
    plan, by_name = ChangedJobs(params, jobs), defaultdict(list)
    for job in jobs:
        by_name[job.addressing.partition("@")[0]].append(job)
    read = {out for job in jobs for dependency in files(job) for out, _ in plan.written(dependency)}
    # What has to run, runs, even if nothing that follows has to.
    wanted = {out: writer for out, writer in plan.writer.items() if out not in read or writer in plan.changed}
    final = [str(out) for out, writer in wanted.items() if not is_left_out(writer)]
    known = [about_stage(name, jobs) for name, jobs in by_name.items()]
    if workflow.is_main_process:
        write_json(STAGES_FILE, [about for about, _ in known])
    return params, plan, [Stage(about, keys, plan.inputs) for about, keys in known], final


@cache
def is_left_out(address):
    """Whether a job lacks programs that are no Python packages, and so waits for a run where these are installed."""
    if not address.startswith("emulate@") or not (line := missing_program()):
        return False
    if workflow.is_main_process:
        print(f"emulate: left out: {line}", file=sys.stderr)
    return True


def begin(params):
    """Refuse what cannot work, bring DVC's files up to date, and list all jobs."""
    check_named_files(params)
    check_budgets(params, Paths(params.experiment))
    if write_jobs(params):
        print("workflow/jobs.yaml: written for the networks of params.yaml", file=sys.stderr)
    mend_state()
    repo = Repo(".")
    distrust(Path(repo.cache.local.path))
    jobs = repo.index.stages
    if merge_entries([job.name for job in jobs]):
        jobs = Repo(".").index.stages
    write_text(CHANGED, str(time.time_ns()))  # a file of the same content would not count as newer
    return jobs


def own_jobs():
    """Jobs of the group that this process was started for, by another one: one may read what another writes."""
    targets, repo = get_argument_parser().parse_known_args()[0].target_jobs, Repo(".")
    if not targets:
        return repo.index.stages
    addresses = ["@".join((target.rulename, *target.wildcards_dict.values())) for target in targets]
    return [job for address in addresses for job in repo.stage.collect(address)]


def expected_seconds(params, plan):
    """Seconds that each job which has to run may take: the mean of its stage in the run that stands in results/, or an
    estimate by counted work."""
    paths, seconds = Paths(params.experiment), defaultdict(list)
    timeline = paths / "timeline.csv"
    if timeline.is_file():
        with timeline.open(newline="") as file:
            for row in csv.DictReader(file):
                seconds[row["stage"]].append(float(row["end_s"]) - float(row["start_s"]))
    means = {stage: sum(values) / len(values) for stage, values in seconds.items()}
    return {
        name: means[stage] + 4 if (stage := name.partition("@")[0]) in means else guess_seconds(params, paths, name)
        for name in planned_jobs(plan)
    }


def planned_jobs(plan):
    """Addresses of the jobs that this run makes: of its targets alone."""
    needed = {job.params.get("address") for job in workflow.dag.needrun_jobs()}
    return [name for name in plan.names if name in plan.changed and name in needed]


try:
    PARAMS, PLAN, STAGES, FINAL = read_stages()
except UserError as error:
    sys.exit(str(error))
except DvcException as error:
    advice = " Run `git init`." if isinstance(error, SCMError) else ""
    sys.exit(f"DVC: {one_line(error, limit=None)}.{advice}")
except OSError as error:
    if told := refusal(error):
        sys.exit(str(told))
    raise


onstart:
    remove_leftovers(PARAMS, Paths(PARAMS.experiment))
    begin_run(expected_seconds(PARAMS, PLAN))


onsuccess:
    merge_entries(PLAN.names)


onerror:
    merge_entries(PLAN.names)
