"""Links between devices: rate, delay, loss, and what theory says of messages on them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from nonn.core.errors import UserError

#: Largest IP packet in bytes, on every link: also on 802.15.4, whose adaptation layer (6LoWPAN) would
#: cut packets into frames of at most 127 bytes. Headers below IP are not modelled.
MTU = 1500

Transfers = Mapping[tuple[str, str], float]  # sender and receiver: bytes

IP_HEADER, UDP_HEADER, TCP_HEADER = 20, 8, 32  # TCP's with the timestamps that Linux sends


@dataclass(frozen=True)
class Link:
    """A network that joins all hosts."""

    rate_bps: float  # bits of IP packets a second, for each host in each direction; of all together if `shared`
    delay_s: float = 0.0  # one way, beyond the time that the bits take
    shared: bool = False  # one half-duplex medium for all hosts, on which one packet is sent at a time
    loss: float = 0.0  # probability that a packet is lost, independently of others
    seed: int = 0  # of the losses

    def __post_init__(self) -> None:
        if not (self.rate_bps > 0 and self.delay_s >= 0 and 0 <= self.loss < 1):
            raise UserError(f"{self}: a link has rate_bps > 0, delay_s >= 0 and 0 <= loss < 1")

    def __str__(self) -> str:
        medium = "one shared medium" if self.shared else "full duplex"
        loss = f", {self.loss:.2%} lost" if self.loss else ""
        return f"{self.rate_bps / 1e6:g} Mbit/s, {1000 * self.delay_s:g} ms one way, {medium}{loss}"


def check_link(name: str) -> str:
    """The name of a link of `PRESETS`; a `ValueError` for any other."""
    if name not in PRESETS:
        raise ValueError(f"no link {name!r}; choose one of {', '.join(PRESETS)}")
    return name


def find_link(name: str) -> Link:
    """A link by its name, or a `UserError`."""
    try:
        return PRESETS[check_link(name)]
    except ValueError as error:
        raise UserError(f"{error}.") from None


#: Links by name. Wired ones are full duplex with a switch. The Wi-Fi scenarios and 802.15.4 are shared:
#: one radio channel, on which one station sends at a time.
PRESETS = {
    "ethernet941": Link(941e6),  # gigabit Ethernet of a Raspberry Pi 4: what TCP gets of the 1000 Mbit/s
    "ethernet100": Link(100e6),  # fast Ethernet of a Raspberry Pi 3B
    "wifi100": Link(100e6, 0.002, shared=True),  # assumed goodputs and delay of good, fair, and poor reception
    "wifi50": Link(50e6, 0.002, shared=True),
    "wifi20": Link(20e6, 0.002, shared=True),
    "ieee802154": Link(250e3, shared=True),  # IEEE 802.15.4 at 2.4 GHz (O-QPSK): 250 kbit/s
}


def datagram_bytes(payload: int) -> int:
    """Bytes on the wire of one UDP message: fragments of at most `MTU` bytes, each with an IP header."""
    content = payload + UDP_HEADER
    return content + IP_HEADER * math.ceil(content / (MTU - IP_HEADER))


def round_trip(link: Link, payload: int) -> float:
    """Seconds from sending a UDP message of `payload` bytes to its echo, when nothing else is sent.

    With ``bytes = payload + 8 + 20 n`` and ``n = ceil((payload + 8) / 1480)`` fragments, which follow each other
    without a gap, both ways take ``2 (8 bytes / rate + delay)``, on a shared medium too.
    """
    return 2 * (8 * datagram_bytes(payload) / link.rate_bps + link.delay_s)


def tcp_goodput(link: Link) -> float:
    """Most payload bits a second of one TCP stream without losses.

    Segments of 1448 bytes in packets of 1500. On a shared medium acknowledgements of 52 bytes, one for every other
    segment, take their part.
    """
    header = IP_HEADER + TCP_HEADER
    acknowledgement = header / 2 if link.shared else 0
    return link.rate_bps * (MTU - header) / (MTU + acknowledgement)


def link_seconds(link: Link, transfers: Transfers) -> float:
    """Seconds from the first byte sent to the last received, all senders starting at once.

    Every host sends and receives at the link's rate, or all share one medium; then the delay. This is
    what `nonn.testbed.emulation` emulates, for messages that need many packets.
    """
    if not transfers:
        return 0.0
    busy: dict[tuple[str, str], float] = defaultdict(float)
    for (sender, receiver), size in transfers.items():
        busy[sender, "sends"] += size
        busy[receiver, "receives"] += size
    busiest = sum(transfers.values()) if link.shared else max(busy.values())
    return busiest * 8 / link.rate_bps + link.delay_s
