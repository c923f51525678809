"""The switch of an emulated network: a process that passes packets between TUN devices when they are due.

`nonn.testbed.emulation` starts it. It makes one network namespace for each host, with one TUN device in
it, and holds them all open; none has a name, so whatever ends this process, even SIGKILL, takes the
devices away at once, and the namespaces with the last process in them. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from nonn.core.links import MTU, Link
from nonn.testbed.emulation import DEVICE, SUBNET, SUBNET_BITS

#: Packets that a TUN device holds until the relay reads them; the default of 500 is a short burst.
DEVICE_QUEUE = 2000
#: Longest sleep in seconds, after which the relay looks whether its parent is still there.
MAX_SLEEP_S = 0.25
#: Packets read from one device before the others have their turn; one at a time costs 8 % at 941 Mbit/s.
BATCH = 16
#: A queue holds this many bytes, or this many seconds of its link, whichever is more: see `Switch`.
QUEUE_BYTES, QUEUE_SECONDS = 256 * 1024, 0.1

# <linux/if_tun.h>, <linux/sched.h>, <linux/prctl.h>
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
PR_SET_TIMERSLACK = 29

_LIBC = ctypes.CDLL(None, use_errno=True)


class Switch:
    """When each packet arrives: the link model, without devices and without a clock of its own.

    A packet of L bytes takes τ = 8L / rate to send. It starts when its sender's transmitter is free,
    first come, first served. As its first bit leaves, it starts on the line to its receiver too
    (cut-through: an uncontended packet pays τ once), or when that line is free, so that several
    senders to one receiver queue. With s, r the times from which sender and receiver are free:

        start = max(now, s),         s ← start + τ
        begin = max(start, r),       r ← begin + τ
        arrival = begin + τ + delay

    On a shared medium all transmitters and lines are one: start = max(now, m), m ← start + τ and
    arrival = m + delay. A lost packet takes its time on the medium like any other.

    Queues drop at the tail. They are long, 256 KiB or 0.1 s of the link, because what waits there is
    mostly what applications have sent at once (an image to all nodes, all nodes' answers to one), and
    dropping it would measure TCP's timeouts. The price is that one bulk transfer at 250 kbit/s can
    make others wait up to 8.4 s.
    """

    def __init__(self, link: Link, n_hosts: int) -> None:
        self.link = link
        self.max_wait_s = max(QUEUE_BYTES * 8 / link.rate_bps, QUEUE_SECONDS)
        self.sender_free = [0.0] * n_hosts
        self.receiver_free = [0.0] * n_hosts
        self.medium_free = 0.0
        self.random = Random(link.seed)
        self.count = 0  # orders events of equal time
        self.waiting: list[tuple[float, int, int, bytes]] = []  # start, count, receiver, packet
        self.flying: list[tuple[float, int, int, bytes]] = []  # arrival, count, receiver, packet

    def send(self, now: float, sender: int, receiver: int, packet: bytes) -> None:
        """Take a packet from a host at time `now`, in seconds; times must not decrease."""
        seconds = len(packet) * 8 / self.link.rate_bps
        if self.link.shared:
            start = max(now, self.medium_free)
            if start - now <= self.max_wait_s:
                self.medium_free = start + seconds
                self._fly(self.medium_free, receiver, packet)
            return
        self._start_due(now)
        start = max(now, self.sender_free[sender])
        if start - now <= self.max_wait_s:
            self.sender_free[sender] = start + seconds
            if start <= now:
                self._receive(start, receiver, packet)
            else:
                self.count += 1
                heapq.heappush(self.waiting, (start, self.count, receiver, packet))

    def _start_due(self, now: float) -> None:
        # Lines are taken in the order in which packets start, not in which they were handed over: the
        # second packet of a long message must not keep a line that another sender could use meanwhile.
        while self.waiting and self.waiting[0][0] <= now:
            start, _, receiver, packet = heapq.heappop(self.waiting)
            self._receive(start, receiver, packet)

    def _receive(self, start: float, receiver: int, packet: bytes) -> None:
        begin = max(start, self.receiver_free[receiver])
        if begin - start <= self.max_wait_s:
            end = self.receiver_free[receiver] = begin + len(packet) * 8 / self.link.rate_bps
            self._fly(end, receiver, packet)

    def _fly(self, end: float, receiver: int, packet: bytes) -> None:
        if self.link.loss and self.random.random() < self.link.loss:
            return
        self.count += 1
        heapq.heappush(self.flying, (end + self.link.delay_s, self.count, receiver, packet))

    def arrived(self, now: float) -> list[tuple[int, bytes]]:
        """Take out the packets that have arrived by `now`, in order: receiver and packet."""
        self._start_due(now)
        packets = []
        while self.flying and self.flying[0][0] <= now:
            _, _, receiver, packet = heapq.heappop(self.flying)
            packets.append((receiver, packet))
        return packets

    @property
    def next_event(self) -> float:
        """When `arrived` should be called next; infinity if nothing is under way."""
        return min((queue[0][0] for queue in (self.waiting, self.flying) if queue), default=float("inf"))


def retransmission_timeout(link: Link) -> float:
    """Least seconds after which TCP sends again: Linux's 0.2, or as long as 64 KiB take on a slow link.

    At 250 kbit/s 16 nodes answering at once fill a queue of seconds. With 0.2 s TCP takes that for loss:
    in a trial it sent three times the bytes, and took more than twice the time.
    """
    return max(0.2, 64 * 1024 * 8 / link.rate_bps)


def open_host(address: str, link: Link) -> tuple[int, int]:
    """Make a namespace for a host, with loopback and one TUN device, and return the file descriptors of both.

    At the device whole IPv4 packets are read and written.

    Raises
    ------
    OSError, subprocess.CalledProcessError
        It is not permitted.
    """
    if _LIBC.unshare(CLONE_NEWNET):  # os.unshare from Python 3.12 on
        raise OSError(ctypes.get_errno(), "network namespaces are not permitted")
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    timeout = retransmission_timeout(link)
    if timeout > 0.2:  # without the probes for a lost tail, which would be sent earlier
        with contextlib.suppress(OSError):
            Path("/proc/sys/net/ipv4/tcp_early_retrans").write_text("0")
    commands = [
        "link set lo up",
        f"addr add {address}/{SUBNET_BITS} dev {DEVICE} noprefixroute",
        f"link set dev {DEVICE} mtu {MTU} txqueuelen {DEVICE_QUEUE} up",
        f"route add {SUBNET.format(0)}/{SUBNET_BITS} dev {DEVICE} rto_min {1000 * timeout:.0f}ms",
    ]
    if Path("/proc/net/if_inet6").exists():  # its neighbour discovery would be counted with the packets
        commands.insert(0, f"link set dev {DEVICE} addrgenmode none")
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, capture_output=True, check=True)
    return namespace, device


def be_prompt() -> None:
    """Wake up in time even while all cores are busy, as far as that is permitted."""
    _LIBC.prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.disable()  # nothing here is cyclic


def relay(devices: Sequence[int], addresses: Sequence[str], link: Link, parent: int) -> None:
    """Pass packets between devices until the process `parent` has gone."""
    switch = Switch(link, len(devices))
    hosts = {bytes(map(int, address.split("."))): host for host, address in enumerate(addresses)}
    senders = {device: host for host, device in enumerate(devices)}
    clock = time.monotonic
    while os.getppid() == parent:
        pause = min(max(switch.next_event - clock(), 0), MAX_SLEEP_S)
        for device in select.select(devices, [], [], pause)[0]:
            with contextlib.suppress(BlockingIOError):  # no more for now
                for _ in range(BATCH):
                    packet = os.read(device, MTU)
                    receiver = hosts.get(packet[16:20])  # destination address of the IPv4 header
                    if receiver is not None:
                        switch.send(clock(), senders[device], receiver, packet)
        for receiver, packet in switch.arrived(clock()):
            with contextlib.suppress(OSError):  # a device that was set down, or is full, loses it
                os.write(devices[receiver], packet)


def main() -> None:
    """Read the network from the argument; say where the namespaces are; relay."""
    plan = json.loads(sys.argv[1])
    addresses, link = plan["addresses"], Link(**plan["link"])
    try:
        opened = [open_host(address, link) for address in addresses]
    except (OSError, subprocess.CalledProcessError) as error:
        reason = f"ip: {error.stderr.strip()}" if isinstance(error, subprocess.CalledProcessError) else error.strerror
        print(json.dumps({"error": reason or str(error)}), flush=True)
        return
    be_prompt()
    print(json.dumps({"namespaces": [namespace for namespace, _ in opened]}), flush=True)
    relay([device for _, device in opened], addresses, link, plan["parent"])


if __name__ == "__main__":
    main()
