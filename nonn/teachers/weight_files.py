"""Reading state dicts of any origin: the format of the file, where in it the weights are, prefixes of their names.

No pickled code is ever run: files are read with ``weights_only``, and what that refuses is named.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nonn.core.errors import UserError, printable
from nonn.core.files import regular, sha256_of
from nonn.core.params import TeacherParams
from nonn.core.progress import log
from nonn.data.tensors import read_tensors

#: Where checkpoints hold averaged weights, and where those of the last step.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
PLAIN = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "shadow_params")
#: Parts of the names of tensors whose shape depends on the size of images, as transformers have them.
SIZE_DEPENDENT = ("pos_embed", "relative_position", "attn_mask")
#: Tensors of averaged models that are no weights.
COUNTERS = ("n_averaged", "module.n_averaged")

#: What else checkpoints hold: the options of a training, and numbers of numpy.
_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    _SCALAR,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),
]

REMEDY = "Save `model.state_dict()` and name that file in teacher.weights."


def read_weights(params: TeacherParams) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by name from the file `teacher.weights`, and the options of the training where the file holds them.

    Raises
    ------
    UserError
        There is no such file, it is another one than ``weights_sha256`` says, or it holds no state dict.
    """
    path = Path(str(params.weights))
    if not path.exists():
        raise UserError(f"{path}: no such file. Mend teacher.weights in params.yaml, or set it to null to train.")
    check_sum(path, params)
    content = _load(path)
    weights = select_weights(content, path, params.ema)
    check_kinds(weights, path)
    check_finite(weights, path)
    options = content.get("args") if isinstance(content, dict) else None
    return weights, dict(vars(options)) if isinstance(options, argparse.Namespace) else {}


def check_sum(path: Path, params: TeacherParams) -> None:
    """Refuse another file than ``weights_sha256`` says, and what is not a regular file; FileNotFoundError if absent."""
    if params.weights_sha256 not in (None, found := sha256_of(regular(path))):
        raise UserError(
            f"params.yaml: teacher.weights_sha256: {path} has SHA-256 {found}, not {params.weights_sha256} as stated. "
            "Fetch the right file, or correct the key."
        )


def _load(path: Path) -> Any:
    if reason := foreign_format(path):
        raise UserError(f"{path}: {reason}; not a readable state dict for teacher.weights.")
    with path.open("rb") as file:
        start = file.read(9)
    is_saved_by_torch = start.startswith((b"PK", b"\x80"))  # whatever the file is called
    if start[8:] == b"{" or (path.suffix == ".safetensors" and not is_saved_by_torch):
        try:
            return read_tensors(path)
        except UserError:
            raise UserError(f"params.yaml: teacher.weights: {path} is damaged. Fetch or save it again.") from None
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickles than its own
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged data, torch raises almost anything
        text = str(error)
        if "Unsupported global: GLOBAL " in text:
            name = text.partition("Unsupported global: GLOBAL ")[2].split()[0]
            reason = f"a pickle that needs code ({printable(name)}), which could be any, not a readable state dict"
            raise UserError(f"{path}: {reason}. {REMEDY}") from None
        if isinstance(error, EOFError | IndexError) or "unexpected EOF" in text:
            raise UserError(f"{path}: is cut off or damaged. Fetch or save it again.") from None
        raise UserError(f"{path}: not a readable state dict. {REMEDY}") from error


def foreign_format(path: Path) -> str | None:
    """What a file is that cannot be a state dict, and what to do; None if it may be one."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "is empty; fetch or save it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, the file itself is missing; run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, as a failed download leaves it; fetch the file again"
    if start.startswith(b"\x89HDF"):
        return "is an HDF5 file, as Keras writes it; export the model to ONNX and set teacher.source to onnx:FILE"
    if path.suffix == ".onnx":
        return f"is an ONNX file; set teacher.source to onnx:{path} and teacher.weights to null"
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            return "is a damaged zip; fetch or save it again"
        if any(name.endswith("models/model.json") for name in names):
            return f"is an exported program; set teacher.source to export:{path} and teacher.weights to null"
        if any("/code/" in name for name in names):
            return "is a TorchScript archive; save the state dict of the model that was scripted"
    elif start.startswith(b"PK"):
        return "is cut off or damaged; fetch or save it again"
    return None


def select_weights(content: Any, path: Path, ema: bool) -> dict[str, Tensor]:
    """The state dict in the content of a file; of averaged weights and those of the last step, those that `ema` says.

    Raises
    ------
    UserError
        There is none, or several whose names do not tell which to take.
    """
    state_dicts = dict(_state_dicts(content, ""))
    if not state_dicts:
        raise UserError(f"{path}: holds no state dict. {REMEDY}")
    averaged = [name for name in state_dicts if any(part in AVERAGED for part in name.split("."))]
    plain = [name for name in state_dicts if name not in averaged]
    usual = [name for name in plain if name == "" or name.split(".")[-1] in PLAIN]
    preferred = (averaged or usual or plain) if ema else (usual or plain or averaged)
    if len(preferred) > 1 and preferred is plain:
        raise UserError(
            f"{path}: holds several state dicts ({', '.join(map(repr, plain[:4]))}). Save the teacher's alone: "
            "`torch.save(checkpoint[NAME], FILE)`, and name that file in teacher.weights."
        )
    chosen = min(preferred, key=lambda name: _rank(name))
    if averaged and plain:
        kind, other = ("averaged weights", "false") if chosen in averaged else ("weights of the last step", "true")
        log(f"{path}: takes the {kind} ({chosen or 'top level'}); teacher.ema: {other} takes the others")
    return {name: tensor for name, tensor in state_dicts[chosen].items() if name not in COUNTERS}


def _rank(name: str) -> int:
    last = name.split(".")[-1]
    order = [*AVERAGED, *PLAIN]
    return order.index(last) if last in order else -1


def _state_dicts(content: Any, name: str, depth: int = 0) -> Iterable[tuple[str, dict[str, Tensor]]]:
    """State dicts at any depth up to three, by their dotted names."""
    if not isinstance(content, Mapping) or depth > 3:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors and any(value.dim() for value in tensors.values()) and len(tensors) == len(content):
        yield name, tensors
        return
    for key, value in content.items():
        if isinstance(key, str) and "optimizer" not in key:
            yield from _state_dicts(value, f"{name}.{key}".removeprefix("."), depth + 1)


def check_kinds(weights: Mapping[str, Any], path: Path | str) -> None:
    """Refuse entries that are not tensors, and tensors without values, sparse or complex."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            kind: str | None = f"is no tensor ({type(tensor).__name__})"
        elif is_lazy(tensor):
            raise UserError(f"{path}: {printable(name)} has no size before the first image. Give its layer a size.")
        else:
            kind = "has no values (device meta)" if tensor.is_meta else None
            kind = "is sparse" if tensor.layout is not torch.strided else kind
            kind = "is complex" if tensor.is_complex() else kind
        word = "tensor" if isinstance(tensor, Tensor) else "entry"
        if kind:
            raise UserError(f"{path}: the {word} {printable(name)} {kind}. Save its weights as dense float tensors.")


def check_finite(weights: Mapping[str, Tensor], path: Path | str) -> None:
    """Refuse weights that are NaN or infinite, as a training that diverged leaves them."""
    broken = [
        name for name, t in weights.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())
    ]
    if broken:
        raise UserError(
            f"{path}: NaN or infinite values in {len(broken)} of {len(weights)} tensors, such as {broken[0]}: its "
            "training has diverged, or the file is damaged. Take an earlier checkpoint."
        )


def strip_prefixes(weights: dict[str, Tensor], expected: Collection[str], path: Path) -> dict[str, Tensor]:
    """The weights under the names that a model expects, without what wrappers put before each of them.

    The prefix is taken that most of the expected names have. Tensors of the wrapper outside the model, such as the
    weights of a loss, are left out, and a line says so. A UserError names several prefixes that are equally good.
    """
    starts = ((name, start) for name in weights for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))))
    counts = Counter(name[:start] for name, start in starts if name[start:] in expected)
    most = max(counts.values(), default=0)
    best = sorted(prefix for prefix, count in counts.items() if count == most)
    if 2 * most <= len(expected) or "" in best:
        return weights
    if len(best) > 1:
        raise UserError(
            f"{path}: holds several networks ({', '.join(map(repr, best[:4]))}). Save the teacher's weights alone, and "
            "name that file in teacher.weights."
        )
    inner = {n.removeprefix(best[0]): t for n, t in weights.items() if n.startswith(best[0])}
    others = f"; {n} others are left out" if (n := len(weights) - len(inner)) else ""
    log(f"{path}: takes the tensors whose names begin with {printable(best[0])}{others}")
    return inner


class Mismatch(NamedTuple):
    """Names by which weights differ from those that a model expects, each list sorted."""

    missing: list[str]
    unknown: list[str]
    misshapen: list[str]

    @classmethod
    def of(cls, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Mismatch:
        missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
        shared = sorted(expected.keys() & weights.keys())
        return cls(missing, unknown, [name for name in shared if expected[name].shape != weights[name].shape])

    def refusal(self, path: Path | str | None, what: str, remedy: str) -> UserError:
        """`what` is what the model is called in ``params.yaml``."""
        missing, unknown, misshapen = self
        example = printable((missing + unknown + misshapen)[0])
        return UserError(
            f"{path}: does not fit {what} ({len(missing)} tensors missing, {len(unknown)} unknown, {len(misshapen)} of "
            f"another shape, such as {example}). {remedy}"
        )


def fill(model: nn.Module, weights: dict[str, Tensor], path: Path, what: str, head: str | None, n_classes: int) -> None:
    """Load weights into a model, or say in one line what does not fit.

    `what` is what the model is called in ``params.yaml``; `head` the name of its last layer with `n_classes` outputs.
    """
    expected = model.state_dict()
    weights = strip_prefixes(weights, expected, path)
    counters = {n: t for n, t in expected.items() if n.endswith("num_batches_tracked")}
    weights = {**counters, **weights}
    mismatch = Mismatch.of(expected, weights)
    if (misshapen := mismatch.misshapen) and not (mismatch.missing or mismatch.unknown):
        if {n.rpartition(".")[0] for n in misshapen} == {head} and all(weights[n].dim() for n in misshapen):
            raise other_classes(path, len(weights[misshapen[0]]), n_classes)
        if all(any(part in n for part in SIZE_DEPENDENT) for n in misshapen):
            raise UserError(
                f"{path}: does not fit {what}: {printable(misshapen[0])} is for images of another size. Set "
                "teacher.size to what these weights were trained with."
            )
    if head and {n.rpartition(".")[0] for n in mismatch.missing} == {head} and not (mismatch.unknown or misshapen):
        raise UserError(
            f"{path}: has no last layer ({head}). Name a file that has one, or fit one for a network of torchvision or "
            f"timm: `nonn head --start {path}`."
        )
    if any(mismatch):
        raise mismatch.refusal(path, what, "Name the model that these weights were trained with.")
    load_into(model, weights, path)


def load_into(model: nn.Module, weights: dict[str, Tensor], path: Path | str | None) -> None:
    """Load weights of the right names and shapes; a UserError if PyTorch cannot copy them, as quantised ones."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = shorten(str(error).rpartition("occurred : ")[2].strip("(),.'"), 120, placeholder=" …")
        raise UserError(
            f"{path}: PyTorch cannot load it into the network ({reason}). Save its weights as float tensors."
        ) from error


def other_classes(where: Path | str, n_outputs: int, n_classes: int) -> UserError:
    """The teacher has another number of outputs than the data set has classes."""
    return UserError(
        f"{where}: the teacher has {n_outputs} outputs, and {n_classes} classes are expected. "
        f"{remedy_of_outputs(n_outputs, n_classes)}"
    )


def remedy_of_outputs(n_outputs: int | None, n_classes: int | None) -> str:
    """What to do about a last layer of another number of outputs."""
    if (n_outputs, n_classes) == (1, 2):
        return "Give its last layer two outputs, one for each class: a row of zeros, and the one that it has."
    return (
        "Fine-tune its last layer on the classes of the data set, or list the names of all its outputs, in order, in "
        "teacher.classes."
    )
