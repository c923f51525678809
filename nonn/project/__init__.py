"""The workflow that comes with the package, for projects outside of a clone: see `nonn.commands.project`.

In a clone these are links to its files, which a wheel holds in their place.
"""

from pathlib import Path

#: Rules, experiments and profiles; and what is ``dvc.yaml`` in a clone, by a name that DVC does not look for.
WORKFLOW, STAGES = Path(__file__).parent / "workflow", Path(__file__).parent / "stages.yaml"
#: What a project begins with, by its path there.
SETTINGS = {
    ".dvc/config": Path(__file__).parent / "dvc_config",
    ".dvcignore": Path(__file__).parent / "dvcignore",
    ".gitignore": Path(__file__).parent / "gitignore",
}
