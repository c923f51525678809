"""The pipeline under a real Slurm of one node: `pytest -m slurm`, as root, with Debian's slurm-wlm and munge."""

import contextlib
import importlib.util
import os
import shutil
import signal
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
    "runtime=10",
    "mem_mb=900",
]
HERE += ["--set-resources", "benchmark:mem_mb=900"]  # instead of all that the profile sets: this node is small
TRAINED = [f"results/tiny/students/seed0/low/{student}.safetensors" for student in range(2)]


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


def queue() -> dict[str, tuple[str, str]]:
    """State of each job, and the stage that it runs, by the number of the job."""
    lines = subprocess.check_output(["squeue", "--noheader", "--states=all", "--format=%i|%T|%k"], text=True)
    return {number: (state, comment) for number, state, comment in (line.split("|") for line in lines.splitlines())}


@pytest.mark.slurm
@pytest.mark.usefixtures("node")
def test_slurm_gives_the_bytes_of_a_local_run_also_of_a_job_that_was_cancelled(tmp_path):
    here = Clone(tmp_path / "here")
    here.edit(set_to("distill", "epochs", value=150))
    here.call([BIN / "snakemake", "--cores", "2", "results/tiny/partition/low"])
    there = here.copied(tmp_path / "there")
    here.call([BIN / "snakemake", "--cores", "2", *TRAINED])
    process = there.start([*SLURM, *HERE, "--", *TRAINED])
    checkpoints = there.folder / ".nonn/checkpoints"
    cancelled = None
    while process.poll() is None and cancelled is None:
        time.sleep(0.5)
        training = [number for number, (state, what) in queue().items() if state == "RUNNING" and "distill" in what]
        if training and list(checkpoints.glob("*.safetensors")):
            cancelled = training[0]
            subprocess.run(["scancel", cancelled], check=True)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    assert cancelled
    assert queue()[cancelled][0] == "CANCELLED"
    logs = "".join(path.read_text() for path in there.folder.glob("logs/distill/**/*.log"))
    assert "resumed at" in logs
    assert there.results() == here.results()
    assert there.stages_of([BIN / "snakemake", "--cores", "2", *TRAINED]) == [], "the local run finds something to do"
