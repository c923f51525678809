"""Lists of jobs, experiments that hold what differs, and what goes when parameters no longer name it."""

import subprocess
import sys
from pathlib import Path

import pytest
from experiments import REPOSITORY, SHIPPED
from ruamel.yaml import YAML

from nonn.commands.use import DEFAULT, EXPERIMENTS, merge_experiment, write_params
from nonn.core.errors import UserError
from nonn.core.files import write_text
from nonn.core.jobs import JOBS_FILE, check_jobs, check_named_files, list_jobs, write_jobs
from nonn.core.params import PARAMS_FILE, SOLO, Params, load_params
from nonn.core.paths import Paths, remove_leftovers

EXPERIMENT_NAMES = sorted(path.stem for path in (REPOSITORY / EXPERIMENTS).glob("*.yaml"))


@pytest.fixture
def clone(folder) -> Path:
    """A folder with the shipped experiments and nothing else."""
    (folder / EXPERIMENTS).parent.mkdir()
    (folder / EXPERIMENTS).symlink_to(REPOSITORY / EXPERIMENTS)
    return folder


def with_network(params: Params, **changes) -> Params:
    """Parameters whose network ``2s`` is changed."""
    network = params.networks["2s"].model_copy(update=changes)
    return params.model_copy(update={"networks": params.networks | {"2s": network}})


# Lists of jobs


def test_jobs_by_hand(params):
    jobs = list_jobs(with_network(params, seeds=2, baselines={"kd": 1}))
    assert list(jobs["students"]) == ["seed0/2s/0", "seed0/2s/1", "seed1/2s/0", "seed1/2s/1"]
    assert jobs["students"]["seed1/2s/0"] == {"network": "2s", "student": 0, "seed": 1}
    assert jobs["assembled"] == {"seed0/2s": {"network": "2s", "seed": 0}, "seed1/2s": {"network": "2s", "seed": 1}}
    assert jobs["baselines"] == {"seed0/2s/kd": {"network": "2s", "method": "kd", "seed": 0}}
    assert list(jobs["exported"]) == ["2s", SOLO]
    assert jobs["pool"] == "2s-kd"


def test_named_files_are_watched_and_what_stands_for_others_exists(params):
    jobs = list_jobs(params)
    assert (REPOSITORY / jobs["weights"]).is_file()
    assert (REPOSITORY / jobs["source"]).is_file()
    dataset = params.dataset.model_copy(update={"source": "photos/"})
    teacher = params.teacher.model_copy(update={"weights": "best.pth"})
    jobs = list_jobs(params.model_copy(update={"dataset": dataset, "teacher": teacher}))
    assert (jobs["source"], jobs["weights"]) == ("photos/", "best.pth")


def test_folders_of_baselines_are_read_where_there_are_any(params):
    names = ("baselines_folder", "solo_folder")
    jobs = list_jobs(with_network(params, baselines={"kd": 1}))
    assert [jobs[name] for name in names] == ["results/tiny/baselines", "results/tiny/baselines/seed0"]
    assert all((REPOSITORY / list_jobs(with_network(params, baselines={}))[name]).is_file() for name in names)


@pytest.mark.usefixtures("folder")
def test_what_is_written_reads_as_what_was_meant(params):
    named = with_network(params, baselines={}).model_copy(
        update={"dataset": params.dataset.model_copy(update={"source": 'é "'})}
    )
    assert write_jobs(named)
    assert YAML(typ="safe").load(JOBS_FILE) == {"jobs": list_jobs(named)}
    assert not write_jobs(named), "it is there already"
    JOBS_FILE.write_bytes(b"\xff")
    assert write_jobs(named), "it was damaged"
    check_jobs(named)
    with pytest.raises(UserError, match=r"workflow/jobs\.yaml: lists other jobs .* Run `nonn jobs`"):
        check_jobs(params)


def test_the_shipped_lists_are_those_of_the_shipped_parameters(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    check_jobs(load_params())


def test_files_that_are_not_there_are_refused(params, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    check_named_files(params)
    dataset = params.dataset.model_copy(update={"source": "photos"})
    with pytest.raises(UserError, match=r"params\.yaml: dataset\.source: photos does not exist\. Name a folder"):
        check_named_files(params.model_copy(update={"dataset": dataset}))
    for source in ("", ".", "/", ".."):
        dataset = params.dataset.model_copy(update={"source": source})
        with pytest.raises(UserError, match=r"dataset\.source: '[./]*' holds the whole project\. Put the"):
            check_named_files(params.model_copy(update={"dataset": dataset}))
    teacher = params.teacher.model_copy(update={"weights": "results"})
    with pytest.raises(UserError, match=r"params\.yaml: teacher\.weights: results: is a folder\. Name a regular file"):
        check_named_files(params.model_copy(update={"teacher": teacher}))


# Experiments


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("name", EXPERIMENT_NAMES)
def test_experiments_are_sound_and_have_folders_of_their_own(name):
    write_params(name)
    params = load_params()
    assert params.experiment == name
    check_jobs(params)


@pytest.mark.usefixtures("clone")
def test_the_shipped_parameters_are_the_default_experiment():
    write_params(DEFAULT)
    assert PARAMS_FILE.read_bytes() == (REPOSITORY / "params.yaml").read_bytes()


def test_an_experiment_changes_what_it_says_and_nothing_else(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    long, short, default = merge_experiment("cifar10_int8_long"), merge_experiment("cifar10_int8"), SHIPPED
    assert long["distill"] == {**short["distill"], "epochs": 32}
    assert long["teacher"] == short["teacher"]
    assert short["graph"] == default["graph"]
    assert list(long["networks"]) == ["4s"], "networks are replaced as a whole"


@pytest.mark.usefixtures("clone")
def test_what_the_schema_refuses_is_not_written():
    write_params(DEFAULT, {"distill.epochs": 3})
    before = PARAMS_FILE.read_bytes(), JOBS_FILE.read_bytes()
    assert load_params().distill.epochs == 3
    with pytest.raises(UserError, match=r"distill\.epochs: input should be"):
        write_params(DEFAULT, {"distill.epochs": 0})
    with pytest.raises(UserError, match=r"cifar11\.yaml: no such file. Choose one of .*did you mean 'cifar10'"):
        write_params("cifar11")
    assert (PARAMS_FILE.read_bytes(), JOBS_FILE.read_bytes()) == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "stated"), [("experiment: p1\n", "p1"), ("numerics: fast\n", DEFAULT), ("base: p1\n", "p1")]
)
def test_an_experiment_that_would_replace_the_results_of_another_is_refused(text, stated):
    EXPERIMENTS.mkdir(parents=True)
    (EXPERIMENTS / "p1.yaml").write_text("experiment: p1\n")
    write_params("p1")
    (EXPERIMENTS / "copy.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"/copy\.yaml: experiment: is '{stated}', whose .* write `experiment: copy`"):
        write_params("copy")
    assert load_params().experiment == "p1"


@pytest.mark.usefixtures("folder")
def test_mistakes_are_those_of_the_experiment_s_file():
    EXPERIMENTS.mkdir(parents=True)
    (EXPERIMENTS / "odd.yaml").write_text("experiment: odd\ndistill: {epoch: 3, lr: fast}\n")
    with pytest.raises(UserError, match=r"^workflow/experiments/odd\.yaml: distill\.lr: .*\n.*yaml: distill\.epoch:"):
        write_params("odd")
    with pytest.raises(UserError, match=r"^workflow/experiments/odd\.yaml, --set: distill\.lr: "):
        write_params("odd", {"distill.epochs": 3})
    assert not PARAMS_FILE.exists()


# Leftovers


def write_all(params: Params, paths: Paths) -> set[Path]:
    """An empty file for every artifact that the parameters name, and some that all experiments have."""
    files = {paths.dataset, paths.teacher, paths.signals, paths.evaluation}
    for name, network in params.networks.items():
        students = range(len(network.devices))
        files |= {paths.filter_counts(name), paths.partition_info(name), paths.cluster(name)}
        files |= {place(name, student) for place in (paths.design, paths.partition) for student in students}
        files |= {paths.student(name, student, seed) for student in students for seed in range(network.seeds)}
        files |= {paths.network(name, seed).with_suffix(".json") for seed in range(network.seeds)}
    files |= {paths.baseline(name, method, seed) for name, method, seeds in params.baselines() for seed in seeds}
    for name in [*params.networks, SOLO]:
        files |= {paths.export(name) / "manifest.json", paths.benchmark(name), paths.distributed(name)}
    files |= {paths.log(path) for path in files if path.parts[2] in ("students", "baselines")}
    for path in files:
        write_text(path, "")
    return files


@pytest.mark.usefixtures("folder")
def test_what_is_named_stays(params):
    files = write_all(params, Paths(params.experiment))
    assert remove_leftovers(params, Paths(params.experiment)) == []
    assert {path for path in Path("results").rglob("*") if path.is_file()} == files


@pytest.mark.usefixtures("folder")
def test_what_is_no_longer_named_goes(params):
    paths = Paths(params.experiment)
    more = with_network(
        params, seeds=2, devices=["small"] * 3, baselines={**params.networks["2s"].baselines, "full": 1}
    )
    more = more.model_copy(update={"networks": more.networks | {"3s": more.networks["2s"]}})
    kept = write_all(params, paths)
    surplus = write_all(more, paths) - kept
    assert paths.student("2s", 2, 0) in surplus, "one student more"
    assert paths.student("2s", 0, 1) in surplus, "one seed more"
    assert paths.baseline("2s", "full", 0) in surplus, "one baseline more"
    assert paths.export("3s") / "manifest.json" in surplus, "one network more"
    assert remove_leftovers(params, paths)
    inside = {paths.design("2s", 2), paths.partition("2s", 2)}  # of folders that the stages write as a whole
    assert {path for path in Path("results").rglob("*") if path.is_file()} == kept | inside
    assert remove_leftovers(params, paths) == []


@pytest.mark.usefixtures("folder")
def test_other_experiments_are_left_alone(params):
    other = with_network(params, seeds=5).model_copy(update={"experiment": "other"})
    files = write_all(other, Paths(other.experiment))
    assert remove_leftovers(params, Paths(params.experiment)) == []
    assert all(path.exists() for path in files)


@pytest.mark.usefixtures("folder")
def test_baselines_go_when_none_is_named(params):
    paths = Paths(params.experiment)
    write_all(params, paths)
    remove_leftovers(with_network(params, baselines={}), paths)
    assert not list((paths / "baselines").iterdir())


@pytest.mark.usefixtures("folder")
def test_what_a_killed_stage_left_goes_though_it_does_not_run_again(params):
    paths = Paths(params.experiment)
    killed = "import os, sys; from nonn.core.files import replacing; from pathlib import Path\n"
    killed += "with replacing(Path(sys.argv[1])) as temporary: temporary.mkdir(), os._exit(1)"
    subprocess.run([sys.executable, "-c", killed, paths.export("2s")], check=False)
    assert len(list((paths / "export").iterdir())) == 1
    remove_leftovers(params, paths)
    assert not list((paths / "export").iterdir())


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "holds no keys"),
        (b"- a\n", "holds no keys"),
        (b"experiment: caf\xe9\n", "is not text in UTF-8"),
        (b"base: odd\n", "base: 'odd' is no experiment that this one can begin with"),
        (b"base: other\n", "base: 'odd' is no experiment that this one can begin with"),
        (b"base: [a]\n", r"base: \['a'\] is no experiment"),
        (b"base:\n", "base: None is no experiment"),
        (b"seed: 1\nseed: 2\n", "line 2 is not valid YAML"),
    ],
)
def test_an_experiment_file_that_is_none_is_refused(text, said):
    EXPERIMENTS.mkdir(parents=True)
    (EXPERIMENTS / "odd.yaml").write_bytes(text)
    (EXPERIMENTS / "other.yaml").write_text("base: odd\n")
    with pytest.raises(UserError, match=rf"workflow/experiments/o\w+\.yaml:.*{said}"):
        merge_experiment("odd")


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("before", [b"experiment: caf\xe9\n", None])
def test_params_are_as_they_were_where_others_are_refused_or_interrupted(before, monkeypatch):
    if before:
        Path("params.yaml").write_bytes(before)
    with pytest.raises(UserError, match=r"distill\.epochs"):
        write_params(DEFAULT, {"distill.epochs": "six"})

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nonn.commands.use.write_jobs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_params(DEFAULT)
    assert (Path("params.yaml").read_bytes() if before else Path("params.yaml").exists()) == (before or False)
    assert not Path("workflow/jobs.yaml").exists()
