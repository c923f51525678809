"""README and docs: their tables of results are those of the committed results, their links lead somewhere."""

import re
from itertools import groupby
from pathlib import Path

import pytest
from committed import summaries
from experiments import REPOSITORY

SUMMARIES = summaries()
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "config/README.md", "results/README.md")]
PAGES += sorted(REPOSITORY.glob("docs/*.md"))


def tables(text: str) -> list[list[str]]:
    """Tables of a text, each as its lines."""
    blocks = groupby(text.splitlines(), lambda line: line.startswith("|"))
    return [list(block) for is_table, block in blocks if is_table]


def rows(table: list[str]) -> list[dict[str, str]]:
    """Rows of a table by the headings of its columns."""
    heading, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(heading, line, strict=True)) for line in body]


def summary(experiment: str) -> list[list[str]]:
    return tables(SUMMARIES[experiment])


def sections(path: Path) -> dict[str, str]:
    """Text below each heading of the second level."""
    _, *parts = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)
    return {heading: text for heading, _, text in (part.partition("\n") for part in parts)}


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_results_page_shows_the_tables_of_the_figures_stage():
    shown = {heading: tables(text) for heading, text in sections(REPOSITORY / "docs/results.md").items()}
    found = {heading: found for heading, found in shown.items() if found}
    assert sorted(found) == sorted(SUMMARIES), "one section for each experiment, no table elsewhere"
    for experiment in SUMMARIES:
        assert sorted(found[experiment]) == sorted(summary(experiment)), experiment


def test_readme_shows_rows_of_the_figures_stage():
    (shown,) = [rows(table) for table in tables((REPOSITORY / "README.md").read_text()) if "Accuracy" in table[0]]
    assert len(shown) >= 6
    for row in shown:
        experiment = row.pop("Experiment")
        methods = rows(summary(experiment)[0])
        assert any(row.items() <= written.items() for written in methods), f"{experiment}: {row}"


def test_readme_keeps_to_the_point():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_relative_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
