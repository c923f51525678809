"""Trainings travel through a server of the S3 protocol: one clone trains, others at other paths fetch.

Needs the extra `s3` and the package `moto[s3,server]`, which is too large to be installed for one test.
"""

import shutil

import pytest
from test_pipeline import BIN, Clone

pytest.importorskip("dvc_s3")
moto = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")

TRAINED = "results/tiny/teacher.safetensors"
#: As everywhere in AWS's tools: from the environment, not from a file of the repository.
SECRETS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def server(monkeypatch):
    """Address of a server with the bucket `store`."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket="store")
    yield address
    running.stop()


def test_trainings_travel_through_s3(server, tmp_path):
    clones = {name: Clone(tmp_path / name) for name in ("here", "there")}
    here = clones["here"]
    for clone in clones.values():
        if clone is not here:
            shutil.copy(here.folder / "images.zip", clone.folder)  # archives know when they were written
        clone.call([BIN / "dvc", "remote", "add", "--default", "store", "s3://store/nonn"])
        clone.call([BIN / "dvc", "remote", "modify", "--local", "store", "endpointurl", server])
        configuration = (clone.folder / ".dvc/config").read_text()
        assert not any(value in configuration for value in SECRETS.values())
    snakemake = [BIN / "snakemake", "--cores", "2", TRAINED]
    assert "teacher" in here.stages_of(snakemake)
    here.call([BIN / "dvc", "push", "--run-cache"])
    there = clones["there"]
    assert there.stages_of([BIN / "dvc", "repro", "--pull", "teacher"]) == []
    assert there.stages_of(snakemake) == []
    assert (there.folder / TRAINED).read_bytes() == (here.folder / TRAINED).read_bytes()
