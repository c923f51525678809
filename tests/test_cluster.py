"""The file that says which node serves which student: written, read back, and refused where it is unsafe."""

import re
from pathlib import Path

import pytest
from clusters import N_FEATURES
from ruamel.yaml import YAML

from nonn import cli
from nonn.core.errors import UserError
from nonn.core.paths import Paths
from nonn.runtime.addresses import split_address
from nonn.runtime.cluster import Cluster, load_cluster, local_cluster, write_cluster

SOUND = {
    "export": "export",
    "deadline_ms": 100,
    "insecure": True,
    "nodes": [
        {"name": "a", "address": "127.0.0.1:7100", "model": "0"},
        {"name": "b", "address": "[::1]:7101", "model": "1"},
    ],
}


def load(changes: dict):
    """A sound cluster file with changes; None removes a key."""
    content = {key: value for key, value in (SOUND | changes).items() if value is not None}
    with Path("cluster.yaml").open("w") as file:
        YAML().dump(content, file)
    return load_cluster()


def node(**changes) -> dict:
    return SOUND["nodes"][0] | changes


@pytest.mark.parametrize("certificates", [None, Path("elsewhere/certs")])
def test_what_is_written_is_read_back(network_folder, folder, certificates):
    cluster = local_cluster(network_folder, certificates, 7100, 80)
    assert [node.address for node in cluster.nodes] == [f"127.0.0.1:{port}" for port in (7100, 7101, 7102)]
    write_cluster(Path("deep/cluster.yaml"), cluster)
    found = load_cluster(Path("deep/cluster.yaml"))
    assert (found.nodes, found.deadline_ms, found.insecure) == (cluster.nodes, 80, certificates is None)
    assert found.export.resolve() == network_folder
    if certificates:
        assert found.tls.folder.resolve() == folder / certificates
    text = Path("deep/cluster.yaml").read_text()
    write_cluster(Path("deep/cluster.yaml"), found)
    assert Path("deep/cluster.yaml").read_text() == text


def test_paths_are_those_of_the_folder_that_a_link_leads_to(network_folder, folder):
    (folder / "far/away").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "far/away")
    write_cluster(Path("link/cluster.yaml"), local_cluster(network_folder, Path("certs"), 7100, 80))
    found = load_cluster(Path("link/cluster.yaml"))
    assert (found.export.resolve(), found.tls.folder.resolve()) == (network_folder, folder / "certs")


def test_students_keep_their_places_in_any_order(network_folder):
    cluster = local_cluster(network_folder, None, 7100, 80)
    turned = cluster.model_copy(update={"nodes": cluster.nodes[::-1]})
    _, placed = turned.placed()
    assert [(node.model, position, contract.n_features) for node, position, contract in placed] == [
        (str(i), i, n_features) for i, n_features in enumerate(N_FEATURES)
    ]


PROBLEMS = {
    "neither": ({"insecure": None}, "tls: give `tls`, or `insecure: true`"),
    "both": ({"tls": {"folder": "certs"}}, "tls: give `tls`, or `insecure: true`"),
    "plain text abroad": ({"nodes": [node(address="10.0.0.7:7100")]}, "nodes: a: 10.0.0.7:7100 is not on this machine"),
    "no port": ({"nodes": [node(address="127.0.0.1")]}, "nodes.0.address: '127.0.0.1' is not host:port"),
    "port 0": (
        {"nodes": [node(address="127.0.0.1:00")]},
        "nodes: a: 127.0.0.1:00 names no port; give that of the node",
    ),
    "name twice": ({"nodes": [node(), node(address="127.0.0.1:7101", model="1")]}, "nodes: a: name given twice"),
    "reserved name": ({"nodes": [node(name="localhost")]}, "nodes.0.name: 'localhost' is reserved in certificates"),
    "address twice": ({"nodes": [node(), node(name="b", model="1")]}, "nodes: 127.0.0.1:7100: address given twice"),
    "model twice": ({"nodes": [node(), node(name="b", address="[::1]:1")]}, "nodes: 0: model given twice"),
    "model elsewhere": ({"nodes": [node(model="../0")]}, "nodes.0.model: string should match"),
    "no nodes": ({"nodes": []}, "nodes: list should have at least 1 item"),
    "no deadline": ({"deadline_ms": None}, "deadline_ms: missing; add it"),
    "deadline in the past": ({"deadline_ms": 0}, "deadline_ms: input should be greater than 0"),
    "typing error": ({"deadline": 1}, "deadline: unknown key; remove it (did you mean 'deadline_ms'?)"),
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("changes", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_unsafe_or_unclear_is_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(f"cluster.yaml: {message}")):
        load(changes)


@pytest.mark.usefixtures("folder")
def test_no_file():
    with pytest.raises(UserError, match=r"cluster\.yaml: no such file\. Write one with `nonn cluster NETWORK`"):
        load_cluster()


@pytest.mark.usefixtures("folder")
def test_nodes_and_students_must_match(network_folder):
    with pytest.raises(UserError, match=r"no node serves student 2 of"):
        load({"export": str(network_folder)}).placed()
    with pytest.raises(UserError, match=r"no student 7 in .*; it has 0, 1, 2"):
        load({"export": str(network_folder), "nodes": [node(model="7")]}).placed()


@pytest.mark.usefixtures("folder")
def test_the_command_writes_what_up_can_start(network_folder, params, capsys):
    experiment = Paths(params.experiment)
    YAML().dump(params.model_dump(), Path("params.yaml"))
    experiment.export("2s").parent.mkdir(parents=True)
    experiment.export("2s").symlink_to(network_folder)
    cli.main(["cluster", "2s", "--port", "7200"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == [
        "next: nonn certs certs coordinator node-0 node-1 node-2",
        "then: nonn up --cluster cluster.yaml",
    ]
    cluster = load_cluster()
    assert (cluster.tls.folder, cluster.export) == (Path("certs"), experiment.export("2s"))
    cli.main([*lines[1].removeprefix("next: nonn ").split()])
    assert cluster.own_identity.for_client()
    with pytest.raises(SystemExit, match=r"cluster\.yaml: is there already\. Remove it, or name another .* --output"):
        cli.main(["cluster", "2s", "--port", "7300"])
    assert load_cluster() == cluster, "its addresses may have been put in by hand"
    with pytest.raises(SystemExit, match="--port: 0 leaves the nodes without addresses"):
        cli.main(["cluster", "2s", "--port", "0"])
    with pytest.raises(SystemExit, match="no '9s'; choose one of 2s"):
        cli.main(["cluster", "9s"])


@pytest.mark.parametrize(("port", "deadline_ms"), [(65535, 100), (80, 100), (-1, 100), (7100, 0), (7100, 1e9)])
def test_impossible_ports_and_deadlines_are_refused(network_folder, port, deadline_ms):
    with pytest.raises(UserError, match=r"--(port|deadline-ms): .*give"):
        local_cluster(network_folder, None, port, deadline_ms)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("localhost:7100", "127.0.0.1:7100"),
        ("[::1]:7100", "LOCALHOST:7100"),
        ("127.0.0.2:7100", "[::ffff:127.0.0.1]:7100"),
        ("10.0.0.1:7100", "[::ffff:10.0.0.1]:7100"),
        ("Node.example:7100", "node.example.:7100"),
        ("[2001:db8::1]:7100", "[2001:db8:0::1]:7100"),
    ],
)
def test_two_names_of_one_place_are_not_two_nodes(one, other):
    nodes = [{"name": f"n{i}", "address": address, "model": str(i)} for i, address in enumerate((one, other))]
    with pytest.raises(ValueError, match="is the same place as"):
        Cluster.model_validate({"export": "e", "deadline_ms": 100.0, "tls": {"folder": "certs"}, "nodes": nodes})
    nodes[1]["address"] = other.replace("7100", "7101")
    Cluster.model_validate({"export": "e", "deadline_ms": 100.0, "tls": {"folder": "certs"}, "nodes": nodes})


@pytest.mark.parametrize(
    "address", [":7100", "[::1:7100", "::1]:7100", "localhost]:7100", "[127.0.0.1]:7100", "[[::1]]:7100", "127.1:7100"]
)
def test_addresses_that_are_not_read_alike_everywhere_are_refused(address):
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(address)


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".local"])
def test_names_that_no_machine_can_have_are_refused(host):
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(f"{host}:7100")


def test_names_and_addresses_are_read():
    assert [split_address(text) for text in ("pi.local:1", "[::1]:2", "10.0.0.1:3", "münchen:4")] == [
        ("pi.local", 1),
        ("::1", 2),
        ("10.0.0.1", 3),
        ("münchen", 4),
    ]
