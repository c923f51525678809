"""Files in folders of pictures that are not pictures, recognised by name alone: no file is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

#: Suffixes of files that are not pictures, in small letters.
CLUTTER_SUFFIXES = frozenset(
    (
        *(".csv", ".db", ".doc", ".docx", ".htm", ".html", ".ini", ".ipynb", ".json", ".jsonl", ".lnk", ".log", ".m"),
        *(".mat", ".md", ".npy", ".npz", ".parquet", ".pdf", ".pickle", ".pkl", ".py", ".rst", ".rtf", ".sh"),
        *(".sha256", ".tsv", ".txt", ".url", ".xls", ".xlsx", ".xml", ".yaml", ".yml"),
    )
)
#: Folders that operating systems and network drives leave among pictures.
CLUTTER_FOLDERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information")
)
#: What files in a folder whose name begins with a dot are counted as.
HIDDEN = "in hidden folders"
CLUTTER_NAMES = frozenset(("desktop.ini", "license", "licence", "makefile", "readme", "thumbs.db"))


def sort_out(names: Iterable[str]) -> tuple[list[str], Counter]:
    """The names without hidden files and files that are not pictures, and how many of the others there are.

    They are counted by suffix, those in hidden folders as `HIDDEN`. A file of an unknown suffix, or of none, may be a
    picture: reading it will tell.
    """
    kept, passed = [], Counter[str]()
    for name in names:
        path, is_folder = PurePosixPath(name), name.endswith("/")
        folder = path.parts if is_folder else path.parts[:-1]
        if any(part.startswith(".") or part.lower() in CLUTTER_FOLDERS for part in folder):
            is_hidden = not any(part.lower() in CLUTTER_FOLDERS for part in folder) and not is_folder
            passed.update([HIDDEN] * is_hidden)
            continue
        is_clutter = path.suffix.lower() in CLUTTER_SUFFIXES or path.name.lower() in CLUTTER_NAMES
        if is_folder or not (is_clutter or path.name.startswith(".")):
            kept.append(name)
            continue
        if folder:  # it may hold nothing else
            kept.append("/".join(folder) + "/")
        if not path.name.startswith("."):
            passed[path.suffix.lower() or path.name] += 1
    return kept, passed
