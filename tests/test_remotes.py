"""Trainings travel through a server of the S3 protocol: one clone trains, others at other paths fetch.

Needs the extra `s3` and the package `moto[s3,server]`, which is too large to be installed for one test.
"""

import pytest
from remotes import BIN, check_that_trainings_travel

pytest.importorskip("dvc_s3")
moto = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")

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
    def configure(clone) -> None:
        clone.call([BIN / "dvc", "remote", "add", "--default", "store", "s3://store/nonn"])
        clone.call([BIN / "dvc", "remote", "modify", "--local", "store", "endpointurl", server])

    check_that_trainings_travel(tmp_path, configure, SECRETS.values())
