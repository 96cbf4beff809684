"""Wan, and what a family of videos adds to one of images: frames, a grid that the call is not told, and the
pipelines of it that are refused."""

import base64
import io
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image

from scfm.data.cache import CachePlan
from scfm.data.videos import list_videos, read_frames
from scfm.evaluation.external_models import ExternalModel, PipelineImages
from scfm.inference.config import InferenceConfig
from scfm.inference.step_lora import StepLora, generate
from scfm.models.base import (
    PipelineFamily,
    is_plain,
    plain_grid,
    scheduler_shift,
    spatial_factor,
    takes_sigmas,
    time_shift,
)
from scfm.models.check import stock_grid, stock_trajectory
from scfm.models.family import FAMILIES
from scfm.models.quantize import quantize_linears
from scfm.models.sampling import start_noise
from scfm.models.source import PipelineSource
from scfm.models.wan import Wan
from toy.pipelines import BUILD, FLUX, SHIFT, build_wan

CAPTIONS = ["a large red cross", "a small blue ring on the left"]
LENGTH = 16


@pytest.fixture(scope="module")
def pipe():
    made = build_wan()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "pipeline"
    pipe.save_pretrained(path)
    return path


@pytest.mark.parametrize("frames, latents", [(1, 1), (5, 2), (9, 3)])
def test_the_first_frame_has_a_latent_of_its_own_and_four_more_have_one(pipe, frames, latents):
    family = Wan(pipe, 32, 64, LENGTH, num_frames=frames)
    assert family.latent_shape == (4, latents, 8, 16) and family.tokens == latents * 4 * 8
    shape = (2, frames, 3, 32, 64) if frames > 1 else (2, 3, 32, 64)
    videos = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = family.encode_images(videos)
    assert x.shape[1:] == family.latent_shape and family.decode(x).shape == shape
    sampled = family.sample_stock(CAPTIONS, torch.randn_like(x), 2, 4.0)
    assert sampled.shape == shape and -1 <= sampled.min() <= sampled.max() <= 1


def test_a_video_is_cut_into_frames_in_their_order(pipe):
    """What the latents hold of the first frame does not depend on the later ones, which the VAE reads after
    it."""
    family = Wan(pipe, 32, 32, LENGTH, num_frames=5)
    videos = torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = videos.clone()
    other[:, 1:] = 0
    a, b = family.encode_images(videos), family.encode_images(other)
    image = Wan(pipe, 32, 32, LENGTH).encode_images(videos[:, 0])
    torch.testing.assert_close(a[:, :, :1], b[:, :, :1])
    torch.testing.assert_close(a[:, :, :1], image)
    assert (a[:, :, 1] - b[:, :, 1]).abs().max() > 1e-2
    torch.testing.assert_close(family.decode(a)[:, 0], Wan(pipe, 32, 32, LENGTH).decode(image))


@pytest.mark.parametrize("frames, near", [(0, "1 or 5"), (2, "1 or 5"), (6, "5 or 9"), (80, "77 or 81")])
def test_other_numbers_of_frames_are_refused_with_the_next_ones(pipe, frames, near):
    with pytest.raises(ValueError, match=f"num_frames is {frames}: .* 1, 5, 9, .* take {near}"):
        Wan(pipe, 32, 32, LENGTH, num_frames=frames)


@pytest.mark.parametrize("shift", [None, 1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_pipeline_that_takes_no_sigmas_has_the_plain_grid_too(pipe, steps, shift):
    family = Wan(pipe, 32, 32, LENGTH)
    assert not takes_sigmas(type(pipe)) and scheduler_shift(pipe.scheduler) == SHIFT
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    own = pipe.scheduler
    times = torch.tensor([step.t for step in stock_trajectory(family, CAPTIONS, noise, steps, 1.0, shift)])
    torch.testing.assert_close(times, stock_grid(family, steps, shift)[:-1])
    assert pipe.scheduler is own


def test_the_bounds_of_a_scheduler_are_its_own_again(pipe):
    with time_shift(pipe, 5.0):
        scheduler = pipe.scheduler
        bounds = scheduler.sigma_min, scheduler.sigma_max
        with pytest.raises(KeyError), plain_grid(pipe, 4) as arguments:
            assert arguments == {} and scheduler.sigma_min == 0.25
            raise KeyError
        assert (scheduler.sigma_min, scheduler.sigma_max) == bounds


def test_the_time_of_each_token_is_one_time_for_all(pipe):
    """Wan2.2-TI2V-5B's pipeline hands its network a time for each token; we hand it one for each example."""
    other = build_wan(expand_timesteps=True)
    other.set_progress_bar_config(disable=True)
    told = []
    hook = other.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["timestep"].shape), with_kwargs=True
    )
    family, same = (Wan(p, 32, 32, LENGTH, num_frames=5) for p in (other, pipe))
    noise = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    a, b = (f.sample_stock(CAPTIONS, noise, 2, 4.0) for f in (family, same))
    hook.remove()
    assert set(told) == {(2, family.tokens)}
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, most", [("int8", 0.02), ("nf4", 0.2)])
def test_a_base_in_fewer_bits_hears_the_time_as_it_is(pipe, kind, most):
    family = Wan(pipe, 32, 32, LENGTH, num_frames=5)
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = {**family.encode_text(CAPTIONS), "guidance": torch.tensor([1.0, 4.0])}
    small = quantize_linears(build_wan().transformer, kind)
    for name, layer in small.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert (type(layer) is torch.nn.Linear) == ("time_embedder" in name)
    for t in (0.1, 0.9):
        with torch.no_grad():
            whole, rough = (
                family.velocity(m, x, torch.full((2,), t), cond) for m in (pipe.transformer, small)
            )
        assert (whole - rough).norm() < most * whole.norm()


def test_two_transformers_are_refused_before_anything_is_loaded(tmp_path, command, capsys, monkeypatch):
    two = build_wan(transformer_2=True)
    with pytest.raises(ValueError, match="second transformer .*Wan2.2-A14B.*take Wan 2.1 or"):
        Wan(two, 32, 32, LENGTH)
    two.save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr("scfm.data.prepare.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "prompts.txt").write_text("a red star\n")
    more = {"pretrained_model_name_or_path": tmp_path / "pipeline", "prompts": tmp_path / "prompts.txt"}
    capsys.readouterr()
    assert command("data", **more, sizes="32x32", output_dir=tmp_path / "images") == 2
    line = capsys.readouterr().err.strip().splitlines()
    assert len(line) == 1 and "second transformer" in line[0] and not (tmp_path / "images").exists()
    assert command("plan", pretrained_model_name_or_path=tmp_path / "pipeline", height=32, width=32) == 2


# From videos to a pipeline


FRAMES = 5
RUN = {
    "height": 32,
    "width": 32,
    "rank": 2,
    "max_train_steps": 2,
    "global_batch_size": 2,
    "teacher_steps": 2,
    "num_eval_prompts": 2,
    "guidance_scale_range": "1,4",
    "teacher_guidance_scale": 3,
    "validation_steps": 2,
    "eval_num_steps": 2,
    "algorithm": "step_scaled",
    "report_to": "none",
}


@pytest.fixture(scope="module")
def work(folder, tmp_path_factory, command):
    """A folder of teacher-made videos, and a student of them: {"videos": ..., "run": ...}."""
    path = tmp_path_factory.mktemp("work")
    (path / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    ours = {"pretrained_model_name_or_path": folder, "max_sequence_length": LENGTH, "num_frames": FRAMES}
    made = {"prompts": path / "prompts.txt", "output_dir": path / "videos", "sizes": "32x32"}
    assert command("data", **ours, **made, teacher_steps=2, teacher_guidance_scale=3) == 0
    run = {**ours, **RUN, "train_data_dir": path / "videos", "output_dir": path / "run"}
    assert command("distill", **run) == 0
    return path


@pytest.mark.slow
def test_a_student_of_videos_lands_nearer_than_its_teacher(folder, work, tmp_path, command):
    ours = {"pretrained_model_name_or_path": folder, "max_sequence_length": LENGTH, "num_frames": FRAMES}
    longer = {"max_train_steps": 150, "global_batch_size": 8, "rank": 8, "learning_rate": 1e-3}
    compared = {"teacher_steps": 16, "num_eval_prompts": 8, "eval_num_steps": "1,2", "validation_steps": 0}
    run = {**ours, **RUN, **longer, **compared, "train_data_dir": work / "videos", "output_dir": tmp_path}
    assert command("distill", **run) == 0
    distance = json.loads((tmp_path / "selection.json").read_text())["endpoint_distance"]
    for steps in ("1", "2"):
        assert distance["ema"][steps] < 0.8 * distance["teacher"][steps], distance


def test_the_teachers_videos_are_files_of_all_frames(folder, pipe, work):
    family = Wan(pipe, 32, 32, LENGTH, num_frames=FRAMES)
    rows = [json.loads(line) for line in (work / "videos/metadata.jsonl").read_text().splitlines()]
    assert [row["num_frames"] for row in rows] == [FRAMES] * 2 and rows[0]["shift"] == SHIFT
    noise = start_noise(family, range(2), 0)
    want = family.sample_stock(CAPTIONS, noise, 2, 3.0)
    for row, video in zip(rows, want, strict=True):
        read = read_frames(work / "videos" / row["file_name"], 32, 32, FRAMES)
        torch.testing.assert_close(read, video, rtol=0, atol=0.02)
    plan = CachePlan(
        PipelineSource(folder),
        list_videos(work / "videos", FRAMES),
        work / "videos/cache",
        [(32, 32)],
        LENGTH,
        torch.float32,
        num_frames=FRAMES,
    )
    latents = plan.open().latents([0, 1])
    assert latents.shape[1:] == family.latent_shape
    videos = torch.stack([read_frames(work / "videos" / r["file_name"], 32, 32, FRAMES) for r in rows])
    torch.testing.assert_close(latents, family.encode_images(videos), rtol=0, atol=1e-4)


def test_validation_and_samples_are_a_strip_and_a_gif(work, command, capsys):
    for path, rows in (work / "run/validation/000002.png", 4), (work / "two.png", 2):
        if path.name == "two.png":
            prompts = work / "prompts.txt"
            assert command("sample", lora=work / "run", prompts=prompts, steps=2, output=path) == 0
            assert "two.png and two.gif: 2 videos, 2 steps" in capsys.readouterr().out
        with Image.open(path) as strip, Image.open(path.with_suffix(".gif")) as gif:
            assert strip.width // 32 == FRAMES and strip.height // 32 == rows
            assert gif.n_frames == FRAMES


def test_the_code_of_the_card_makes_the_videos_that_we_make(folder, work, monkeypatch):
    """Run as it stands, on stock diffusers, in the folder above the LoRA's; so is an export's."""
    text = (work / "run/README.md").read_text()
    assert "pipe.scheduler.sigma_min = 1 / 4" in text and "sigmas=" not in text
    assert f"    num_frames={FRAMES}," in text and ").frames" in text
    step_lora = StepLora(InferenceConfig(lora=str(work / "run"), seed=5), "cpu")
    videos, _ = generate(step_lora, CAPTIONS, 4)
    noise = start_noise(step_lora.family, range(2), 5)
    pipe = WanPipeline.from_pretrained(str(folder))
    torch.testing.assert_close(run_card(text, work, monkeypatch, noise, pipe=pipe), videos, rtol=0, atol=1e-5)
    base, _ = generate(step_lora, CAPTIONS, 4, 0.0)
    assert (videos - base).abs().max() > 1e-5


def run_card(text, folder, monkeypatch, noise, **names):
    """What the code of a card generates, in [-1, 1]."""
    code = text.split("```python")[1].split("```")[0]
    assert code.count("    prompt,\n") == 1
    code = code.replace("    prompt,\n", "    prompt,\n    latents=noise,\n    output_type='pt',\n")
    monkeypatch.chdir(folder)
    exec(code, names := {"prompt": CAPTIONS, "noise": noise, **names})
    return names["frames"] * 2 - 1


@pytest.mark.slow
def test_an_export_and_its_card(work, command, monkeypatch):
    assert command("export", lora=work / "run", steps=2, output_dir=work / "fused") == 0
    step_lora = StepLora(InferenceConfig(lora=str(work / "run"), seed=5), "cpu")
    videos, _ = generate(step_lora, CAPTIONS, 2)
    text, noise = (work / "fused/README.md").read_text(), start_noise(step_lora.family, range(2), 5)
    torch.testing.assert_close(run_card(text, work, monkeypatch, noise), videos, rtol=0, atol=1e-3)


def middle_mean(images, captions):
    """A metric of the user's own: the mean of each image, which is a video's middle frame."""
    assert images.shape[1:] == (3, 32, 32)
    return images.flatten(1)[:, :8], {"mean": images.flatten(1).mean(1)}


@pytest.mark.slow
def test_evaluate_measures_images_on_middle_frames_and_says_so(work, command, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    out = work / "report"
    more = {"inception": "none", "clip": "none", "imagenet": "none", "custom_metric": "test_wan:middle_mean"}
    few = {
        "num_images": 2,
        "steps": "2",
        "teacher_steps": 4,
        "latency_repeats": 1,
        "prompts": work / "prompts.txt",
    }
    assert command("evaluate", lora=work / "run", output_dir=out, **few, **more) == 0
    record = json.loads((out / "report.json").read_text())
    assert (
        record["protocol"]["num_frames"] == FRAMES
        and "2 videos of 5 frames" in (out / "report.html").read_text()
    )
    assert any("one frame of each video" in text for text in record["warnings"])
    teacher = record["rows"][0]
    frames = torch.stack(
        [read_frames(out / teacher["name"] / f"0000{i}.png", 32, 32, FRAMES) for i in range(2)]
    )
    assert teacher["scores"]["mean"] == pytest.approx(frames[:, FRAMES // 2].mean().item(), abs=1e-2)
    change = ((frames[:, 1:] - frames[:, :-1]) / 2).abs().mean().item()
    assert teacher["motion"] == pytest.approx(change, abs=1e-5) and change > 0
    assert "change from frame to frame" in capsys.readouterr().out
    assert {row["kind"] for row in record["rows"]} == {"teacher", "student", "solver"}


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_a_pipeline_beside_a_student_of_another_family_makes_as_many_frames(pipe, frames):
    model = ExternalModel("other", Path(), guidance_scale=4.0, inference_shift=3.0)
    config = InferenceConfig(height=32, width=32, num_frames=frames)
    with time_shift(pipe, 3.0):
        images = PipelineImages(pipe, model, config, 2, None)(CAPTIONS, [0, 1])
    assert images.shape == ((2, 3, 32, 32) if frames == 1 else (2, frames, 3, 32, 32)) and images.min() < 0


@pytest.mark.slow
def test_a_folder_of_ones_own_videos_trains_a_student(folder, tmp_path, command):
    """A GIF, a folder of frames and a film, with captions beside them."""
    av, own = pytest.importorskip("av"), tmp_path / "own"
    (own / "clip").mkdir(parents=True)
    frames = [Image.new("RGB", (48, 32), (40 * i, 80, 200 - 30 * i)) for i in range(FRAMES + 1)]
    for i, frame in enumerate(frames):
        frame.save(own / f"clip/{i}.png")
    frames[0].save(own / "cat.gif", save_all=True, append_images=frames[1:], duration=60)
    with av.open(str(own / "dog.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=16)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode())
    for name in ("clip", "cat", "dog"):
        (own / f"{name}.txt").write_text("a red star\n")
    ours = {"pretrained_model_name_or_path": folder, "max_sequence_length": LENGTH, "num_frames": FRAMES}
    run = {**ours, **RUN, "train_data_dir": own, "output_dir": tmp_path / "run", "validation_steps": 0}
    assert command("distill", **run) == 0
    assert command("sample", lora=tmp_path / "run", prompt="a star", steps=1, output=tmp_path / "a.png") == 0


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("wan", {"num_frames": 6}, "num_frames is 6: this pipeline makes 1, 5, 9, ... frames: take 5 or 9"),
        ("wan", {"num_frames": 0}, "num_frames"),
        ("flux", {"num_frames": 5}, "num_frames is 5, and Flux makes images: leave it out"),
    ],
)
@pytest.mark.parametrize("what", ["data", "distill", "plan"])
def test_frames_that_cannot_be_are_one_line_and_code_2(
    folder, tmp_path, command, capsys, what, name, change, message
):
    (tmp_path / "prompts.txt").write_text("a red star\n")
    where = {
        "pretrained_model_name_or_path": folder if name == "wan" else FLUX,
        "max_sequence_length": LENGTH,
    }
    made = {"prompts": tmp_path / "prompts.txt", "output_dir": tmp_path / "out"}
    size = {"sizes": "32x32"} if what == "data" else {"height": 32, "width": 32}
    if what == "plan" and not change["num_frames"]:
        change = {"num_frames": -3}
    capsys.readouterr()
    assert command(what, **where, **made, **size, **change) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1 and shown[0].startswith(f"scfm {what}: ") and message in shown[0]
    assert not (tmp_path / "out").exists()


def test_sampling_with_other_frames_than_the_runs_is_checked_too(work, command, capsys):
    capsys.readouterr()
    more = {"prompt": "a star", "output": work / "none.png"}
    assert command("sample", lora=work / "run", num_frames=7, **more) == 2
    assert "take 5 or 9" in capsys.readouterr().err and not (work / "none.png").exists()
    assert command("sample", lora=work / "run", num_frames=1, steps=1, **more) == 0
    with Image.open(work / "none.png") as image:
        assert image.size == (32, 32) and not (work / "none.gif").exists()


def test_the_page_plays_a_video(work):
    pytest.importorskip("gradio")
    from scfm.app import card
    from scfm.evaluation.compare import Choice, Comparer

    comparer = Comparer(StepLora(InferenceConfig(lora=str(work / "run")), "cpu"), 2)
    choice = Choice("a red star", 1, shift=SHIFT)
    made = {"student": comparer.student(choice), "target": comparer.target(choice)}
    assert made["student"].image.shape == (FRAMES, 3, 32, 32)
    shown = card("student", "1 step", made, choice)
    data = base64.b64decode(shown.split("data:image/webp;base64,")[1].split('"')[0])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == FRAMES and opened.size == (32, 32)


# What stood in the way of the newer families: a test of each kind


@pytest.mark.parametrize("name", BUILD)
def test_one_step_is_no_nan_whatever_the_scheduler(name):
    """A grid that is stretched to end at shift_terminal is 0 / 0 for one step."""
    made = BUILD[name]()
    made.set_progress_bar_config(disable=True)
    family = FAMILIES[name](made, 32, 32, 32)
    noise = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    for shift in (None, 2.0):
        image = family.sample_stock(CAPTIONS[:1], noise, 1, 1.0, shift)
        assert image.isfinite().all()


def test_a_terminal_shift_gives_nan_when_it_is_left(pipe):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1)
    with pytest.warns(RuntimeWarning, match="divide"):
        scheduler.set_timesteps(sigmas=[1.0])
    assert scheduler.sigmas.isnan().any() and not is_plain(scheduler)


@pytest.mark.parametrize(
    "name, frames",
    [
        ("AutoencoderKL", 0),
        ("AutoencoderKLFlux2", 0),
        ("AutoencoderDC", 0),
        ("AutoencoderKLQwenImage", 1),
        ("AutoencoderKLWan", 5),
        ("AutoencoderKLLTXVideo", 1),
        ("AutoencoderKLHunyuanVideo", 5),
    ],
)
def test_a_vaes_factor_is_read_of_its_configuration(name, frames):
    """Against what it does to an image without content."""
    blocks = {"block_out_channels": (32, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 3}
    settings = {"AutoencoderKL": {**blocks, "up_block_types": ("UpDecoderBlock2D",) * 3}}.get(name, {})
    with torch.device("meta"):
        vae = getattr(diffusers, name)(**settings)
        encoded = vae.encode(torch.zeros(1, 3, *[frames] * (frames > 0), 64, 64))
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean
    assert PipelineFamily.vae_factor(vae.config) == 64 // latents.shape[-1]


def test_the_factors_come_from_the_vaes_configuration(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "pipeline")
    path = copy / "vae/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "scale_factor_spatial": 16, "scale_factor_temporal": 8}))
    skeleton = PipelineSource(copy).skeleton
    assert (spatial_factor(skeleton), skeleton.vae_scale_factor_temporal) == (16, 8)
    assert Wan(skeleton, 64, 64, LENGTH, num_frames=17).latent_shape == (4, 3, 4, 4)
    with pytest.raises(ValueError, match="30 x 32 pixels .* multiples of 32"):
        Wan(skeleton, 30, 32, LENGTH)
