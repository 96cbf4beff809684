"""The emoji pipeline: its captions, its training in small, resumed to the bit, and a folder for diffusers."""

import io
import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from scfm.data.images import read_folder
from scfm.inference.step_lora import InferenceConfig, StepLora
from toy.emoji import captions, compare, sheet
from toy.emoji.data import (
    CONFIG,
    SIDE,
    TONES,
    Caption,
    Emoji,
    choose_held_out,
    draw_caption,
    draw_weights,
    load_emoji,
    parse_names,
    split,
)
from toy.emoji.fit import pack_first, pack_second, unpack_first, unpack_second
from toy.emoji.flow import PlainAttention, build_transformer, draw, pack, positions
from toy.emoji.text import build_text, tie_capitals
from toy.emoji.train import load_text, main, make_world, parse
from toy.emoji.vae import build_vae, psnr, pyramid_loss

SIZES = [
    "--tiny",
    "--fp32",
    "--vae_batch",
    "2",
    "--text_batch",
    "4",
    "--flow_batch",
    "2",
    "--guide_batch",
    "2",
]
SIZES += [
    "--decoder_batch",
    "2",
    "--vae",
    "4",
    "--text",
    "4",
    "--flow",
    "4",
    "--guide",
    "4",
    "--decoder",
    "4",
]
WAYS = {"light": "#fbd7b5", "dark": "#60463a", "medium": "#c68642"}


@pytest.fixture(scope="module")
def emoji_file(folder):
    """Discs and squares of the two styles, in the layout of the data set: 36 images."""
    import pyarrow.parquet

    rows = []
    for thing, source in itertools.product(("disc", "square", "ring", "ear"), ("noto", "fluent")):
        for tone in ("", *WAYS) if thing == "ear" else ("",):
            end = f" {tone} skin tone" if source == "noto" else f" {tone}"
            rows.append(
                {"image": cell(thing, source, tone), "name": thing + end * bool(tone), "source": source}
            )
    rows += [{**row, "name": f"{row['name']} {i}"} for row in rows[:6] for i in range(4)]
    unread = {"base": "", "tone": "", "category": ""}
    path = folder / "emoji.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, **unread} for row in rows]), path)
    return path


def cell(thing, source, tone):
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen, colour = ImageDraw.Draw(image), WAYS.get(tone, "gold" if source == "noto" else "orange")
    (pen.rectangle if thing == "square" else pen.ellipse)((12, 12, 52, 52), fill=colour)
    if thing == "ring":
        pen.ellipse((24, 24, 40, 40), fill="white")
    image.save(file := io.BytesIO(), "png")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def trained(emoji_file, folder):
    run(emoji_file, folder / "whole")
    return folder / "whole"


def run(emoji_file, out, *more):
    assert main(["--data", str(emoji_file), "--output_dir", str(out), "--every", "2", *SIZES, *more]) == 0


def test_captions_for_distillation_are_of_training_images_alone(emoji_file, trained, tmp_path):
    train, out = split(load_emoji(emoji_file), trained)
    words = [
        "--data",
        str(emoji_file),
        "--folder",
        str(trained),
        "--output_file",
        str(tmp_path / "p" / "c.txt"),
    ]
    assert captions.main([*words, "--count", "20", "--images", str(tmp_path / "images")]) == 0
    lines = (tmp_path / "p" / "c.txt").read_text().splitlines()
    assert len(set(lines)) == len(lines) == 20
    assert all(any(row.object in line for row in train.rows) for line in lines)
    pairs = read_folder(tmp_path / "images")
    assert [text for _, text in pairs] == [row.name for row in train.rows]
    for (path, _), pixels in list(zip(pairs, train.pixels, strict=True))[::7]:
        assert torch.equal(pil_to_tensor(Image.open(path)), pixels)
    assert captions.main([*words, "--held_out"]) == 0
    assert (tmp_path / "p" / "c.txt").read_text().splitlines() == [row.name for row in out.rows]
    with pytest.raises(ValueError, match="ask for fewer"):
        captions.main([*words, "--count", "3000"])


def test_both_sets_of_names_say_the_same():
    noto = [("ear medium dark skin tone", "noto"), ("kiss woman man dark skin tone light skin tone", "noto")]
    fluent = [(f"ear {tone}", "fluent") for tone in TONES] + [
        ("traffic light", "fluent"),
        ("man deaf", "fluent"),
    ]
    rows = parse_names(noto + fluent)
    assert rows[0] == Emoji("ear", ("medium dark",), "noto")
    assert rows[1] == Emoji("kiss woman man", ("dark", "light"), "noto")
    assert rows[2:7] == [Emoji("ear", (tone,), "fluent") for tone in TONES]
    assert rows[7:] == [Emoji("traffic light", (), "fluent"), Emoji("deaf man", (), "fluent")]


def test_a_caption_names_the_object_and_sometimes_the_rest():
    row, rng = Emoji("kiss woman man", ("medium dark", "medium light"), "noto"), random.Random(0)
    captions = [draw_caption(row, rng) for _ in range(300)]
    assert all(row.object in c.text and c.fits(row) for c in captions)
    assert {c.style for c in captions} == {"", "noto"} and {c.tones for c in captions} == {(), row.tones}
    assert all(bool(c.style) == ("noto" in c.text) and bool(c.tones) == ("skin" in c.text) for c in captions)
    assert max(len(c.text.replace(",", " ,").split()) for c in captions) <= 15  # and the end, of 16 tokens
    assert not Caption("", row.object, ("dark",), "").fits(row)


def test_held_out_combinations_are_seen_apart_and_never_together(emoji_file, tmp_path):
    data = load_emoji(emoji_file)
    train, out = split(data, tmp_path)
    again = split(data, tmp_path)
    assert (
        again[1].rows == out.rows and len(out.rows) >= 1 and len(train.rows) + len(out.rows) == len(data.rows)
    )
    assert not {r.name for r in train.rows} & {r.name for r in out.rows}
    assert {r.object for r in out.rows} <= {r.object for r in train.rows}
    assert draw_weights(train.rows).sum().item() == pytest.approx(1)
    assert choose_held_out(data.rows, seed=0) == choose_held_out(data.rows, seed=0)
    with pytest.raises(FileNotFoundError, match="--data"):
        load_emoji(tmp_path / "none.parquet")


def test_the_carried_list_of_held_out_combinations_is_of_two_kinds():
    names = json.loads((CONFIG / "held_out.json").read_text(encoding="utf-8"))
    assert len(names) == len({*names}) == 200 and all(name.endswith(" style") for name in names)
    assert sum("skin tone" in name for name in names) == 130


def test_both_tokenizers_read_what_people_write():
    text = build_text(["apple", "red", "a", "fluent"])
    tie_capitals(text.t5, text.tokenizer_2)
    for tokenizer in (text.tokenizer, text.tokenizer_2):
        ids = tokenizer("a red apple, fluent").input_ids
        assert tokenizer.unk_token_id not in ids[:-1] and len(ids) <= 7
        assert len(tokenizer("red zebra").input_ids) > len(tokenizer("red apple").input_ids)
    rows = text.t5.get_input_embeddings().weight
    small, large = (text.tokenizer_2(t).input_ids for t in ("red apple,", "Red Apple."))
    assert small != large and torch.equal(rows[small], rows[large])


def test_moments_in_8_bits_keep_their_sign_and_size():
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(1000, generator=generator) * torch.rand(1000, generator=generator) ** 4
    back = unpack_first(pack_first(m))
    assert (back - m).abs().max() <= m.abs().max() / 127 + 1e-6 and (back * m >= 0).all()
    v = m.square() + 1e-9
    assert (unpack_second(pack_second(v)) / v - 1).abs().max() < 0.06
    zero = torch.zeros(3)
    assert (
        torch.equal(unpack_first(pack_first(zero)), zero) and unpack_second(pack_second(zero)).max() < 1e-20
    )


def test_plain_attention_is_the_stock_one():
    torch.manual_seed(0)
    transformer = build_transformer(8, width=32, heads=2, double=1, single=1)
    with torch.no_grad():
        for p in transformer.parameters():
            p.copy_(0.1 * torch.randn_like(p))
    config, ids = transformer.config, positions(4)
    inputs = {
        "hidden_states": torch.randn(3, 16, 8),
        "timestep": torch.rand(3),
        "guidance": torch.ones(3),
        "pooled_projections": torch.randn(3, config.pooled_projection_dim),
        "encoder_hidden_states": torch.randn(3, 5, config.joint_attention_dim),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": ids,
        "return_dict": False,
    }
    stock = transformer(**inputs)[0]
    transformer.set_attn_processor(PlainAttention())
    assert torch.allclose(transformer(**inputs)[0], stock, atol=1e-5) and stock.abs().max() > 0.01


def test_latents_and_positions_are_those_of_the_pipeline():
    latents = torch.randn(2, 4, 6, 6)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, *latents.shape))
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 3, "cpu", torch.float32)
    assert torch.equal(positions(3), ids)


def test_the_loss_of_the_vae_is_zero_for_the_image_and_sees_a_lost_edge():
    images = torch.zeros(1, 3, 32, 32)
    images[..., 16:] = 1
    blurred = torch.nn.functional.avg_pool2d(images, 5, 1, 2, count_include_pad=False)
    assert pyramid_loss(images, images) == 0
    assert pyramid_loss(blurred, images) > 3 * (blurred - images).abs().mean()
    assert 0 < psnr(build_vae((8, 8, 8)), torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)) < 30


def test_a_batch_is_set_by_its_seed(trained, emoji_file):
    world = make_world(split(load_emoji(emoji_file), trained)[0], trained)
    assert world.latents.mean().abs() < 0.3 and 0.7 < world.latents.std() < 1.3
    x, t, velocity, captions = draw(world, 40, seed=3)
    again = draw(world, 40, seed=3)
    assert torch.equal(x, again[0]) and captions == again[3] and "" in draw(world, 400, 3)[3]
    data = x - t[:, None, None] * velocity  # x_t = data + t (noise - data)
    assert all((world.latents - row).abs().amax((1, 2)).min() < 1e-3 for row in data)
    assert (t[1:] > t[:-1]).all()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(trained, emoji_file, folder):
    out = folder / "parts"
    for stage in ("vae", "text", "flow", "guide", "decoder"):
        for stop in (["--stop", "2"], []):
            run(emoji_file, out, "--only", stage, *stop)
    files = sorted(p.relative_to(trained) for p in trained.rglob("*.safetensors"))
    assert len(files) == 4 and not list((out / "training").iterdir())
    for file in files:
        whole, parts = load_file(trained / file), load_file(out / file)
        assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole), file


def test_the_vae_of_another_run_is_where_a_second_one_begins(trained, emoji_file, folder):
    run(emoji_file, folder / "again", "--only", "vae", "--vae", "0", "--vae_from", str(trained))
    first, second = (
        load_file(f / "vae" / "diffusion_pytorch_model.safetensors") for f in (trained, folder / "again")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_diffusers_loads_the_folder_without_scfm(trained):
    code = f"""
import sys, torch
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained({str(trained)!r})
pipe.set_progress_bar_config(disable=True)
size = {{"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}}
image = pipe("a disc, noto style", **size).images[0]
print(image.size, *[name for name in sys.modules if name.split(".")[0] in ("scfm", "toy")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=trained)
    assert done.stdout.strip() == "(64, 64)", done.stderr


def test_the_text_stage_is_kept_as_it_was(trained):
    text = load_text(trained)
    for tokenizer in (text.tokenizer, text.tokenizer_2):
        assert tokenizer.unk_token_id not in tokenizer("ear, dark skin tone").input_ids[:-1]
    stages = json.loads((trained / "stages.json").read_text())
    assert set(stages) == {"vae", "text", "flow", "guide", "decoder"} and stages["vae"]["psnr_held_out"] > 0


def test_a_sheet_has_a_row_a_caption_and_a_column_a_step_count(trained, emoji_file, tmp_path):
    path = tmp_path / "sheet.png"
    words = ["--folder", str(trained), "--output_file", str(path), "--data", str(emoji_file)]
    assert sheet.main([*words, "--steps", "1", "2", "--held_out", "1", "--captions", "disc"]) == 0
    cell = SIDE + sheet.EDGE
    assert Image.open(path).size == (sheet.MARGIN + 4 * cell, sheet.LINE + 2 * cell)
    assert sheet.main([*words, "--steps", "1", "--cfg", "--captions", "disc", "--held_out", "0"]) == 0


@pytest.mark.slow
def test_stock_diffusers_samples_the_carried_student_as_we_do(tmp_path):
    """And it lands nearer to its teacher's endpoints than the teacher in as many steps."""
    words = ["--lora", str(compare.LORA), "--student_counts", "1", "2"]
    args, pipe = sheet.parse(words), sheet.load(CONFIG)
    scales = sheet.student(pipe, args)
    settings = {"lora": str(compare.LORA), "pretrained_model_name_or_path": str(CONFIG)}
    ours = StepLora(InferenceConfig(**settings, weight_dtype="fp32"))
    texts = list(compare.CAPTIONS[:4])
    noise = torch.randn(4, *ours.family.latent_shape, generator=torch.Generator().manual_seed(0))
    goal = ours.endpoints(texts, noise, 32, 0.0)
    for steps, scale in scales:
        assert scale == pytest.approx(steps**-0.85)
        endpoints = ours.endpoints(texts, noise, steps, scale)
        images = (ours.family.decode(endpoints) + 1) * 127.5
        theirs = sheet.sample(pipe, texts, args, steps, scale)
        assert (images.clamp(0, 255) - theirs.float()).abs().max() < 2
        alone = ours.endpoints(texts, noise, steps, 0.0)
        assert (endpoints - goal).square().mean() < 0.5 * (alone - goal).square().mean()
    path = tmp_path / "sheet.png"
    assert sheet.main([*words, "--output_file", str(path), "--steps", "1", "--captions", "red heart"]) == 0
    assert Image.open(path).width == sheet.MARGIN + 3 * (SIDE + sheet.EDGE)


def test_the_help_names_every_stage(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{stage}" in shown for stage in ("vae", "text", "flow", "guide", "decoder", "data"))
