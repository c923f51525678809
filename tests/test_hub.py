"""Images that the package ``datasets`` provides: of the Hugging Face Hub, or of Parquet files."""

import math
import os
from pathlib import Path

import pytest
from pictures import load_images, save, seeds_of, write_folder

from nonn.core.errors import UserError
from nonn.core.image_source import named_source
from nonn.data import hub

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def pyarrow():
    pytest.importorskip("datasets")
    return pytest.importorskip("pyarrow")


def write_parquet(pyarrow, path: Path, labels: list, first: int = 0, **columns) -> None:
    import pyarrow.parquet

    for i in range(len(labels)):
        save(Path("scratch.png"), first + i)
        columns.setdefault("image", []).append({"bytes": Path("scratch.png").read_bytes(), "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"label": labels} | columns), path)


def test_parquet_files_of_splits_are_read(pyarrow, tmp_path):
    write_parquet(pyarrow, tmp_path / "pets/data/train-00000-of-00001.parquet", ["cat", "dog", "cat"])
    write_parquet(pyarrow, tmp_path / "pets/data/test-00000-of-00001.parquet", ["dog", "cat"], first=3)
    source = f"hf:{tmp_path / 'pets'}"
    loaded = load_images(source)
    assert seeds_of(loaded) == [0, 1, 2, 3, 4]
    assert loaded.classes == ("cat", "dog")
    assert loaded.labels.tolist() == [0, 1, 0, 1, 0]
    assert loaded.is_test.tolist() == [False] * 3 + [True] * 2
    assert loaded.is_validation is None
    assert load_images(source, sha256=loaded.sha256).sha256 == loaded.sha256
    assert named_source(source) == str(tmp_path / "pets"), "DVC watches it"
    (tmp_path / "pets/data").rename(tmp_path / "elsewhere")
    (tmp_path / "pets/data").symlink_to("../elsewhere")
    with pytest.raises(UserError, match=r"^params\.yaml: dataset\.source: .*pets/data: is a link to a folder, whose"):
        load_images(source)


def test_columns_are_found_or_named(pyarrow, tmp_path):
    path, source = tmp_path / "pets.parquet", f"hf:{tmp_path / 'pets.parquet'}"
    write_parquet(pyarrow, path, [3, 1, 3], place=[0, 1, 0])
    loaded = load_images(source)
    assert (loaded.classes, loaded.labels.tolist()) == (("1", "3"), [1, 0, 1])
    assert load_images(source, label_column="place").labels.tolist() == [0, 1, 0]
    with pytest.raises(UserError, match=r"label_column: .* has no column 'kind'; name one of label, place, image"):
        load_images(source, label_column="kind")
    write_parquet(pyarrow, path, [3, 1, 3], mask=[{"bytes": b"", "path": None}] * 3)
    with pytest.raises(UserError, match=r"several columns of images\. Set dataset\.image_column to one of mask, image"):
        load_images(source)
    assert load_images(source, image_column="image").labels.tolist() == [1, 0, 1]


def test_a_file_that_has_kept_its_time_and_size_is_read_anew(pyarrow, tmp_path):
    path, sizes = tmp_path / "pets.parquet", set()
    for labels in ([0, 1], [1, 0]):
        write_parquet(pyarrow, path, labels)
        os.utime(path, (1e9, 1e9))
        sizes.add(path.stat().st_size)
        assert load_images(f"hf:{path}").labels.tolist() == labels
    assert len(sizes) == 1
    assert not list(Path(".nonn/downloads").iterdir())


def test_rows_without_a_label_or_an_image_are_refused(pyarrow, tmp_path):
    path, source = tmp_path / "pets.parquet", f"hf:{tmp_path / 'pets.parquet'}"
    for labels in (["cat", None, "dog"], ["cat", "", "dog"], [0.0, 1.0, math.nan]):
        write_parquet(pyarrow, path, labels)
        with pytest.raises(UserError, match=r"1 of the images have no label"):
            load_images(source)
    write_parquet(pyarrow, path, [0, 1, -1])
    with pytest.raises(UserError, match=r"images without a label, of number −1"):
        load_images(source)
    write_parquet(pyarrow, path, [0, 1], image=[None, {"bytes": b"", "path": None}], label=[0, 1, 0, 1])
    with pytest.raises(UserError, match=r"2 pictures cannot be read"):
        load_images(source)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"label_column": "uneven"}, r"label_column: .*: column 'uneven' holds values of type list, not numbers"),
        ({"label_column": "even"}, r"label_column: .*: column 'even' holds values of type list"),
        ({"label_column": "image"}, r"label_column: .*: column 'image' holds values of type dict"),
        ({"label_column": "raw"}, r"label_column: .*: column 'raw' holds values of type bytes"),
        ({"image_column": "label"}, r"image_column: .*: column 'label' holds values of type int, not files"),
        ({"image_column": "even"}, r"image_column: .*: column 'even' holds values of type list"),
        ({"image_column": "box"}, r"image_column: .*: column 'box' holds values of type dict"),
    ],
)
def test_columns_of_another_kind_are_refused_by_their_names(columns, told, pyarrow, tmp_path):
    more = {"uneven": [[0], [1, 2]], "even": [[0, 1], [1, 2]], "raw": [b"a", b"b"], "box": [{"x": 1}, {"x": 2}]}
    write_parquet(pyarrow, tmp_path / "pets.parquet", [0, 1], **more)
    with pytest.raises(UserError, match=rf"^params\.yaml: dataset\.{told}"):
        load_images(f"hf:{tmp_path / 'pets.parquet'}", **{"image_column": "image"} | columns)


@pytest.mark.usefixtures("pyarrow")
def test_two_splits_of_one_meaning_are_refused(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: dict.fromkeys(("train", "val", "validation")))
    with pytest.raises(UserError, match=r"hf:some/pets: val and validation name the same split"):
        load_images("hf:some/pets")


def test_a_broken_picture_of_a_parquet_file_is_named(pyarrow, tmp_path):
    images = [{"bytes": b"no picture", "path": None}]
    write_parquet(pyarrow, tmp_path / "pets.parquet", [0, 1], image=images, label=[0, 1, 1])
    with pytest.raises(UserError, match=r"pets\.parquet: image 0 of train cannot be read \(not an image\)"):
        load_images(f"hf:{tmp_path / 'pets.parquet'}")


def test_files_that_rows_name_are_listed_or_skipped_if_they_cannot_be_read(pyarrow, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    save(tmp_path / "there.png", 7)
    images = [{"bytes": None, "path": str(tmp_path / f"{name}.png")} for name in ("there", "gone", "pipe")]
    write_parquet(pyarrow, tmp_path / "pets.parquet", [0, 1], image=images, label=[0, 1, 0, 0, 1])
    with pytest.raises(UserError) as refusal:
        load_images(f"hf:{tmp_path / 'pets.parquet'}")
    first, gone, pipe = str(refusal.value).splitlines()
    assert first.startswith("params.yaml: dataset.source: 2 pictures cannot be read.")
    assert "image 1 of train: " in gone
    assert "gone.png: no such file" in gone
    assert "pipe.png: is a named pipe" in pipe
    assert seeds_of(load_images(f"hf:{tmp_path / 'pets.parquet'}", broken="skip")) == [7, 0, 1]


@pytest.mark.usefixtures("pyarrow")
def test_folders_of_images_are_read_through_datasets_too(tmp_path):
    write_folder(tmp_path / "pets", ["train/cat", "train/dog", "validation/cat", "validation/dog"], count=2)
    loaded = load_images(f"hf:{tmp_path / 'pets'}")
    assert sorted(seeds_of(loaded)) == list(range(8))
    assert loaded.is_validation.sum() == 4
    assert loaded.classes == ("cat", "dog")


@pytest.mark.usefixtures("pyarrow")
def test_what_the_hub_lacks_is_one_line(monkeypatch):
    def fail(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach 'nobody/pets' on the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match=r"^params\.yaml: dataset\.source: hf:nobody/pets cannot be loaded \(.*Hub\)"):
        load_images("hf:nobody/pets")
    assert named_source("hf:nobody/pets") is None


def test_what_fails_while_a_data_set_is_prepared_is_told_by_its_cause(monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("An error occurred while generating the dataset") from ValueError("column of unequal length")

    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match=r"hf:nobody/pets cannot be loaded \(column of unequal length\)"):
        load_images("hf:nobody/pets")


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets\. Run `pip install datasets`"):
        hub.load_hub("nobody/pets", None, None, None)
