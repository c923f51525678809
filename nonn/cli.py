"""The command ``nonn``: one subcommand a stage, and what a user does with the results.

Stages are normally run by ``snakemake`` or ``dvc repro``, which know what is stale; each can also
be run by hand. Modules are imported only when their command runs, so that help is instant.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nonn import __version__
from nonn.core.errors import UserError

OVERVIEW = """\
Network of Neural Networks: split one large image classifier into small students, one a device.

  make reproduce            set up everything and run the experiment of params.yaml
  snakemake --cores 2       run what is stale, independent stages in parallel
  dvc repro                 the same, one stage after another
  nonn predict IMAGE        classify an image with the trained network
  nonn cluster NETWORK      describe its devices in cluster.yaml; nonn up runs them on this machine

Stages, in order (the pipeline calls them; `nonn STAGE --help` says more):
  dataset  teacher  signals  graph  design  partition  distill  assemble
  baseline  evaluate  export  benchmark  distributed  figures
"""

#: Stage: what it does, and the kind of item that it takes.
STAGES = {
    "dataset": ("read or download the images and split them", None),
    "teacher": ("train or import the teacher", None),
    "signals": ("run the teacher once over all augmented views", None),
    "graph": ("build the graph of the teacher's filters", None),
    "design": ("choose the students' sizes and architectures from the budgets", "NETWORK"),
    "partition": ("share the filters out among the students", "NETWORK"),
    "distill": ("train one student with one seed", "NETWORK/STUDENT"),
    "assemble": ("join a network's students by a final layer", "NETWORK"),
    "baseline": ("train one baseline with one seed", "NETWORK/METHOD"),
    "evaluate": ("score everything on the test images", None),
    "export": ("write ONNX files and score them again", "NETWORK or solo"),
    "benchmark": ("measure latency and memory of the exported models", "NETWORK or solo"),
    "distributed": (
        "run the devices together over emulated links, and split networks for comparison",
        "NETWORK or solo",
    ),
    "figures": ("draw figures and write tables from the results", None),
}
#: Commands that run an exported network, and the module of each.
RUNTIME = {name: f"runtime.{name}" for name in ("node", "coordinate", "certs", "cluster", "hosting")}
RUNTIME |= {"up": "live.up", "split": "split.planner", "split-node": "split.node"}
RUNTIME |= {name: f"testbed.{name}" for name in ("fuzz", "soak", "links")}
#: What only the pipeline imports, as it is imported: a device has none of it.
PIPELINE = ("dvc", "matplotlib", "mlxtend", "networkx", "onnx", "onnxscript", "pandas", "scipy", "torch", "torchvision")
SEEDED = ("distill", "assemble", "baseline")


def natural(text: str) -> int:
    """A whole number from 0 on; what else an argument may say is refused by `argparse`."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0; give 0 or more")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nonn", description=OVERVIEW, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"nonn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage, (summary, item) in STAGES.items():
        command = commands.add_parser(stage, help=summary, description=f"Stage {stage}: {summary}.")
        if item:
            command.add_argument("item", metavar=item, help="as named in params.yaml")
        if stage in SEEDED:
            command.add_argument("--seed", type=int, required=True)
    commands.add_parser("check", help="check params.yaml and stop")
    predict = commands.add_parser("predict", help="classify an image with the trained network")
    predict.add_argument("image", type=Path)
    source = predict.add_mutually_exclusive_group()
    source.add_argument("--network", help="of params.yaml; the first by default")
    source.add_argument("--cluster", type=Path, metavar="FILE", help="ask the nodes of this cluster.yaml instead")
    timeline = commands.add_parser(
        "timeline", help="draw when each job of the last run ran, and how parallel they were"
    )
    timeline.add_argument("--all", action="store_true", help="every job on record, not only the last run")
    share = commands.add_parser("share", help="write the trained teacher to a small file, for others to import")
    share.add_argument("file", type=Path, metavar="FILE.safetensors")
    keep = commands.add_parser("keep", help="copy finished trainings from DVC's cache, for another machine")
    keep.add_argument("folder", type=Path, metavar="FOLDER")
    restore = commands.add_parser("restore", help="put kept trainings into DVC's cache, in place of training again")
    restore.add_argument("folder", type=Path, metavar="FOLDER")
    attempt = commands.add_parser("try", help="train a network or a baseline with changed params, for validation")
    attempt.add_argument("item", metavar="NETWORK[/METHOD]", help="as named in params.yaml")
    attempt.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="in place of params.yaml; repeatable"
    )
    attempt.add_argument("--seed", type=natural, default=0)
    attempt.add_argument("--table", type=Path, metavar="FILE.csv", help="append a row to it")
    add_runtime(commands)
    bench = commands.add_parser("bench", help="measure what the design rests on")
    bench.add_argument("what", choices=["graph", "distill"])
    return parser


def add_runtime(commands) -> None:
    """The commands that run an exported network on devices; see `nonn.runtime`."""
    node = commands.add_parser("node", help="serve one exported student over gRPC")
    node.add_argument("model", type=Path, metavar="MODEL.onnx", help="beside the manifest.json of its export")
    node.add_argument("--address", default="127.0.0.1:7100", help="host:port to listen on (default: %(default)s)")
    add_serving(node)
    node.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics on 127.0.0.1:PORT")
    coordinate = commands.add_parser("coordinate", help="serve a whole network to applications over gRPC")
    coordinate.add_argument(
        "--cluster", type=Path, default=Path("cluster.yaml"), metavar="FILE", help="(default: %(default)s)"
    )
    coordinate.add_argument("--address", default="127.0.0.1:7090", help="host:port to listen on (default: %(default)s)")
    coordinate.add_argument(
        "--allow", action="append", metavar="NAME", help="common name that may call; repeatable (default: application)"
    )
    coordinate.add_argument("--insecure", action="store_true", help="plain text to applications; loopback only")
    coordinate.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics on 127.0.0.1:PORT"
    )
    certs = commands.add_parser("certs", help="make certificates for a test bed")
    certs.add_argument("folder", type=Path)
    certs.add_argument("names", nargs="+", metavar="NAME", help="of a node, or coordinator")
    certs.add_argument("--days", type=int, default=365, help="that they are good for (default: %(default)s)")
    cluster = commands.add_parser("cluster", help="write a cluster.yaml that runs a network on this machine")
    cluster.add_argument("network", metavar="NETWORK", help="as named in params.yaml; exported")
    cluster.add_argument("--output", type=Path, default=Path("cluster.yaml"), help="(default: %(default)s)")
    cluster.add_argument("--port", type=int, default=7100, help="of the first node (default: %(default)s)")
    cluster.add_argument("--deadline-ms", type=float, default=100.0, help="of an image (default: %(default)s)")
    cluster.add_argument("--certs", type=Path, default=Path("certs"), help="folder of `nonn certs`")
    cluster.add_argument("--insecure", action="store_true", help="plain text without certificates")
    up = commands.add_parser("up", help="run all nodes of a cluster on this machine and watch them")
    up.add_argument("--cluster", type=Path, default=Path("cluster.yaml"), metavar="FILE", help="(default: %(default)s)")
    up.add_argument(
        "--web", type=int, nargs="?", const=7080, metavar="PORT", help="serve a live page on 127.0.0.1:PORT (7080)"
    )
    up.add_argument(
        "--images", type=Path, nargs="+", metavar="PATH", help="pictures for the page, files or folders (test images)"
    )
    hosting = commands.add_parser("hosting", help="write a model repository for Triton or OpenVINO Model Server")
    hosting.add_argument("export", type=Path, metavar="FOLDER", help="of an exported network")
    hosting.add_argument("folder", type=Path, metavar="TARGET", help="a new folder")
    fuzz = commands.add_parser("fuzz", help="send hostile messages to a node and a coordinator on this machine")
    fuzz.add_argument("export", type=Path, metavar="FOLDER", help="of an exported network")
    fuzz.add_argument("--messages", type=int, default=100_000, help="at each of the two (default: %(default)s)")
    fuzz.add_argument("--seed", type=natural, default=0)
    soak = commands.add_parser("soak", help="classify on and on while nodes of a cluster on this machine die")
    soak.add_argument("export", type=Path, metavar="FOLDER", help="of an exported network")
    soak.add_argument("--requests", type=int, default=100_000, help="(default: %(default)s)")
    soak.add_argument("--deadline-ms", type=float, default=100.0, help="of an image (default: %(default)s)")
    soak.add_argument("--kill-every", type=float, default=10.0, metavar="S", help="seconds (default: %(default)s)")
    soak.add_argument("--seed", type=natural, default=0)
    links = commands.add_parser("links", help="measure the emulated links against their theory")
    links.add_argument("--link", metavar="NAME", help="only this one, for example wifi20")
    links.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements here")

    split = commands.add_parser("split", help="split one exported model over devices: the baseline of a NoNN")
    split.add_argument("model", type=Path, metavar="MODEL.onnx", help="of the export `solo`")
    split.add_argument("-n", "--devices", type=int, required=True)
    split.add_argument("--method", choices=["channels", "rows"], required=True)
    split.add_argument(
        "--recomputed", type=int, default=0, metavar="K", help="leading convolutions that every device does for itself"
    )
    split.add_argument("--output", type=Path, metavar="FOLDER", help="write the plan there, a folder for each device")
    split_node = commands.add_parser("split-node", help="serve one device's part of a split model over gRPC")
    split_node.add_argument("part", type=Path, metavar="FOLDER/POSITION", help="of a plan that `nonn split` wrote")
    split_node.add_argument(
        "--devices",
        nargs="+",
        required=True,
        metavar="HOST:PORT",
        help="of all devices in order; it listens on its own",
    )
    add_serving(split_node)


def add_serving(command) -> None:
    """What every command that serves something takes."""
    command.add_argument("--cert", type=Path, help="this node's certificate")
    command.add_argument("--key", type=Path, help="its private key")
    command.add_argument("--ca", type=Path, help="certificate of the authority that signs callers")
    command.add_argument(
        "--allow", action="append", metavar="NAME", help="common name that may call; repeatable (default: coordinator)"
    )
    command.add_argument("--insecure", action="store_true", help="plain text without certificates; loopback only")
    command.add_argument("--sensor", type=Path, metavar="FILE.npy", help="images that stand for its camera")
    command.add_argument("--attached", action="store_true", help="stop when standard input closes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit with 1 and one clear message if the user has to mend something."""
    options = build_parser().parse_args(arguments)
    try:
        if options.command in STAGES:
            run_stage(options.command, getattr(options, "item", None), getattr(options, "seed", None))
        else:
            run_tool(options)
    except UserError as error:
        sys.exit(f"nonn {options.command}: {error}")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in PIPELINE:
            raise
        sys.exit(f"nonn {options.command}: this command needs the pipeline: pip install nonn[pipeline]")
    except KeyboardInterrupt:
        sys.exit(130)


def run_stage(stage: str, item: str | None, seed: int | None) -> None:
    """Run one stage on one item, and note in the journal when it ran."""
    from nonn.core.files import STATE, sweep
    from nonn.core.leftovers import remove_leftovers
    from nonn.core.params import load_params
    from nonn.core.paths import Paths

    params = load_params()
    paths = Paths(params.experiment)
    arguments = parse_item(stage, item, params) | parse_seed(stage, item, seed, params)
    sweep()
    remove_leftovers(params, paths)
    start = time.time()
    importlib.import_module(f"nonn.stages.{stage}").run(params, paths, **arguments)
    entry = {"experiment": params.experiment, "stage": stage, "item": item, "seed": seed}
    entry |= {"start": start, "end": time.time()}
    path = STATE / "journal.jsonl"
    is_cut_off = path.exists() and not path.read_bytes().endswith(b"\n")  # by a crash
    with path.open("a") as journal:
        journal.write("\n" * is_cut_off + json.dumps(entry) + "\n")


def parse_item(stage: str, item: str | None, params) -> dict:
    """Keyword arguments of a stage's `run` from an item such as ``2s/0``.

    Raises
    ------
    UserError
        The parameters name no such item.
    """
    if item is None:
        return {}
    if stage in ("design", "partition", "assemble"):
        known = {network: {"network": network} for network in params.networks}
    elif stage in ("export", "benchmark", "distributed"):
        known = {name: {"name": name} for name in [*params.networks, "solo"]}
    elif stage == "distill":
        students = [*params.students, *params.students_once]
        known = {s: {"network": s.split("/")[0], "student": int(s.split("/")[1])} for s in students}
    else:
        known = {f"{n}/{method}": {"network": n, "method": method} for n, method, _ in params.baseline_jobs()}
    if item not in known:
        raise UserError(f"params.yaml: {item!r} is not there; {stage} takes one of {', '.join(known)}.")
    return known[item]


def parse_seed(stage: str, item: str | None, seed: int | None, params) -> dict:
    """Keyword argument of a stage's `run` from a seed, for stages that take one.

    Raises
    ------
    UserError
        The parameters name no such seed: what it trained would be nobody's, and swept away.
    """
    if seed is None:
        return {}
    if stage == "baseline":
        known = next(seeds for network, method, seeds in params.baseline_jobs() if f"{network}/{method}" == item)
    else:
        known = params.seeds_of(item.split("/")[0])
    if seed not in known:
        listed, remedy = ", ".join(map(str, known)), "add it to `seeds`"
        if seed in params.seeds:
            remedy = "move it from `…_once` to the list with all `seeds`"
        raise UserError(f"params.yaml: {item} has no seed {seed}, but {listed}; {remedy}.")
    return {"seed": seed}


def run_tool(options: argparse.Namespace) -> None:
    from nonn.core.params import load_params

    if options.command in RUNTIME:
        importlib.import_module(f"nonn.{RUNTIME[options.command]}").run(options)
        return
    if options.command == "bench":
        from nonn.commands.bench import BENCHES

        BENCHES[options.what]()
        return
    if options.command == "try":
        from nonn.commands.attempt import run

        run(options.item, options.set, options.seed, options.table)
        return
    if options.command in ("keep", "restore"):
        from nonn.commands import keep

        {"keep": keep.keep, "restore": keep.restore}[options.command](options.folder)
        return
    if options.command == "predict" and options.cluster:
        from nonn.runtime.coordinator import run

        run(options.image, options.cluster)
        return
    params = load_params()
    if options.command == "check":
        n_students = sum(map(len, params.networks.values()))
        print(f"params.yaml is sound: experiment {params.experiment}, {n_students} students.")
    elif options.command == "predict":
        from nonn.runtime.predict import run

        run(params, options.image, options.network)
    elif options.command == "share":
        from nonn.commands.share import run
        from nonn.core.paths import Paths

        run(params, Paths(params.experiment), options.file)
    elif options.command == "timeline":
        from nonn.commands.timeline import run

        run(params, whole=options.all)
