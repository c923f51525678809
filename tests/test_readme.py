"""The README's numbers are those of the committed results."""

from itertools import groupby
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def tables(path: str) -> list[list[str]]:
    """Tables of a text, each as its lines."""
    lines = (REPOSITORY / path).read_text().splitlines()
    return [list(block) for is_table, block in groupby(lines, lambda line: line.startswith("|")) if is_table]


def test_tables_of_results_are_those_of_the_figures_stage():
    names = ("mnist5k", "cifar10", "cifar10_int8", "cifar10_int8_long")
    written = {name: tables(f"results/{name}/summary.md") for name in names}
    headings = {table[0] for summary in written.values() for table in summary}
    shown = [table for table in tables("README.md") if table[0] in headings]
    counts = {name: sum(table in summary for table in shown) for name, summary in written.items()}
    assert counts == {"mnist5k": 3, "cifar10": 1, "cifar10_int8": 1, "cifar10_int8_long": 1}, (
        "methods of all, the paper's ratios, and latencies"
    )
    assert len(shown) == sum(counts.values()), "a table that no experiment wrote"


def test_the_figures_that_are_shown_exist():
    shown = [part.split(")")[0] for part in (REPOSITORY / "README.md").read_text().split("](results/")[1:]]
    assert shown
    for path in shown:
        assert (REPOSITORY / "results" / path).is_file(), path
