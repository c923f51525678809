"""``cluster.yaml``: which node serves which student, where, and how they know each other."""

from __future__ import annotations

import argparse
import os
from io import StringIO
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator, model_validator
from ruamel.yaml import YAML

from nonn.core.errors import UserError
from nonn.core.files import write_text
from nonn.core.names import COORDINATOR
from nonn.core.options import add_network, add_settings, amount, load_settings, refuse_unknown_networks
from nonn.core.params import MOST_DEVICES
from nonn.core.paths import Paths
from nonn.core.progress import log
from nonn.core.schema import Section, load_yaml
from nonn.runtime.addresses import canonical_address, is_loopback, split_address
from nonn.runtime.exported import Manifest, read_manifest
from nonn.runtime.protocol import Contract, student_contract
from nonn.runtime.tls import CA, COMMON_NAME, RESERVED, Identity

CLUSTER_FILE = Path("cluster.yaml")
#: Of a node or a model, which may be a number in quotes.
PlainName = Annotated[str, Field(pattern=f"^{COMMON_NAME}$")]


def not_reserved(name: str) -> str:
    if name.lower() in RESERVED:
        raise ValueError(f"{name!r} is reserved in certificates; choose another")
    return name


#: Of a node or a coordinator, in its certificate.
CertifiedName = Annotated[PlainName, AfterValidator(not_reserved)]


def nameable(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("has a character that no file name may have; write it again")
    return path


#: Text in YAML.
FilePath = Annotated[Path, Field(strict=False), AfterValidator(nameable)]
LONGEST_DEADLINE_MS = 60_000

HEADER = """\
# Written by `nonn cluster`. Paths are relative to this file. To move a node to another machine, copy
# the export folder and its certificate there, start `nonn node` there, and put its address here.
"""


class Tls(Section):
    """Certificates as `nonn certs` lays them out: those of the coordinator, and of nodes that `nonn up` starts."""

    folder: FilePath
    coordinator: CertifiedName = COORDINATOR


class Node(Section):
    """One device: the name in its certificate, where it listens, and the student that it serves."""

    name: CertifiedName
    address: str
    model: PlainName

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, address: str) -> str:
        split_address(address)
        return address


class Cluster(Section):
    """All of ``cluster.yaml``."""

    export: FilePath  # folder of the exported network: its manifest and final layer, and the students' files
    #: Deadline by which an image is answered with the students that have replied.
    deadline_ms: Annotated[float, Field(gt=0, le=LONGEST_DEADLINE_MS)]
    tls: Tls | None = None
    sensor: FilePath | None = None  # a file of images, the camera of each node that `nonn up` starts
    insecure: bool = False  # plain text instead of `tls`; all nodes must then be on this machine
    nodes: Annotated[list[Node], Field(min_length=1, max_length=MOST_DEVICES)]  # one for each student, in any order

    @model_validator(mode="after")
    def _is_safe_and_unambiguous(self) -> Cluster:
        if self.insecure == (self.tls is not None):
            raise ValueError("tls: give `tls`, or `insecure: true` for plain text on loopback addresses")
        for key in ("name", "address", "model"):
            values = [getattr(node, key) for node in self.nodes if not getattr(node, key).endswith(":0")]
            if twice := {value for value in values if values.count(value) > 1}:
                raise ValueError(f"nodes: {', '.join(sorted(twice))}: {key} given twice; change one")
        places: dict[tuple[str, int], Node] = {}
        for node in self.nodes:
            place = canonical_address(node.address)
            if place[1] and (other := places.setdefault(place, node)) is not node:
                same = f"{node.address} is the same place as {other.address} of {other.name}"
                raise ValueError(f"nodes: {node.name}: {same}; change one")
        for node in self.nodes:
            if self.insecure and not is_loopback(node.address):
                raise ValueError(f"nodes: {node.name}: {node.address} is not on this machine; use `tls`")
        return self

    def identity(self, name: str) -> Identity | None:
        """Certificates of a node or of the coordinator; None for plain text."""
        return Identity.of(name, self.tls.folder) if self.tls else None

    @property
    def own_identity(self) -> Identity | None:
        """Certificates of the coordinator."""
        return self.identity(self.tls.coordinator) if self.tls else None

    def placed(self) -> tuple[Manifest, list[tuple[Node, int, Contract]]]:
        """The export's manifest, and each node with the position and the contract of its student.

        Raises
        ------
        UserError
            Nodes and exported students do not match.
        """
        manifest = read_manifest(self.export)
        nodes = {node.model: node for node in self.nodes}
        models = [student.model for student in manifest.students]
        if surplus := sorted(set(nodes) - set(models)):
            raise UserError(f"nodes: no student {', '.join(surplus)} in {self.export}; it has {', '.join(models)}.")
        if missing := sorted(set(models) - set(nodes)):
            raise UserError(f"nodes: no node serves student {', '.join(missing)} of {self.export}. Add one for each.")
        contracts = [student_contract(manifest, student) for student in manifest.students]
        return manifest, [(nodes[contract.model], i, contract) for i, contract in enumerate(contracts)]


def load_cluster(path: Path = CLUSTER_FILE) -> Cluster:
    """Read a cluster file, or raise a `UserError`; its paths come back relative to the working directory."""
    cluster = load_yaml(path, Cluster, "Write one with `nonn cluster NETWORK`.")
    if portless := next((node for node in cluster.nodes if not split_address(node.address)[1]), None):
        raise UserError(f"{path}: nodes: {portless.name}: {portless.address} names no port; give that of the node")
    changes: dict = {"export": path.parent / cluster.export}
    if cluster.tls:
        changes["tls"] = cluster.tls.model_copy(update={"folder": path.parent / cluster.tls.folder})
    if cluster.sensor:
        changes["sensor"] = path.parent / cluster.sensor
    cluster = cluster.model_copy(update=changes)
    try:
        cluster.placed()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return cluster


def check_ports(port: int, n_nodes: int) -> None:
    """A `UserError` unless all nodes find consecutive ports from this one on."""
    if not 1024 <= port <= 65536 - n_nodes:
        raise UserError(f"--port: {port} leaves no room for {n_nodes} nodes; give 1024 to 60000")


def check_deadline(deadline_ms: float) -> None:
    """A `UserError` for a deadline that is not positive, or longer than `LONGEST_DEADLINE_MS`."""
    if not 0 < deadline_ms <= LONGEST_DEADLINE_MS:
        raise UserError(f"--deadline-ms: {deadline_ms:g} is not in reach; give up to {LONGEST_DEADLINE_MS}")


def local_cluster(export: Path, certificates: Path | None, port: int, deadline_ms: float) -> Cluster:
    """All nodes of an exported network on this machine's loopback address, on consecutive ports.

    With port 0 the addresses are not known yet: each node will choose its own.

    Raises
    ------
    UserError
        There are no such ports, or the deadline is impossible.
    """
    students = read_manifest(export).students
    if port:
        check_ports(port, len(students))
    check_deadline(deadline_ms)
    nodes = [
        Node(name=f"node-{student.model}", address=f"127.0.0.1:{port + i if port else 0}", model=student.model)
        for i, student in enumerate(students)
    ]
    tls = Tls(folder=certificates) if certificates else None
    return Cluster(export=export, deadline_ms=deadline_ms, tls=tls, insecure=tls is None, nodes=nodes)


def write_cluster(path: Path, cluster: Cluster) -> None:
    """Write a cluster file, its paths relative to it."""
    content = cluster.model_dump(mode="json", exclude_defaults=True)

    def relative(other: Path) -> str:
        # ".." in a symbolic link leads to the parent of its target.
        return os.path.relpath(other.parent.resolve() / other.name, path.parent.resolve())

    content["export"] = relative(cluster.export)
    if cluster.tls:
        content["tls"] = {"folder": relative(cluster.tls.folder), "coordinator": cluster.tls.coordinator}
    if cluster.sensor:
        content["sensor"] = relative(cluster.sensor)
    text, yaml = StringIO(), YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(content, text)
    write_text(path, HEADER + text.getvalue())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network(parser, help="an exported network of params.yaml")
    parser.add_argument("--output", type=Path, default=CLUSTER_FILE, help="file to write (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7100, help="port of the first node (default: %(default)s)")
    parser.add_argument("--deadline-ms", type=amount, default=100.0, help="time for one image (default: %(default)s)")
    parser.add_argument(
        "--certs", type=Path, default=Path("certs"), help="folder that `nonn certs` writes to (default: %(default)s)"
    )
    parser.add_argument("--insecure", action="store_true", help="plain text without certificates")
    add_settings(parser)
    parser.epilog = "example: nonn cluster 2s"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn cluster``."""
    params = load_settings(options)
    refuse_unknown_networks(params, [options.network])
    if not options.port:
        raise UserError("--port: 0 leaves the nodes without addresses to write down; give 1024 to 60000")
    if os.path.lexists(options.output):
        raise UserError(f"{options.output}: is there already. Remove it, or name another file with --output.")
    export = Paths(params.experiment).export(options.network)
    certificates = None if options.insecure else options.certs
    cluster = local_cluster(export, certificates, options.port, options.deadline_ms)
    write_cluster(options.output, cluster)
    log(f"{options.output}: {len(cluster.nodes)} nodes on this machine")
    if certificates and not (certificates / CA).exists():
        names = " ".join(node.name for node in cluster.nodes)
        log(f"next: nonn certs {certificates} {COORDINATOR} {names}")
    log(f"then: nonn up --cluster {options.output}")
