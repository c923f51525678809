"""The networks: sizes known from the literature, gradients everywhere, and normalisation inside."""

import pytest
import torch
import torchvision

from nonn.core.architecture import Architecture
from nonn.training.networks import ConvNet, accuracy, count_parameters, deployed, predict, single_pass, whiten

FAST = Architecture(family="fast", widths=[4, 8, 12], depth=2)
DEEP_FAST = Architecture(family="fast", widths=[4, 6, 8, 12], depth=1)
WRN = Architecture(family="wrn", depth=10, width=1)
MOBILENET = Architecture(family="mobilenet", widths=[4, 6, 8], depth=2)
RESNET = Architecture(family="resnet", depth=8)
AIRBENCH = Architecture(family="airbench", widths=[4, 8, 12], depth=2)
DEEP_AIRBENCH = Architecture(family="airbench", widths=[4, 8, 12], depth=3)
STRIDED_AIRBENCH = Architecture(family="airbench", widths=[4, 8, 12], depth=2, strided=True)
FAMILIES = {
    "fast": FAST,
    "fast of four stages": DEEP_FAST,
    "airbench": AIRBENCH,
    "airbench of depth 3": DEEP_AIRBENCH,
    "airbench strided": STRIDED_AIRBENCH,
    "wrn": WRN,
    "resnet": RESNET,
    "mobilenet": MOBILENET,
}


def random_images(n_images: int, channels: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n_images, channels, size, size), generator=generator, dtype=torch.uint8)


def make_network(architecture: Architecture, channels: int = 1, n_filters: int | None = None) -> ConvNet:
    torch.manual_seed(0)
    mean, std = torch.full((channels,), 120.0), torch.full((channels,), 60.0)
    return ConvNet(architecture, channels, 3, n_filters, mean=mean, std=std)


def test_wrn_16_2_layer_by_layer():
    def convolution(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + outputs

    def norm(channels):
        return 2 * channels

    def block(inputs, outputs):
        shortcut = convolution(inputs, outputs, 1) if inputs != outputs else 0
        inside = norm(inputs) + convolution(inputs, outputs, 3) + norm(outputs) + convolution(outputs, outputs, 3)
        return inside + shortcut

    stem = convolution(3, 16, 3)
    stages = block(16, 32) + block(32, 32) + block(32, 64) + block(64, 64) + block(64, 128) + block(128, 128)
    expected = stem + stages + norm(128) + 128 * 10 + 10
    assert expected == 692_810
    assert count_parameters(ConvNet(Architecture(family="wrn", depth=16, width=2), 3, 10)) == expected


def test_wrn_40_4_and_resnet_20_have_the_published_sizes():
    assert count_parameters(ConvNet(Architecture(family="wrn", depth=40, width=4), 3, 10)) == 8_955_050
    # 0.27 million in the paper; 269,722 without parameters in the shortcuts.
    assert count_parameters(ConvNet(Architecture(family="resnet", depth=20), 3, 10)) == 269_722


def test_a_mobilenet_is_built_of_the_blocks_of_the_paper():
    """MobileNetV2 of torchvision, https://arxiv.org/abs/1801.04381, in the blocks that both have."""
    reference = torchvision.models.mobilenet_v2().features
    model = ConvNet(Architecture(family="mobilenet", widths=[16, 24, 32, 64, 320], depth=2), 3, 10)
    pairs = {0: model.stem, 1: model.stages[0][0].layers, 18: model.stages[-1][-3:]}
    pairs |= {2: model.stages[1][0].layers, 3: model.stages[1][1].layers, 7: model.stages[3][0].layers}
    for number, ours in pairs.items():
        shapes = [[tuple(p.shape) for p in part.parameters()] for part in (reference[number], ours)]
        assert shapes[0] == shapes[1], number
    assert [block.adds for block in model.stages[1]] == [reference[n].use_res_connect for n in (2, 3)]
    images = random_images(1, 3, 224)
    assert [m.shape[-1] for m in model.stage_maps(images)] == [112, 56, 28, 14, 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_bridge_the_feature_vector_has_the_length_that_the_architecture_says(family):
    features, _ = make_network(FAMILIES[family])(random_images(2, 1, 28))
    assert features.shape == (2, FAMILIES[family].n_features)


@pytest.mark.parametrize("size", [28, 32, 40])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_finite_and_every_parameter_learns(family, channels, size):
    model = make_network(FAMILIES[family], channels, n_filters=5)
    features, logits = model(random_images(4, channels, size))
    assert features.shape == (4, 5)
    assert logits.shape == (4, 3)
    assert features.isfinite().all()
    assert logits.isfinite().all()
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias right before a batch norm has no effect, so its gradient may be zero.
        assert parameter.ndim == 1 or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_spatial_mean_of_a_rectified_map(family):
    images = random_images(3, 1, 28)
    teacher = make_network(FAMILIES[family]).eval()
    last = teacher.stage_maps(images)[-1].detach().numpy()
    assert last.min() >= 0
    features, _ = predict(teacher, images)
    torch.testing.assert_close(features, torch.from_numpy(last.mean((2, 3))))

    student = make_network(FAMILIES[family], n_filters=5).eval()
    rectified = []
    student.bridge[-1].register_forward_hook(lambda _module, _inputs, output: rectified.append(output.detach()))
    features, _ = predict(student, images)
    assert features.min() >= 0
    torch.testing.assert_close(features, torch.from_numpy(rectified[0].numpy().mean((2, 3))))


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_maps_halve_from_stage_to_stage(family):
    sizes = [m.shape[-1] for m in make_network(FAMILIES[family]).stage_maps(random_images(2, 1, 32))]
    first = 32 if family in ("wrn", "resnet") else 16
    assert sizes == [first >> stage for stage in range(len(sizes))]
    assert len(sizes) == (4 if family == "fast of four stages" else 3)


def test_raw_pixels_are_normalised_inside():
    images = random_images(4, 3, 28)
    mean, std = torch.tensor([100.0, 120.0, 140.0]), torch.tensor([50.0, 60.0, 70.0])
    torch.manual_seed(0)
    model = ConvNet(FAST, 3, 3, mean=mean, std=std).eval()
    torch.manual_seed(0)
    plain = ConvNet(FAST, 3, 3).eval()
    manual = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert not torch.equal(model(images)[1], plain(images)[1])
    torch.testing.assert_close(model(images)[1], plain(manual)[1])


def test_mean_and_std_travel_with_the_weights():
    model, other = make_network(FAST), ConvNet(FAST, 1, 3)
    other.load_state_dict(model.state_dict())
    images = random_images(2, 1, 28)
    assert torch.equal(predict(model, images)[1], predict(other, images)[1])


def test_only_a_student_with_a_bridge_leaves_its_head_behind():
    images = random_images(2, 1, 28)
    student, alone = make_network(FAST, n_filters=5).eval(), make_network(FAST).eval()
    head = 5 * 3 + 3
    assert count_parameters(deployed(student)) == count_parameters(student) - head
    assert torch.equal(deployed(student)(images)[1], student(images)[0])
    assert torch.equal(deployed(alone)(images)[1], alone(images)[1])
    assert student.head.out_features == 3, "the original keeps its head"


def test_predict_does_not_depend_on_the_batches():
    model, images = make_network(FAST, n_filters=5), random_images(7, 1, 28)
    features, logits = predict(model, images)
    for whole, parts in zip((features, logits), predict(model, images, batch_size=3), strict=True):
        torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_predict_leaves_a_model_that_is_in_place_at_its_addresses(family, channels):
    """A step that was recorded on a GPU goes on reading there after the scores of an epoch."""
    model, images = make_network(FAMILIES[family], channels), random_images(2, channels, 32)
    _, expected = predict(model, images)
    lying = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    _, again = predict(model, images)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == lying
    assert torch.equal(again, expected)


def test_accuracy_by_hand():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 1])) == 2 / 4


# Family airbench


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening_leaves_no_correlation_and_one_variance(channels):
    smooth = torch.nn.functional.avg_pool2d(random_images(300, channels, 32).float(), 3, 1, 1).byte()
    model = make_network(AIRBENCH, channels)
    whiten(model, smooth)
    outputs = model.stem[1](model.normalize(smooth)).transpose(0, 1).flatten(1)  # (filters, positions)
    half = len(outputs) // 2
    assert half == channels * 4
    torch.testing.assert_close(outputs[half:], -outputs[:half])
    second_moments = outputs[:half] @ outputs[:half].T / outputs.shape[1]
    torch.testing.assert_close(second_moments, torch.eye(half), atol=0.05, rtol=0)


def test_whitening_looks_at_images_from_the_whole_list():
    """Folders list their images class by class: the first ones alone are no sample."""
    noise, model = random_images(100, 1, 16), make_network(AIRBENCH)
    images = torch.cat([noise // 8, noise])
    whiten(model, images, n_images=50)
    outputs = model.stem[1](model.normalize(images)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs.square().mean(1), torch.ones(8), atol=0.2, rtol=0)


def test_whitening_takes_fewer_of_larger_images():
    """Patches of 5000 images take 0.5 GB at 32 pixels; at 224 they would take 25 GB."""
    images, model, same = random_images(90, 1, 96), make_network(AIRBENCH), make_network(AIRBENCH)
    whiten(model, images, n_images=90)
    whiten(same, images[::9])
    assert torch.equal(model.stem[1].weight, same.stem[1].weight)


def test_only_family_airbench_is_whitened():
    images, model = random_images(4, 1, 28), make_network(FAST)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whiten(model, images)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_first_filters_of_family_airbench_begin_as_the_identity():
    model = make_network(AIRBENCH)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model.stages[0][4](x), x)  # 4 to 4 channels
    torch.testing.assert_close(model.stages[1][0](x)[:, :4], x)  # 4 to 8
    assert not torch.equal(model.stages[1][0].weight[4], model.stages[1][0].weight[5])


@torch.no_grad()
def test_from_depth_3_on_a_shortcut_passes_all_but_the_first_convolution_of_a_stage():
    stage = make_network(DEEP_AIRBENCH).stages[1].eval()
    first, shortcut = stage[:4], stage[4]
    x = torch.randn(2, 4, 6, 6)
    before = first(x)
    assert len([layer for layer in shortcut if isinstance(layer, torch.nn.Conv2d)]) == 2
    shortcut[-2].weight.zero_()  # the last convolution
    torch.testing.assert_close(stage(x), torch.nn.functional.gelu(before))


# Mirror images


@torch.no_grad()
@pytest.mark.parametrize("n_filters", [None, 5])
def test_a_network_with_mirror_answers_with_the_mean_of_an_image_and_its_mirror_image(n_filters):
    images = random_images(4, 3, 32)
    model = make_network(FAST.model_copy(update={"mirror": True}), 3, n_filters)
    model.train()(images)  # statistics for the batch norms
    once = single_pass(model.eval())
    pairs = zip(model(images), once(images), once(images.flip(-1)), strict=True)
    for both, plain, mirrored in pairs:
        assert not torch.allclose(plain, mirrored)
        torch.testing.assert_close(both, (plain + mirrored) / 2)
    torch.testing.assert_close(model(images.flip(-1)), model(images))
    assert model.mirrors, "single_pass changes a copy"


def test_in_training_each_image_is_seen_once():
    images = random_images(4, 1, 28)
    plain, mirrors = make_network(FAST), make_network(FAST.model_copy(update={"mirror": True}))
    for a, b in zip(plain.train()(images), mirrors.train()(images), strict=True):
        assert torch.equal(a, b)


def test_the_first_layer_and_the_scales_of_family_airbench_are_fixed():
    model = make_network(AIRBENCH)
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    norms = {n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert fixed == {"stem.1.weight"} | {f"{name}.weight" for name in norms}
