"""A trained network and some pictures that come with the package, for `nonn demo`; `nonn ship` puts them here."""

from pathlib import Path

#: An exported network, and test pictures in folders that are named as their classes.
NETWORK, PICTURES = Path(__file__).parent / "digits", Path(__file__).parent / "pictures"
