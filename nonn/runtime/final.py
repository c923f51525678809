"""The final layer where the network runs: in blocks by student, for whichever students answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from nonn.core.errors import UserError
from nonn.runtime.exported import Manifest, read_verified
from nonn.runtime.subsets import Subset, subset_name, subset_of


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image.

    Attributes
    ----------
    label : str
        The most probable class.
    probability : float
    probabilities : list of float
        Of all classes.
    shares : list of float
        Of each student that took part: its part in the lead of the predicted class over the mean of all
        classes, negative if it spoke against the class. Their magnitudes add up to 1.
    """

    label: str
    probability: float
    probabilities: list[float]
    shares: list[float]


#: W_i (C, F_i) and the shares b_i (C,) of the bias, by position of the student.
Blocks = dict[int, tuple[np.ndarray, np.ndarray]]


class FinalLayer:
    """The final layer of N students, of which any may be missing; see `nonn.method.final_layer.FinalLayer`.

    Sums are taken in float64, so that finite features of any size give finite logits.

    Parameters
    ----------
    blocks : Blocks
        Of all students.
    scales : ndarray of shape (N,)
    fills : ndarray of shape (N, C)
    layers : mapping of subsets to Blocks
        Of the subsets with a layer of their own.
    """

    def __init__(self, blocks: Blocks, scales: np.ndarray, fills: np.ndarray, layers: Mapping[Subset, Blocks]):
        self.blocks, self.scales, self.fills, self.layers = blocks, scales, fills, layers

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
            tensors = load(read_verified(path, manifest.final.blocks_sha256))
            tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
            subsets = {subset_of(name.split(".")[1]) for name in tensors if name.startswith("layers.")}
            blocks = _read_blocks(tensors, range(len(lengths)), "")
            layers = {s: _read_blocks(tensors, s, f"layers.{subset_name(s)}.") for s in subsets}
            layer = cls(blocks, tensors["scales"], tensors["fills"], layers)
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}). Export the network again.") from None
        shapes = [(i, w.shape, b.shape) for parts in (blocks, *layers.values()) for i, (w, b) in parts.items()]
        expected = [((n_classes, length), (n_classes,)) for length in lengths]
        fits = layer.scales.shape == (len(lengths),) and layer.fills.shape == (len(lengths), n_classes)
        if not fits or any(i >= len(lengths) or (w, b) != expected[i] for i, w, b in shapes):
            raise UserError(f"{path}: does not fit the students of the manifest. Export the network again.")
        return layer

    def contributions(self, features: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """What each student present, by position, adds to the logits (C,), from its feature vector (F_i,)."""
        present = tuple(sorted(features))
        blocks, scale, fill = self.blocks, self.scales[len(present) - 1], 0.0
        if present in self.layers:
            blocks, scale = self.layers[present], 1.0
        elif missing := [j for j in self.blocks if j not in features]:
            fill = self.fills[missing].sum(0) / len(present)
        terms = {i: weight @ features[i] + bias for i, (weight, bias) in blocks.items() if i in features}
        return {i: scale * term + fill for i, term in terms.items()}

    def logits(self, contributions: Mapping[int, np.ndarray]) -> np.ndarray:
        """Logits (C,) of the students that are present, from what each of them adds."""
        return np.sum(list(contributions.values()), axis=0)


def _read_blocks(tensors: Mapping[str, np.ndarray], students: Sequence[int], prefix: str) -> Blocks:
    """The blocks of these students; those of a subset are numbered among themselves."""
    return {i: (tensors[f"{prefix}weights.{k}"], tensors[f"{prefix}biases.{k}"]) for k, i in enumerate(students)}


def read_out(classes: Sequence[str], logits: np.ndarray, contributions: Sequence[np.ndarray]) -> Prediction:
    """Class, probabilities and shares from logits (C,) and what each student added to them (C,)."""
    winner = int(logits.argmax())
    exponentials = np.exp(logits - logits.max())
    probabilities = exponentials / exponentials.sum()
    leads = [float(term[winner] - term.mean()) for term in contributions]
    total = sum(map(abs, leads)) or 1.0
    return Prediction(
        label=classes[winner],
        probability=float(probabilities[winner]),
        probabilities=probabilities.tolist(),
        shares=[lead / total for lead in leads],
    )
