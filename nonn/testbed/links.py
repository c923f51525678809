"""The command ``nonn links``: measure the emulated links against their theory."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from nonn.core.files import write_json
from nonn.core.links import PRESETS, find_link
from nonn.core.progress import log
from nonn.core.system import describe_system
from nonn.testbed.echo import format_measurement, measure_link
from nonn.testbed.emulation import ON_LOOPBACK, EmulatedNetwork, emulated_network, missing_privileges


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--link", metavar="NAME", help="measure only this link")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements here")
    parser.epilog = "example: nonn links --link wifi20"


def run(options: argparse.Namespace) -> None:
    """The command ``nonn links``: measure each preset against its theory."""
    system = describe_system()
    links = {options.link: find_link(options.link)} if options.link else PRESETS
    hosts = ("sender", "receiver")
    measured = {}
    if reason := missing_privileges():
        log(ON_LOOPBACK.format(reason))
        measured["loopback"] = measure_link(EmulatedNetwork(hosts))
        print(f"loopback\n{format_measurement(measured['loopback'])}")
    for name, link in {} if reason else links.items():
        log(f"{name}: {link}")
        with emulated_network(hosts, link) as network:
            measured[name] = asdict(link) | measure_link(network)
        print(f"{name}: {link}\n{format_measurement(measured[name])}\n", flush=True)
    if options.json:
        write_json(options.json, {"system": system, "note": reason, "links": measured})
