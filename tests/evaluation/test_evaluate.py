"""`scfm evaluate`: images, numbers and report, and how it resumes."""

import hashlib
import io
import json
import re
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

from scfm.cli import main
from scfm.evaluation.measure import distances_of
from scfm.evaluation.table import best_of, groups_of, text_table
from scfm.method.metrics import frechet_distance
from scfm.models import source
from scfm.models.flux import Flux
from scfm.models.lora import WEIGHT_NAME, save_lora
from scfm.models.sampling import start_noise, stock_latents
from toy.pipelines import FLUX, TOKENS, WEIGHTS, build_flux, load_flux

CAPTIONS = ["a large red cross", "a small blue ring on the left", "a pink star"]
TINY = ["--num_images", "3", "--steps", "2", "--teacher_steps", "4", "--latency_repeats", "1"]
TINY += ["--batch_size", "2"]
NO_METRICS = ["--inception", "none", "--clip", "none", "--imagenet", "none"]
NAME, MARK = "EfficientNet-Lite0", "579344248a93e230"  # the file's SHA-256 begins so
CUSTOM = "Frechet distance on toy.judge:look"


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    return tmp_path / "prompts.txt"


def evaluate(lora, prompts, out, *more):
    words = ["evaluate", "--lora", lora, "--prompts", prompts, "--output_dir", out, *TINY, *more]
    return main([str(word) for word in words])


def record_in(out):
    return json.loads((out / "report.json").read_text())


def rows_in(out):
    return {row["name"]: row for row in record_in(out)["rows"]}


def test_the_report_and_what_is_missing(lora, prompts, clip_folder, tmp_path, capsys):
    out, reference = tmp_path / "out", tmp_path / "reference"
    (reference / "deep").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (40, 50), (80 * i, 20, 90)).save(reference / "deep" / f"{i}.jpg")
    metrics = ["--custom_metric", "toy.judge:look", "--clip", clip_folder]
    metrics += ["--inception", tmp_path / "nowhere.pth", "--patch_fid", "--preference", clip_folder]
    assert evaluate(lora, prompts, out, *metrics, "--reference_dir", reference) == 0
    text = capsys.readouterr().out
    assert "missing: Inception (FID): Inception's weights could not be loaded from" in text
    assert "missing: patch FID: images of 32 x 32 pixels are not larger than a patch" in text
    assert text.count("missing:") == 2
    record, rows = record_in(out), rows_in(out)
    solvers = ("teacher-2", "teacher-heun-2", "teacher-midpoint-2", "teacher-dpm-2", "teacher-stock-2")
    assert list(rows) == ["teacher-4", "student-2", *solvers]
    protocol = record["protocol"]
    assert (protocol["num_images"], protocol["num_captions"], protocol["reference_images"]) == (3, 3, 3)
    preference = f"preference model {clip_folder.name}"
    assert protocol["metrics"] == ["toy.judge:look", NAME, "CLIP", preference]
    clip = hashlib.sha256((clip_folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    assert protocol["weights_of_metrics"] == {NAME: MARK, "CLIP": clip, preference: clip}
    assert list(record["missing"]) == ["Inception (FID)", "patch FID"] and record["floors"] == {}
    for name, row in rows.items():
        assert row["evaluations"] == (4 if name == "teacher-4" else 2) and row["seconds"] > 0
        distances = row["distances"][CUSTOM]
        assert row["distances"][f"Frechet distance on {NAME}"]["reference"] > 0
        assert row["sets"] == dict.fromkeys(
            ("toy.judge:look", NAME), {"teacher": None, "reference": None}
        )  # few
        assert 0 <= row["scores"]["prompt accuracy"] <= 1 and "CLIP score" in row["scores"]
        assert row["scores"][f"preference ({clip_folder.name})"] == row["scores"]["CLIP score"]
        if name == "teacher-4":
            assert row["endpoint_distance"] is None
            assert distances["teacher"] is None and distances["reference"] > 0
        else:
            assert row["endpoint_distance"] > 0 and distances["teacher"] > 0
            theirs = rows["teacher-4"]["distances"][CUSTOM]["reference"]
            assert distances["difference"] == pytest.approx(abs(distances["reference"] - theirs))
    assert any("biased" in warning for warning in record["warnings"])
    page = (out / "report.html").read_text()
    assert "Missing: Inception (FID)" in page and "data:image/png;base64," in page
    assert not [word for word in ("http://", "https://", "<script", "<link", 'src="/') if word in page]
    grid = Image.open(out / "grid.png")
    assert grid.width > grid.height / 3 and (out / "teacher-4/00002.safetensors").is_file()


def test_the_endpoint_distance_is_that_of_the_latents(lora, prompts, tmp_path, flux):
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS) == 0
    noise, scheduler = start_noise(flux, range(3), 0), flux.pipe.scheduler
    target, two = (stock_latents(flux, CAPTIONS, noise, n, 2.5, scheduler) for n in (4, 2))
    want = (target - two).square().mean().sqrt().item()
    assert rows_in(tmp_path / "out")["teacher-2"]["endpoint_distance"] == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
def test_it_resumes_and_an_image_is_the_same_alone_and_in_a_batch(lora, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(lora, prompts, out, *NO_METRICS) == 0
    first = {path: path.read_bytes() for path in out.rglob("*.png") if path.parent != out}
    ages = {path: path.stat().st_mtime_ns for path in first}
    old = record_in(out)["rows"]
    lost = [out / "student-2/00001.png", out / "teacher-4/00000.png"]
    for path in lost:
        path.unlink()
    assert evaluate(lora, prompts, out, *NO_METRICS) == 0
    assert {path for path in first if path.stat().st_mtime_ns != ages[path]} == set(lost)
    for path in lost:
        assert (pixels(path) - pixels(io.BytesIO(first[path]))).abs().max() <= 1
    distances = [[row["endpoint_distance"] for row in rows[1:]] for rows in (record_in(out)["rows"], old)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)

    capsys.readouterr()
    assert evaluate(lora, prompts, out, *NO_METRICS, "--seed", "3") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"scfm evaluate: {out} holds images of another seed: take another --output_dir, or delete it"
    )


def test_images_on_a_base_of_4_bits_are_of_another_protocol(lora, prompts, tmp_path, capsys, monkeypatch):
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS) == 0
    monkeypatch.setattr("scfm.inference.step_lora.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS, "--quantize", "nf4") == 2
    assert "holds images of another quantize" in capsys.readouterr().err


def test_the_name_of_the_pipeline_is_looked_up_once(lora, prompts, tmp_path, monkeypatch):
    names, resolve = [], source.resolve_folder
    monkeypatch.setattr(source, "resolve_folder", lambda name, *a: names.append(name) or resolve(name, *a))
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS) == 0
    assert names == [str(FLUX)]


def pixels(file):
    """(3, H, W), 0 to 255."""
    return pil_to_tensor(Image.open(file)).float()


def random_lora(folder):
    """A LoRA of the tiny Flux that does something, saved as diffusers saves them."""
    pipe = build_flux()
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "style")
    return save_lora(type(pipe), pipe.transformer, folder, "style")


@pytest.mark.slow
def test_external_models_come_through_the_same_door(lora, prompts, tmp_path):
    random_lora(tmp_path / "hyper")
    schnell = build_flux(seed=1)
    config = {**schnell.transformer.config, "guidance_embeds": False}
    schnell.transformer = FluxTransformer2DModel.from_config(config)
    schnell.save_pretrained(tmp_path / "schnell")
    before, out = tmp_path / "alone", tmp_path / "out"
    assert evaluate(lora, prompts, before, *NO_METRICS) == 0
    hyper = f"hyper={tmp_path / 'hyper'},lora_scale=.5,steps=1+2,guidance_scale=3.5"
    models = ["--external_model", hyper]
    models += ["--external_model", f"schnell={tmp_path / 'schnell'},steps=1,guidance_scale=0"]
    assert evaluate(lora, prompts, out, *NO_METRICS, *models) == 0
    rows = rows_in(out)
    assert {"hyper-1", "hyper-2", "schnell-1"} <= set(rows) and rows["hyper-1"]["kind"] == "external"
    assert rows["schnell-1"]["endpoint_distance"] is None and rows["schnell-1"]["evaluations"] == 1
    assert rows["hyper-1"]["endpoint_distance"] > 0
    assert [heading for heading, _ in groups_of(record_in(out))] == [
        "the teacher at its steps",
        "1 evaluation an image",
        "2 evaluations an image",
    ]
    for name in ("student-2", "teacher-2"):  # a second adapter in the pipeline changes nobody else
        images = [Image.open(folder / name / "00000.png").tobytes() for folder in (out, before)]
        assert images[0] == images[1]

    pipe = load_flux()  # and the external LoRA is what a stock pipeline generates with it
    pipe.load_lora_weights(str(tmp_path / "hyper"), adapter_name="x")
    pipe.set_adapters(["x"], [0.5])
    stock = pipe(
        CAPTIONS[:1],
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.5,
        latents=start_noise(Flux(pipe, 32, 32, TOKENS), range(1), 0),
        max_sequence_length=TOKENS,
        output_type="pt",
    ).images[0]
    assert (pixels(out / "hyper-2/00000.png") / 255 - stock).abs().max() < 0.01


def test_the_best_of_a_column_is_marked_among_equals_only():
    numbers = [("teacher", 9, None, 0.9), ("a", 2, 0.3, 0.5), ("b", 2, 0.2, 0.4), ("c", 3, 0.1, 0.1)]
    rows = [
        {
            "name": name,
            "label": name,
            "steps": 2,
            "evaluations": evaluations,
            "endpoint_distance": distance,
            "seconds": 1.0,
            "scores": {"score": score},
        }
        for name, evaluations, distance, score in numbers
    ]
    record = {"rows": rows}
    assert [len(group.rows) for group in groups_of(record)] == [1, 2, 1]
    assert best_of(record, rows[1:3]) == {("b", "endpoint distance"), ("a", "score")}
    assert best_of(record, rows[3:]) == set()
    heads, *lines = text_table(record).splitlines()
    assert heads.split("  ")[-1] == "seconds an image" and len({len(heads), *map(len, lines)}) == 1
    assert [line.split()[2] for line in lines] == ["-", "0.3", "0.2*", "0.1"]


def test_frechet_distances_are_to_the_teacher_and_to_the_reference():
    torch.manual_seed(0)
    features, teacher, reference = (torch.randn(9, 2) + k for k in range(3))
    to_reference, own = frechet_distance(features, reference), frechet_distance(teacher, reference)
    assert distances_of(features, teacher, reference) == {
        "teacher": frechet_distance(features, teacher),
        "reference": to_reference,
        "difference": abs(to_reference - own),
    }
    assert distances_of(teacher, teacher, reference) == {
        "teacher": None,
        "reference": own,
        "difference": None,
    }
    assert distances_of(features, teacher, None)["difference"] is None


# What is wrong is said before anything is loaded


@pytest.mark.parametrize(
    "change, message",
    [
        (["--lora", "nowhere"], "no LoRA at nowhere"),
        (["--num_images", "0"], "--num_images is 0: give 1 or more"),
        (["--steps", "0,2"], "give step counts of 1 or more"),
        (["--teacher_steps", "0"], "--teacher_steps is 0"),
        (["--batch_size", "-1"], "--batch_size is -1"),
        (["--latency_repeats", "0"], "--latency_repeats is 0"),
        (["--prompts", "nowhere.txt"], "no captions at nowhere.txt"),
        (["--pretrained_model_name_or_path", "nowhere"], "no pipeline in nowhere"),
        (["--reference_dir", "nowhere"], "no images in nowhere"),
        (["--reference_dir", str(FLUX)], "no images in"),
        (["--output_dir", str(FLUX / "model_index.json/out")], "take another --output_dir"),
        (["--custom_metric", "toy.judge:nobody"], "no such function"),
        (["--custom_metric", "toy.judge"], "no such function"),
        (["--negative_prompt", "ugly"], "a negative prompt means nothing to Flux"),
        (["--external_model", "hyper"], "say NAME=PATH"),
        (["--external_model", "teacher=x.safetensors"], "none of teacher, student"),
        (["--external_model", "step=x.safetensors"], "none of teacher, student"),
        (["--external_model", "a-b=x.safetensors"], "letters, digits"),
        (["--external_model", "x=nowhere.safetensors"], "no LoRA and no pipeline at nowhere.safetensors"),
        (["--external_model", f"x={WEIGHTS / 'lora'},weight=1"], "no option 'weight'; there are lora_scale,"),
        (["--external_model", f"x={WEIGHTS / 'lora'},lora_scale=much"], "lora_scale is 'much'"),
        (["--external_model", f"x={WEIGHTS / 'lora'},steps=0"], "steps are 1 or more"),
        (["--external_model", f"x={FLUX},lora_scale=1"], "a pipeline has no lora_scale"),
        (["--external_model", f"x={FLUX / 'vae'}"], "holds no LoRA"),
        (["--external_model", f"x={FLUX / 'model_index.json'}"], "no safetensors file"),
        (
            ["--external_model", f"a={WEIGHTS / 'lora'}", "--external_model", f"a={FLUX}"],
            "two external models are called a",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(lora, prompts, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.setattr("scfm.inference.step_lora.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS, *change) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("scfm evaluate: ") and message in line


def test_a_lora_that_fits_nothing_is_named_before_anything_is_generated(lora, prompts, tmp_path, capsys):
    layer, path = "transformer.elsewhere", tmp_path / "x.safetensors"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(2, 4), f"{layer}.lora_B.weight": torch.zeros(4, 2)}
    save_file(tensors, path)
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS, "--external_model", f"x={path}") == 2
    assert "x.safetensors" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.png"))


def test_what_fits_nowhere_stands_in_the_report(lora, prompts, tmp_path, capsys):
    """Of the student's LoRA and of a rival's; of those that fit there is no word."""
    for folder in (lora, tmp_path / "deep"):
        tensors = load_file(WEIGHTS / "lora" / WEIGHT_NAME)
        tensors = {
            name.replace("transformer_blocks.1.", "transformer_blocks.9."): x for name, x in tensors.items()
        }
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / WEIGHT_NAME)
    models = [f"--external_model=deep={tmp_path / 'deep'}", f"--external_model=whole={WEIGHTS / 'lora'}"]
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS, *models) == 0
    notes = [text for text in record_in(tmp_path / "out")["warnings"] if "fit nowhere" in text]
    assert [f"/{name}/{WEIGHT_NAME} fit" in note for note, name in zip(notes, ("lora", "deep"), strict=True)]
    assert all(" of 124 tensors of" in note for note in notes)
    assert capsys.readouterr().out.count("fit nowhere") == 2
    assert (tmp_path / "out/report.html").read_text().count("fit nowhere") == 2


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path={}", "--external_model=x={}"])
def test_a_pipeline_that_is_not_whole_is_named_before_the_folder_is_made(
    lora, prompts, tmp_path, capsys, flag
):
    flux = shutil.copytree(FLUX, tmp_path / "flux")
    (flux / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS, flag.format(flux)) == 2
    assert "has no weights in vae" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_long_captions_are_counted_once(lora, prompts, tmp_path, caplog, capfd):
    prompts.write_text("a red star on the left " * 40)
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS) == 0
    assert caplog.text.count("1 of 1 captions are longer than 16 tokens") == 1
    assert not re.search("truncated|indexing errors", caplog.text + capfd.readouterr().err)


@pytest.mark.parametrize("which", ["teacher", "external"])
def test_images_of_other_weights_under_the_same_name_are_refused(lora, prompts, tmp_path, capsys, which):
    flux = shutil.copytree(FLUX, tmp_path / "flux")
    teacher = [f"--pretrained_model_name_or_path={flux}"]
    words = {"teacher": teacher, "external": [f"--external_model=other={flux},steps=1"]}[which]
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS, *words) == 0
    path = flux / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert evaluate(lora, prompts, tmp_path / "out", *NO_METRICS, *words) == 2
    assert "holds images of another weights" in capsys.readouterr().err
