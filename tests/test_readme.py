"""The README's numbers are those of the committed results."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def table_rows(path: Path) -> list[str]:
    return [line for line in (REPOSITORY / path).read_text().splitlines() if line.startswith("|")]


def test_the_table_of_results_is_that_of_the_figures_stage():
    summary = table_rows(Path("results/mnist5k/summary.md"))
    readme = table_rows(Path("README.md"))
    assert [row for row in readme if row in summary] == summary


def test_the_figures_that_are_shown_exist():
    shown = [part.split(")")[0] for part in (REPOSITORY / "README.md").read_text().split("](results/")[1:]]
    assert shown
    for path in shown:
        assert (REPOSITORY / "results" / path).is_file(), path
