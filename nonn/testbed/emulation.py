"""Emulated links between the devices: network namespaces on this machine, joined by a relay that keeps time.

A link is described by its rate, delay and loss and by whether all hosts share one medium; `PRESETS`
names the usual ones. In `emulated_network` each host is a network namespace in which ordinary
programs run; what the link does to their packets is the model of `nonn.testbed.relay.Switch`.
The kernel's own shaper (tbf) would let a short message through at full speed, as a burst.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nonn.core.errors import UserError
from nonn.core.links import PRESETS, Link

#: Name of each host's network device, in its namespace.
DEVICE = "link0"
#: Addresses of the hosts; the namespaces are apart, so every network has the same.
SUBNET, SUBNET_BITS, MOST_HOSTS = "10.77.0.{}", 24, 250
ON_LOOPBACK = "note: {}. Running on loopback instead: without any link's rate, delay and loss."


@dataclass(frozen=True)
class Counters:
    """IP packets, and their bytes with all headers, that a host's device has sent and received."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int

    def __sub__(self, before: Counters) -> Counters:
        pairs = zip(asdict(self).values(), asdict(before).values(), strict=True)
        return Counters(*(now - then for now, then in pairs))


@dataclass
class EmulatedNetwork:
    """Hosts to run programs on: `prefix` starts a program there, `address` is how others reach it.

    Without a relay it is loopback: every host is this machine, nothing is delayed and nothing counted.
    """

    hosts: tuple[str, ...]
    link: Link | None = None  # on loopback
    _relay: subprocess.Popen | None = field(default=None, repr=False)
    _namespaces: dict[str, Path] = field(default_factory=dict, repr=False)

    @property
    def is_emulated(self) -> bool:
        return self._relay is not None

    def address(self, host: str) -> str:
        """IPv4 address of a host."""
        position = self.hosts.index(host)
        return SUBNET.format(position + 1) if self.is_emulated else "127.0.0.1"

    def prefix(self, host: str) -> list[str]:
        """The prefix of a command that is to run on a host: ``[*network.prefix("a"), "python", …]``."""
        return ["nsenter", f"--net={self._namespaces[host]}"] if self.is_emulated else []

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Have this thread on a host while the block runs: a socket opened in it stays there for good."""
        if not self.is_emulated:
            yield
            return
        with Path("/proc/thread-self/ns/net").open() as home, self._namespaces[host].open() as there:
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(home.fileno())

    def counters(self) -> dict[str, Counters]:
        """Counts of each host's device since the network began; none on loopback."""
        return {host: self._count(host) for host in self.hosts} if self.is_emulated else {}

    def _count(self, host: str) -> Counters:
        with self.inside(host):
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        device = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{DEVICE}:"))
        received, sent = map(int, device[0:2]), map(int, device[8:10])
        return Counters(*sent, *received)


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0):  # os.setns from Python 3.12 on
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


def missing_privileges() -> str | None:
    """Why links cannot be emulated here; None if they can."""
    try:  # a container's root may lack these rights, so only an attempt tells
        with emulated_network(["probe"], PRESETS["ethernet100"]):
            return None
    except UserError as error:
        return str(error)


def _missing_means() -> str | None:
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if absent := [tool for tool in ("ip", "nsenter") if shutil.which(tool) is None]:
        return f"{' and '.join(absent)} not found; install iproute2 and util-linux"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is missing, or not ours to open"
    return None


@contextlib.contextmanager
def emulated_network(hosts: Sequence[str], link: Link) -> Iterator[EmulatedNetwork]:
    """Join hosts by emulated links while the block runs.

    Each host is a network namespace with an address of its own, reachable from the others at the
    link's rate and delay and from nowhere else. Nothing of it has a name on this machine: several
    networks may run at once, and nothing is left behind however this process ends. Programs on the
    hosts must be ended by whoever started them.

    Packets are those of the kernel's own TCP and IP, unsegmented by offloads, so that `EmulatedNetwork.counters`
    are exact. On slow links TCP is told to be patient: see `nonn.testbed.relay.retransmission_timeout`.

    Raises
    ------
    UserError
        This machine or user may not have network namespaces; `missing_privileges` says so beforehand.
    """
    if len(set(hosts)) != len(hosts) or not 1 <= len(hosts) <= MOST_HOSTS:
        raise UserError(f"an emulated network has 1 to {MOST_HOSTS} hosts with different names, not {list(hosts)}")
    if reason := _missing_means():
        raise UserError(f"links cannot be emulated here: {reason}")
    addresses = [SUBNET.format(position + 1) for position in range(len(hosts))]
    plan = {"addresses": addresses, "link": asdict(link), "parent": os.getpid()}
    relay = subprocess.Popen(
        [sys.executable, "-m", "nonn.testbed.relay", json.dumps(plan)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches it through us, after the programs on the hosts
    )
    assert relay.stdout is not None  # a pipe
    try:
        answer = json.loads(relay.stdout.readline() or '{"error": "the relay did not start"}')
        if "error" in answer:
            raise UserError(f"links cannot be emulated here: {answer['error']}; it takes root's capabilities")
        places = [Path(f"/proc/{relay.pid}/fd/{descriptor}") for descriptor in answer["namespaces"]]
        yield EmulatedNetwork(tuple(hosts), link, relay, dict(zip(hosts, places, strict=True)))
        if relay.poll() is not None:
            raise UserError(f"the relay of the emulated network ended early ({relay.returncode}); run this again")
    finally:
        relay.kill()
        relay.wait()
        relay.stdout.close()
