"""License, citation, changelog and catalogue entry: complete, and of one mind with the package."""

import re
import tomllib

from experiments import REPOSITORY
from ruamel.yaml import YAML

from nonn import __version__

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def load(name: str) -> dict:
    return YAML(typ="safe").load(REPOSITORY / name)


def test_the_license_is_the_one_that_is_named():
    text = (REPOSITORY / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == load("CITATION.cff")["license"] == "Apache-2.0"


def test_the_citation_names_the_paper():
    citation = load("CITATION.cff")
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert [author["family-names"] for author in paper["authors"]] == ["Bhardwaj", "Lin", "Sartor", "Marculescu"]


def test_the_changelog_has_the_version():
    versions = re.findall(r"^## \[?([^\]\s]+)", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert __version__ in versions


def test_the_catalogue_of_workflows_finds_what_it_asks_for():
    usage = load(".snakemake-workflow-catalog.yml")["usage"]
    assert usage["software-stack-deployment"]["conda"] is True
    assert usage["report"] is True
    for name in ("workflow/Snakefile", "workflow/envs/nonn.yaml", "config/README.md"):
        assert (REPOSITORY / name).is_file(), name
