"""Devices get by without the pipeline: without torch, dvc, and all else of the extra `pipeline`."""

import asyncio
import contextlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from clusters import PATIENCE, cluster_of, make_image, plain_node
from experiments import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from ruamel.yaml import YAML

from nonn.cli import COMMANDS, main
from nonn.core.errors import UserError
from nonn.core.install import BASE, PARTITIONS, PIPELINE, how_to_install, require_64_bit
from nonn.runtime.cluster import write_cluster

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: Never imported by name: with it, ruamel.yaml is faster.
SPEED_UP = "ruamel-yaml-clib"

#: Runs `nonn` where importing anything of the pipeline fails, as on a device.
WITHOUT = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {(*PIPELINE, "snakemake")!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from nonn.cli import main
"""


def run_without(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"{WITHOUT}main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def test_the_conda_environment_is_that_of_the_pipeline():
    listed = YAML(typ="safe").load(REPOSITORY / "workflow/envs/nonn.yaml")["dependencies"][-1]["pip"]
    assert listed == sorted(PROJECT["dependencies"] + EXTRAS["pipeline"])


def test_every_dependency_is_pinned():
    wanted = names(PROJECT["dependencies"] + EXTRAS["pipeline"] + EXTRAS["dev"]) - {"nonn"}
    assert wanted - {canonicalize_name(entry.partition("==")[0]) for entry in locked("requirements.lock")} == set()


def locked(name: str) -> dict[str, list[str]]:
    """Lines of hashes of each pinned version, with the systems that it is for."""
    entries: dict[str, list[str]] = {}
    for line in (REPOSITORY / name).read_text().splitlines():
        if line.startswith(" "):
            entries[next(reversed(entries))].append(line.strip(" \\"))
        else:
            entries[line.removesuffix(" \\")] = []
    return entries


def test_every_pinned_file_has_its_hash():
    for name in ("requirements.lock", "requirements-device.lock"):
        entries = locked(name)
        assert len(entries) > 20
        for version, hashes in entries.items():
            assert "==" in version
            assert hashes, version
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), version


def test_a_device_installs_the_same_versions_and_nothing_of_the_pipeline():
    device, everything = locked("requirements-device.lock"), locked("requirements.lock")
    versions = {entry.partition(" ;")[0] for entry in everything}
    assert {entry.partition(" ;")[0] for entry in device} <= versions
    pinned = {canonicalize_name(re.split(r"\[|==", entry)[0]) for entry in device}
    assert names(PROJECT["dependencies"]) - pinned == set()
    assert pinned & names(EXTRAS["pipeline"]) == set()


def test_the_command_knows_what_only_the_pipeline_imports():
    """Each of its names belongs to a package of the extra; snakemake is a command, never imported."""
    assert providers(PIPELINE) == names(EXTRAS["pipeline"]) - {"snakemake", SPEED_UP}


def test_the_command_knows_what_every_installation_imports():
    assert providers(BASE) == names(PROJECT["dependencies"])


def test_the_command_knows_what_a_comparison_of_partitions_imports():
    imported = {"sklearn": "scikit-learn"}
    assert {imported.get(module, module) for module in PARTITIONS} == names(EXTRAS["partitions"])


def providers(modules: tuple[str, ...]) -> set[str]:
    """The package of each module, the dependency where several share a name, as those of `ruamel` do."""
    distributions = packages_distributions()
    wanted = names(PROJECT["dependencies"] + EXTRAS["pipeline"]) - {SPEED_UP}
    found = [set(map(canonicalize_name, distributions[module])) & wanted for module in modules]
    assert all(found), dict(zip(modules, found, strict=True))
    return set().union(*found)


def test_a_stage_says_what_to_install(folder):
    (folder / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    done = run_without("teacher")
    assert done.returncode == 1
    assert done.stderr == f"nonn teacher: {how_to_install('torch')}\n"


def test_what_to_install_works_from_where_the_user_stands(monkeypatch):
    monkeypatch.setattr("sys.prefix", "/home/pi/.venv")
    assert how_to_install("torch.nn") == (
        "torch is not installed: this command needs the packages of the pipeline. "
        f"Run: {sys.executable} -m pip install -e '{REPOSITORY}[pipeline]'"
    )
    monkeypatch.setattr("sys.prefix", sys.base_prefix)  # no virtual environment: pip refuses there
    assert how_to_install("grpc") == (
        f"grpc is not installed: this command needs the packages of nonn. In {REPOSITORY}, run: "
        "python3 -m venv .venv && .venv/bin/pip install -e '.'. Then call .venv/bin/nonn."
    )
    monkeypatch.setattr("nonn.core.install.__file__", "/usr/lib/python3/site-packages/nonn/core/install.py")
    assert "In a clone of the repository, run: python3 -m venv .venv && " in how_to_install("torch")
    assert how_to_install("nonsense") is how_to_install(None) is None


def test_what_came_from_a_wheel_is_completed_from_the_wheel(monkeypatch):
    monkeypatch.setattr("sys.prefix", "/home/pi/.venv")
    monkeypatch.setattr("nonn.core.install.__file__", "/home/pi/.venv/lib/site-packages/nonn/core/install.py")
    noted = '{"url": "file:///home/pi/my%20files/nonn-0.1.0-py3-none-any.whl", "archive_info": {}}'
    monkeypatch.setattr("importlib.metadata.PathDistribution.read_text", lambda *_: noted)
    wheel = "'/home/pi/my files/nonn-0.1.0-py3-none-any.whl[pipeline]'"
    assert how_to_install("torch").endswith(f" Run: {sys.executable} -m pip install {wheel}")


@pytest.mark.parametrize("path", ["README.md", "docs", "nonn", "workflow"])
def test_nothing_advises_a_name_on_the_registry_that_is_not_ours(path):
    place = REPOSITORY / path
    for file in [place, *place.rglob("*")]:
        if file.suffix in (".py", ".md", ".yaml"):
            assert not re.search(r"pip install [\"']?nonn\b", file.read_text()), file


def test_a_32_bit_python_is_refused():
    require_64_bit(2**63 - 1)
    with pytest.raises(UserError, match=r"^this Python is a 32-bit program \(armv7l\).* the 64-bit Raspberry Pi OS\.$"):
        require_64_bit(2**31 - 1, "armv7l")


def test_a_32_bit_python_ends_in_one_line():
    code = "import sys; sys.maxsize = 2**31 - 1; from nonn.cli import main; main(['check'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr.startswith("nonn check: this Python is a 32-bit program (")
    assert len(done.stderr.splitlines()) == 1


def test_another_missing_module_is_a_fault_and_looks_like_one(monkeypatch):
    monkeypatch.setitem(COMMANDS, "check", ("begin", "nonsense", "Check."))
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        main(["check"])


def test_a_cluster_is_described_certified_and_checked(folder, network_folder):
    (folder / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    (folder / "results/mnist5k/export").mkdir(parents=True)
    (folder / "results/mnist5k/export/2s").symlink_to(network_folder)
    for command in (["check"], ["cluster", "2s"], ["certs", "certs", "coordinator", "node-0"]):
        done = run_without(*command)
        assert done.returncode == 0, done.stderr
    assert Path("cluster.yaml").is_file()
    assert Path("certs/node-0.key").is_file()


def test_an_image_is_classified(folder, network_folder):
    Image.fromarray(make_image()[0]).save("image.png")

    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(plain_node(network_folder, i)) for i in range(3)]
            write_cluster(folder / "cluster.yaml", cluster_of(network_folder, [address for address, _ in nodes]))
            return await asyncio.to_thread(run_without, "predict", "image.png", "--cluster", "cluster.yaml")

    done = asyncio.run(scenario())
    assert done.returncode == 0, done.stderr
    assert "of the lead" in done.stdout


ON_DEVICES = [f"runtime.{name}" for name in ("node", "certs", "cluster", "hosting", "predict")]
ON_DEVICES += [
    "live.coordinate",
    "live.demo",
    "live.up",
    "live.web",
    "split.node",
    *(f"testbed.{name}" for name in ("fuzz", "soak", "links")),
]


@pytest.mark.parametrize("module", ON_DEVICES)
def test_what_runs_on_devices_imports(module):
    command = [sys.executable, "-c", f"{WITHOUT}import nonn.{module}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
