"""Foreign teachers that cannot be one, and keys of `teacher` that do not go together."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from experiments import tiny_params
from foreign import CODE, save, section, taught, write_onnx, write_program
from onnx import helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from torch import nn

from nonn.core.errors import UserError
from nonn.core.files import sha256_of
from nonn.core.jobs import check_named_files, list_jobs
from nonn.core.params import Params, TeacherParams
from nonn.teachers.teacher import import_teacher

pytestmark = pytest.mark.usefixtures("code")

# Wrong teachers


def bad(name: str, model: nn.Module) -> TeacherParams:
    """Write one wrong teacher into the working directory; return the section that names it."""
    weights, module = dict(model.state_dict()), section
    nan = weights | {"conv.weight": weights["conv.weight"].clone().fill_(float("nan"))}
    inf = weights | {"fc.bias": weights["fc.bias"] / 0}
    if name.startswith("code "):
        body = {
            "fails": "def make():\n    return 1 / 0",
            "does not parse": "def make(:",
            "no module": "def make():\n    return [1, 2]",
            "softmax": f"{CODE}\n\ndef make():\n    return nn.Sequential(Small(), nn.Softmax(1))",
            "tuple": f"{CODE}\n\nclass make(Small):\n    def forward(self, x):\n        return super().forward(x), x\n",
            "no linear layer": "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 3, 3), "
            "nn.AdaptiveAvgPool2d(1), nn.Flatten())",
            "maps": "from torch import nn\ndef make():\n    return nn.Conv2d(3, 3, 3)",
            "exits": "import sys\ndef make():\n    sys.exit(0)",
            "reads its own options": "import argparse\nparser = argparse.ArgumentParser()\n"
            "parser.add_argument('--epochs')\nparser.parse_args(['--epochs'])\ndef make():\n    return None",
            "exits on images": "import sys\nfrom torch import nn\nclass make(nn.Module):\n    def forward(self, x):\n"
            "        sys.exit(2)",
            "without sizes": "from torch import nn\ndef make():\n"
            "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))",
            "without values": f"{CODE}\ndef make():\n    return Small().to('meta')",
            "with more than tensors": f"{CODE}\n\nclass make(Small):\n    def get_extra_state(self):\n        return 1",
            "drops out": f"{CODE}\n\nclass make(Small):\n    def forward(self, x):\n"
            "        return super().forward(nn.functional.dropout(x))\n",
            "squeezes": f"{CODE}\n\nclass make(Small):\n    def forward(self, x):\n"
            "        return self.fc(nn.functional.adaptive_avg_pool2d(self.more(self.conv(x)), 1).squeeze())\n",
            "fails on one image": f"{CODE}\n\nclass make(Small):\n    def forward(self, x):\n"
            "        return super().forward(x).squeeze().flatten(1)\n",
            "mixed precision": f"{CODE}\n\nclass make(Small):\n    def forward(self, x):\n"
            "        with torch.autocast('cpu', torch.bfloat16):\n            return super().forward(x)\n",
            "two inputs": f"{CODE}\n\nclass make(Small):\n    def forward(self, x, y):\n"
            "        return super().forward(x + y)\n",
            "whole numbers": f"{CODE}\n\nclass make(Small):\n    def forward(self, x):\n"
            "        return super().forward(x).long()\n",
            "complex": f"{CODE}\n\nclass make(Small):\n    def forward(self, x):\n"
            "        return super().forward(x) * 1j\n",
            "fixed size": "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))",
        }[name.removeprefix("code ")]
        Path("nets/wrong.py").write_text(body)
        return section("module:nets.wrong:make")
    if name == "ONNX with softmax":
        write_onnx(Path("a.onnx"), model, tail=[helper.make_node("Softmax", ["y"], ["z"])])
        return section("onnx:a.onnx")
    if name == "ONNX in training mode":
        write_onnx(Path("a.onnx"), model, training=True)
        return section("onnx:a.onnx")
    if name == "ONNX that squeezes":
        write_onnx(Path("a.onnx"), model, tail=[helper.make_node("Squeeze", ["y"], ["z"])])
        return section("onnx:a.onnx")
    if name == "ONNX with a scaled product":
        write_onnx(Path("a.onnx"), model)
        changed = onnx.load("a.onnx")
        last = next(node for node in changed.graph.node if node.name == "fc")
        last.attribute.append(helper.make_attribute("alpha", 2.0))
        onnx.save(changed, "a.onnx")
        return section("onnx:a.onnx")
    if name == "program in training mode":
        write_program(Path("a.pt2"), model.train())
        return section("export:a.pt2")
    if name == "decomposed program":
        program = torch.export.export(model, (torch.zeros(1, 3, 32, 32),)).run_decompositions()
        torch.export.save(program, "a.pt2")
        return section("export:a.pt2")
    if name == "dynamically quantised ONNX":
        write_onnx(Path("b.onnx"), model)
        quantize_dynamic("b.onnx", "a.onnx", op_types_to_quantize=["Conv"])
        return section("onnx:a.onnx")
    if name in ("quantised ONNX", "ONNX with channels last"):
        write_onnx(Path("a.onnx"), model)
        changed = onnx.load("a.onnx")
        if name == "quantised ONNX":
            whole = numpy_helper.from_array(np.zeros((3, 16), np.int8), "fc.whole")
            changed.graph.initializer.extend([whole, numpy_helper.from_array(np.float32(0.1), "fc.scale")])
            next(node for node in changed.graph.node if node.name == "fc").input[1] = "fc.dequantised"
            node = helper.make_node("DequantizeLinear", ["fc.whole", "fc.scale"], ["fc.dequantised"])
            changed.graph.node.insert(0, node)
        else:
            sides = changed.graph.input[0].type.tensor_type.shape.dim
            sides[1].dim_param, sides[2].dim_param, sides[3].dim_value = "h", "w", 3
        onnx.save(changed, "a.onnx")
        return section("onnx:a.onnx")
    if name in ("ONNX cut off", "ONNX without its weights", "ONNX with its weights elsewhere"):
        write_onnx(Path("a.onnx"), model)
        if name == "ONNX cut off":
            Path("a.onnx").write_bytes(Path("a.onnx").read_bytes()[:500])
        else:
            location = "b.onnx.data" if name == "ONNX without its weights" else "b.onnx_data"
            onnx.save(onnx.load("a.onnx"), "b.onnx", save_as_external_data=True, location=location, size_threshold=0)
            Path(location).unlink()
        return section("onnx:a.onnx" if name == "ONNX cut off" else "onnx:b.onnx")
    if name == "zip without its directory":
        save(weights)
        content = Path("w.pt").read_bytes()
        Path("w.pt").write_bytes(content.replace(b"PK\x01\x02", b"PK\x00\x00"))
        return section(weights="w.pt")
    if name in ("ONNX of other biases", "ONNX of one input"):
        write_onnx(Path("a.onnx"), model)
        wrong = onnx.load("a.onnx")
        last = next(node for node in reversed(wrong.graph.node) if node.op_type == "Gemm")
        if name == "ONNX of one input":
            del last.input[1:]
        else:
            bias = next(tensor for tensor in wrong.graph.initializer if tensor.name == last.input[2])
            bias.CopyFrom(numpy_helper.from_array(np.zeros((2, 5), np.float32), bias.name))
        Path("a.onnx").write_bytes(wrong.SerializeToString())
        return section("onnx:a.onnx")
    if name == "program with calculated weights":
        write_program(Path("a.pt2"), nn.Sequential(*list(model.children())[:-1], nn.Flatten(), Calculated()))
        return section("export:a.pt2")
    if name == "batches of 8":
        write_onnx(Path("a.onnx"), model, batch=8)
        return section("onnx:a.onnx")
    if name == "no program":
        Path("a.pt2").write_bytes(b"no program")
        return section("export:a.pt2")
    if name == "a folder":
        Path("folder.onnx").mkdir()
        return section("onnx:folder.onnx")
    if name in ("cut off", "cut off, of old", "empty"):
        save(weights)
        if name == "cut off, of old":
            torch.save(weights, "w.pt", _use_new_zipfile_serialization=False)
        content = Path("w.pt").read_bytes()
        Path("w.pt").write_bytes(content[: 0 if name == "empty" else len(content) // 2])
        return section(weights="w.pt")
    if name == "a folder as weights":
        Path("w.pt").mkdir()
    if name == "Keras":
        Path("w.pt").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    if name == "Git LFS":
        Path("w.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    if name == "web page":
        Path("w.pt").write_text("<!DOCTYPE html><html>Not found</html>")
    if name == "ONNX as weights":
        write_onnx(Path("w.onnx"), model)
        return section(weights="w.onnx")
    if name == "program as weights":
        write_program(Path("w.pt"), model)
    contents = {
        "NaN": nan,
        "infinity": inf,
        "a pickled model": nn.Linear(2, 2),
        "no last layer": {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")},
        "two networks": {"generator": weights, "critic": weights},
        "optimizer alone": {"optimizer": {"state": {}}, "epoch": 3},
        "another model": {"a.weight": torch.zeros(2, 2)},
        "quantised": weights | {"conv.weight": quantised(weights["conv.weight"])},
        "no values": weights | {"conv.weight": weights["conv.weight"].to("meta")},
        "sparse": weights | {"fc.weight": weights["fc.weight"].to_sparse()},
        "complex": weights | {"fc.bias": weights["fc.bias"] * 1j},
        "an entry that is no tensor": {"state_dict": weights | {"fc._extra_state": {}}, "epoch": 1},
        "a last layer of no dimensions": weights | {"fc.weight": torch.tensor(0.0), "fc.bias": torch.tensor(0.0)},
        "float8 with NaN": weights | {"fc.bias": nan["conv.weight"].flatten()[:3].to(torch.float8_e4m3fn)},
        "other classes": weights | {"fc.weight": torch.zeros(10, 16), "fc.bias": torch.zeros(10)},
    }
    if name in contents:
        save(contents[name])
    keys = {
        "no such library model": {"source": "torchvision:resnet19"},
        "no such module": {"source": "module:nets.missing:make"},
        "no such factory": {"source": "module:nets.small:build"},
        "no such layer": {"classifier": "fcc"},
        "unknown classes": {"classes": ["across", "dwon", "chequered"]},
    }
    if name in keys:
        return section(**keys[name])
    return module(weights="w.pt")


class Calculated(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 16 * 13 * 13))

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


def quantised(weights: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to give them up, and files stay
        return torch.quantize_per_tensor(weights, 0.1, 0, torch.qint8)


BAD = {
    "NaN": r"w\.pt: NaN or infinite values in 1 of \d+ tensors, such as conv\.weight",
    "infinity": r"NaN or infinite values in 1 of \d+ tensors, such as fc\.bias",
    "a pickled model": r"w\.pt: a pickle that needs code \(torch\.nn\.modules\.linear\.Linear\)",
    "two networks": r"holds several state dicts \('generator', 'critic'\)",
    "optimizer alone": r"holds no state dict",
    "another model": r"does not fit teacher\.source module:nets\.small:make \(\d+ tensors missing, 1 unknown",
    "other classes": r"the teacher has 10 outputs, and 3 classes are expected",
    "Keras": r"is an HDF5 file, as Keras writes it; export the model to ONNX",
    "Git LFS": r"is a pointer of Git LFS",
    "web page": r"is a web page, as a failed download leaves it",
    "ONNX as weights": r"is an ONNX file; set teacher\.source to onnx:w\.onnx",
    "program as weights": r"is an exported program; set teacher\.source to export:w\.pt",
    "ONNX with softmax": r"differ by [\d.]+: a softmax follows it",
    "ONNX cut off": r"a\.onnx is not an ONNX file",
    "ONNX with its weights elsewhere": r"b\.onnx keeps its weights in b\.onnx_data, .* location='b\.onnx\.data'",
    "ONNX without its weights": r"b\.onnx has its weights in a file that is not there or damaged",
    "batches of 8": r"takes batches of 8 images alone",
    "no program": r"is not a program that torch\.export wrote",
    "cut off": r"w\.pt: is cut off or damaged; fetch or save it again",
    "cut off, of old": r"w\.pt: is cut off or damaged\. Fetch or save it again",
    "empty": r"w\.pt: is empty; fetch or save it again",
    "no last layer": r"w\.pt: has no last layer \(fc\)\. .* `nonn head --start w\.pt`",
    "a folder": r"is a folder\. Name a regular file",
    "a folder as weights": r"w\.pt: is a folder\. Name a regular file",
    "quantised": r"w\.pt: PyTorch cannot load it .*Copying from quantized.*Save its weights as float tensors",
    "no values": r"w\.pt: the tensor conv\.weight has no values \(device meta\)\. Save its weights as dense",
    "sparse": r"w\.pt: the tensor fc\.weight is sparse\. Save its weights as dense float tensors",
    "complex": r"w\.pt: the tensor fc\.bias is complex\. Save its weights as dense float tensors",
    "an entry that is no tensor": r"w\.pt: holds no state dict",
    "a last layer of no dimensions": r"does not fit .* 2 of another shape, such as fc\.bias",
    "float8 with NaN": r"NaN or infinite values in 1 of \d+ tensors, such as fc\.bias",
    "zip without its directory": r"w\.pt: is a damaged zip",
    "ONNX of other biases": r"a\.onnx is damaged, or no model that a library has exported",
    "ONNX of one input": r"a\.onnx is damaged|has no linear layer of 3 outputs",
    "program with calculated weights": r"calculates the weights of its last linear layer for each image",
    "code exits": r"fails \(SystemExit: 0\)",
    "code reads its own options": r"fails \(SystemExit: 2\)",
    "code exits on images": r"fails on 16 images .*\(SystemExit: 2\)",
    "code without sizes": r"1\.weight has no size before the first image\. Give its layer a size",
    "code without values": r"the tensor conv\.weight has no values",
    "code with more than tensors": r"the entry _extra_state is no tensor \(int\)",
    "no such library model": r"torchvision has no classifier 'resnet19' \(did you mean 'resnet1?\d'\?\)",
    "no such module": r"there is no module nets\.missing",
    "no such factory": r"module nets\.small has no 'build'",
    "no such layer": r"has no linear layer 'fcc' \(did you mean 'fc'\?\)",
    "unknown classes": r"class 'down' of the data set is not among .* \(did you mean 'dwon'\?\)",
    "code fails": r"fails \(ZeroDivisionError: division by zero\)",
    "code does not parse": r"fails \(SyntaxError",
    "code no module": r"returns a list, not an nn\.Module",
    "code softmax": r"a softmax follows it",
    "code tuple": r"answers with a tuple, not with the logits",
    "code no linear layer": r"runs no linear layer of 3 outputs",
    "code maps": r"answers 16 images with shape \(16, 3, 30, 30\)",
    "code drops out": r"answers differently when asked again, or in another batch\. Export it in evaluation mode",
    "ONNX in training mode": r"answers differently when asked again, or in another batch",
    "program in training mode": r"answers differently when asked again, or in another batch",
    "decomposed program": r"has no linear layer of 3 outputs\. .* exported without `run_decompositions`",
    "dynamically quantised ONNX": r"is quantised by what each batch holds, .* Export it in float32",
    "quantised ONNX": r"is quantised, and its last linear layer has to be one of floating point\. Export it in float32",
    "ONNX with channels last": r"takes images \(B, H, W, C\), with the channels last",
    "code mixed precision": r"differ by [\d.e-]+: it computes in 16 bits\. Let it compute in float32, without torch",
    "code two inputs": r"fails on 16 images .*\(TypeError: .*\. Wrap it in a module whose forward takes only the",
    "code whole numbers": r"answers with int64, not with logits of floating point",
    "code complex": r"answers with complex64, not with logits of floating point",
    "code fixed size": r"fails on 16 images of 3 channels and 32 x 32 pixels .* Set teacher\.size to what it was",
    "code squeezes": r"answers 1 image with shape \(3,\), not with logits \(1, 3\)\. .*`\.flatten\(1\)` instead of",
    "code fails on one image": r"fails on 1 image of .*\(IndexError: .*`\.flatten\(1\)` instead of `\.squeeze\(\)`",
    "ONNX with a scaled product": r"its last, with their outputs: none\. Its last layer has to be a matrix product",
    "ONNX that squeezes": r"answers 1 image with shape \(3,\), not with logits \(1, 3\)\. .*`\.flatten\(1\)` instead",
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", BAD)
def test_wrong_teachers_are_refused_in_one_line(name, colour, model, caplog):
    params = bad(name, model)
    caplog.clear()  # what writing it has said
    with pytest.raises(UserError, match=BAD[name]) as told:
        import_teacher(colour, params)
    assert len(str(told.value).splitlines()) == 1, told.value
    assert str(told.value).endswith((".", "`")), told.value
    assert not caplog.records  # nor does a library say more


@pytest.mark.parametrize("kind", ["module", "onnx"])
def test_one_output_for_two_classes_gets_its_own_remedy(kind, colour, model):
    model.fc = nn.Linear(16, 1)
    Path("nets/one.py").write_text(f"{CODE}\n\ndef make():\n    return Small(n_classes=1)\n")
    write_onnx(Path("a.onnx"), model)
    source = {"module": "module:nets.one:make", "onnx": "onnx:a.onnx"}[kind]
    with pytest.raises(UserError, match=r"Give its last layer two outputs, one for each class: a row of zeros, and"):
        import_teacher(colour, section(source, classes=["across", "down"]))


def test_weights_of_torchvision_in_our_families_are_told_apart(colour):
    """A state dict of torchvision's ResNet-18 given to a CIFAR ResNet: the remedy is another source."""
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer4.0.conv1.weight": torch.zeros(512, 256, 3, 3)}
    params = TeacherParams.model_validate(
        {"architecture": {"family": "resnet", "depth": 20}, "weights": save(weights), "threads": 1}
    )
    with pytest.raises(UserError, match=r"set teacher\.source to torchvision:NAME or timm:NAME"):
        import_teacher(colour, params)


def test_downloads_that_fail_are_one_line(folder, colour, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(folder))
    with pytest.raises(UserError, match=r"null takes the weights that torchvision downloads for resnet18, and the dow"):
        import_teacher(colour, section("torchvision:resnet18"))


def test_a_checksum_of_a_graph_without_its_weights_is_refused(colour):
    write_onnx(Path("a.onnx"), taught(colour))
    onnx.save(onnx.load("a.onnx"), "a.onnx", save_as_external_data=True, location="a.onnx.data", size_threshold=0)
    import_teacher(colour, section("onnx:a.onnx"))
    pinned = section("onnx:a.onnx", weights_sha256=sha256_of(Path("a.onnx")))
    with pytest.raises(UserError, match=r"weights_sha256: is that of a\.onnx alone, whose weights are in a\.onnx\.d"):
        import_teacher(colour, pinned)


# Parameters


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"source": "tv:resnet18"}, r"no source 'tv:resnet18'; write one of train, torchvision:NAME"),
        ({"source": "torchvison:resnet18"}, r"did you mean 'torchvision'\?"),
        ({"source": "module:nets"}, r"is not of the form module:PACKAGE\.FILE:FACTORY"),
        ({"source": "onnx:"}, r"is not of the form onnx:FILE\.onnx"),
        ({"source": "onnx:a.onnx", "weights": "a.pt"}, r"holds its weights itself"),
        ({"source": "torchvision:resnet18", "weights": "https://host/w.pt"}, r"is an address; download it"),
        ({"source": "torchvision:resnet18", "classes": ["a", "b", "a"]}, r"'a' is listed twice"),
        ({}, r"architecture: source train needs one"),
        ({"architecture": {"family": "wrn", "depth": 10}, "expected_accuracy": 0.9}, r"belongs to an imported teacher"),
    ],
)
def test_keys_that_do_not_suit_the_source_are_refused(keys, complaint):
    with pytest.raises(ValueError, match=complaint):
        TeacherParams.model_validate({"threads": 1, **keys})


def test_few_lines_are_enough_for_a_foreign_teacher():
    raw = tiny_params({"signals": {"attention": False}})
    raw["networks"]["2s"]["baselines"] = {}
    raw["teacher"] = {"source": "torchvision:resnet18", "threads": 2}
    assert Params.model_validate(raw).teacher.is_foreign
    raw["signals"]["attention"] = True
    with pytest.raises(ValueError, match=r"signals\.attention: only teachers of source train have attention maps"):
        Params.model_validate(raw)


def test_dvc_watches_the_files_of_a_source():
    raw = tiny_params({"signals": {"attention": False}})
    raw["networks"]["2s"]["baselines"] = {}

    def jobs(**keys) -> dict:
        return list_jobs(Params.model_validate(raw | {"teacher": {"threads": 1, **keys}}))

    assert jobs(source="onnx:a.onnx")["teacher"] == "a.onnx"
    Path("a.onnx.data").touch()
    assert jobs(source="onnx:a.onnx")["teacher_data"] == "a.onnx.data"
    assert jobs(source="module:nets.small:make")["teacher"] == "nets"
    assert jobs(source="module:nets.small:make", weights="w.pt")["weights"] == "w.pt"
    params = Params.model_validate(raw | {"teacher": {"threads": 1, "source": "onnx:missing.onnx"}})
    with pytest.raises(UserError, match=r"teacher\.source: missing\.onnx does not exist\. Name a file"):
        check_named_files(params)
