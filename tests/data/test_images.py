"""Images as a person sees them, whoever reads them; captions wherever they stand; generated images known by
their marks."""

import io
import json
import re
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from scfm.cli import main
from scfm.data.images import inspect_image, list_images, nearest_size, not_finite, read_folder, read_image
from scfm.data.labelled_images import load_labelled_images
from scfm.data.prompts import read_prompts
from scfm.data.teacher_images import generate_images
from scfm.models.flux import Flux
from toy.pipelines import FLUX, TOKENS, load_flux


@pytest.fixture
def through(tmp_path):
    """Both readers of one file: that of folders, and that of parquet; (3, 32, 32) in 0 .. 255 each."""

    def read(name):
        path = tmp_path / name
        folder = ((read_image(path, 32, 32) + 1) * 127.5).round()
        table = pyarrow.table({"img": [{"bytes": path.read_bytes(), "path": None}], "label": [0]})
        pyarrow.parquet.write_table(table, tmp_path / "train-0.parquet")
        pixels = load_labelled_images(tmp_path).pixels[0].float()
        assert (folder - pixels).abs().max() <= 1  # two ways of scaling, one image
        return folder

    return read


def ramp(scale, dtype):
    return (np.linspace(0, 1, 32, dtype=np.float64)[None].repeat(32, 0) * scale).astype(dtype)


@pytest.mark.parametrize("hidden", ["black", "magenta"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, through, hidden, mode):
    image = Image.new("RGBA", (32, 32), hidden)
    image.putalpha(0)
    image.paste((255, 0, 0, 255), (8, 8, 24, 24))
    image = image.convert("LA") if mode == "LA" else image.quantize(8) if mode == "P" else image
    image.save(tmp_path / "a.png")
    assert through("a.png")[:, 0, 0].tolist() == [255, 255, 255]


def test_a_colour_that_stands_for_nothing_is_white(tmp_path, through):
    Image.new("RGB", (32, 32), (0, 200, 0)).save(tmp_path / "a.png", transparency=(0, 200, 0))
    assert through("a.png")[:, 0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_brought_to_eight(tmp_path, through):
    Image.fromarray(ramp(65535, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(ramp(255, np.uint8)).save(tmp_path / "plain.png")
    assert (through("deep.png") - through("plain.png")).abs().max() <= 1


def test_pixels_of_no_known_range_are_refused(tmp_path):
    Image.fromarray(ramp(1, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="a.tiff has pixels of mode F, whose range is unknown"):
        read_image(tmp_path / "a.tiff", 32, 32)


def turned(path, how):
    """A 96 x 48 image, upright 48 x 96, with its top half red, that says so in one of three places."""
    image = Image.new("RGB", (96, 48), "blue")
    image.paste("red", (0, 0, 48, 48))
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    if how == "exif":
        image.save(path, exif=exif)
    elif how == "xmp":
        image.save(path, xmp=xmp.encode())
    else:
        image.save(path)  # between IDAT and IEND, as the PNG standard allows
        data, body = path.read_bytes(), exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
        path.write_bytes(data[:-12] + chunk + data[-12:])


@pytest.mark.parametrize("name, how", [("a.jpg", "exif"), ("a.jpg", "xmp"), ("a.png", "late")])
def test_the_bucket_is_that_of_the_image_as_it_is_read(tmp_path, name, how):
    turned(tmp_path / name, how)
    _, height, width = inspect_image(tmp_path / name)
    assert (height, width) == (96, 48) and nearest_size(height, width, [(64, 32), (32, 64)]) == (64, 32)
    pixels = read_image(tmp_path / name, 64, 32)
    assert pixels[0, 5, 16] > 0.8 and pixels[2, 60, 16] > 0.8  # red above, blue below: nothing is cut away


def write_folder(folder, count, suffix=".jpg"):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}{suffix}")
    rows = [json.dumps({"file_name": f"{i}{suffix}", "text": "a red star"}) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_all_broken_images_are_named_before_anything_is_made(tmp_path, capsys, suffix):
    own = tmp_path / "own"
    write_folder(own, 6, suffix)
    for i in (2, 4):
        path = own / f"{i}{suffix}"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    words = [
        "distill",
        "--pretrained_model_name_or_path",
        str(FLUX),
        "--train_data_dir",
        str(own),
        "--output_dir",
        str(tmp_path / "run"),
        "--height",
        "32",
        "--width",
        "32",
        "--max_sequence_length",
        str(TOKENS),
    ]
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"2{suffix} does not open" in line and f"4{suffix} does not open" in line
    assert not (tmp_path / "run").exists() and not (own / "cache").exists()


# Where captions stand


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", 'file_name,text\n0.png,"a red star, large"\n1.png,a ring\n'),
        ("a.tsv", "file_name\tcaption\n0.png\ta red star, large\n1.png\ta ring\n"),
        ("a.txt", "# a comment\na red star, large\na ring\n"),
        ("a.jsonl", '{"prompt": "a red star, large"}\n{"prompt": "a ring"}\n'),
    ],
)
def test_captions_are_read_by_the_kind_of_their_file(tmp_path, name, text, caplog):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == ["a red star, large", "a ring"]
    assert ("left out as a comment" in caplog.text) == (name == "a.txt")


@pytest.mark.parametrize(
    "lines, words",
    [
        (1, "1 line that begins with # is left out as a comment"),
        (2, "2 lines that begin with # are left out"),
    ],
)
def test_comments_are_counted_and_their_file_is_named_as_people_do(
    tmp_path, monkeypatch, caplog, lines, words
):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("# a comment\n" * lines + "a red star\n")
    for path in ("a.txt", tmp_path / "a.txt"):  # a run remembers the full one
        read_prompts(path)
    assert [record.getMessage()[: len(words) + 7] for record in caplog.records] == [f"a.txt: {words}"] * 2


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.yaml", b"- a red star\n", "a .yaml file is no list of captions"),
        ("a.parquet", b"PAR1", "a .parquet file is no list of captions"),
        ("a.csv", b"name,words\n0.png,a ring\n", "line 2: no caption"),
        ("a.txt", "a red star\n".encode("utf-16-le"), "NUL bytes, as UTF-16"),
        ("a.jsonl", b'{"text": "a red \\ud83d"}\n', "a.jsonl, line 1: 'a red .* holds half a character"),
    ],
)
def test_what_is_no_list_of_captions_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_captions_beside_their_images(tmp_path):
    for name in "ba":
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a red\n{name}\n")
    assert [(p.name, text) for p, text in read_folder(tmp_path)] == [
        ("a.png", "a red a"),
        ("b.png", "a red b"),
    ]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match="no caption beside b.png: write b.txt"):
        read_folder(tmp_path)


def test_a_table_of_captions(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"a red star, large"\n')
    assert [(p.name, text) for p, text in read_folder(tmp_path)] == [("a.png", "a red star, large")]


def test_the_folder_below_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match="there is one in .*train: name that folder"):
        read_folder(tmp_path)


@pytest.mark.parametrize("listed, there", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_may_be_spelled_in_two_ways(tmp_path, listed, there):
    Image.new("RGB", (32, 32), "red").save(tmp_path / unicodedata.normalize(there, "café.png"))
    row = {"file_name": unicodedata.normalize(listed, "café.png"), "text": "a cup"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert len(list_images(tmp_path)) == 1


# Generated images


@pytest.fixture(scope="module")
def flux():
    return Flux(load_flux(), 32, 32, TOKENS)


def made(flux, folder, captions=("a red star", "a blue ring"), **more):
    return generate_images(flux, list(captions), folder, 1, 2.0, progress=False, **more)


def test_images_without_their_listing_are_not_taken_for_others(flux, tmp_path):
    made(flux, tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="holds 00000.png, but no metadata.jsonl"):
        made(flux, tmp_path, ("a green cross", "a circle"))


def test_images_whose_listing_is_gone_are_known_by_their_marks(flux, tmp_path):
    """No caption comes to another's image: the mark is of the whole row."""
    captions = ["a red star", "a blue ring", "a green cross"]
    generate_images(flux, captions, tmp_path, 1, progress=False)
    before, listing = files_in(tmp_path), (tmp_path / "metadata.jsonl").read_text()
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "00001.png").unlink()
    with pytest.raises(ValueError, match="holds 00000.png, but no metadata.jsonl"):
        generate_images(flux, ["a pink ring", *captions[1:]], tmp_path, 1, progress=False)
    with pytest.raises(ValueError, match="holds 00000.png, but no metadata.jsonl"):
        generate_images(flux, captions[::-1], tmp_path, 1, progress=False)
    generate_images(flux, captions, tmp_path, 1, progress=False)
    assert (tmp_path / "metadata.jsonl").read_text() == listing
    assert {name: files_in(tmp_path)[name] for name in ("00000.png", "00002.png")} == {
        name: before[name] for name in ("00000.png", "00002.png")
    }
    assert (tmp_path / "00001.png").is_file()


def test_a_line_taken_out_by_hand_is_no_dead_end(flux, tmp_path):
    captions = ["a red star", "a blue ring", "a green cross"]
    generate_images(flux, captions, tmp_path, 1, progress=False)
    listing = tmp_path / "metadata.jsonl"
    text = listing.read_text()
    listing.write_text("".join(line for line in text.splitlines(True) if "blue" not in line))
    with pytest.raises(
        ValueError, match="lists 2 of the 3 images.*delete .*metadata.jsonl.*--train_data_dir"
    ):
        generate_images(flux, captions, tmp_path, 1, progress=False)
    assert "blue" not in listing.read_text()  # it may have been somebody's choice
    listing.unlink()
    generate_images(flux, captions, tmp_path, 1, progress=False)
    assert listing.read_text() == text


def files_in(folder):
    """{name: (bytes, time of change)} of the images in a folder."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.png")}


def test_somebodys_numbered_images_are_neither_taken_nor_overwritten(flux, tmp_path):
    Image.new("RGB", (200, 100), "white").save(tmp_path / "00001.png")
    before = (tmp_path / "00001.png").read_bytes()
    with pytest.raises(ValueError, match="holds 00001.png, but no metadata.jsonl"):
        made(flux, tmp_path)
    assert (tmp_path / "00001.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_image_that_was_exchanged_is_left_alone(flux, tmp_path):
    made(flux, tmp_path)
    Image.new("RGB", (32, 32), "white").save(tmp_path / "00001.png")
    before = (tmp_path / "00001.png").read_bytes()
    with pytest.raises(ValueError, match="00001.png was not made by this command"):
        made(flux, tmp_path)
    assert (tmp_path / "00001.png").read_bytes() == before


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-30], lambda data: data[:200] + b"x" + data[201:]]
)
def test_a_damaged_image_is_generated_again(flux, tmp_path, damage):
    made(flux, tmp_path)
    path = tmp_path / "00001.png"
    before = path.read_bytes()
    path.write_bytes(damage(before))
    made(flux, tmp_path)
    assert path.read_bytes() == before


def test_images_of_another_pipeline_are_refused(flux, tmp_path):
    made(flux, tmp_path, pipeline="one")
    with pytest.raises(ValueError, match=r"begun with other captions or settings \(pipeline\)"):
        made(flux, tmp_path, pipeline="two")


def test_a_vae_that_overflows_writes_no_image(tmp_path):
    family = Flux(load_flux(), 32, 32, TOKENS)
    with torch.no_grad():
        family.pipe.vae.decoder.conv_in.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="the VAE gives values that are not finite for 00000.png"):
        made(family, tmp_path)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "dtype, mend",
    [
        (torch.bfloat16, "take --weight_dtype fp32"),
        (torch.float32, "its weights are at fault: take another VAE"),
    ],
)
def test_fp32_is_no_mend_for_fp32(dtype, mend):
    assert str(not_finite("VAE", "a.png", dtype)).endswith(f"for a.png ({dtype}): {mend}")


def test_bytes_of_the_hub_and_images_of_pillow_are_read_alike(tmp_path):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.save(file := io.BytesIO(), "png")
    from scfm.data.labelled_images import decode

    assert decode(image, "here").tobytes() == decode({"bytes": file.getvalue()}, "here").tobytes()


def test_long_captions_are_counted_once(tmp_path, caplog, capfd):
    own = tmp_path / "own"
    write_folder(own, 2, ".png")
    rows = [
        {"file_name": "0.png", "text": "a large red star " + "on the left " * 40},
        {"file_name": "1.png", "text": "a ring"},
    ]
    (own / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--pretrained_model_name_or_path", str(FLUX), "--train_data_dir", str(own), "--sizes", "32x32"]
    assert main(["data", *words, "--max_sequence_length", str(TOKENS)]) == 0
    assert "1 of 2 captions are longer than 16 tokens" in caplog.text
    assert not re.search("truncated|indexing errors", caplog.text + capfd.readouterr().err)


def test_long_captions_are_counted_once_also_when_images_are_generated(tmp_path, caplog, capfd):
    (tmp_path / "long.txt").write_text(
        "\n".join(f"a red star number {i} " + "on the left " * 40 for i in range(3))
    )
    words = ["--pretrained_model_name_or_path", FLUX, "--prompts", tmp_path / "long.txt", "--sizes", "32x32"]
    words += ["--output_dir", tmp_path / "out", "--teacher_steps", 1, "--batch_size", 1]
    assert main(["data", *map(str, words), "--max_sequence_length", str(TOKENS)]) == 0
    assert caplog.text.count("3 of 3 captions are longer than 16 tokens") == 1
    assert not re.search("truncated|indexing errors", caplog.text + capfd.readouterr().err)
