"""Addresses of nodes and coordinators: ``host:port``, or ``[host]:port`` for IPv6."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

#: Names of this machine for its own users (or those at the other end of an SSH tunnel).
OWN_NAMES = {"127.0.0.1", "localhost"}


def host_name(host: str) -> str | None:
    """The name or address in a Host header; None if there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``, or of ``[host]:port`` for IPv6; a `ValueError` for anything else."""
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_number = port.isascii() and port.isdecimal()
    written = f"[{bare}]" if ":" in bare else bare
    if not bare or host != written or not _is_plain(bare) or not is_number or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port; write for example 127.0.0.1:7100")
    return bare, int(port)


def _is_plain(host: str) -> bool:
    """Whether a host is a name, or an address in full: short forms such as 127.1 mean different things to programs."""
    try:
        host.encode("idna")
        if ":" in host or re.fullmatch(r"[\d.]+", host):
            ipaddress.ip_address(host)
    except ValueError:  # a label of more than 63 letters, or of none, too
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether what is sent to ``host:port`` stays on this machine."""
    host, _ = split_address(address)
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().removesuffix(".") in ("localhost", "ip6-localhost")
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def canonical_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port`` in one form, so that equal places compare as equal.

    All names and addresses of this machine's loopback are one. Other names are not looked up, since what a name server
    answers may change.
    """
    host, port = split_address(address)
    if is_loopback(address):
        return "localhost", port
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().removesuffix("."), port
    return str(getattr(ip, "ipv4_mapped", None) or ip), port
