"""Prompts, sizes and the teacher's images: obeyed, resumed and shared out to the last bit, and every mistake
named."""

import errno
import gc
import json
import math
import shutil
import sys
import time
import weakref
from types import SimpleNamespace

import forked
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import scfm.data.prepare
import scfm.data.teacher_images
from scfm.cli import main
from scfm.data.images import nearest_size, parse_sizes, read_folder, read_image
from scfm.data.prepare import DataConfig, check_processes
from scfm.data.prompts import read_prompts
from scfm.data.teacher_images import drawn_size, generate_images
from scfm.method.flow import time_grid
from scfm.models.flux import Flux
from scfm.models.sampling import start_noise, stock_shift
from scfm.models.sd3 import SD3
from toy.pipelines import FLUX, TOKENS, build_sd3, load_flux

CAPTIONS = [
    "a large red cross",
    "a small blue ring on the left",
    "a yellow circle at the top",
    "a green star",
    "a pink square",
    "a small green cross",
    "a red star on the right",
]
SIZES = [(32, 32), (24, 40), (40, 24)]


@pytest.fixture(scope="module")
def families():
    pipe = load_flux()
    return {size: Flux(pipe, *size, TOKENS) for size in SIZES}


def images_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


# Prompts


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.txt", "# two\n\na cat\r\n  a  dog \n"),
        ("a.txt", "\ufeffa cat\na  dog"),
        ("a.jsonl", '{"text": "a cat"}\n\n{"prompt": "a  dog", "seed": 3}\n'),
        ("a.jsonl", '{"caption": "a cat", "id": 1}\n{"text": "a  dog", "caption": "not this"}\n'),
    ],
)
def test_prompts_are_read(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == ["a cat", "a  dog"]


def test_a_line_of_json_may_hold_any_character(tmp_path):
    words = "a\u2028cat\x0bon \x85 a mat"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": words}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert read_prompts(tmp_path / "a.jsonl") == [words]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"a cat\n\xff\xfe dog\n", "line 2: not UTF-8"),
        ("a.txt", b"# nothing\n\n", "holds no caption"),
        ("a.jsonl", b"", "holds no caption"),
        ("a.jsonl", b'{"text": "a cat"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'"a cat"\n', "line 1: write an object"),
        (
            "a.jsonl",
            b'{"text": "a cat"}\n{"words": "a dog"}\n',
            "line 2: no caption: needs words as its text, prompt or caption",
        ),
        ("a.jsonl", b'{"text": ["a cat", "a dog"]}\n', "line 1: no caption"),
        ("a.jsonl", b'{"text": " "}\n', "line 1: no caption"),
    ],
)
def test_what_is_wrong_with_prompts_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    with pytest.raises(FileNotFoundError, match="no captions at"):
        read_prompts(tmp_path / "elsewhere.txt")


def test_a_data_set_by_name(tmp_path):
    pytest.importorskip("datasets")
    for split, words in (("train", ["a cat", "a dog"]), ("test", ["a cow"])):
        rows = "".join(json.dumps({"prompt": w, "title": w.upper()}) + "\n" for w in words)
        (tmp_path / f"{split}.jsonl").write_text(rows)
    assert read_prompts(f"datasets:{tmp_path}") == ["a cat", "a dog"]
    assert read_prompts(f"datasets:{tmp_path}:test") == ["a cow"]
    assert read_prompts(f"datasets:{tmp_path}:train:title") == ["A CAT", "A DOG"]
    with pytest.raises(ValueError, match="no column words.*one of prompt, title"):
        read_prompts(f"datasets:{tmp_path}:train:words")
    with pytest.raises(ValueError, match="cannot be read.*dev"):
        read_prompts(f"datasets:{tmp_path}:dev")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(f"datasets:{tmp_path}/elsewhere")


def test_a_data_set_without_a_network_is_one_line_at_once(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(
        ValueError, match="datasets:me/captions:train cannot be read .http://localhost:9 cannot"
    ):
        read_prompts("datasets:me/captions")


def test_a_data_set_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install 'scfm.data.'"):
        read_prompts("datasets:some/name")


# Sizes


def test_sizes_are_height_and_width():
    assert parse_sizes(("512x512", " 640x384 ")) == [(512, 512), (640, 384)]


@pytest.mark.parametrize(
    "words, message",
    [
        (("512",), "'512': write HEIGHTxWIDTH"),
        (("512x",), "'512x'"),
        (("0x512",), "'0x512'"),
        (("-8x8",), "'-8x8'"),
        (("512x512x3",), "'512x512x3'"),
        (("8.5x8",), "'8.5x8'"),
        (("8x8", "16x8", "8x8"), "'8x8' is named twice"),
        ((), "no size"),
    ],
)
def test_what_is_wrong_with_sizes_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        parse_sizes(words)


sides = st.integers(1, 4000)
several = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=6, unique=True)


@given(sides, sides, several)
@settings(deadline=None)
def test_the_nearest_size(height, width, sizes):
    found = nearest_size(height, width, sizes)

    def away(size):
        return abs(math.log(height / width) - math.log(size[0] / size[1]))

    assert away(found) <= min(map(away, sizes)) + 1e-6
    turned = nearest_size(
        width, height, [(w, h) for h, w in sizes]
    )  # an image on its side: the same size on its side
    assert away(turned[::-1]) == pytest.approx(away(found), abs=1e-6)


def test_a_image_of_a_size_belongs_to_it():
    sizes = [(256, 256), (512, 512), (640, 384), (384, 640), (320, 192)]
    assert [nearest_size(*size, sizes) for size in sizes] == sizes


def test_sizes_are_drawn_evenly_and_by_number():
    drawn = [drawn_size(SIZES, i, 0) for i in range(900)]
    assert drawn[:5] == [drawn_size(SIZES, i, 0) for i in range(5)] and drawn[:30] != [
        drawn_size(SIZES, i, 1) for i in range(30)
    ]
    assert all(250 <= drawn.count(size) <= 350 for size in SIZES)


# Reading images


def test_a_image_is_turned_upright_scaled_and_cut_in_the_middle(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    image.save(tmp_path / "a.png")
    blue = torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1)
    assert torch.equal(
        read_image(tmp_path / "a.png", 20, 20), blue.expand(3, 20, 20)
    )  # the red ends are cut off
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    image.save(tmp_path / "b.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "b.jpg", 40, 20)
    assert upright[0, 0].mean() > 0.9 and upright[2, 0].mean() < -0.9 and upright[2, 20].mean() > 0.9


# Generating


def test_steps_guidance_shift_and_size_are_obeyed(families, tmp_path):
    generate_images(families, CAPTIONS, tmp_path, steps=3, guidance=2.0, seed=5, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == CAPTIONS and len(
        {(row["height"], row["width"]) for row in rows}
    ) > 1
    for i, row in enumerate(rows):
        assert {k: row[k] for k in ("steps", "guidance", "seed", "shift")} == {
            "steps": 3,
            "guidance": 2.0,
            "seed": 5,
            "shift": 3.0,
        }
        family = families[row["height"], row["width"]]
        noise = start_noise(family, [i], 5)
        stock = family.sample_stock([row["text"]], noise, 3, 2.0)[0]
        ours = read_image(tmp_path / row["file_name"], row["height"], row["width"])
        assert (ours - stock).abs().max() <= 2 / 255 + 1e-4  # what eight bits leave of it
        other = family.sample_stock([row["text"]], noise, 4, 2.0)[0]
        assert (other - stock).abs().max() > 0.05


def test_sd3_asks_a_scheduler_that_shifts_by_size():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = build_sd3()
    family = SD3(pipe, 32, 32, 16)
    assert family.dynamic_shift is None
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0)
    noise = start_noise(family, [0], 0)
    pipe(
        ["a red star"],
        height=32,
        width=32,
        num_inference_steps=2,
        sigmas=[1.0, 0.5],
        max_sequence_length=16,
        guidance_scale=1.0,
        latents=noise,
        output_type="latent",
    )
    middle = float(pipe.scheduler.sigmas[1])  # shift / (shift + 1), which t = 1/2 becomes
    assert stock_shift(family) == family.dynamic_shift == pytest.approx(middle / (1 - middle), rel=1e-5)


def test_the_stock_shift_of_a_scheduler_that_works_it_out(families):
    from diffusers import FlowMatchEulerDiscreteScheduler

    family = Flux(load_flux(), 32, 32, TOKENS)
    assert stock_shift(family) == 3
    family.pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    assert stock_shift(family) == family.dynamic_shift == pytest.approx(1.6, abs=0.05)
    noise = start_noise(family, [0], 0)
    seen = []
    hook = family.pipe.transformer.register_forward_hook(
        lambda m, a, kw, out: seen.append(kw["timestep"].item()), with_kwargs=True
    )
    family.pipe(
        CAPTIONS[:1],
        height=32,
        width=32,
        num_inference_steps=4,
        sigmas=[1, 0.75, 0.5, 0.25],
        latents=noise,
        max_sequence_length=TOKENS,
        output_type="latent",
    )
    hook.remove()
    grid = time_grid(4, stock_shift(family))[:-1]
    torch.testing.assert_close(torch.tensor(seen), grid, rtol=0, atol=1e-4)


def test_true_guidance_and_a_negative_prompt_are_written_down(tmp_path):
    family = SD3(build_sd3(), 32, 32, TOKENS, negative_prompt="a blue ring")
    generate_images(family, CAPTIONS[:2], tmp_path, 2, 4.0, progress=False)
    assert (
        json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[1])["negative_prompt"]
        == "a blue ring"
    )
    stock = family.sample_stock(CAPTIONS[:1], start_noise(family, [0], 0), 2, 4.0)[0]
    assert (read_image(tmp_path / "00000.png", 32, 32) - stock).abs().max() <= 2 / 255 + 1e-4


@pytest.fixture(scope="module")
def unbroken(families, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    generate_images(families, CAPTIONS * 2, folder, 2, batch_size=3, progress=False)
    assert sorted(images_of(folder)) == [f"{i:05d}.png" for i in range(14)]
    return folder


@pytest.mark.parametrize("writes", range(0, 14, 2))
def test_stopped_after_any_write_it_goes_on_to_the_same_folder(
    families, unbroken, tmp_path, monkeypatch, writes
):
    count, write = [0], scfm.files.atomic_write

    def stop(path, what):
        if count[0] == writes:
            path.with_name("half.new").write_bytes(b"half an image")
            raise KeyboardInterrupt
        count[0] += 1
        write(path, what)

    monkeypatch.setattr(scfm.data.teacher_images, "atomic_write", stop)
    with pytest.raises(KeyboardInterrupt):
        generate_images(families, CAPTIONS * 2, tmp_path, 2, batch_size=3, progress=False)
    monkeypatch.undo()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert len(kept) == max(0, writes - 1)  # the first write is the list
    generate_images(families, CAPTIONS * 2, tmp_path, 2, batch_size=3, progress=False)
    assert images_of(tmp_path) == images_of(unbroken)
    assert all((tmp_path / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shared_out_it_is_the_same_folder(families, unbroken, tmp_path, count):
    made = []
    for number in reversed(range(count)):
        generate_images(
            families, CAPTIONS * 2, tmp_path, 2, batch_size=3, progress=False, process=(number, count)
        )
        made.append(len(images_of(tmp_path)))
    assert images_of(tmp_path) == images_of(unbroken)
    assert (tmp_path / "metadata.jsonl").read_bytes() == (unbroken / "metadata.jsonl").read_bytes()
    assert made == sorted(made) and made[0] < 14


def test_a_folder_that_was_begun_otherwise_is_refused_by_every_process(families, unbroken):
    before = images_of(unbroken)
    for more in ({"steps": 3}, {"guidance": 1.0}, {"seed": 1}):
        for process in ((0, 2), (1, 2)):
            with pytest.raises(ValueError, match="other captions or settings"):
                generate_images(
                    families,
                    CAPTIONS * 2,
                    unbroken,
                    **{"steps": 2, "batch_size": 3, "progress": False, "process": process, **more},
                )
    with pytest.raises(ValueError, match="other captions or settings"):
        generate_images(families[32, 32], CAPTIONS * 2, unbroken, 2, progress=False)
    assert images_of(unbroken) == before


# The command


def words(prompts, out, **more):
    told = {
        "pretrained_model_name_or_path": FLUX,
        "prompts": prompts,
        "output_dir": out,
        "sizes": "32x32,24x40,40x24",
        "max_sequence_length": TOKENS,
        "teacher_steps": 2,
        "batch_size": 3,
        **more,
    }
    return [
        "data",
        *(word for name, value in told.items() if value is not None for word in (f"--{name}", str(value))),
    ]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


def test_the_command_generates_and_caches_and_then_finds_all_done(prompts, unbroken, tmp_path, capsys):
    assert main(words(prompts, tmp_path / "out", num_images=14)) == 0
    said = capsys.readouterr().out.strip()
    assert said.startswith("14 images of 7 different captions in") and "\n" not in said and "MiB" in said
    for name in images_of(unbroken):  # the command's say of which pipeline they are
        with Image.open(tmp_path / "out" / name) as mine, Image.open(unbroken / name) as theirs:
            assert mine.tobytes() == theirs.tobytes()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main(words(prompts, tmp_path / "out", num_images=14)) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == stamps
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert sorted(rows["text"]) == sorted(CAPTIONS * 2) and rows[0]["image"].size == (
        rows[0]["width"],
        rows[0]["height"],
    )


@pytest.fixture
def alive(monkeypatch):
    """Notes, whenever a transformer or a text encoder is loaded, which of them are in memory."""
    there, seen, load = [], [], scfm.data.prepare.load_pipeline

    def noted(*args):
        pipe, family = load(*args)
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        there.extend((name.rstrip("_2"), weakref.ref(part)) for name, part in parts.items())
        seen.append({name for name, part in there if part() is not None})
        return pipe, family

    monkeypatch.setattr(scfm.data.prepare, "load_pipeline", noted)
    return seen


@pytest.mark.parametrize("cache", [True, False])
def test_the_text_encoders_are_gone_when_the_transformer_comes(cache, prompts, unbroken, tmp_path, alive):
    out, more = tmp_path / "out", [] if cache else ["--no-cache"]
    assert main(words(prompts, out, num_images=14) + more) == 0
    assert alive == [{"text_encoder", "vae"}, {"transformer", "vae"}]
    for name in images_of(unbroken):
        with Image.open(out / name) as mine, Image.open(unbroken / name) as theirs:
            assert mine.tobytes() == theirs.tobytes()
    assert {path.name for path in out.iterdir() if path.is_dir()} == ({"cache"} if cache else set())
    (out / "00003.png").unlink()
    gc.collect()
    assert main(words(prompts, out, num_images=14) + more) == 0
    # its caption is in the cache, or is encoded again
    assert alive[2:] == [{"text_encoder", "vae"}] * (not cache) + [{"transformer", "vae"}]
    with Image.open(out / "00003.png") as mine, Image.open(unbroken / "00003.png") as theirs:
        assert mine.tobytes() == theirs.tobytes()


def test_a_folder_of_ones_own_is_cached_without_loading_twice(tmp_path, capsys, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    for i, size in enumerate([(100, 90), (30, 60), (64, 20)]):
        Image.new("RGB", size, (80 * i, 0, 0)).save(own / f"{i}.jpg")
    (own / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{i}.jpg", "text": CAPTIONS[i]}) + "\n" for i in range(3))
    )
    told = [
        "data",
        "--pretrained_model_name_or_path",
        str(FLUX),
        "--train_data_dir",
        str(own),
        "--sizes",
        "32x32,24x40,40x24",
        "--max_sequence_length",
        str(TOKENS),
    ]
    assert main(told) == 0 and list((own / "cache").glob("latents-*"))
    monkeypatch.setattr(
        "scfm.data.prepare.load_pipeline",
        lambda *_: pytest.fail("nothing is missing: nothing need be loaded"),
    )
    assert main(told) == 0
    assert "3 images of 3 different captions" in capsys.readouterr().out


def no_place(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_cache_that_cannot_be_written_is_named_before_the_work(prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scfm.data.prepare.load_pipeline", lambda *_: pytest.fail("loaded"))
    (tmp_path / "full").write_text("")
    assert main(words(prompts, tmp_path / "out", cache_dir=tmp_path / "full/cache")) == 2
    assert "full cannot be written to (Not a directory): say --cache_dir FOLDER" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


def test_images_on_a_read_only_disk_need_a_cache_elsewhere_only_when_it_is_not_made(
    prompts, tmp_path, capsys, monkeypatch
):
    assert main(words(prompts, tmp_path / "out", num_images=3)) == 0
    own = {"teacher_steps": None, "batch_size": None, "train_data_dir": tmp_path / "out"}
    monkeypatch.setattr("scfm.files.tempfile.NamedTemporaryFile", no_place)
    monkeypatch.setattr("scfm.data.prepare.load_pipeline", lambda *_: pytest.fail("loaded"))
    assert main(words(None, None, **own)) == 0  # all is there
    shutil.rmtree(tmp_path / "out/cache")
    assert main(words(None, None, **own)) == 2
    assert "out cannot be written to (Read-only file system): say --cache_dir" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_at_once_and_a_kill_give_what_one_gives(prompts, tmp_path):
    """Two processes of one group, killed in the middle, run again; then against one process."""

    def told(out):
        return words(prompts, out, num_images=40, teacher_steps=12)

    processes = forked.start_two(told(tmp_path / "two"), tmp_path / "log")
    while not images_of(tmp_path / "two") and processes[0].is_alive():
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    assert 1 <= len(images_of(tmp_path / "two")) < 40, "the kill came too late"
    forked.run_two(told(tmp_path / "two"), tmp_path / "log")
    assert main(told(tmp_path / "one")) == 0

    def files(out):
        return {
            p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix != ".new"
        }

    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys() and len([name for name in one if name.suffix == ".png"]) == 40
    assert all(one[name] == two[name] for name in one)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pretrained_model_name_or_path": None}, "say --pretrained_model_name_or_path FOLDER"),
        ({"pretrained_model_name_or_path": "nowhere"}, "no pipeline in nowhere"),
        ({"prompts": None}, "say either --prompts"),
        ({"train_data_dir": "own"}, "say either --prompts"),
        ({"prompts": "elsewhere.txt"}, "no captions at elsewhere.txt"),
        ({"out": None}, "say --output_dir FOLDER"),
        ({"sizes": "512"}, "write HEIGHTxWIDTH"),
        ({"sizes": "32x32,32x32"}, "named twice"),
        ({"sizes": "32x30"}, "take multiples of 4"),
        ({"teacher_steps": 0}, "steps is 0: give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_images": -1}, "num_images is -1: give 0 or more"),
        ({"teacher_guidance_scale": "nan"}, "teacher_guidance_scale is nan"),
        ({"max_sequence_length": 0}, "max_sequence_length is 0"),
        ({"weight_dtype": "fp8"}, "take one of fp32, bf16"),
        ({"negative_prompt": "ugly"}, "no negative prompts"),
        ({"prompts": None, "train_data_dir": "own", "out": None}, "no metadata.jsonl in own"),
        (
            {"prompts": None, "train_data_dir": "own", "out": None, "seed": 3},
            "--seed says how the teacher generates",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(prompts, tmp_path, capsys, change, message):
    change = {"teacher_steps": None, "batch_size": None, **change} if change.get("train_data_dir") else change
    assert main(words(**{"prompts": prompts, "out": tmp_path / "out", **change})) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("scfm data: ") and message in said[-1]
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_named_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"not an image")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red star"}\n')
    monkeypatch.setattr("scfm.data.prepare.load_pipeline", lambda *_: pytest.fail("loaded"))
    assert (
        main(
            [
                "data",
                "--pretrained_model_name_or_path",
                str(FLUX),
                "--train_data_dir",
                str(tmp_path),
                "--sizes",
                "32x32",
                "--max_sequence_length",
                str(TOKENS),
            ]
        )
        == 2
    )
    assert "a.png does not open as an image" in capsys.readouterr().err
    assert (
        main(
            [
                "data",
                "--pretrained_model_name_or_path",
                str(FLUX),
                "--train_data_dir",
                str(tmp_path),
                "--no-cache",
            ]
        )
        == 2
    )


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in DataConfig.__dataclass_fields__)


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no metadata.jsonl"):
        read_folder(tmp_path)
    for text, message in [
        ('{"file_name": "a.png"}', "line 1: needs file_name and text"),
        ('{"text": "a"}', "line 1: needs file_name"),
        ('{"file_name": "a.png", "text": ""}', "line 1: no caption"),
        ("{", "line 1: not JSON"),
        ('{"file_name": "a.png", "text": "a star"}', "line 1: no image a.png"),
        ("\n", "lists no image"),
    ]:
        (tmp_path / "metadata.jsonl").write_text(text + "\n")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_folder(tmp_path)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_asks_for_what_is_not_done_is_refused(monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match=f"{engine}, which is not done here"):
        check_processes(SimpleNamespace(num_processes=1))
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "false")
    check_processes(SimpleNamespace(num_processes=1))


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but accelerate sees 1"):
        check_processes(SimpleNamespace(num_processes=1))
