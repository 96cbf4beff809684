"""Images from parquet files: exact pixels, and mistakes that are named. The files are made on the spot."""

import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from scfm.data.labelled_images import load_labelled_images

NAMES = ["cat", "dog", "ship"]


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "png")
    return file.getvalue()


def write(folder, name, cells, labels, columns=("img", "label"), note=True):
    """A parquet file in the layout of the hub; `cells`: bytes."""
    table = pyarrow.table({columns[0]: [{"bytes": c, "path": None} for c in cells], columns[1]: labels})
    if note:
        about = {"info": {"features": {columns[1]: {"_type": "ClassLabel", "names": NAMES}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, folder / name)


@pytest.fixture
def pixels():
    return torch.randint(256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_every_pixel_and_label_of_all_files_in_order(tmp_path, pixels):
    labels = [0, 1, 2, 2, 1, 0, 1]
    write(tmp_path / "data", "train-00000-of-00002.parquet", map(png, pixels[:4]), labels[:4])
    write(tmp_path / "data", "train-00001-of-00002.parquet", map(png, pixels[4:]), labels[4:])
    write(tmp_path / "data", "test-00000-of-00001.parquet", map(png, pixels[:1]), labels[:1])
    train, test = (
        load_labelled_images(tmp_path),
        load_labelled_images(tmp_path, "test"),
    )  # folders below count
    assert torch.equal(train.pixels, pixels) and train.pixels.dtype == torch.uint8
    assert train.labels.tolist() == labels and train.labels.dtype == torch.int64
    assert train.names == test.names == tuple(NAMES) and torch.equal(test.pixels, pixels[:1])


def test_without_the_hubs_note_classes_are_numbered(tmp_path, pixels):
    write(tmp_path, "train-0.parquet", map(png, pixels[:2]), [0, 4], note=False)
    assert load_labelled_images(tmp_path).names == ("0", "1", "2", "3", "4")


def test_other_columns_and_sizes(tmp_path):
    wide = torch.zeros(3, 40, 60, dtype=torch.uint8)
    wide[:, :, 10:50] = 200  # the middle square is even
    write(tmp_path, "train-0.parquet", [png(wide)], [1], columns=("image", "what"))
    data = load_labelled_images(tmp_path, size=20, columns=("image", "what"))
    assert data.pixels.shape == (1, 3, 20, 20) and data.pixels[..., 2:-2].unique().tolist() == [200]


def test_a_grey_image_gets_three_channels(tmp_path):
    file = io.BytesIO()
    Image.new("L", (32, 32), 77).save(file, "png")
    write(tmp_path, "train-0.parquet", [file.getvalue()], [0])
    assert load_labelled_images(tmp_path).pixels.unique().tolist() == [77]


def test_no_folder_and_no_file_of_the_split(tmp_path, pixels):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder.*hub:OWNER/NAME"):
        load_labelled_images(tmp_path / "nowhere")
    write(tmp_path, "train-0.parquet", map(png, pixels[:1]), [0])
    with pytest.raises(FileNotFoundError, match=r"no test-\*\.parquet"):
        load_labelled_images(tmp_path, "test")


def test_wrong_columns_are_listed(tmp_path, pixels):
    write(tmp_path, "train-0.parquet", map(png, pixels[:1]), [0], columns=("image", "label"))
    with pytest.raises(ValueError, match="no column img: its columns are image, label"):
        load_labelled_images(tmp_path)


def test_a_broken_image_is_named(tmp_path, pixels):
    good = png(pixels[0])
    for bad in (b"", b"no image", good[:60], None):
        write(tmp_path, "train-00003.parquet", [good, bad], [0, 0])
        with pytest.raises(ValueError, match=r"row 1 (is no|does not open as an) image"):
            load_labelled_images(tmp_path)


def test_a_label_must_be_a_class(tmp_path, pixels):
    for label in (-1, None):
        write(tmp_path, "train-0.parquet", map(png, pixels[:2]), [0, label])
        with pytest.raises(ValueError, match="row 1: the label"):
            load_labelled_images(tmp_path)


def test_a_file_that_is_no_parquet_and_one_without_rows(tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is no parquet file"):
        load_labelled_images(tmp_path)
    write(tmp_path, "train-0.parquet", [], pyarrow.array([], pyarrow.int64()))
    with pytest.raises(ValueError, match="holds no row"):
        load_labelled_images(tmp_path)


def test_a_name_on_the_hub_goes_through_datasets(tmp_path, pixels, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    made = datasets.Dataset.from_dict(
        {"img": [{"bytes": png(p), "path": None} for p in pixels[:3]], "label": [2, 0, 1]}, features
    )
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: calls.append((name, split)) or made)
    data = load_labelled_images("hub:owner/set", "test")
    assert calls == [("owner/set", "test")] and torch.equal(data.pixels, pixels[:3])
    assert data.labels.tolist() == [2, 0, 1] and data.names == tuple(NAMES)
