"""Trainings travel through a server of SSH, as through S3 (`test_remotes`); needs `dvc-ssh` and OpenSSH's server."""

import getpass
import shutil

import pytest
from ssh_server import ssh_server
from test_pipeline import BIN, Clone

pytest.importorskip("dvc_ssh")

TRAINED = "results/tiny/teacher.safetensors"


@pytest.mark.slow
def test_trainings_travel_through_ssh(tmp_path):
    here, there = (Clone(tmp_path / name) for name in ("here", "there"))
    shutil.copy(here.folder / "images.zip", there.folder)  # archives know when they were written
    store = tmp_path / "store"
    with ssh_server(tmp_path / "ssh") as port:
        for clone in (here, there):
            address = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{store}"
            clone.call([BIN / "dvc", "remote", "add", "--default", "store", address])
            key = tmp_path / "ssh/user"
            clone.call([BIN / "dvc", "remote", "modify", "--local", "store", "keyfile", key])
            assert str(key) not in (clone.folder / ".dvc/config").read_text()
        snakemake = [BIN / "snakemake", "--cores", "2", TRAINED]
        assert "teacher" in " ".join(here.stages_of(snakemake))
        here.call([BIN / "dvc", "push", "--run-cache"])
        assert any(store.rglob("*"))
        assert there.stages_of([BIN / "dvc", "repro", "--pull", "teacher"]) == []
        assert there.stages_of(snakemake) == []
        assert (there.folder / TRAINED).read_bytes() == (here.folder / TRAINED).read_bytes()
