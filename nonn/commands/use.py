"""The command ``nonn use``: make one of the experiments the active one.

An experiment file holds what differs from the one that it names as its ``base``, or from the default. ``params.yaml``
is written complete, with the default's comments, and may then be edited.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from io import StringIO
from itertools import dropwhile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from nonn.core.errors import UserError
from nonn.core.files import restored_on_error, write_text
from nonn.core.jobs import JOBS_FILE, write_jobs
from nonn.core.options import add_settings, complete_from
from nonn.core.params import PARAMS_FILE, Params
from nonn.core.schema import check_values, did_you_mean, parse_changes, set_key
from nonn.core.yaml_text import parse_yaml, read_yaml
from nonn.project import WORKFLOW

#: Tells editors where the schema of `nonn docs` is, so that they complete keys and mark mistakes.
SCHEMA_LINE = "# yaml-language-server: $schema=workflow/params.schema.json"
EXPERIMENTS, DEFAULT = Path("workflow/experiments"), "mnist5k"
WHERE = "Run nonn from the top folder of a clone, or of a project that `nonn new` has made."
#: Mappings that an experiment replaces as a whole: their keys are the user's own names, or belong together.
WHOLE = ("networks", "devices", "architecture", "proxy", "reference")


def experiment_files() -> dict[str, Path]:
    """Experiments by name: those of the package, overridden by those of the working directory."""
    folders = (WORKFLOW / EXPERIMENTS.name, EXPERIMENTS) if EXPERIMENTS.is_dir() else ()
    return {file.stem: file for folder in folders for file in folder.glob("*.yaml")}


def experiments() -> list[str]:
    return sorted(experiment_files())


def merge_experiment(name: str, above: Sequence[str] = ()) -> Any:
    """All parameters of an experiment, as a mapping of ruamel that keeps comments; `above` are those based on it."""
    files = experiment_files()
    if not files:
        raise UserError(f"{EXPERIMENTS}: no such folder. {WHERE}")
    if name not in files:
        known = f"{', '.join(sorted(files))}{did_you_mean(name, files)}"
        raise UserError(f"{EXPERIMENTS}/{name}.yaml: no such file. Choose one of {known}.")
    path = files[name]
    if not isinstance(read_yaml(path, WHERE), dict):
        raise UserError(f"{path}: holds no keys. Write an experiment into it, or remove it.")
    own = yaml_with_comments().load(path.read_text(encoding="utf-8"))
    if name == DEFAULT:
        return own
    base = own.pop("base", DEFAULT)
    if not isinstance(base, str) or base in (name, *above):
        raise UserError(f"{path}: base: {base!r} is no experiment that this one can begin with. Name another.")
    return merge(merge_experiment(base, (name, *above)), own)


def merge(base: Any, changes: Any) -> Any:
    """Change `base` section by section; mappings of `WHOLE` are replaced."""
    for key, value in changes.items():
        if isinstance(value, dict) and key not in WHOLE and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value
    return base


def write_params(name: str, changes: dict[str, Any] | None = None) -> None:
    """Write ``params.yaml`` of an experiment, with changes by dotted key, and the lists of its jobs.

    Where the schema refuses what would be written, nothing is.
    """
    content, path = merge_experiment(name), experiment_files()[name]
    if isinstance(stated := content.get("experiment"), str) and stated != name:
        raise UserError(
            f"{path}: experiment: is {stated!r}, whose results this would replace; write `experiment: {name}`"
        )
    for key, value in (changes or {}).items():
        set_key(content, key, value)
    text = StringIO()
    yaml_with_comments().dump(content, text)
    body = "".join(dropwhile(lambda line: line.startswith("#"), text.getvalue().splitlines(keepends=True)))
    where = f"{path}, --set" if changes else str(path)
    params = check_values(parse_yaml(text.getvalue(), where), Params, where)
    source = path if path.parent == EXPERIMENTS else f"the package's {path.name}"
    header = f"{SCHEMA_LINE}\n# The active experiment: `nonn use {name}` wrote it from {source}. Edit it as you like.\n"
    with restored_on_error(PARAMS_FILE, JOBS_FILE):
        write_text(PARAMS_FILE, header + body)
        write_jobs(params)


def yaml_with_comments() -> YAML:
    yaml = YAML()
    yaml.width = 120
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    name = parser.add_argument(
        "experiment", metavar="EXPERIMENT", help=f"name of a file in {EXPERIMENTS}, such as cifar10"
    )
    complete_from(name, experiments)
    add_settings(parser, "write another value than the experiment's; repeatable")
    parser.epilog = "example: nonn use cifar10 --set distill.epochs=10"


def run(options: argparse.Namespace) -> None:
    write_params(options.experiment, parse_changes(options.set))
    print(f"{PARAMS_FILE}: {options.experiment} is active; `snakemake --cores all` or `dvc repro` runs it")
