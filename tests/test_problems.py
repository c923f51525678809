"""Commands that look for problems: where they find some, they end with status 1 and one line."""

import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from experiments import tiny_params
from ruamel.yaml import YAML

from nonn.cli import main
from nonn.commands import torture
from nonn.commands.torture import Outcome
from nonn.commands.verify import md5_of
from nonn.testbed import fuzz, soak
from nonn.testbed.soak import Soak


def problem(*arguments: str) -> str:
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert isinstance(ended.value.code, str), "Python writes a text to standard error, and ends with 1"
    assert len(ended.value.code.splitlines()) == 1
    return ended.value.code


def calling(result):
    """In the place of a coroutine function."""

    async def call(*_, **__):
        return result

    return call


def test_verify_names_and_deletes_what_is_damaged(folder, capsys):
    for name, content in {".dvc/config": "[core]\n    no_scm = true\n", "dvc.yaml": "", "content": "sound"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    name = md5_of(Path("content"))
    kept = folder / ".dvc/cache/files/md5" / name[:2] / name[2:]
    kept.parent.mkdir(parents=True)
    kept.write_text("sound")
    main(["verify"])
    assert capsys.readouterr().out == "DVC's cache is sound.\n"
    kept.write_text("damaged")
    assert problem("verify") == "nonn verify: 1 damaged files were deleted. Run `dvc repro` to make them again."
    assert capsys.readouterr().out == f"{kept}: damaged, deleted\n"
    assert not kept.exists()
    main(["verify"])


@pytest.fixture
def tiny(folder) -> None:
    YAML().dump(tiny_params(), folder / "params.yaml")


@pytest.mark.usefixtures("tiny")
def test_compare_says_what_is_missing(folder, capsys):
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "x", "--allow-empty"], check=True
    )
    lock = "stages:\n  teacher:\n    outs:\n    - {path: results/tiny/teacher.safetensors, md5: '1'}\n"
    (folder / "dvc.lock").write_text(lock)
    assert problem("compare").startswith("nonn compare: results/tiny/teacher.safetensors: is not here; 1 of 1 outputs")
    (folder / "results/tiny").mkdir(parents=True)
    (folder / "results/tiny/teacher.safetensors").touch()
    main(["compare"])
    assert capsys.readouterr().out.startswith("results/tiny: no results are committed")


@pytest.mark.usefixtures("tiny")
def test_torture_counts_what_is_not_the_same(monkeypatch, capsys):
    found = []
    monkeypatch.setattr(torture, "copy_repository", lambda folder: (folder / "results").mkdir())
    monkeypatch.setattr(torture, "JOBS", ["true"])
    monkeypatch.setattr(torture, "REPRO", ["true"])
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: "teacher\ndesign@2s\n")
    monkeypatch.setattr(torture, "trials", lambda *_: iter(found))
    found.append(Outcome("kill", "teacher", True, ""))
    main(["torture", "--tries", "1"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["kill", "1", "1", "1"]
    found.append(Outcome("full disk", "design@2s", True, "design/2s.json differs"))
    assert problem("torture") == "nonn torture: 1 of 2 disturbances changed what the pipeline writes."
    assert "full disk, design@2s: design/2s.json differs" in capsys.readouterr().out
    monkeypatch.setattr(torture, "REPRO", ["false"])
    assert problem("torture").startswith("nonn torture: the undisturbed run failed")


def test_soak_says_what_must_not_be(monkeypatch, capsys):
    calm = {"late_ms": np.full(1000, -50.0), "present": np.full(1000, 4), "memory": [(0, 2**20), (999, 2**20)]}
    monkeypatch.setattr(soak, "soak_cluster", calling(Soak(**calm, whole_again=True)))
    main(["soak", "export"])
    assert "1000  answered by 4 students" in capsys.readouterr().out
    monkeypatch.setattr(soak, "soak_cluster", calling(Soak(**calm)))
    assert problem("soak", "export").startswith("nonn soak: ")
    assert "whole again at the end: no" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["fuzz_node", "fuzz_coordinator"])
def test_fuzz_counts_what_was_wrong(place, monkeypatch, capsys):
    for name in ("fuzz_node", "fuzz_coordinator"):
        monkeypatch.setattr(fuzz, name, calling(Counter(INVALID_ARGUMENT=10)))
    main(["fuzz", "export", "--messages", "10"])
    assert "nothing crashed" in capsys.readouterr().err
    monkeypatch.setattr(fuzz, place, calling(Counter({"INVALID_ARGUMENT": 7, "WRONG: answered": 3})))
    assert problem("fuzz", "export") == "nonn fuzz: 3 outcomes were wrong; see WRONG above"
    assert "       3  WRONG: answered" in capsys.readouterr().out
