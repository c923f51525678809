"""Int8 networks split over devices: every integer map is that of the whole, bit for bit, and takes a byte a value."""

import numpy as np
import onnx
import onnxruntime
import pytest
from loads import CORE
from onnx import TensorProto, numpy_helper
from splits import Build, in_int8, random_image, write_tiny
from tritonclient.grpc.service_pb2 import ModelInferRequest

from nonn.cli import main
from nonn.runtime.protocol import ProtocolError
from nonn.runtime.session import open_session, run_onnx
from nonn.split import plan as plans
from nonn.split.exchange import make_slice, read_slice
from nonn.split.graph import UnsplittableError
from nonn.split.node import SplitDevice
from nonn.split.plan import SplitPlan, run_in_process
from nonn.split.planner import plan_split
from nonn.testbed import composed
from nonn.testbed.composed import split_workload

METHODS = ("channels", "rows")
#: What float32 after the last integer map may differ by, relative to the largest: sums in another order.
ROUNDING = 2e-6


def write_plain(path) -> None:
    """Odd widths, pooling, and a batch norm that cannot be folded."""
    build = Build(channels=1, size=14)
    for outputs, is_pooled in ((5, True), (7, False), (9, True)):
        build.convolve(outputs)
        if is_pooled:
            build.pool()
        build.normalize()
        build.add("Relu")
    build.convolve(6)
    build.write(path)


def write_residual(path) -> None:
    """A shortcut by a convolution, and one that reads what a convolution reads, too; then a stride."""
    build = Build(channels=3, size=11)
    build.convolve(4)
    build.add("Relu")
    before = build.map
    build.convolve(6)
    build.add("Relu")
    branch = build.convolve(6)
    build.convolve(6, kernel=1, read=before, inputs=4)
    build.add("Add", branch)
    build.add("Relu")
    entry = build.map
    build.convolve(6)
    build.add("Add", entry)
    build.add("Relu")
    build.convolve(8, stride=2)
    build.add("Relu")
    build.write(path)


def write_gelu(path) -> None:
    """GELU in the parts that the exporter makes of it, which ONNX Runtime fuses, and a shortcut of stages."""
    build = Build(channels=3, size=13)

    def activate() -> str:
        x = build.map
        build.add("Div", build.constant(np.sqrt(2)))
        build.add("Erf")
        build.add("Add", build.constant(1.0))
        half = build.add("Mul", build.constant(0.5))
        return build.add("Mul", half, read=x)

    build.convolve(24, kernel=3)
    activate()
    build.convolve(6, stride=2)
    entry = activate()
    build.convolve(6)
    activate()
    build.convolve(6)
    build.add("Add", entry)
    build.add("Relu")
    build.convolve(7)
    build.pool()
    activate()
    build.write(path)


@pytest.fixture(scope="module", params=[write_plain, write_residual, write_gelu], ids=["plain", "residual", "gelu"])
def export(request, tmp_path_factory):
    """An int8 classifier."""
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    request.param(path)
    return in_int8(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    write_tiny(path)
    return in_int8(path)


def run_whole(path, names: list[str], image: np.ndarray) -> dict[str, np.ndarray]:
    """These values of the unsplit network."""
    model = onnx.load(path)
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    model.graph.output.extend(known[name] for name in names)
    session = open_session(model.SerializeToString())
    return dict(zip(["logits", *names], session.run(None, {"image": image[None]}), strict=True))


def run_split(plan: SplitPlan, image: np.ndarray, monkeypatch) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    """Logits, and what the devices made, in their order, by name."""
    made: dict[str, list[np.ndarray]] = {}
    run_segment = plans.run_segment

    def record(*arguments):
        outputs = run_segment(*arguments)
        for name, value in outputs.items():
            made.setdefault(name, []).append(value)
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(plans, "run_segment", record)
        return run_in_process(plan, image).logits, made


# What is computed


@pytest.mark.parametrize("n_devices", [1, 2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_integer_maps_are_those_of_the_whole_bit_for_bit(export, method, n_devices, monkeypatch):
    plan = plan_split(export, n_devices, method)
    assert plan.precision == "int8"
    exchanged = sorted({message.source for message in plan.messages})
    for seed in range(3):
        image = random_image(export, seed)
        logits, made = run_split(plan, image, monkeypatch)
        whole = run_whole(export, exchanged, image)
        for name in exchanged:
            joined = np.concatenate(made[name], axis=METHODS.index(method) + 1)
            assert joined.dtype == np.uint8
            assert len(np.unique(joined)) > 3  # a map of one value would prove nothing
            np.testing.assert_array_equal(joined, whole[name])
        expected = run_onnx(export, image[None])[0]
        assert np.abs(whole["logits"] - expected).max() <= ROUNDING * np.abs(expected).max()
        assert np.abs(logits - expected).max() <= ROUNDING * np.abs(expected).max()


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_convolutions_change_nothing(export, method):
    image = random_image(export)
    expected = run_onnx(export, image[None])[0]
    plans_ = [plan_split(export, 3, method, recomputed) for recomputed in (0, 2, 99)]
    assert plans_[0].rounds > plans_[1].rounds > plans_[2].rounds == 0
    for plan in plans_:
        assert np.abs(run_in_process(plan, image).logits - expected).max() <= ROUNDING * np.abs(expected).max()


def test_devices_calculate_on_integers(tiny, tmp_path):
    """ONNX Runtime fuses each convolution of a segment with what is around it: none is left in float32."""
    plan = plan_split(tiny, 2, "channels")
    for number, model in enumerate(plan.models[0]):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{number}.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        operations = [node.op_type for node in onnx.load(tmp_path / f"{number}.onnx").graph.node]
        assert operations.count("QLinearConv") == 1
        assert "Conv" not in operations


# What is sent and what it costs


@pytest.mark.parametrize("method", METHODS)
def test_a_value_is_a_byte_on_the_wire(tiny, tmp_path, method):
    write_tiny(tmp_path / "float32.onnx")
    plan, plain = (plan_split(path, 3, method) for path in (tiny, tmp_path / "float32.onnx"))
    assert {message.dtype for message in plan.messages} == {"uint8"}
    assert plan.payload_bytes() * 4 == plain.payload_bytes() > 0
    assert plain.precision == "float32"
    assert {message.dtype for message in plain.messages} == {"float32"}


def test_costs_by_hand(tiny, monkeypatch):
    # A byte for each weight, and for each filter 4 bytes of bias and 4 of scale.
    first, second = 4 * 9 + 8 * 4, 6 * 4 * 9 + 8 * 6
    channels, rows = (plan_split(tiny, 2, method) for method in METHODS)
    assert [part.weight_bytes for part in channels.parts] == [(first + second) / 2] * 2
    assert [part.weight_bytes for part in rows.parts] == [first + second] * 2
    macs = 16 * 4 * 9 + 16 * 6 * 4 * 9
    assert [part.macs for part in channels.parts] == [part.macs for part in rows.parts] == [macs / 2] * 2
    monkeypatch.setattr(composed, "COMPUTE_RUNS", 2)
    load = split_workload(channels, CORE)
    # The second segment takes its own 2 and the other's 2 channels of 16 bytes, and makes 3 features of 4 bytes.
    assert load.precision == "int8"
    assert load.memory_bytes == (first + second) / 2 + 64 + 12


# On devices


def test_slices_of_integers_travel_as_they_are(tiny):
    message = plan_split(tiny, 2, "channels").messages[0]
    values = np.random.default_rng(0).integers(0, 256, message.shape, dtype=np.uint8)
    request = ModelInferRequest.FromString(make_slice(message, "one", "1", values))
    assert len(request.raw_input_contents[0]) == message.n_bytes == values.size
    np.testing.assert_array_equal(read_slice(message, request), values)
    request.inputs[0].datatype = "FP32"
    with pytest.raises(ProtocolError, match="expected the type UINT8, not 'FP32'"):
        read_slice(message, request)
    request.inputs[0].datatype = "UINT8"
    request.raw_input_contents[0] = values.astype(np.float32).tobytes()
    with pytest.raises(ProtocolError, match=f"expected {values.size} bytes, not {4 * values.size}"):
        read_slice(message, request)


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_survives_its_folder_and_warms_up(tiny, folder, method, capsys):
    main(["split", str(tiny), "-n", "3", "--method", method, "--output", "plan"])
    assert f"split over 3 by {method} in int8; for one image" in capsys.readouterr().out
    plan, loaded = plan_split(tiny, 3, method), SplitPlan.load(folder / "plan")
    assert (loaded.parts, loaded.models, loaded.precision) == (plan.parts, plan.models, "int8")
    for position in range(3):
        device = SplitDevice(folder / "plan" / str(position))
        assert device.part == plan.parts[position]


# What cannot be split


def quantised(path, edit) -> None:
    """The tiny network in int8, after an edit."""
    write_tiny(path)
    model = onnx.load(in_int8(path))
    edit(model.graph)
    onnx.save(model, path)


def signed(graph) -> None:
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.UINT8:
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.int8), tensor.name))
    del graph.value_info[:]


def by_channel(graph) -> None:
    scale = next(
        tensor for tensor in graph.initializer if tensor.name.startswith("map") and tensor.name.endswith("_scale")
    )
    scale.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), scale.name))


@pytest.mark.parametrize(("edit", "why"), [(signed, "a map of int8"), (by_channel, "not one scale for the whole map")])
def test_other_forms_of_quantisation_are_refused(tmp_path, edit, why):
    quantised(tmp_path / "model.onnx", edit)
    with pytest.raises(UnsplittableError, match=rf"model.onnx: cannot be split: .*: {why}\."):
        plan_split(tmp_path / "model.onnx", 2, "rows")
