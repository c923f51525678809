"""Trainings travel through a server of SSH, as through S3 (`test_remotes`); needs `dvc-ssh` and OpenSSH's server."""

import getpass

import pytest
from remotes import BIN, check_that_trainings_travel
from ssh_server import ssh_server

pytest.importorskip("dvc_ssh")


@pytest.mark.slow
def test_trainings_travel_through_ssh(tmp_path):
    store, key = tmp_path / "store", tmp_path / "ssh/user"
    with ssh_server(tmp_path / "ssh") as port:

        def configure(clone) -> None:
            address = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{store}"
            clone.call([BIN / "dvc", "remote", "add", "--default", "store", address])
            clone.call([BIN / "dvc", "remote", "modify", "--local", "store", "keyfile", key])

        check_that_trainings_travel(tmp_path, configure, [str(key)])
        assert any(store.rglob("*"))
