"""The pipeline under a real Slurm of one node: `pytest -m slurm`, as root, with Debian's slurm-wlm and munge."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from experiments import REPOSITORY
from ruamel.yaml import YAML
from test_pipeline import BIN, Clone, set_to

PROFILES = sorted(path.parent.name for path in (REPOSITORY / "workflow/profiles").glob("*/config.yaml"))
SLURM = [BIN / "snakemake", "--workflow-profile", "workflow/profiles/slurm", "--jobs", "8"]
#: Of this node: no accounting, two gigabytes a job are plenty, and files are seen at once.
HERE = ["--slurm-no-account", "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"]
HERE += [
    "--seconds-between-status-checks",
    "2",
    "--latency-wait",
    "5",
    "--default-resources",
    "runtime=30",
    "mem_mb=900",
]
HERE += ["--set-resources", "benchmark:mem_mb=900"]  # instead of all that the profile sets: this node is small
TRAINED = [f"results/tiny/students/seed0/low/{student}.safetensors" for student in range(2)]
NODE = f"nodename={socket.gethostname().split('.')[0]}"


def read_profile(name: str) -> dict:
    return YAML(typ="safe").load(REPOSITORY / "workflow/profiles" / name / "config.yaml")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_says_what_the_default_one_says(name):
    assert read_profile("default").items() <= read_profile(name).items()


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "default"])
def test_profiles_of_clusters_name_rules_that_there_are(name):
    stages = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    profile = read_profile(name)
    assert {*profile["set-resources"], *profile["set-threads"]} <= {*stages}


@pytest.mark.slurm
@pytest.mark.parametrize("engine", ["slurm", "htcondor"])
def test_a_dry_run_under_each_profile(engine, tmp_path):
    if not importlib.util.find_spec(f"snakemake_executor_plugin_{engine}"):
        pytest.skip(f"snakemake-executor-plugin-{engine} is not installed")
    command = [BIN / "snakemake", "--workflow-profile", f"workflow/profiles/{engine}", "--dry-run"]
    assert "distill" in Clone(tmp_path).call(command)


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A running Slurm, ended after the tests."""
    if os.geteuid() or not shutil.which("slurmctld") or not shutil.which("munged"):
        pytest.skip("slurm-wlm and munge are not installed, or this is not root")
    if not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        pytest.skip("the extra slurm is not installed")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([REPOSITORY / "tests/slurm_node.sh", folder], check=True, timeout=60)
        yield folder
    finally:
        for name in ("slurmd", "slurmctld", "munged"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)
        configuration = Path("/etc/slurm/slurm.conf")
        if configuration.is_file() and str(folder) in configuration.read_text():
            configuration.unlink()


class Training:
    """The training of one student under Slurm, to which things happen; it may be submitted more than once."""

    def __init__(self, clone: Clone, process: subprocess.Popen, student: int):
        self.clone, self.process, self.student = clone, process, student
        self.log = clone.folder / f"logs/distill/seed0/low/{student}.log"
        self.harmed_at = 0.0

    def submissions(self) -> dict[str, str]:
        """State of each submission, by its number, in their order."""
        lines = subprocess.check_output(["squeue", "--noheader", "--states=all", "--format=%i|%T|%k"], text=True)
        ours = [line for line in lines.splitlines() if line.endswith(f"distill_wildcards_seed0_low_{self.student}")]
        found = [line.split("|") for line in ours]
        return {number: state for number, state, _ in sorted(found, key=lambda words: int(words[0]))}

    def wait_until(self, is_so) -> None:
        while not is_so():
            assert self.process.poll() is None, self.process.communicate()[0][-4000:]
            time.sleep(0.5)

    def job(self, state: str) -> str:
        """Number of the latest submission, once it is in a state."""
        self.wait_until(lambda: [*self.submissions().values()][-1:] == [state])
        return [*self.submissions()][-1]

    def has_begun(self) -> bool:
        """Whether it has a checkpoint or, later, has resumed from the one of the job before."""
        if not self.log.is_file() or self.log.stat().st_mtime < self.harmed_at:
            return False
        return ("resumed at" if self.harmed_at else ", about") in self.log.read_text()

    def running(self) -> str:
        """Number of the job that trains, once it has begun."""
        self.wait_until(self.has_begun)
        number = self.job("RUNNING")
        self.harmed_at = time.time()
        return number

    def stop(self) -> None:
        """Let it take for ever, however fast this machine is."""
        words = f"distill\0low/{self.student}\0".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if words in (folder / "cmdline").read_bytes() and (folder / "cwd").readlink() == self.clone.folder:
                    os.kill(int(folder.name), signal.SIGSTOP)


def control(*words: str) -> None:
    subprocess.run(["scontrol", "update", *words], check=True)


@pytest.mark.slurm
@pytest.mark.usefixtures("node")
def test_a_training_survives_what_slurm_does_to_it_with_the_bytes_of_a_local_run(tmp_path):
    here = Clone(tmp_path / "here")
    here.edit(set_to("distill", "epochs", value=400))
    here.call([BIN / "snakemake", "--cores", "2", "results/tiny/partition/low"])
    there = here.copied(tmp_path / "there")
    here.call([BIN / "snakemake", "--cores", "2", *TRAINED])
    process = there.start([*SLURM, *HERE, "--", *TRAINED])
    training = Training(there, process, 0)

    first = training.running()
    control(NODE, "state=drain", "reason=test")
    subprocess.run(["scancel", first], check=True)
    training.job("PENDING")  # submitted again; a drained node takes no new job
    control(NODE, "state=resume")

    second = training.running()
    training.stop()
    control(f"jobid={second}", "timelimit=1")
    training.wait_until(lambda: training.submissions()[second] == "TIMEOUT")

    third = training.running()
    control(NODE, "state=down", "reason=test")
    training.job("PENDING")  # by Slurm itself, which lets it wait for two minutes
    control(NODE, "state=resume")
    assert training.running() == third

    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    assert training.submissions() == {first: "CANCELLED", second: "TIMEOUT", third: "COMPLETED"}
    assert there.results() == here.results()
    assert there.stages_of([BIN / "snakemake", "--cores", "2", *TRAINED]) == [], "the local run finds something to do"
