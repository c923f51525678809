"""Runs told apart, lanes by hand, and what the command writes."""

import itertools
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from experiments import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from nonn.cli import main
from nonn.commands import timeline
from nonn.core.params import load_params

PARAMS = load_params(REPOSITORY / "params.yaml")


def job(stage, start, end, item=None, seed=None):
    return {
        "experiment": PARAMS.experiment,
        "stage": stage,
        "item": item,
        "seed": seed,
        "start": start,
        "end": end,
    }


OF_ANOTHER_EXPERIMENT = job("teacher", 2000.0, 2001.0) | {"experiment": "another"}
#: Two runs, the later one in the order in which its jobs ended, as the journal has them.
JOBS = [
    job("dataset", 0.0, 4.0),
    job("teacher", 5.0, 50.0),
    job("dataset", 1000.0, 1002.0),
    job("teacher", 1003.0, 1013.04),
    job("distill", 1014.0, 1024.0, "2s/1", 0),
    job("distill", 1014.0, 1034.0, "2s/0", 0),
    job("baseline", 1024.0, 1034.0, "2s/kd", 0),
    job("evaluate", 1035.0, 1036.0),
]


@pytest.fixture
def journal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    timeline.JOURNAL.parent.mkdir()
    timeline.JOURNAL.write_text("".join(json.dumps(entry) + "\n" for entry in [*JOBS, OF_ANOTHER_EXPERIMENT]))
    return timeline.JOURNAL


def stages(jobs):
    return timeline.last_run(pd.DataFrame(jobs))["stage"].tolist()


def test_a_run_begins_with_dataset_or_after_idle_time():
    first, later = [job("dataset", 0, 9), job("teacher", 10, 20)], [job("graph", 50, 60), job("evaluate", 61, 62)]
    assert stages(first + later) == ["dataset", "teacher", "graph", "evaluate"]
    late = [job(j["stage"], j["start"] + 300, j["end"] + 300) for j in later]
    assert stages(first + late) == ["graph", "evaluate"]
    assert stages([*later, job("dataset", 63, 64), job("teacher", 65, 66)]) == ["dataset", "teacher"]


def test_a_long_job_beside_short_ones_is_not_idle_time():
    jobs = [job("teacher", 0, 1000), job("graph", 1, 2), job("design", 990, 995)]
    assert stages(jobs) == ["teacher", "graph", "design"]


def test_lanes_by_hand():
    assert timeline.assign_lanes([0, 0, 5, 6, 8], [10, 5, 8, 7, 9]) == [0, 1, 1, 2, 1]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=30))
def test_lanes_never_overlap_and_are_as_few_as_possible(spans):
    spans = sorted((start, start + length) for start, length in spans)
    lanes = timeline.assign_lanes([s for s, _ in spans], [e for _, e in spans])
    for lane in set(lanes):
        own = [span for span, where in zip(spans, lanes, strict=True) if where == lane]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(own))
    at_once = max((sum(s <= t < e for s, e in spans) for t, _ in spans), default=0)
    assert len(set(lanes)) == at_once


def test_command_writes_the_last_run_and_its_parallelism(journal, capsys):
    main(["timeline"])
    folder = journal.parent.parent / "results" / PARAMS.experiment
    assert (folder / "timeline.csv").read_text() == (
        "stage,item,seed,start_s,end_s\n"
        "dataset,,,0.0,2.0\n"
        "teacher,,,3.0,13.0\n"
        "distill,2s/1,0,14.0,24.0\n"
        "distill,2s/0,0,14.0,34.0\n"
        "baseline,2s/kd,0,24.0,34.0\n"
        "evaluate,,,35.0,36.0\n"
    )
    assert (folder / "figures/timeline.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == (
        "all stages: 6 jobs, elapsed 36.0 s, sum 53.0 s, 1.47 x parallel\n"
        "distill and baseline: 3 jobs, elapsed 20.0 s, sum 40.0 s, 2.00 x parallel\n"
    )


@pytest.mark.usefixtures("journal")
def test_all_jobs_on_record(capsys):
    main(["timeline", "--all"])
    assert capsys.readouterr().out.startswith("all stages: 8 jobs, elapsed 1036.0 s")
    assert len(pd.read_csv(Path("results", PARAMS.experiment, "timeline.csv"))) == len(JOBS)


def test_a_line_cut_off_by_a_crash_is_left_out(journal):
    with journal.open("a") as file:
        file.write('{"stage": "eval')
    assert len(timeline.read_journal(journal, PARAMS.experiment)) == len(JOBS)
    with journal.open("a") as file:
        file.write(f"\n{json.dumps(JOBS[-1])}")
    assert len(timeline.read_journal(journal, PARAMS.experiment)) == len(JOBS) + 1


@pytest.mark.parametrize(
    "line", ["3", "null", '{"experiment": "tiny"}', json.dumps(JOBS[-1] | {"start": "x"}), "\udcff"]
)
def test_a_line_that_is_no_job_is_left_out(line, journal):
    with journal.open("a", errors="surrogateescape") as file:
        file.write(line)
    assert len(timeline.read_journal(journal, PARAMS.experiment)) == len(JOBS)


def test_where_all_came_from_the_cache_there_is_no_timeline(journal, capsys):
    """`nonn.commands.job` notes what it restored, but no stage has run."""
    journal.write_text(json.dumps({"job": "dataset", "start": 1.0, "end": 2.0}) + "\n")
    main(["timeline"])
    assert "no stage of" in capsys.readouterr().err
    assert not Path("results", PARAMS.experiment, "timeline.csv").exists()
    assert timeline.read_journal(journal.with_name("none"), PARAMS.experiment).empty
