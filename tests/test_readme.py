"""The README's numbers are those of the committed results."""

from itertools import groupby
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def tables(path: str) -> dict[str, list[str]]:
    """Tables of a text, by their heading row."""
    lines = (REPOSITORY / path).read_text().splitlines()
    blocks = [list(block) for is_table, block in groupby(lines, lambda line: line.startswith("|")) if is_table]
    return {block[0]: block for block in blocks}


def test_tables_of_results_are_those_of_the_figures_stage():
    summary, readme = tables("results/mnist5k/summary.md"), tables("README.md")
    shared = summary.keys() & readme.keys()
    assert len(shared) == 3, "methods, the paper's ratios, and latencies"
    for heading in shared:
        assert readme[heading] == summary[heading]


def test_the_figures_that_are_shown_exist():
    shown = [part.split(")")[0] for part in (REPOSITORY / "README.md").read_text().split("](results/")[1:]]
    assert shown
    for path in shown:
        assert (REPOSITORY / "results" / path).is_file(), path
