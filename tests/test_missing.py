"""Missing students: each strategy by hand, what is fitted and kept, what is chosen, and the same in numpy."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from clusters import sha256
from safetensors.torch import save, save_file

from nonn.core.errors import UserError
from nonn.core.params import STRATEGIES, Assemble
from nonn.method.final_layer import FinalLayer, LinearBlocks
from nonn.method.missing import (
    choose,
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
from nonn.runtime import final as runtime
from nonn.runtime.exported import FinalFiles, Image, Manifest, StudentFile
from nonn.runtime.subsets import MAX_SUBSETS, proper_subsets, subset_name, subset_of, subsets_missing

SECTION = Assemble(epochs=5, lr=0.01)
#: One feature each of three students, two classes.
WEIGHTS = [[[1.0], [0.0]], [[0.0], [2.0]], [[1.0], [1.0]]]
BIASES = [[0.3, 0.0], [0.6, 0.3], [0.0, 0.9]]
FEATURES = [torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[5.0]])]


def layer_by_hand() -> FinalLayer:
    return FinalLayer([torch.tensor(w) for w in WEIGHTS], [torch.tensor(b) for b in BIASES])


def make_problem(n_students=3, n_images=60, n_classes=3, seed=0, noise=0.6):
    """Heads that take the nearest pattern, averaged; and features of noise around a pattern for each class."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [2 + i % 3 for i in range(n_students)]
    patterns = torch.rand(n_classes, sum(lengths), generator=torch.Generator().manual_seed(9))
    labels = torch.randint(n_classes, (n_images,), generator=generator)
    features = patterns[labels] + noise * torch.randn(n_images, sum(lengths), generator=generator)
    blocks = patterns.split(lengths, dim=1)
    layer = FinalLayer([b / n_students for b in blocks], [-b.square().sum(1) / 2 / n_students for b in blocks])
    return layer, list(features.split(lengths, dim=1)), labels


# By hand


@torch.no_grad()
def test_rescaling_by_hand():
    layer = layer_by_hand()
    assert layer(FEATURES)[0].tolist() == pytest.approx([2 + 5 + 0.9, 6 + 5 + 1.2])
    assert layer(FEATURES, [0])[0].tolist() == pytest.approx([3 * (2 + 0.3), 0])
    assert layer(FEATURES, [0, 1])[0].tolist() == pytest.approx([1.5 * (2 + 0.9), 1.5 * (6 + 0.3)])


@torch.no_grad()
def test_zero_filling_by_hand():
    layer = zero_fill(layer_by_hand())
    assert layer(FEATURES)[0].tolist() == pytest.approx([2 + 5 + 0.9, 6 + 5 + 1.2])
    assert layer(FEATURES, [0])[0].tolist() == pytest.approx([2 + 0.9, 1.2])
    assert layer(FEATURES, [2, 1])[0].tolist() == pytest.approx([5 + 0.9, 6 + 5 + 1.2])


@torch.no_grad()
def test_mean_filling_by_hand():
    layer = mean_fill(layer_by_hand(), [torch.tensor([m]) for m in (4.0, 0.5, 1.0)])
    assert layer(FEATURES)[0].tolist() == pytest.approx([2 + 5 + 0.9, 6 + 5 + 1.2])
    assert layer(FEATURES, [0])[0].tolist() == pytest.approx([2 + 1 + 0.9, 2 * 0.5 + 1 + 1.2])
    assert layer(FEATURES, [1, 2])[0].tolist() == pytest.approx([4 + 5 + 0.9, 6 + 5 + 1.2])


@torch.no_grad()
def test_a_subset_with_a_layer_of_its_own_by_hand():
    own = LinearBlocks([torch.tensor([[10.0], [0.0]]), torch.tensor([[0.0], [1.0]])], [torch.tensor([1.0, 2.0])] * 2)
    plain = layer_by_hand()
    layer = FinalLayer(plain.weights, plain.biases, layers={(0, 2): own})
    assert layer(FEATURES, [2, 0])[0].tolist() == [20 + 2, 5 + 4]
    for subset in [(0,), (0, 1), (0, 1, 2)]:
        assert torch.equal(layer(FEATURES, subset), plain(FEATURES, subset))
    assert layer.whole is layer
    everyone = FinalLayer(plain.weights, plain.biases, layers={(0, 1, 2): plain})
    assert torch.equal(everyone.whole(FEATURES), plain(FEATURES))


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [FinalLayer.whole.fget, zero_fill, lambda layer: mean_fill(layer, [torch.ones(1)] * 3)]
)
def test_shares_add_up_to_the_logits(make):
    layer = make(layer_by_hand())
    for subset in [(0,), (1, 2), (0, 1, 2)]:
        terms = layer.contributions(FEATURES, subset)
        assert len(terms) == len(subset)
        torch.testing.assert_close(terms.sum(0), layer(FEATURES, subset))


# Subset layers


def fit_alone(start, features, labels, subset, params, seed) -> LinearBlocks:
    """A subset's layer, fitted by itself: a plain linear layer over the features of the students present."""
    (layer,) = fit_subset_layers(
        LinearBlocks([start.weights[i] for i in subset], [start.biases[i] for i in subset]),
        [features[i] for i in subset],
        labels,
        [tuple(range(len(subset)))],
        params,
        seed,
    )
    return layer


def test_layers_fitted_at_once_are_those_fitted_alone():
    start, features, labels = make_problem()
    subsets = proper_subsets(3)
    together = fit_subset_layers(start, features, labels, subsets, SECTION, seed=0)
    for subset, layer in zip(subsets, together, strict=True):
        scale = 3 / len(subset)
        scaled = LinearBlocks([scale * w for w in start.weights], [scale * b for b in start.biases])
        alone = fit_alone(scaled, features, labels, subset, SECTION, seed=0)
        assert [w.shape for w in layer.weights] == [start.weights[i].shape for i in subset]
        for a, b in zip(layer.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        moved = max((w - scale * start.weights[i]).abs().max() for i, w in zip(subset, layer.weights, strict=True))
        assert moved > 0.01, "it was not fitted"


def test_fitting_follows_the_gradient_of_cross_entropy():
    """One step of Adam moves each number by the learning rate, against the sign of its gradient."""
    start, features, labels = make_problem(n_students=2)
    params = Assemble(epochs=1, lr=0.01)
    (layer,) = fit_subset_layers(start, features, labels, [(1,)], params, seed=0)
    weight = (2 * start.weights[1]).detach().requires_grad_()
    bias = (2 * start.biases[1]).detach().requires_grad_()
    torch.nn.functional.cross_entropy(features[1] @ weight.T + bias, labels).backward()
    torch.testing.assert_close(layer.weights[0], weight - 0.01 * weight.grad.sign(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.biases[0], bias - 0.01 * bias.grad.sign(), rtol=1e-3, atol=1e-4)


def test_without_epochs_subset_layers_are_the_rescaled_average():
    start, features, labels = make_problem()
    subsets = proper_subsets(3)
    fitted = fit_subset_layers(start, features, labels, subsets, Assemble(epochs=0, lr=1), seed=0)
    with torch.no_grad():
        for subset, layer in zip(subsets, fitted, strict=True):
            torch.testing.assert_close(layer([features[i] for i in subset]), start(features, subset))


@pytest.mark.parametrize("misled", [False, True])
def test_a_kept_subset_layer_is_better_on_validation_and_others_are_the_start(misled):
    start, features, labels = make_problem(n_students=4, n_images=80, noise=0.8)
    _, *validation = make_problem(n_students=4, n_images=70, seed=1, noise=0.8)
    if misled:  # away from a start that is right
        labels = (labels + 1) % 3
    else:  # away from a start whose first student speaks against itself
        start = FinalLayer([-start.weights[0], *list(start.weights)[1:]], list(start.biases))
    train = features, labels
    layers, summary = fit_strategies(start, start, train, validation, Assemble(epochs=30, lr=0.03), seed=0)
    layer, subsets = layers["subset_layers"], proper_subsets(4)
    before = right_answers(start, *validation, subsets).sum(1)
    after = right_answers(layer, *validation, subsets).sum(1)
    kept = [subset_name(subset) in layer.layers for subset in subsets]
    assert sum(kept) == summary["kept"]
    assert ((after > before) == torch.tensor(kept)).all()
    assert (after >= before).all()
    with torch.no_grad():
        for subset, own in zip(subsets, kept, strict=True):
            if not own:
                assert torch.equal(layer(validation[0], subset), start(validation[0], subset))
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
    wrong = FinalLayer([-w for w in start.weights], list(start.biases))
    fitted = fit_fail_out(wrong, features, labels, Assemble(epochs=200, lr=0.03), seed=0)
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
    assert torch.equal(fitted.weights[0], again.weights[0])
    assert not torch.equal(fitted.weights[1], again.weights[1])


# Choosing


@torch.enable_grad()
def all_strategies(n_students=3, **changes):
    averaged, *train = make_problem(n_students)
    _, *validation = make_problem(n_students, n_images=45, seed=1)
    final = FinalLayer([1.5 * w + 0.1 for w in averaged.weights], [b + 0.2 for b in averaged.biases])
    layers, summary = fit_strategies(final, averaged, train, validation, SECTION.model_copy(update=changes), seed=0)
    return final, layers, summary, validation


@torch.no_grad()
def test_with_all_present_every_strategy_gives_the_same_answer():
    final, layers, _, (features, _) = all_strategies()
    assert tuple(layers) == STRATEGIES
    for layer in layers.values():
        assert torch.equal(layer(features), final(features))
        assert torch.equal(layer.whole(features), final(features))
    answers = {name: layer(features, [0, 2]) for name, layer in layers.items()}
    for a, b in itertools.combinations(answers.values(), 2):
        assert not torch.allclose(a, b)


def test_the_best_on_validation_is_chosen_and_the_simplest_of_equals():
    means = {"zero_fill": 0.9, "rescale": 0.9, "fail_out": 0.8, "subset_layers": 0.9}
    assert choose(means, "auto") == "rescale"
    assert choose(means | {"subset_layers": 0.91}, "auto") == "subset_layers"
    assert choose(means, "fail_out") == "fail_out"


def test_the_summary_is_what_counting_gives():
    _, layers, summary, (features, labels) = all_strategies()
    for name in ("rescale", "zero_fill", "mean_fill", "fail_out"):
        right = {
            subset: Fraction(int((layers[name](features, subset).argmax(1) == labels).sum()), len(labels))
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
        return summary, [save(layer.state_dict()) for layer in layers.values()]

    assert content() == content()


# Subsets and their names


def test_subsets():
    assert proper_subsets(3) == [(0, 1), (0, 2), (1, 2), (0,), (1,), (2,)]
    assert len(proper_subsets(8)) == 2**8 - 2
    assert len(set(subsets_missing(12, 6))) == MAX_SUBSETS
    assert subset_name([10, 0, 2]) == "0-2-10"
    assert all(subset_of(subset_name(subset)) == subset for subset in proper_subsets(5))


# The same without torch


def write_layer(folder, layer: FinalLayer) -> Manifest:
    path = folder / "final.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in layer.state_dict().items()}, path)
    students = [
        StudentFile(file=f"{i}.onnx", sha256="0" * 64, n_features=w.shape[1], feature_limit=1)
        for i, w in enumerate(layer.weights)
    ]
    final = FinalFiles(file="final.onnx", blocks=path.name, blocks_sha256=sha256(path))
    image = Image(channels=1, size=4, dtype="uint8")
    return Manifest(classes=["a", "b", "c"], image=image, students=students, final=final)


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torch_and_numpy_agree_on_every_subset(strategy, tmp_path):
    _, layers, _, (features, _) = all_strategies(n_students=4)
    layer = layers[strategy]
    loaded = runtime.FinalLayer.load(tmp_path, write_layer(tmp_path, layer))
    again = FinalLayer.of(layer.state_dict())
    for subset in [*proper_subsets(4), (0, 1, 2, 3)]:
        expected = layer.contributions(features, subset)
        assert torch.equal(again.contributions(features, subset), expected)
        for image in range(5):
            terms = loaded.contributions({i: features[i][image].numpy() for i in reversed(subset)})
            assert tuple(terms) == subset
            np.testing.assert_allclose(list(terms.values()), expected[:, image], rtol=0, atol=1e-5)
            logits = layer(features, subset)[image]
            np.testing.assert_allclose(loaded.logits(terms), logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rescaling_is_what_it_always_was(tmp_path):
    """N/|S| · Σ_S (W_i f_i + b_i), to the last digits."""
    layer, features, _ = make_problem(n_students=3)
    loaded = runtime.FinalLayer.load(tmp_path, write_layer(tmp_path, layer))
    for subset in [*proper_subsets(3), (0, 1, 2)]:
        vectors = {i: features[i][0].double().numpy() for i in subset}
        blocks = {i: (layer.weights[i].double().numpy(), layer.biases[i].double().numpy()) for i in subset}
        expected = 3 / len(subset) * sum(w @ vectors[i] + b for i, (w, b) in blocks.items())
        np.testing.assert_allclose(loaded.logits(loaded.contributions(vectors)), expected, rtol=1e-14)


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
    own = LinearBlocks(list(layer.weights)[:2], list(layer.biases)[:2])
    manifest = write_layer(tmp_path, FinalLayer(layer.weights, layer.biases, layers={(0, 1): own}))
    tensors = FinalLayer(layer.weights, layer.biases, layers={(0, 1): own}).state_dict()
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "final.safetensors")
    final = manifest.final.model_copy(update={"blocks_sha256": sha256(tmp_path / "final.safetensors")})
    with pytest.raises(UserError, match=r"final\.safetensors: (damaged|does not fit).* Export the network again"):
        runtime.FinalLayer.load(tmp_path, manifest.model_copy(update={"final": final}))
