"""examples/plain_scfm_flux.py stands alone, computes what the library does, and diffusers loads its file."""

import ast
import importlib.util
import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from scfm.method.consistency import Jumps, draw_jumps
from scfm.method.distill import Batch, SCFMConfig, make_emas, make_optimizer, train_step
from scfm.models.flux import Flux
from scfm.models.lora import ADAPTERS, LoraModels
from scfm.streams import keyed_generator
from toy.pipelines import FLUX, TOKENS, load_flux

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "plain_scfm_flux.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
CAPTIONS = ("a red circle", "a blue square on the left", "there is a green star", "a small yellow ring")
B = 8


@pytest.fixture(scope="module")
def plain():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("plain_scfm_flux", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(folder):
    """Four images, one of them neither square nor of the size of training, with captions beside them."""
    where = folder / "images"
    where.mkdir()
    for i, caption in enumerate(CAPTIONS):
        image = Image.new("RGB", (32, 32) if i else (80, 60), "gray")
        ImageDraw.Draw(image).ellipse((4 + i, 6, 22 + i, 24), fill=caption.split()[1] if i == 0 else "navy")
        image.save(where / f"{i}.png")
        (where / f"{i}.txt").write_text(caption + "\n")
    return where


def flags(images, out, **more):
    settings = {
        "pretrained_model_name_or_path": FLUX,
        "train_data_dir": images,
        "output_dir": out,
        "resolution": 32,
        "max_sequence_length": TOKENS,
        "rank": 2,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "weight_dtype": "fp32",
        **more,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", *str(value).split())]


# What it is


def test_it_stands_alone_and_is_short():
    nodes = list(ast.walk(ast.parse(SOURCE)))
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert foreign == {"torch", "diffusers", "peft", "PIL"}
    assert len(SOURCE.splitlines()) <= 250 and max(map(len, SOURCE.splitlines())) <= 110


# What it computes


def batch(plain, dtype, step):
    """Latents, noise, times, kinds and a condition that both implementations are given."""
    torch.manual_seed(step)
    data, noise = torch.randn(2, B, 64, 16)
    times, is_teacher = plain.sample_jumps(B, dtype)
    assert 0 < is_teacher.sum() < B  # both kinds of examples are compared
    cond = torch.randn(B, TOKENS, 64), torch.randn(B, 64), torch.empty(B).uniform_(1, 4)
    return data, noise, times, is_teacher, tuple(c.to(dtype) for c in cond)


def both(plain, dtype, checkpointing=False):
    """The example's models and the library's, of equal weights; the three adapters already differ."""
    flux = Flux(load_flux(dtype=dtype), 32, 32, TOKENS)
    library = LoraModels(flux.pipe.transformer, flux.velocity, Flux.lora_targets, rank=4)
    transformer = load_flux(dtype=dtype).transformer
    example = plain.LoraModels(transformer, 4, FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", dtype))
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    torch.manual_seed(0)
    for name in ADAPTERS:
        assert [p.shape for p in example.parameters(name)] == [p.shape for p in library.parameters(name)]
        for p, q in zip(example.parameters(name), library.parameters(name), strict=True):
            assert p.dtype == q.dtype == torch.float32
            p.data += 0.05 * torch.randn_like(p)
            q.data.copy_(p.data)
    return example, library


def apart(a, b):
    """The norm of the difference of two lists of tensors, over that of the second."""
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (a, b))
    return ((a - b).norm() / b.norm()).item()


def test_all_models_start_as_the_teacher_and_only_the_student_is_trainable(plain):
    transformer = load_flux().transformer
    example = plain.LoraModels(transformer, 2, torch.zeros(64, 3))
    data, _, times, _, cond = batch(plain, torch.float32, 1)
    assert all(p.requires_grad == ("student" in name) for name, p in transformer.named_parameters())
    with torch.no_grad():
        teacher, *others = (example.velocity(n, data, times[:, 0], cond) for n in ("teacher", *ADAPTERS))
    assert all(torch.equal(teacher, v) for v in others)


@pytest.mark.parametrize(
    "dtype, checkpointing", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_loss_gradients_and_weights_of_three_steps_are_the_librarys(plain, dtype, checkpointing):
    """But for rounding: PEFT multiplies by float32 adapters one model after the other, the library all models
    in one forward and in the base's dtype."""
    config = SCFMConfig(global_batch_size=B, learning_rate=1e-3, ema_decay_fast=0.9, ema_decay_slow=0.97)
    example, library = both(plain, dtype, checkpointing)
    start = {name: [p.detach().clone() for p in example.parameters(name)] for name in ADAPTERS}
    base = {n: p.clone() for n, p in example.transformer.named_parameters() if ".lora_" not in n}
    (optimizer, _), emas = make_optimizer(library, config), make_emas(library, config)
    for name in ("ema_fast", "ema_slow"):  # make_emas restarts them; here they differ
        for p, value in zip(library.parameters(name), start[name], strict=True):
            p.data.copy_(value)
    other = torch.optim.AdamW(example.parameters("student"), lr=1e-3, weight_decay=config.adam_weight_decay)
    gradients, exact = {}, dtype == torch.float32

    def remember(opt, *_):
        gradients[opt] = [p.grad.clone() for p in opt.param_groups[0]["params"]]

    for opt in (optimizer, other):
        opt.register_step_pre_hook(remember)
    for step in range(3):
        data, noise, times, is_teacher, cond = batch(plain, dtype, step)
        jumps = Jumps(times, is_teacher, torch.where(is_teacher, 32, 2))
        words = dict(zip(("tokens", "pooled", "guidance"), cond, strict=True))
        result = train_step(library, emas, optimizer, [Batch(data, noise, jumps, words)], config)
        loss = plain.train_step(example, other, data, noise, times, is_teacher, cond, (0.9, 0.97))
        assert loss == pytest.approx(result.losses.mean().item(), rel=1e-6 if exact else 0.03)
        assert apart(gradients[optimizer], gradients[other]) < (1e-5 if exact else 0.1)
        for name in ADAPTERS:
            moved = [
                [p.detach() - q for p, q in zip(models.parameters(name), start[name], strict=True)]
                for models in (library, example)
            ]
            assert apart(*moved) < (1e-3 if exact else 0.3)
    for name in ADAPTERS:  # and something has happened
        assert not any(map(torch.equal, start[name], example.parameters(name)))
    assert all(torch.equal(base[n], p) for n, p in example.transformer.named_parameters() if n in base)


def test_a_wrong_kind_of_example_would_be_noticed(plain):
    example, _ = both(plain, torch.float32)
    data, _, times, is_teacher, cond = batch(plain, torch.float32, 0)
    right = plain.consistency_target(example, data, times, is_teacher, cond)
    wrong = plain.consistency_target(example, data, times, ~is_teacher, cond)
    assert ((right - wrong).flatten(1).norm(dim=1) > 1e-2).all()


def test_latents_and_embeddings_are_the_librarys(plain, images, folder):
    args = plain.parse_args(flags(images, folder / "unused"))
    pairs = plain.read_dataset(images)
    latents, prompt_embeds, pooled = plain.encode_dataset(args, pairs, "cpu")
    flux = Flux(load_flux(), 32, 32, TOKENS)
    pixels = [pil_to_tensor(plain.read_image(file, 32)).float() / 127.5 - 1 for file, _ in pairs]
    text = flux.encode_text(CAPTIONS)
    torch.testing.assert_close(latents, flux.encode_images(torch.stack(pixels)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prompt_embeds, text["tokens"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, text["pooled"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_are_drawn_from_the_librarys_distribution(plain, dtype):
    torch.manual_seed(0)
    n = 100_000
    times, is_teacher = plain.sample_jumps(n, dtype)
    jumps = draw_jumps(n, shift=(2.5, 4.5), dtype=dtype, generator=keyed_generator(0, 0))
    assert times.dtype == torch.float32 and torch.equal(times, times.to(dtype).float())
    assert (times[:, :-1] > times[:, 1:]).all() and abs(is_teacher.sum() - 0.4 * n) <= 1
    for mask, others in ((is_teacher, jumps.is_teacher), (~is_teacher, ~jumps.is_teacher)):
        for column in range(3):  # quantile by quantile
            a, b = (t[:39_000, column].sort().values for t in (times[mask], jumps.times[others]))
            assert (a - b).abs().mean() < 0.01


def test_a_batch_of_one_has_a_teacher_example_in_two_of_five(plain):
    torch.manual_seed(0)
    kinds = torch.cat([plain.sample_jumps(1, torch.float32)[1] for _ in range(4000)])
    assert abs(kinds.float().mean() - 0.4) < 0.03


# What it writes


def test_a_stock_pipeline_with_the_file_is_the_student(plain, tmp_path):
    example, _ = both(plain, torch.float32)
    plain.save_lora(example.transformer, tmp_path)
    plain.save_lora(example.transformer, tmp_path)  # replaces what is there
    assert [f.name for f in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = load_flux()
    data, _, times, _, (prompt_embeds, pooled, guidance) = batch(plain, torch.float32, 0)

    def stock():
        with torch.no_grad():
            return pipe.transformer(
                data, prompt_embeds, pooled, times[:, 0], example.img_ids, torch.zeros(TOKENS, 3), guidance
            ).sample

    before = stock()
    pipe.load_lora_weights(tmp_path)
    student = example.velocity("student", data, times[:, 0], (prompt_embeds, pooled, guidance)).detach()
    torch.testing.assert_close(stock(), student, atol=1e-5, rtol=1e-5)
    assert (before - student).abs().max() > 0.1


@pytest.mark.slow
def test_the_command_of_its_docstring_runs_and_its_last_words_sample(plain, tmp_path, capsys, monkeypatch):
    """In two steps instead of a hundred, with the images that the docstring draws."""
    words = plain.__doc__.replace("runs/", f"{tmp_path}/").replace("\n    ", "\n").split("python -c '\n")[1]
    words = words.replace("max_train_steps 100", "max_train_steps 2").replace("5e-4", "5e-2")
    drawing, command = words.split("'\n")
    monkeypatch.chdir(ROOT)
    (tmp_path / "circles").mkdir()
    exec(drawing, {})
    command = shlex.split(command.replace("\\\n", " "))
    assert command[:2] == ["python", "examples/plain_scfm_flux.py"]
    plain.main(command[2:])
    last = capsys.readouterr().out
    assert last.count("\n") == 3
    pipe = load_flux()

    def sample():
        return pipe(
            "a red circle",
            height=32,
            width=32,
            num_inference_steps=4,
            max_sequence_length=TOKENS,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    before = sample()
    exec(last, {"pipe": pipe})
    after = sample()
    assert (after - before).abs().max() > 0.01
    assert pipe.scheduler.config.shift == 3 and not pipe.scheduler.config.use_dynamic_shifting
    pipe.set_adapters("scfm", 0.0)
    torch.testing.assert_close(sample(), before, atol=1e-5, rtol=0)


def test_metadata_gradient_checkpointing_and_bf16_run_and_repeat(plain, images, tmp_path):
    (images / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a red circle"}\n')
    try:
        assert plain.read_dataset(images) == [(images / "0.png", "a red circle")]
        for out in ("a", "b"):
            plain.main(flags(images, tmp_path / out, weight_dtype="bf16", gradient_checkpointing=""))
    finally:
        (images / "metadata.jsonl").unlink()
    a, b = (load_file(tmp_path / out / "pytorch_lora_weights.safetensors") for out in ("a", "b"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# What it refuses

WRONG = [
    ({"resolution": 33}, "multiple of 4"),
    ({"resolution": 0}, "above 0"),
    ({"rank": 0}, "above 0"),
    ({"rank": "two"}, "invalid int"),
    ({"learning_rate": "nan"}, "above 0"),
    ({"max_train_steps": -1}, "above 0"),
    ({"ema_decay_slow": 1}, "below 1"),
    ({"guidance_scale_range": "4 1"}, "low <= high"),
    ({"weight_dtype": "fp16"}, "invalid choice"),
    ({"lr": 1}, "unrecognized"),
    ({"train_data_dir": "nowhere"}, "no such folder"),
    ({"output_dir": __file__}, "exists"),
    ({"pretrained_model_name_or_path": FLUX.parent}, "config.json"),
]


@pytest.mark.parametrize("change, says", WRONG, ids=[next(iter(change)) for change, _ in WRONG])
def test_wrong_settings_are_refused_in_one_line(plain, images, tmp_path, capsys, change, says):
    refused(plain, capsys, flags(images, tmp_path / "out", **change), says)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("metadata.jsonl", "", "no images"),
        ("metadata.jsonl", "{", "line 1"),
        ("metadata.jsonl", '{"file_name": "0.png"}', "line 1"),
        ("metadata.jsonl", '{"file_name": "9.png", "text": "a star"}', "9.png"),
        ("0.txt", " ", "no caption"),
        ("0.png", "no image", "0.png"),
    ],
)
def test_wrong_data_is_refused_in_one_line(plain, tmp_path, capsys, name, content, says):
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a black square")
    (tmp_path / name).write_text(content)
    refused(plain, capsys, flags(tmp_path, tmp_path / "out"), says)


def test_a_transformer_without_guidance_is_refused_in_one_line(plain, images, tmp_path, capsys):
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        config = json.loads((FLUX / part / "config.json").read_text())
        (tmp_path / part / "config.json").write_text(json.dumps({**config, "guidance_embeds": False}))
    words = flags(images, tmp_path / "out", pretrained_model_name_or_path=tmp_path)
    refused(plain, capsys, words, "guidance embedding")


def refused(plain, capsys, words, says):
    """main() ends before any model is loaded, with one line that begins with "error:"."""
    with pytest.raises(SystemExit) as end:
        plain.main(words)
    line = capsys.readouterr().err if isinstance(end.value.code, int) else f"{end.value.code}\n"
    assert line.startswith("error: ") and line.count("\n") == 1 and says in line


def test_run_as_a_script_it_refuses_just_so(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags(images, tmp_path, rank=0)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr() == ("", "error: --rank 0: must be above 0 (a decay: below 1, too)\n")
