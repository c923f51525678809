"""Networks of torchvision, of timm and of the user's own code, built by their name in ``teacher.source``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nonn.core.errors import UserError, one_line, printable
from nonn.core.params import TeacherParams
from nonn.core.schema import did_you_mean
from nonn.core.teacher_source import CODE_PLACES
from nonn.teachers.preprocessing import IMAGENET, Moments

#: Mean and deviation that turn pixels from 0 to 1 into values from -1 to 1.
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Built:
    """A network, and what its library says of it."""

    network: nn.Module
    moments: Moments | None = None  # of the images that it was trained on, pixels from 0 to 1
    classes: tuple[str, ...] | None = None  # of its outputs, where it comes with weights


def build_network(
    params: TeacherParams,
    channels: int,
    size: int,
    n_outputs: int,
    weights: Mapping[str, Tensor] | None,
    download: bool,
) -> Built:
    """The network of a source, with `n_outputs` outputs.

    Networks for images of a fixed size are made for `size` pixels a side. timm's are made for as many channels as the
    first layer of `weights` has, by default 3. With `download`, the network has the library's own weights and number of
    outputs.
    """
    kind, name = params.kind, params.target
    if kind == "module":
        return Built(_call_factory(params))
    build = {"torchvision": _build_torchvision, "timm": _build_timm}[kind]
    try:
        return build(name, channels, size, n_outputs, weights, download)
    except (OSError, ConnectionError) as error:
        raise UserError(
            f"params.yaml: teacher.weights: null takes the weights that {kind} downloads for {name}, and the download "
            f"failed ({one_line(error)}). Connect to the network, or name a file of weights."
        ) from None
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"params.yaml: teacher.source: {params.source} cannot be built ({one_line(error)}).") from None


def _build_torchvision(
    name: str, _channels: int, size: int, n_outputs: int, weights: Mapping[str, Tensor] | None, download: bool
) -> Built:
    from torchvision import models

    # These two can turn images normalised as ImageNet's into values from -1 to 1 themselves. They have auxiliary
    # classifiers, which a file of weights may leave out.
    is_inception = name in ("googlenet", "inception_v3")

    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    published: Any = models.get_model_weights(name)
    if download:
        best = published.DEFAULT
        preset = best.transforms()
        moments = (HALF, HALF) if is_inception else (tuple(preset.mean), tuple(preset.std))
        own = {"transform_input": False} if is_inception else {}
        return Built(models.get_model(name, weights=best, **own), moments, tuple(best.meta["categories"]))
    options: dict[str, Any] = {"num_classes": n_outputs, "weights": None}
    if name.startswith("vit_"):
        options["image_size"] = size
    if is_inception:
        has_auxiliary = weights is None or any("aux" in key.lower() for key in weights)
        options |= {"init_weights": False, "aux_logits": has_auxiliary}
    return Built(models.get_model(name, **options), IMAGENET)


def _build_timm(
    name: str, channels: int, size: int, n_outputs: int, weights: Mapping[str, Tensor] | None, download: bool
) -> Built:
    try:
        import timm
    except ImportError:
        raise UserError(
            f"params.yaml: teacher.source: timm:{name} needs timm. Install it: `pip install timm`."
        ) from None
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    options: dict[str, Any] = {} if download else {"num_classes": n_outputs}
    config = timm.get_pretrained_cfg(name)
    first = config.first_conv if config else None
    named = [n for n, t in (weights or {}).items() if f".{n}".endswith(f".{first}.weight") and t.dim() > 1]
    if weights and named:  # of names that end alike, the first convolution's has least before it
        options["in_chans"] = weights[min(named, key=len)].shape[1]
    elif not download and weights is None:
        options["in_chans"] = channels
    if config and config.fixed_input_size:
        options["img_size"] = size
    network = timm.create_model(name, pretrained=download, **options)
    return Built(network, (tuple(config.mean), tuple(config.std)) if config else IMAGENET, _labels(config, download))


def _labels(config: Any, download: bool) -> tuple[str, ...] | None:
    return tuple(config.label_names) if download and config and config.label_names else None


def _unknown(library: str, name: str, known: list[str]) -> UserError:
    return UserError(
        f"params.yaml: teacher.source: {library} has no classifier {name!r}{did_you_mean(name, known)}. Take one of "
        f"`{library}`'s own names."
    )


def find_code(source: str) -> Path:
    """File of the module of a source ``module:PACKAGE.FILE:FACTORY``, which is not run."""
    name = source.split(":")[1]
    folder = str(Path.cwd())
    if folder not in sys.path:  # as it is with `python -m nonn`
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"params.yaml: teacher.source: {source}: {one_line(error)}. {CODE_PLACES}") from None
    except (Exception, SystemExit) as error:  # the user's package may raise anything, and end the program
        raise _failed(source, error) from None
    if spec is None or not spec.origin:
        raise UserError(f"params.yaml: teacher.source: {source}: there is no module {name}. {CODE_PLACES}")
    return Path(spec.origin)


def digest_code(source: str) -> str:
    """SHA-256 of the code that a module's source names: of its file, and of a package all files of code."""
    path, (package, *below) = find_code(source), source.split(":")[1].split(".")
    files = [path]
    if below or path.name == "__init__.py":
        top = path.parents[len(below) - (path.name != "__init__.py")] if below else path.parent
        files = sorted(top.rglob("*.py")) if top.name == package else files
    digest = sha256()
    for file in files:
        digest.update(sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _call_factory(params: TeacherParams) -> nn.Module:
    source, known_before = params.source, set(sys.modules)
    name, factory = source.split(":")[1:]
    find_code(source)
    try:
        make = getattr(importlib.import_module(name), factory, None)
        network = make() if callable(make) else None
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and end the program
        raise _failed(source, error) from None
    if make is None:
        known = [n for n, v in vars(sys.modules[name]).items() if inspect.isroutine(v) or inspect.isclass(v)]
        raise UserError(
            f"params.yaml: teacher.source: {source}: module {name} has no {factory!r}{did_you_mean(factory, known)}. "
            "Name a function there that returns the network."
        )
    if not isinstance(network, nn.Module):
        raise UserError(
            f"params.yaml: teacher.source: {source} returns a {type(network).__name__}, not an nn.Module. Name a "
            "function that returns the network."
        )
    _check_watched(params, set(sys.modules) - known_before)
    return network


def _check_watched(params: TeacherParams, imported: set[str]) -> None:
    """Refuse code below the working directory that the source imports, and whose changes would run no stage again."""
    folder = Path.cwd()
    watched = [folder / path for path in params.files]
    modules = [sys.modules[name] for name in imported & sys.modules.keys() if name.partition(".")[0] != "nonn"]
    for path in sorted({Path(file) for module in modules if (file := getattr(module, "__file__", None))}):
        is_library = path.is_relative_to(sys.prefix) or "site-packages" in path.parts
        if path.is_relative_to(folder) and not is_library and not any(path.is_relative_to(place) for place in watched):
            raise UserError(
                f"params.yaml: teacher.source: {params.source} imports {printable(path.relative_to(folder))}, which is "
                "not watched. Put all its code into one package in the working directory: module:PACKAGE.FILE:FACTORY."
            )


def _failed(source: str, error: BaseException) -> UserError:
    return UserError(
        f"params.yaml: teacher.source: {source} fails ({type(error).__name__}: {one_line(error)}). Mend that code."
    )


def input_channels(network: nn.Module) -> int | None:
    """Channels of the images that the first convolution takes; None if there is no convolution."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return first.in_channels if first else None
