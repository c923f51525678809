"""Generated parts of the documentation are what `nonn docs` would write, and say what the commands accept."""

import json
from io import StringIO
from pathlib import Path

import jsonschema
import pytest
from committed import summaries
from experiments import REPOSITORY
from ruamel.yaml import YAML

from nonn.commands.docs import MEANINGS, REFERENCE, RESULTS, SCHEMA, fill_tables, generated, make_schema, read_tables
from nonn.commands.use import SCHEMA_LINE, merge_experiment
from nonn.core.errors import UserError
from nonn.core.files import write_text
from nonn.core.params import Params


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def meanings() -> dict:
    return YAML(typ="safe").load(MEANINGS)


@pytest.mark.usefixtures("folder")
def test_generated_files_are_up_to_date():
    for path in (MEANINGS, SCHEMA, REFERENCE, RESULTS):
        write_text(path, (REPOSITORY / path).read_text())
    for experiment, text in summaries().items():
        write_text(Path("results", experiment, "summary.md"), text)
    for path, content in generated().items():
        assert path.read_text() == content, f"{path}: run `nonn docs`"


def experiments() -> list[str]:
    return sorted(path.stem for path in REPOSITORY.glob("workflow/experiments/*.yaml"))


@pytest.mark.parametrize("name", experiments())
def test_the_schema_for_editors_accepts_every_experiment(name):
    text = StringIO()
    YAML().dump(merge_experiment(name), text)
    params = YAML(typ="safe").load(text.getvalue())
    Params.model_validate(params)
    jsonschema.validate(params, json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("distill", "epocs", 3),
        ("distill", "epochs", 0),
        ("distributed", "board", "pi9"),
        ("distributed", "links", ["wifi"]),
        ("teacher", "architecture", {"family": "fast"}),
    ],
)
def test_the_schema_for_editors_marks_mistakes(section, key, value):
    params = Params.model_validate(YAML(typ="safe").load(Path("params.yaml"))).model_dump()
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(params, schema)
    params[section][key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(params, schema)


def test_editors_find_the_schema():
    assert Path("params.yaml").read_text().startswith(f"{SCHEMA_LINE}\n")
    assert SCHEMA_LINE.endswith(f"$schema={SCHEMA}")


def test_a_key_without_a_meaning_is_refused():
    known = meanings()
    del known["ScheduleParams"]["warmup"]
    with pytest.raises(
        UserError, match=r"params\.meaning\.yaml: DistillParams\.warmup: missing; say what the key means"
    ):
        make_schema(known)


def test_no_meaning_is_of_a_key_that_is_gone():
    described = json.dumps(make_schema(meanings()), ensure_ascii=False)
    for section, keys in meanings().items():
        for key, text in keys.items():
            assert json.dumps(text, ensure_ascii=False) in described, f"{MEANINGS}: {section}.{key}"


def test_tables_are_those_below_a_heading(tmp_path):
    page = tmp_path / "summary.md"
    page.write_text("# One\n\n| a |\n| - |\n\ntext\n\n| b |\n\n## Two\n\n### Three\n\n| c |\n")
    assert read_tables(page) == {"One": "| a |\n| - |\n\n| b |", "Three": "| c |"}
    begin, end = f"<!-- tables: {page}, Three -->\n", "<!-- end of tables -->"
    filled = fill_tables(f"{begin}old\n{end}\n")
    assert filled == f"{begin}\n| c |\n\n{end}\n"
    assert fill_tables(filled) == filled
    with pytest.raises(UserError, match=r"has no tables below 'Four'; choose of One, Three"):
        fill_tables(f"<!-- tables: {page}, Four -->\n{end}\n")
