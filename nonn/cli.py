"""The command ``nonn``: a table of names. The options of a command are known to its own module alone.

That module has ``add_arguments(parser)``, which also gives an example, and ``run(options)``. No other
module is imported, so that help is instant. Completion in a shell goes the same way: the name of a command from
the table, its options from its module.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from nonn import __version__
from nonn.core.errors import UserError, refusal
from nonn.core.install import how_to_install, require_64_bit
from nonn.core.interrupts import tidied_up
from nonn.runtime import HANDSHAKE_TRACE

INTRODUCTION = """\
Network of Neural Networks: one small student on each device instead of one
large image classifier.

The whole pipeline, as far as results are stale:
  make reproduce       set up everything and run the experiment of params.yaml
  snakemake --cores 2  the same, independent stages in parallel
  dvc repro            the same, one stage after another
"""
BEGIN, RUN, DEPLOY = "begin", "run one stage of the pipeline by hand, in this order", "deploy"
MEASURE, DEVELOP = "measure", "develop"

#: Name of each command: its group, its module, and what it does.
COMMANDS = {
    "use": (BEGIN, "commands.use", "Write params.yaml for one of the experiments, and so make it the active one."),
    "new": (BEGIN, "commands.new", "Write an experiment for your own images, teacher and devices, and check it."),
    "check": (BEGIN, "commands.check", "Check params.yaml for mistakes, without running anything."),
    "devices": (BEGIN, "commands.devices", "List the boards of the catalogue: memory, speed, power and sources."),
    "plan": (BEGIN, "commands.plan", "Say what a set of devices would run and how fast, before anything is trained."),
    "demo": (BEGIN, "live.demo", "Run the trained network that comes with the package, and show it at work."),
    "predict": (BEGIN, "runtime.predict", "Classify an image with the trained students."),
    "jobs": (RUN, "commands.jobs", "List the trainings that params.yaml asks for; `dvc repro` needs the list."),
    "dataset": (RUN, "commands.stage", "Read or download the images, and set some aside for the test."),
    "teacher": (RUN, "commands.stage", "Train or import the teacher, the one large network."),
    "signals": (RUN, "commands.stage", "Run the teacher once over all augmented images, and keep its answers."),
    "graph": (RUN, "commands.stage", "Build the graph of the teacher's filters that are active together."),
    "design": (RUN, "commands.stage", "Choose for each student the largest architecture that fits its device."),
    "partition": (RUN, "commands.stage", "Divide the teacher's filters among the students."),
    "distill": (RUN, "commands.stage", "Train one student to imitate its share of the teacher."),
    "assemble": (RUN, "commands.stage", "Join the students of a network by a final layer."),
    "baseline": (RUN, "commands.stage", "Train one network in another way, for comparison."),
    "evaluate": (RUN, "commands.stage", "Measure the accuracy of all networks on the test images."),
    "export": (RUN, "commands.stage", "Write a network as ONNX files for devices, and measure its accuracy again."),
    "benchmark": (RUN, "commands.stage", "Measure the latency and memory of exported models."),
    "distributed": (RUN, "commands.stage", "Run all devices at once over emulated links, and measure latency."),
    "figures": (RUN, "commands.stage", "Draw the figures and write the tables of the results."),
    "emulate": (
        RUN,
        "commands.stage",
        "Build students of microcontrollers as firmware, and run it on emulated ones.",
    ),
    "job": (RUN, "commands.job", "Run one of these stages by its name in dvc.yaml, from the cache if possible."),
    "cluster": (DEPLOY, "runtime.cluster", "Write cluster.yaml, which says where each student runs."),
    "certs": (DEPLOY, "runtime.certs", "Make the certificates by which nodes and coordinator recognise each other."),
    "up": (DEPLOY, "live.up", "Start all nodes of a cluster on this machine and watch them."),
    "node": (DEPLOY, "runtime.node", "Serve one exported student on this device."),
    "board": (DEPLOY, "firmware.emulated_board", "Serve one int8 student as firmware on an emulated microcontroller."),
    "deploy": (DEPLOY, "live.rollout", "Serve a network on boards by SSH and Ansible, and go back if one fails."),
    "health": (DEPLOY, "live.health", "Ask the nodes of a cluster whether they serve their students."),
    "coordinate": (DEPLOY, "live.coordinate", "Serve a whole network to applications."),
    "hosting": (DEPLOY, "runtime.hosting", "Write the students for Triton or OpenVINO Model Server."),
    "firmware": (DEPLOY, "commands.firmware", "Write int8 students as firmware for a microcontroller, and run it."),
    "litert": (DEPLOY, "commands.litert", "Write int8 students as files of LiteRT, and run them in its interpreter."),
    "links": (MEASURE, "testbed.links", "Measure the delay and rate of the emulated links, and compare with theory."),
    "split": (MEASURE, "split.planner", "Split one exported model over several devices, for comparison."),
    "split-node": (MEASURE, "split.node", "Serve one device's part of a split model."),
    "load": (MEASURE, "testbed.load", "Call a node and a coordinator from many callers at once, and count answers."),
    "soak": (MEASURE, "testbed.soak", "Classify many images while nodes are killed, and count the answers."),
    "replace": (MEASURE, "testbed.replacement", "Replace all nodes under requests, one by one, and count those lost."),
    "fuzz": (MEASURE, "testbed.fuzz", "Send malformed messages to a node and a coordinator, and check the replies."),
    "torture": (
        MEASURE,
        "commands.torture",
        "Kill stages and damage files, and compare with undisturbed results.",
    ),
    "timeline": (MEASURE, "commands.timeline", "Draw when each stage of the last run ran."),
    "scaling": (MEASURE, "commands.scaling", "Measure the overhead of a job, as the number of jobs grows."),
    "compare": (MEASURE, "commands.compare", "Say whether the results have the same bytes as the committed ones."),
    "try": (DEVELOP, "commands.attempt", "Train with changed parameters and score on the validation images."),
    "map": (DEVELOP, "commands.map", "Train around an experiment, and say when NoNN is ahead of an ensemble."),
    "probe": (DEVELOP, "commands.probe", "Say how much sets of the teacher's filters know, without any training."),
    "rivals": (DEVELOP, "commands.rivals", "Train SplitNet and the pruned teacher for the same devices, and compare."),
    "relabel": (DEVELOP, "commands.relabel", "Fit a final layer for new labels to few images, and compare."),
    "sweep": (DEVELOP, "commands.sweep", "Run DVC's experiments over values, and compare what their networks need."),
    "partitions": (DEVELOP, "commands.partitions", "Compare ways to link and to divide the teacher's filters."),
    "ship": (DEVELOP, "commands.ship", "Put an exported network into the package, for `nonn demo`."),
    "verify": (DEVELOP, "commands.verify", "Check that the objects of DVC's cache match their hashes."),
    "head": (DEVELOP, "commands.head", "Fit a last layer for your classes to a network of torchvision or timm."),
    "share": (DEVELOP, "commands.share", "Write the trained teacher to a small file, for other experiments to import."),
    "docs": (DEVELOP, "commands.docs", "Write the generated parts of the documentation: parameters and results."),
}
#: Commands that serve gRPC: they say whose handshake has failed; see `nonn.runtime.logs`.
SERVERS = ("node", "board", "coordinate", "split-node")
#: Parameters that decide how much memory the stages take.
GREEDY = "dataset.size, signals.views, teacher.architecture or batch_size"


def overview() -> str:
    """What the project is, and all commands by their groups."""
    lines = [INTRODUCTION]
    for group, names in groupby(COMMANDS, lambda name: COMMANDS[name][0]):
        lines += [f"{group}:", *(f"  {name:<12}{COMMANDS[name][2]}" for name in names), ""]
    return "\n".join(lines)


@contextlib.contextmanager
def ending_with_its_reader() -> Iterator[None]:
    """End quietly where nobody reads any more what is printed, as behind `head`.

    What still waits in the buffer is written here: Python itself would complain of it at its end.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error.__context__, SystemExit):
            raise error.__context__ from None
        sys.exit(128 + signal.SIGPIPE)


@ending_with_its_reader()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit with 1 and one clear message if the user has to mend something."""
    parser = argparse.ArgumentParser(
        prog="nonn",
        usage="nonn COMMAND ...",
        description=overview(),
        epilog="`nonn COMMAND --help` says what a command takes, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nonn {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    if hasattr(sys.stdout, "reconfigure"):  # other encodings than UTF-8 may lack the dash
        sys.stdout.reconfigure(errors="replace")
    if "_ARGCOMPLETE" in os.environ:
        complete(parser)
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = parser.parse_args(arguments[:1]).command
    try:
        require_64_bit()
        with ended_by_interrupts():
            command_parser, run = parser_of(command)
            options = command_parser.parse_args(arguments[1:])
        with tidied_up():
            run(options)
    except UserError as error:
        sys.exit(f"nonn {command}: {error}")
    except ModuleNotFoundError as error:
        if (remedy := how_to_install(error.name)) is None:
            raise
        sys.exit(f"nonn {command}: {remedy}")
    except KeyboardInterrupt as error:
        sys.exit(128 + next(iter(error.args), signal.SIGINT))
    except BrokenPipeError:
        raise
    except OSError as error:
        if (user_error := refusal(error)) is None:
            raise
        sys.exit(f"nonn {command}: {user_error}")
    except Exception as error:
        if (problem := shortage(error)) is None:
            raise
        sys.exit(f"nonn {command}: {problem}. Close other programs, or lower {GREEDY}.")


def shortage(error: BaseException) -> str | None:
    """Message for an out-of-memory error, else None. PyTorch raises its own type, which is not imported here.

    Where the system kills a process of a pool instead, all that is known is that it has gone.
    """
    from concurrent.futures.process import BrokenProcessPool

    if isinstance(error, BrokenProcessPool):
        return "a process of it ended by itself: most often for lack of memory (see `dmesg`)"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "this machine has too little memory for it"
    return None


@contextlib.contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process at once, since a module may turn an interrupted import into any error."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def parser_of(command: str) -> tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], None]]:
    """The parser of a command's own arguments, and what runs it."""
    _, name, summary = COMMANDS[command]
    if command in SERVERS:  # gRPC reads this variable when it is imported
        os.environ.setdefault("GRPC_TRACE", HANDSHAKE_TRACE)
    module = importlib.import_module(f"nonn.{name}")
    parser = argparse.ArgumentParser(prog=f"nonn {command}", description=summary)
    parser.set_defaults(command=command)  # for a module of several commands
    module.add_arguments(parser)
    return parser, module.run


def complete(parser: argparse.ArgumentParser) -> None:
    """Tell the shell how the command line may continue, by the protocol of argcomplete, and exit."""
    import argcomplete

    *_, words, _ = argcomplete.split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    if len(words) > 1 and words[1] in COMMANDS:
        os.environ["_ARGCOMPLETE"] = "2"  # the line, as argcomplete sees it, begins with the second word
        with contextlib.suppress(ModuleNotFoundError):  # of the pipeline, on a device
            parser, _ = parser_of(words[1])
    argcomplete.autocomplete(parser)
