"""What other servers are given: the same files, and a description that agrees with them."""

import pytest
from clusters import CHANNELS, N_FEATURES, SIZE, VERSIONS, make_image, sha256
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from nonn.cli import main
from nonn.core.files import read_json
from nonn.runtime.session import open_session, run_onnx


@pytest.fixture
def repository(network_folder, folder):
    main(["hosting", str(network_folder), "models"])
    return folder / "models"


def test_triton_is_told_what_the_file_is(repository, network_folder):
    for position, n_features in enumerate(N_FEATURES):
        path = repository / f"{position}/{VERSIONS[position]}/model.onnx"
        assert sha256(path) == sha256(network_folder / f"{position}.onnx")
        text = (path.parents[1] / "config.pbtxt").read_text()
        assert "NOT tested" in text.splitlines()[0]
        config = text_format.Parse(text, ModelConfig())  # Triton's own schema
        session = open_session(path)
        assert (config.name, config.max_batch_size) == (str(position), 0)
        assert (config.input[0].name, list(config.input[0].dims)) == ("image", [1, CHANNELS, SIZE, SIZE])
        assert (config.output[0].name, list(config.output[0].dims)) == ("features", [1, n_features])
        assert session.get_inputs()[0].shape == list(config.input[0].dims)
        assert session.get_outputs()[0].shape == list(config.output[0].dims)
        assert run_onnx(path, make_image()[None]).shape == (1, n_features)


def test_openvino_is_told_where_the_models_are(repository):
    models = read_json(repository / "config.json")["model_config_list"]
    for entry in models:
        base = entry["config"]["base_path"].removeprefix("/models/")
        assert (repository / base / VERSIONS[int(base)] / "model.onnx").is_file()
    assert [entry["config"]["name"] for entry in models] == ["0", "1", "2"]
    assert "NOT tested" in (repository / "README").read_text()


def test_nothing_is_overwritten(repository, network_folder):
    (repository / "mine").write_text("kept")
    with pytest.raises(SystemExit, match="models: is there already"):
        main(["hosting", str(network_folder), "models"])
    assert (repository / "mine").read_text() == "kept"
