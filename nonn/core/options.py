"""Options of the command line that several commands take."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nonn.core.errors import UserError
from nonn.core.params import PARAMS_FILE, Params, load_params
from nonn.core.schema import parse_changes


def natural(text: str) -> int:
    """A whole number from 0 on. `argparse` reports the ValueError of any other text."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0; give 0 or more")
    return number


def at_least(least: int, most: int = sys.maxsize):
    """A parser of whole numbers within bounds."""

    def number(text: str) -> int:
        if (value := natural(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is above {most:,}")
        return value

    number.__name__ = "whole number"
    return number


def amount(text: str) -> float:
    """A finite number from 0 on."""
    if not 0 <= (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 on; give a number")
    return number


def seed_number(text: str) -> int:
    """A seed of random numbers."""
    return at_least(0, 2**32 - 1)(text)


def numbers(text: str) -> list[int]:
    """Whole numbers from 1 on, with commas between them."""
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def add_settings(parser: argparse.ArgumentParser, help: str = "use another value than that of params.yaml; repeatable"):
    """Add ``--set``, for `load_settings`, or for `refuse_settings` in commands that need params.yaml as it is."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


def load_settings(options: argparse.Namespace) -> Params:
    """The parameters of the file, overridden by ``--set``; the file stays unchanged."""
    return load_params(changes=parse_changes(options.set))


def refuse_unknown_networks(params: Params, names: Iterable[str]) -> None:
    """Raise UserError for the first name that is not a network of params.yaml."""
    if unknown := [name for name in names if name not in params.networks]:
        raise UserError(f"params.yaml: networks: no {unknown[0]!r}; choose one of {', '.join(params.networks)}.")


def refuse_missing(paths: Iterable[Path], stage: str) -> None:
    """Raise UserError for the first missing artifact; `stage` is the last of those that write them."""
    if missing := next((path for path in paths if not path.is_file()), None):
        raise UserError(f"{missing}: is not there. Run `dvc repro {stage}` first.")


def refuse_settings(options: argparse.Namespace, reason: str) -> None:
    """Refuse ``--set`` in a command whose outputs have to follow params.yaml."""
    if options.set:
        key = options.set[0].partition("=")[0]
        raise UserError(f"--set {options.set[0]}: {reason}; change {key} in {PARAMS_FILE}, or try values by `nonn try`")


def add_network(parser: argparse.ArgumentParser, name: str = "network", **how: Any) -> None:
    """Take the name of a network of params.yaml."""
    complete_from(parser.add_argument(name, metavar="NETWORK", **how), lambda: load_params().networks)


def complete_from(action: argparse.Action, words: Callable[[], Iterable[str]]) -> None:
    """Let the shell complete an argument with the results of `words`; none if it raises UserError."""

    def completer(**_) -> list[str]:
        try:
            return list(words())
        except UserError:
            return []

    action.completer = completer  # type: ignore[attr-defined]  # argcomplete's protocol
