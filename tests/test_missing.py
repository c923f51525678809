"""Missing students: each strategy by hand, what is fitted and kept, what is chosen, and what is stored of it."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from clusters import sha256
from safetensors.numpy import save, save_file

from nonn.core.errors import UserError
from nonn.core.params import STRATEGIES, AssembleParams
from nonn.method.final_layer import as_tensors, logits_of
from nonn.method.missing import (
    choose_strategy,
    cross_scored,
    fit_fail_out,
    fit_strategies,
    fit_subset_layers,
    mean_accuracy,
    mean_fill,
    right_answers,
    tabulate,
    zero_fill,
)
from nonn.runtime.exported import FinalFiles, ImageFormat, Manifest, StudentFile
from nonn.runtime.final import Blocks, FinalLayer
from nonn.runtime.subsets import MAX_SUBSETS, proper_subsets, subset_name, subset_of, subsets_missing

SECTION = AssembleParams(epochs=5, lr=0.01)
#: One feature each of three students, two classes.
WEIGHTS = [[[1.0], [0.0]], [[0.0], [2.0]], [[1.0], [1.0]]]
BIASES = [[0.3, 0.0], [0.6, 0.3], [0.0, 0.9]]
FEATURES = [torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[5.0]])]


def layer_by_hand() -> FinalLayer:
    return FinalLayer(dict(enumerate(zip(WEIGHTS, BIASES, strict=True))))


def make_problem(n_students=3, n_images=60, n_classes=3, seed=0, noise=0.6):
    """Heads that take the nearest pattern, averaged; and features of noise around a pattern for each class."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [2 + i % 3 for i in range(n_students)]
    patterns = torch.rand(n_classes, sum(lengths), generator=torch.Generator().manual_seed(9))
    labels = torch.randint(n_classes, (n_images,), generator=generator)
    features = patterns[labels] + noise * torch.randn(n_images, sum(lengths), generator=generator)
    heads = [(block / n_students, -block.square().sum(1) / 2 / n_students) for block in patterns.split(lengths, dim=1)]
    return FinalLayer(dict(enumerate(heads))), list(features.split(lengths, dim=1)), labels


# By hand


def test_rescaling_by_hand():
    layer = layer_by_hand()
    assert logits_of(layer, FEATURES)[0].tolist() == pytest.approx([2 + 5 + 0.9, 6 + 5 + 1.2])
    assert logits_of(layer, FEATURES, [0])[0].tolist() == pytest.approx([3 * (2 + 0.3), 0])
    assert logits_of(layer, FEATURES, [0, 1])[0].tolist() == pytest.approx([1.5 * (2 + 0.9), 1.5 * (6 + 0.3)])


def test_zero_filling_by_hand():
    layer = zero_fill(layer_by_hand())
    assert logits_of(layer, FEATURES)[0].tolist() == pytest.approx([2 + 5 + 0.9, 6 + 5 + 1.2])
    assert logits_of(layer, FEATURES, [0])[0].tolist() == pytest.approx([2 + 0.9, 1.2])
    assert logits_of(layer, FEATURES, [2, 1])[0].tolist() == pytest.approx([5 + 0.9, 6 + 5 + 1.2])


def test_mean_filling_by_hand():
    layer = mean_fill(layer_by_hand(), [torch.tensor([m]) for m in (4.0, 0.5, 1.0)])
    assert logits_of(layer, FEATURES)[0].tolist() == pytest.approx([2 + 5 + 0.9, 6 + 5 + 1.2])
    assert logits_of(layer, FEATURES, [0])[0].tolist() == pytest.approx([2 + 1 + 0.9, 2 * 0.5 + 1 + 1.2])
    assert logits_of(layer, FEATURES, [1, 2])[0].tolist() == pytest.approx([4 + 5 + 0.9, 6 + 5 + 1.2])


def test_a_subset_with_a_layer_of_its_own_by_hand():
    own = {0: ([[10.0], [0.0]], [1.0, 2.0]), 2: ([[0.0], [1.0]], [1.0, 2.0])}
    plain = layer_by_hand()
    layer = FinalLayer(plain.blocks, layers={(0, 2): own})
    assert logits_of(layer, FEATURES, [2, 0])[0].tolist() == [20 + 2, 5 + 4]
    for subset in [(0,), (0, 1), (0, 1, 2)]:
        assert torch.equal(logits_of(layer, FEATURES, subset), logits_of(plain, FEATURES, subset))
    assert layer.whole is layer.blocks
    everyone = FinalLayer(layer.blocks, layers={(0, 1, 2): zero_fill(plain).blocks})
    assert everyone.whole is everyone.layers[0, 1, 2]


@pytest.mark.parametrize("make", [lambda layer: layer, zero_fill, lambda layer: mean_fill(layer, [torch.ones(1)] * 3)])
def test_shares_add_up_to_the_logits(make):
    layer = make(layer_by_hand())
    for subset in [(0,), (1, 2), (0, 1, 2)]:
        terms = layer.contributions({i: FEATURES[i].numpy() for i in subset})
        assert tuple(terms) == subset
        np.testing.assert_allclose(sum(terms.values()), logits_of(layer, FEATURES, subset))


# Subset layers


def fit_alone(start, features, labels, subset, params, seed) -> Blocks:
    """A subset's layer, fitted by itself: a plain linear layer over the features of the students present."""
    renumbered = FinalLayer({k: start.blocks[i] for k, i in enumerate(subset)})
    everyone = tuple(range(len(subset)))
    (blocks,) = fit_subset_layers(renumbered, [features[i] for i in subset], labels, [everyone], params, seed)
    return {i: blocks[k] for k, i in enumerate(subset)}


def test_layers_fitted_at_once_are_those_fitted_alone():
    start, features, labels = make_problem()
    subsets = proper_subsets(3)
    together = fit_subset_layers(start, features, labels, subsets, SECTION, seed=0)
    for subset, blocks in zip(subsets, together, strict=True):
        scale = 3 / len(subset)
        scaled = FinalLayer({i: (scale * w, scale * b) for i, (w, b) in start.blocks.items()})
        alone = fit_alone(scaled, features, labels, subset, SECTION, seed=0)
        assert tuple(blocks) == subset
        for i, own in blocks.items():
            assert own[0].shape == start.blocks[i][0].shape
            for a, b in zip(own, alone[i], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        moved = max(np.abs(w - scale * start.blocks[i][0]).max() for i, (w, _) in blocks.items())
        assert moved > 0.01, "it was not fitted"


def test_fitting_follows_the_gradient_of_cross_entropy():
    """One step of Adam moves each number by the learning rate, against the sign of its gradient."""
    start, features, labels = make_problem(n_students=2)
    params = AssembleParams(epochs=1, lr=0.01)
    ((fitted,),) = (blocks.values() for blocks in fit_subset_layers(start, features, labels, [(1,)], params, seed=0))
    before = [(2 * parts[1]).requires_grad_() for parts in as_tensors(start.blocks)]
    torch.nn.functional.cross_entropy(features[1] @ before[0].T + before[1], labels).backward()
    for after, parameter in zip(fitted, before, strict=True):
        expected = (parameter - 0.01 * parameter.grad.sign()).detach()
        np.testing.assert_allclose(after, expected, rtol=1e-3, atol=1e-4)


def test_without_epochs_subset_layers_are_the_rescaled_average():
    start, features, labels = make_problem()
    subsets = proper_subsets(3)
    fitted = fit_subset_layers(start, features, labels, subsets, AssembleParams(epochs=0, lr=1), seed=0)
    layer = FinalLayer(start.blocks, layers=dict(zip(subsets, fitted, strict=True)))
    for subset in subsets:
        found, expected = (logits_of(each, features, subset) for each in (layer, start))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("misled", [False, True])
def test_a_kept_subset_layer_is_better_on_validation_and_others_are_the_start(misled):
    start, features, labels = make_problem(n_students=4, n_images=80, noise=0.8)
    _, *validation = make_problem(n_students=4, n_images=70, seed=1, noise=0.8)
    if misled:  # away from a start that is right
        labels = (labels + 1) % 3
    else:  # away from a start whose first student speaks against itself
        weight, bias = start.blocks[0]
        start = FinalLayer(start.blocks | {0: (-weight, bias)})
    train = features, labels
    layers, summary = fit_strategies(start, start, train, validation, AssembleParams(epochs=30, lr=0.03), seed=0)
    layer, subsets = layers["subset_layers"], proper_subsets(4)
    before = right_answers(start, *validation, subsets).sum(1)
    after = right_answers(layer, *validation, subsets).sum(1)
    kept = [subset in layer.layers for subset in subsets]
    assert sum(kept) == summary["kept"]
    assert ((after > before) == torch.tensor(kept)).all()
    assert (after >= before).all()
    for subset, own in zip(subsets, kept, strict=True):
        if not own:
            assert torch.equal(logits_of(layer, validation[0], subset), logits_of(start, validation[0], subset))
    assert sum(kept) == 0 if misled else sum(kept) > 5


def test_layers_are_scored_on_images_that_had_no_part_in_keeping_them():
    # Two subsets of students, four images; even ones are one half, odd ones the other.
    start = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1]]).bool()
    fitted = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0]]).bool()
    # First: on odd images 2 to 0, so kept for the even ones; on even images 1 to 1, not kept for the odd ones.
    # Second: on odd images 0 to 2, not kept; on even images 2 to 0, kept for the odd ones, where it is always wrong.
    assert cross_scored(start, fitted).int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert fitted.sum(1).tolist() == [3, 2]


def test_luck_alone_gains_nothing():
    """Layers no better than the start: keeping the luckier ones looks like progress, cross-scoring does not."""
    generator = torch.Generator().manual_seed(0)
    start, fitted = torch.rand(2, 2000, 100, generator=generator) < 0.5
    better = fitted.sum(1) > start.sum(1)
    naive = torch.where(better[:, None], fitted, start).double().mean()
    assert naive > 0.52
    assert cross_scored(start, fitted).double().mean().item() == pytest.approx(0.5, abs=0.005)


# Fail-out


def test_fail_out_learns_to_do_without_students():
    start, features, labels = make_problem(n_students=3, n_images=300)
    # Heads that speak against their students: to be right with one of them, each has to turn round.
    wrong = FinalLayer({i: (-weight, bias) for i, (weight, bias) in start.blocks.items()})
    fitted = fit_fail_out(wrong, features, labels, AssembleParams(epochs=200, lr=0.03), seed=0)
    subsets = proper_subsets(3)
    before, after = (right_answers(layer, features, labels, subsets).double().mean(1) for layer in (wrong, fitted))
    assert (after > before + 0.2).all()


def test_fail_out_of_two_students_fits_each_alone():
    """With two students, one of them is always missing: neither learns to rely on the other."""
    start, features, labels = make_problem(n_students=2)
    fitted = fit_fail_out(start, features, labels, SECTION, seed=0)
    torch.manual_seed(0)
    strangers = [features[0], torch.randn_like(features[1])]
    again = fit_fail_out(start, strangers, labels, SECTION, seed=0)
    assert np.array_equal(fitted.blocks[0][0], again.blocks[0][0])
    assert not np.array_equal(fitted.blocks[1][0], again.blocks[1][0])


# Choosing


def all_strategies(n_students=3, **changes):
    averaged, *train = make_problem(n_students)
    _, *validation = make_problem(n_students, n_images=45, seed=1)
    final = FinalLayer({i: (1.5 * weight + 0.1, bias + 0.2) for i, (weight, bias) in averaged.blocks.items()})
    layers, summary = fit_strategies(final, averaged, train, validation, SECTION.model_copy(update=changes), seed=0)
    return final, layers, summary, validation


def test_with_all_present_every_strategy_gives_the_same_answer():
    final, layers, _, (features, _) = all_strategies()
    assert tuple(layers) == STRATEGIES
    for layer in layers.values():
        assert torch.equal(logits_of(layer, features), logits_of(final, features))
        assert all(np.array_equal(w, final.blocks[i][0]) for i, (w, _) in layer.whole.items())
    answers = {name: logits_of(layer, features, [0, 2]) for name, layer in layers.items()}
    for a, b in itertools.combinations(answers.values(), 2):
        assert not torch.allclose(a, b)


def test_the_best_on_validation_is_chosen_and_the_simplest_of_equals():
    means = {"zero_fill": 0.9, "rescale": 0.9, "fail_out": 0.8, "subset_layers": 0.9}
    assert choose_strategy(means, "auto") == "rescale"
    assert choose_strategy(means | {"subset_layers": 0.91}, "auto") == "subset_layers"
    assert choose_strategy(means, "fail_out") == "fail_out"


def test_the_summary_is_what_counting_gives():
    _, layers, summary, (features, labels) = all_strategies()
    for name in ("rescale", "zero_fill", "mean_fill", "fail_out"):
        right = {
            subset: Fraction(int((logits_of(layers[name], features, subset).argmax(1) == labels).sum()), len(labels))
            for subset in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
        }
        assert summary["mean"][name] == pytest.approx(float(sum(right.values()) / 6))
        for row in summary["by_missing"][name]:
            of_size = [score for subset, score in right.items() if len(subset) == 3 - row["missing"]]
            assert row["n_subsets"] == 3
            assert row["mean"] == pytest.approx(float(sum(of_size) / 3))
            assert row["worst"] == pytest.approx(float(min(of_size)))
    best = max(summary["mean"].values())
    assert summary["chosen"] == next(name for name in STRATEGIES if summary["mean"][name] == best)
    assert {summary["chosen"], *summary["not_chosen"]} == set(STRATEGIES)


@pytest.mark.parametrize("wanted", STRATEGIES)
def test_a_strategy_can_be_demanded(wanted):
    assert all_strategies(missing=wanted)[2]["chosen"] == wanted


def test_many_students_have_no_layer_per_subset():
    layers, summary = all_strategies(n_students=9, epochs=0)[1:3]
    assert "subset_layers" not in layers
    assert "subset_layers" not in summary["mean"]
    assert summary["kept"] == 0


def test_the_mean_counts_subsets_not_sizes():
    right = torch.tensor([[1], [1], [0], [0], [1], [0]]).bool()
    rows = tabulate(right, proper_subsets(3), 3)
    assert [row["mean"] for row in rows] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    rows = [{"missing": 1, "mean": 1.0}, {"missing": 2, "mean": 0.0}, {"missing": 3, "mean": 0.5}]
    assert mean_accuracy(rows, 4) == pytest.approx((4 * 1 + 6 * 0 + 4 * 0.5) / 14)


def test_the_same_bytes_twice():
    def content():
        _, layers, summary, _ = all_strategies()
        return summary, [save(layer.tensors()) for layer in layers.values()]

    assert content() == content()


# Subsets and their names


def test_subsets():
    assert proper_subsets(3) == [(0, 1), (0, 2), (1, 2), (0,), (1,), (2,)]
    assert len(proper_subsets(8)) == 2**8 - 2
    assert len(set(subsets_missing(12, 6))) == MAX_SUBSETS
    assert subset_name([10, 0, 2]) == "0-2-10"
    assert all(subset_of(subset_name(subset)) == subset for subset in proper_subsets(5))


# What is stored of it


def write_layer(folder, layer: FinalLayer) -> Manifest:
    path = folder / "final.safetensors"
    save_file(layer.tensors(), path)
    students = [
        StudentFile(file=f"{i}.onnx", sha256="0" * 64, n_features=weight.shape[1], feature_limit=1)
        for i, (weight, _) in layer.blocks.items()
    ]
    final = FinalFiles(file="final.onnx", sha256="0" * 64, blocks=path.name, blocks_sha256=sha256(path))
    image = ImageFormat(channels=1, size=4, dtype="uint8")
    return Manifest(classes=["a", "b", "c"], image=image, students=students, final=final)


def defined(tensors: dict[str, torch.Tensor], features: list[torch.Tensor], subset: tuple[int, ...]) -> torch.Tensor:
    """Logits as the definition has them, from stored tensors, image by image and student by student."""
    own = f"layers.{subset_name(subset)}."
    has_own = f"{own}weights.0" in tensors
    rows = []
    for image in range(len(features[0])):
        total = torch.zeros(3, dtype=torch.float64)
        for k, i in enumerate(subset):
            weight, bias = (tensors[f"{own}{part}.{k}" if has_own else f"{part}.{i}"] for part in ("weights", "biases"))
            total += weight.double() @ features[i][image].double() + bias.double()
        if not has_own:
            total *= tensors["scales"][len(subset) - 1]
            total += sum(tensors["fills"][j].double() for j in range(len(features)) if j not in subset)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_stored_answers_as_defined_for_every_subset(strategy, tmp_path):
    _, layers, _, (features, _) = all_strategies(n_students=4)
    manifest = write_layer(tmp_path, layers[strategy])
    loaded = FinalLayer.load(tmp_path, manifest)
    stored = {name: torch.from_numpy(array) for name, array in layers[strategy].tensors().items()}
    assert {str(tensor.dtype) for name, tensor in stored.items() if name != "scales"} == {"torch.float32"}
    for subset in [*proper_subsets(4), (0, 1, 2, 3)]:
        logits = logits_of(layers[strategy], features, subset)
        torch.testing.assert_close(logits, defined(stored, features, subset), rtol=1e-12, atol=1e-12)
        assert torch.equal(logits_of(loaded, features, subset), logits)
        for image in range(5):
            terms = loaded.contributions({i: features[i][image].numpy() for i in reversed(subset)})
            assert tuple(terms) == subset
            np.testing.assert_allclose(sum(terms.values()), logits[image], rtol=1e-12, atol=1e-12)


def test_rescaling_is_what_it_always_was(tmp_path):
    """N/|S| · Σ_S (W_i f_i + b_i), to the last digits."""
    layer, features, _ = make_problem(n_students=3)
    loaded = FinalLayer.load(tmp_path, write_layer(tmp_path, layer))
    for subset in [*proper_subsets(3), (0, 1, 2)]:
        vectors = {i: features[i][0].double().numpy() for i in subset}
        expected = 3 / len(subset) * sum(layer.blocks[i][0] @ vectors[i] + layer.blocks[i][1] for i in subset)
        np.testing.assert_allclose(loaded.logits(vectors), expected, rtol=1e-14)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("scales"),
        lambda t: t.update(fills=t["fills"][:2]),
        lambda t: t.update({"layers.0-1.weights.0": t["layers.0-1.weights.0"][:, :1]}),
        lambda t: t.pop("layers.0-1.biases.1"),
        lambda t: t.update({name.replace("0-1", "0-9"): tensor for name, tensor in t.items()}),
        lambda t: t.update({"layers.x.weights.0": t["scales"]}),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(tmp_path, change):
    layer, _, _ = make_problem()
    layer = FinalLayer(layer.blocks, layers={(0, 1): {i: layer.blocks[i] for i in (0, 1)}})
    manifest, tensors = write_layer(tmp_path, layer), layer.tensors()
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, tmp_path / "final.safetensors")
    final = manifest.final.model_copy(update={"blocks_sha256": sha256(tmp_path / "final.safetensors")})
    with pytest.raises(UserError, match=r"final\.safetensors: (damaged|does not fit).* Export the network again"):
        FinalLayer.load(tmp_path, manifest.model_copy(update={"final": final}))
