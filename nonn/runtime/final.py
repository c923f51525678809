"""The final layer: linear over the students' feature vectors, in blocks, and defined for every subset of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from nonn.core.errors import UserError
from nonn.runtime.exported import Manifest, read_verified
from nonn.runtime.subsets import Subset, subset_name, subset_of

#: W_i (C, F_i) and the shares b_i (C,) of the bias, by position of the student.
Blocks = dict[int, tuple[np.ndarray, np.ndarray]]


class FinalLayer:
    """The final layer of N students, of which any may be missing.

    The logits of the students in the subset S are

        s_|S| · Σ_{i in S} (W_i f_i + b_i) + Σ_{j not in S} c_j

    unless the subset has a layer of its own, which then takes the place of all this. The fills c_j are spread
    evenly over the students present, so that each has its share of the logits. All numbers but the scales are
    float32, as in files; sums are taken in float64, so that finite features of any size give finite logits.

    Parameters
    ----------
    blocks : Blocks
    scales : ndarray of shape (N,), optional
        s_1 … s_N; N/|S| by default: if the layer averages all students, it then averages those present.
    fills : ndarray of shape (N, C), optional
        c_0 … c_{N−1}, what stands in for each student that is missing; nothing by default.
    layers : mapping of subsets to Blocks
        Of the subsets with a layer of their own.
    """

    def __init__(
        self,
        blocks: Blocks,
        scales: np.ndarray | None = None,
        fills: np.ndarray | None = None,
        layers: Mapping[Subset, Blocks] | None = None,
    ):
        n = len(blocks)
        self.blocks = _widened(blocks)
        self.scales = n / np.arange(1, n + 1) if scales is None else np.asarray(scales, np.float64)
        self.fills = np.zeros((n, len(blocks[0][1]))) if fills is None else np.asarray(fills, np.float32).astype(float)
        self.layers = {subset: _widened(own) for subset, own in (layers or {}).items()}

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> FinalLayer:
        """The layer of the tensors that the method `tensors` returns.

        Raises
        ------
        KeyError, ValueError
            They are not those of a final layer.
        """
        subsets = sorted({subset_of(name.split(".")[1]) for name in tensors if name.startswith("layers.")})
        everyone = range(sum(name.startswith("biases.") for name in tensors))
        layers = {subset: _read_blocks(tensors, subset, f"layers.{subset_name(subset)}.") for subset in subsets}
        return cls(_read_blocks(tensors, everyone), tensors["scales"], tensors["fills"], layers)

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> FinalLayer:
        """The final layer of an exported network.

        Raises
        ------
        UserError
            Its file is missing, or not the one of the manifest.
        """
        path = folder / manifest.final.blocks
        lengths, n_classes = [student.n_features for student in manifest.students], len(manifest.classes)
        try:
            layer = cls.of(load(read_verified(path, manifest.final.blocks_sha256)))
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}). Export the network again.") from None
        expected = {i: ((n_classes, length), (n_classes,)) for i, length in enumerate(lengths)}
        shapes = [
            {i: (w.shape, b.shape) for i, (w, b) in own.items()} for own in (layer.blocks, *layer.layers.values())
        ]
        fits = layer.scales.shape == (len(lengths),) and layer.fills.shape == (len(lengths), n_classes)
        if not fits or shapes[0] != expected or any(not own.items() <= expected.items() for own in shapes):
            raise UserError(f"{path}: does not fit the students of the manifest. Export the network again.")
        if not all(np.isfinite(values).all() for values in layer.tensors().values()):
            raise UserError(f"{path}: damaged (weights that are no numbers). Export the network again.")
        return layer

    def tensors(self) -> dict[str, np.ndarray]:
        """All that is stored of the layer, by name: float32, the scales float64."""
        tensors: dict[str, np.ndarray] = {"scales": self.scales, "fills": self.fills.astype(np.float32)}
        parts: dict[str, Blocks] = {"": self.blocks} | {
            f"layers.{subset_name(subset)}.": own for subset, own in self.layers.items()
        }
        for prefix, blocks in parts.items():
            for number, (weight, bias) in enumerate(blocks.values()):
                tensors[f"{prefix}weights.{number}"] = weight.astype(np.float32)
                tensors[f"{prefix}biases.{number}"] = bias.astype(np.float32)
        return tensors

    @property
    def whole(self) -> Blocks:
        """The blocks that answer when all students are present."""
        return self.layers.get(tuple(self.blocks), self.blocks)

    def contributions(self, features: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """What each student present, by position, adds to the logits (…, C), from its feature vectors (…, F_i)."""
        present = tuple(sorted(features))
        blocks, scale, fill = self.blocks, self.scales[len(present) - 1], 0.0
        if present in self.layers:
            blocks, scale = self.layers[present], 1.0
        elif missing := [j for j in self.blocks if j not in features]:
            fill = self.fills[missing].sum(0) / len(present)
        return {i: scale * (features[i] @ blocks[i][0].T + blocks[i][1]) + fill for i in present}

    def logits(self, features: Mapping[int, np.ndarray]) -> np.ndarray:
        """Logits (…, C) of the students that are present, by position, from their feature vectors (…, F_i)."""
        return np.asarray(sum(self.contributions(features).values()))


def _widened(blocks: Blocks) -> Blocks:
    """Blocks rounded to float32, as in files, in float64 for the sums."""

    def widened(part: np.ndarray) -> np.ndarray:
        return np.asarray(part, np.float32).astype(np.float64)

    return {i: (widened(weight), widened(bias)) for i, (weight, bias) in blocks.items()}


def _read_blocks(tensors: Mapping[str, np.ndarray], students: Iterable[int], prefix: str = "") -> Blocks:
    """The blocks of these students; those of a subset are numbered among themselves."""
    return {i: (tensors[f"{prefix}weights.{k}"], tensors[f"{prefix}biases.{k}"]) for k, i in enumerate(students)}


@dataclass(frozen=True)
class Prediction:
    """A network's prediction for one image."""

    label: str  # the most probable class
    probability: float  # calibrated, see `nonn.method.calibration`
    probabilities: list[float]  # of all classes
    #: For each student that took part, its share of the lead of the predicted class over the mean of all classes,
    #: negative if it is against the class. Their magnitudes add up to 1.
    shares: list[float]


def predict(manifest: Manifest, layer: FinalLayer, features: Mapping[int, np.ndarray]) -> Prediction:
    """Class, probabilities and shares from the feature vectors (F_i,) of the students present, by position."""
    return read_out(manifest, list(layer.contributions(features).values()))


def read_out(manifest: Manifest, contributions: Sequence[np.ndarray]) -> Prediction:
    """Class, probabilities and shares from what each student adds to the logits, N vectors of shape (C,)."""
    logits = np.sum(contributions, axis=0)
    winner = int(logits.argmax())
    exponentials = np.exp((logits - logits.max()) / manifest.temperature(len(contributions)))
    probabilities = exponentials / exponentials.sum()
    leads = [float(term[winner] - term.mean()) for term in contributions]
    total = sum(map(abs, leads)) or 1.0
    return Prediction(
        label=manifest.classes[winner],
        probability=float(probabilities[winner]),
        probabilities=probabilities.tolist(),
        shares=[lead / total for lead in leads],
    )
