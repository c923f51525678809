"""Options of the commands that serve something: whom they answer, and by which certificate they are known."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from nonn.core.errors import UserError
from nonn.core.names import COORDINATOR
from nonn.runtime.tls import Identity


def add_serving(parser: argparse.ArgumentParser, default_caller: str) -> None:
    """Arguments of every server; `default_caller` may call it unless --allow names others."""
    parser.add_argument(
        "--allow",
        action="append",
        metavar="NAME",
        help=f"common name of a caller that is answered; repeatable (default: {default_caller})",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="plain text to callers, without certificates; loopback only"
    )
    parser.add_argument("--attached", action="store_true", help="stop when standard input closes")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Arguments of every server of a part of a network."""
    parser.add_argument("--cert", type=Path, help="this node's certificate")
    parser.add_argument("--key", type=Path, help="its private key")
    parser.add_argument("--ca", type=Path, help="certificate of the authority that signs callers")
    add_serving(parser, COORDINATOR)
    parser.add_argument("--sensor", type=Path, metavar="FILE.npy", help="images that stand in for a camera")


def add_metrics_port(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics on 127.0.0.1:PORT")


def identity_from(options: argparse.Namespace) -> Identity | None:
    """The certificates of `add_device`; None for plain text, a `UserError` if neither is asked for."""
    files = (options.cert, options.key, options.ca)
    if options.insecure == any(files) or (any(files) and not all(files)):
        raise UserError("give --cert, --key and --ca together, or --insecure for plain text on a loopback address")
    return None if options.insecure else Identity(*files)


def callers_from(options: argparse.Namespace, identity: Identity | None, default: str = COORDINATOR) -> Collection[str]:
    """Names of the callers that a command answers; a `UserError` for names where there are no certificates."""
    if options.allow and identity is None:
        raise UserError("--allow: callers have no names in plain text. Leave it out, or use certificates.")
    return options.allow or (default,)
