"""The final layer where the network runs: in blocks by student, for whichever students answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from nonn.errors import UserError
from nonn.runtime.exported import Manifest, read_verified


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


class FinalLayer:
    """Blocks W_i (C, F_i) and shares b_i (C,) of the bias, one a student; see `nonn.assemble.FinalLayer`.

    Sums are taken in float64, so that finite features of any size give finite logits.
    """

    def __init__(self, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]):
        self.weights = [weight.astype(np.float64) for weight in weights]
        self.biases = [bias.astype(np.float64) for bias in biases]

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> FinalLayer:
        """The final layer of an exported network.

        Raises
        ------
        UserError
            Its file is missing, or not the one of the manifest.
        """
        path = folder / manifest.final.blocks
        n_classes, positions = len(manifest.classes), range(len(manifest.students))
        try:
            blocks = load(read_verified(path, manifest.final.blocks_sha256))
            layer = cls([blocks[f"weights.{i}"] for i in positions], [blocks[f"biases.{i}"] for i in positions])
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{path}: damaged ({error}). Export the network again.") from None
        for student, weight, bias in zip(manifest.students, layer.weights, layer.biases, strict=True):
            if weight.shape != (n_classes, student.n_features) or bias.shape != (n_classes,):
                raise UserError(f"{path}: does not fit {student.file}. Export the network again.")
        return layer

    def contributions(self, features: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """What each student, by position, adds to the logits: W_i f_i + b_i of shape (C,)."""
        return {i: self.weights[i] @ feature + self.biases[i] for i, feature in features.items()}

    def logits(self, contributions: Mapping[int, np.ndarray]) -> np.ndarray:
        """Logits (C,) of the students that are present: N/|present| · Σ_present (W_i f_i + b_i)."""
        return np.sum(list(contributions.values()), axis=0) * (len(self.weights) / len(contributions))


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
