"""Options of the command line that several commands take."""

from __future__ import annotations

import argparse


def natural(text: str) -> int:
    """A whole number from 0 on; what else an argument may say is refused by `argparse`."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0; give 0 or more")
    return number
