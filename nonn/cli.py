"""The command ``nonn``: a table of names. The options of a command are known to its own module alone.

That module has ``add_arguments(parser)``, which also gives an example, and ``run(options)``. No other
module is imported, so that help is instant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from itertools import groupby

from nonn import __version__
from nonn.core.errors import UserError, refusal

INTRODUCTION = """\
Network of Neural Networks: one small student a device, in place of one large
image classifier.

The whole pipeline, as far as results are stale:
  make reproduce       set up everything and run the experiment of params.yaml
  snakemake --cores 2  the same, independent stages in parallel
  dvc repro            the same, one stage after another
"""
BEGIN, STAGES, DEPLOY = "begin", "run the pipeline by hand, in this order", "deploy"
MEASURE, DEVELOP = "measure", "develop"

#: Name of each command: its group, its module, and what it does.
COMMANDS = {
    "use": (BEGIN, "commands.use", "Make one of the experiments the active one, in params.yaml."),
    "check": (BEGIN, "commands.check", "Check params.yaml for mistakes, without running anything."),
    "jobs": (BEGIN, "commands.jobs", "List the trainings that params.yaml asks for, for DVC."),
    "predict": (BEGIN, "runtime.predict", "Classify an image with the trained students."),
    "dataset": (STAGES, "commands.stage", "Read or download the images, and split off some for the test."),
    "teacher": (STAGES, "commands.stage", "Train or import the teacher, the one large network."),
    "signals": (STAGES, "commands.stage", "Run the teacher once over all augmented images."),
    "graph": (STAGES, "commands.stage", "Build the graph of the teacher's filters that act together."),
    "design": (STAGES, "commands.stage", "Choose each student's architecture by the budgets of its device."),
    "partition": (STAGES, "commands.stage", "Share the teacher's filters out among the students."),
    "distill": (STAGES, "commands.stage", "Train one student to imitate its share of the teacher."),
    "assemble": (STAGES, "commands.stage", "Join the students of a network by a final layer."),
    "baseline": (STAGES, "commands.stage", "Train one network in another way, to compare the students with."),
    "evaluate": (STAGES, "commands.stage", "Score everything on the test images."),
    "export": (STAGES, "commands.stage", "Write a network as ONNX files for devices, and score those again."),
    "benchmark": (STAGES, "commands.stage", "Measure latency and memory of exported models."),
    "distributed": (STAGES, "commands.stage", "Run devices together over emulated links, and measure latency."),
    "figures": (STAGES, "commands.stage", "Draw figures and write tables from the results."),
    "cluster": (DEPLOY, "runtime.cluster", "Write cluster.yaml, which says where each student runs."),
    "certs": (DEPLOY, "runtime.certs", "Make the certificates by which devices know each other."),
    "up": (DEPLOY, "live.up", "Run all nodes of a cluster on this machine and watch them."),
    "node": (DEPLOY, "runtime.node", "Serve one exported student on this device, over gRPC."),
    "coordinate": (DEPLOY, "runtime.coordinate", "Serve a whole network to applications, over gRPC."),
    "hosting": (DEPLOY, "runtime.hosting", "Write the students for Triton or OpenVINO Model Server."),
    "links": (MEASURE, "testbed.links", "Measure delay and rate of the emulated links beside their theory."),
    "split": (MEASURE, "split.planner", "Split one exported model over devices, to compare students with."),
    "split-node": (MEASURE, "split.node", "Serve one device's part of a split model, over gRPC."),
    "soak": (MEASURE, "testbed.soak", "Classify on and on while nodes are killed, and count answers."),
    "fuzz": (MEASURE, "testbed.fuzz", "Send hostile messages to a node and a coordinator."),
    "torture": (MEASURE, "commands.torture", "Kill stages, damage files, and compare what comes of it."),
    "timeline": (MEASURE, "commands.timeline", "Draw when each stage of the last run ran, side by side."),
    "try": (DEVELOP, "commands.attempt", "Train with changed params, and score on the validation images."),
    "verify": (DEVELOP, "commands.verify", "Look whether DVC's cache still holds what its names say."),
    "share": (DEVELOP, "commands.share", "Write the trained teacher to a small file, for others to import."),
}
#: What only the pipeline imports, as it is imported: a device has none of it.
PIPELINE = (
    *("dvc", "jinja2", "matplotlib", "mlxtend", "networkx", "onnx", "onnxscript", "pandas", "scipy"),
    *("torch", "torchvision"),
)
#: Parameters that decide how much memory the stages take.
GREEDY = "dataset.size, signals.views, teacher.architecture or batch_size"


def overview() -> str:
    """What the project is, and all commands by their groups."""
    lines = [INTRODUCTION]
    for group, names in groupby(COMMANDS, lambda name: COMMANDS[name][0]):
        lines += [f"{group}:", *(f"  {name:<12}{COMMANDS[name][2]}" for name in names), ""]
    return "\n".join(lines)


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
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = parser.parse_args(arguments[:1]).command
    try:
        run_command(command, arguments[1:])
    except UserError as error:
        sys.exit(f"nonn {command}: {error}")
    except ModuleNotFoundError as error:
        if (package := str(error.name).partition(".")[0]) not in PIPELINE:
            raise
        sys.exit(
            f"nonn {command}: {package} is not installed: this command needs the packages of the pipeline. "
            "In a clone of the repository, run: pip install -e '.[pipeline]'"
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of whoever reads what is printed, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if (told := refusal(error)) is None:
            raise
        sys.exit(f"nonn {command}: {told}")
    except Exception as error:
        if not is_shortage(error):
            raise
        sys.exit(f"nonn {command}: this machine has too little memory for it. Close other programs, or lower {GREEDY}.")


def is_shortage(error: BaseException) -> bool:
    """Whether memory was refused: PyTorch, which is not imported here, says so in an error of another type."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def run_command(command: str, arguments: Sequence[str]) -> None:
    _, name, summary = COMMANDS[command]
    module = importlib.import_module(f"nonn.{name}")
    parser = argparse.ArgumentParser(prog=f"nonn {command}", description=summary)
    parser.set_defaults(command=command)  # for a module of several commands
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments))
