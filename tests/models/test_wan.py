"""Wan, and what a family of videos adds to one of images: frames, a grid that the call is not told, and the
pipelines of it that are refused."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from scfm.models.base import is_plain, plain_grid, scheduler_shift, spatial_factor, takes_sigmas, time_shift
from scfm.models.check import stock_grid, stock_trajectory
from scfm.models.family import FAMILIES
from scfm.models.source import PipelineSource
from scfm.models.wan import Wan
from toy.pipelines import BUILD, SHIFT, build_wan

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
