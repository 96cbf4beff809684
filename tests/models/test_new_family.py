"""Families from outside: how they join, what refuses them, and that the check finds the usual mistakes.

The family is that of nbs/learn/21_new_family.ipynb, taken from its cells: what the page shows is tested.
"""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Lumina2Pipeline
from diffusers.utils import logging

from scfm.models import family as families
from scfm.models.check import (
    CONTRACT,
    check_family,
    check_images,
    check_latents,
    check_lora,
    check_text,
    check_velocity,
    stock_trajectory,
    untargeted_layers,
)
from scfm.models.family import FAMILIES, find_family, installed_families, register
from scfm.models.flux import Flux
from scfm.models.loading import load_pipeline, with_vae
from scfm.models.sd3 import SD3
from scfm.models.source import PipelineSource
from toy.pipelines import FLUX

NOTEBOOK = Path(__file__).parents[2] / "nbs" / "learn/21_new_family.ipynb"
CAPTIONS = ["a large red cross", "a small blue ring on the left", "a green star"]
SIZE = 64, 64, 48


def cells_of_the_class():
    """The notebook's cells that build the pipeline and define the family: a reader's module."""
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]]
    ours = [source for source in cells if "def build_lumina2" in source or source.startswith("class Lumina2")]
    assert len(ours) == 3
    return "\n\n".join(ours) + "\n"


OUTSIDE = (
    "import torch\n"
    + cells_of_the_class()
    + """
from diffusers import ModelMixin            # diffusers looks for it beside a model class from outside


class OwnTransformer(Lumina2Transformer2DModel):
    pass


class OwnPipeline(Lumina2Pipeline):
    pass


class OwnFamily(Lumina2):
    pipeline_class = OwnPipeline
"""
)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Each test has a registry of its own."""
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    logging.disable_progress_bar()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path with the reader's module in it; the import is undone at the end."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "outside_lumina.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("outside_lumina", None)


@pytest.fixture
def outside(site):
    return importlib.import_module("outside_lumina")


@pytest.fixture(scope="module")
def defined():
    """The names of the reader's module, and a pipeline for all tests of the check, which changes none."""
    names = {"__name__": "lumina_cells"}
    exec(OUTSIDE, names)
    names["pipe"] = names["build_lumina2"]()
    names["pipe"].set_progress_bar_config(disable=True)
    return names


@pytest.fixture
def lumina(defined):
    return defined["Lumina2"](defined["pipe"], *SIZE)


def install(site, points, name="outside"):
    """What pip leaves of a package with entry points: the folder that importlib.metadata reads."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[scfm.families]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
    )
    importlib.invalidate_caches()


# Joining


def test_an_installed_family_is_found_and_imported_only_when_it_is_needed(site):
    install(site, {"Lumina2Pipeline": "outside_lumina:Lumina2"})
    assert find_family("FluxPipeline") is Flux and "Lumina2Pipeline" in installed_families()
    assert "outside_lumina" not in sys.modules
    outside = find_family("Lumina2Pipeline")
    assert outside.__module__ == "outside_lumina" and outside is find_family("Lumina2Pipeline")
    assert register(outside) is outside  # the same class twice is no clash


def test_a_registered_family_may_be_defined_again(outside):
    first = register(outside.Lumina2)
    again = type(
        "Lumina2", (outside.Lumina2Parts,), {**vars(outside.Lumina2)}
    )  # a cell that is run a second time
    assert register(again) is again is not first and find_family("Lumina2Pipeline") is again


def test_the_families_of_scfm_have_every_member():
    for family in (Flux, SD3):
        assert register(family) is family


@pytest.mark.parametrize("member", CONTRACT)
def test_a_class_that_lacks_a_member_is_told_which(member):
    half = SimpleNamespace(
        **{name: None for name in CONTRACT if name != member}, __module__="m", __qualname__="Half"
    )
    with pytest.raises(ValueError, match=f"m:Half is no family yet: it lacks {member} "):
        register(half)


def test_a_second_family_of_a_pipeline_is_refused(outside, site):
    with pytest.raises(ValueError, match="FluxPipeline has a family already, scfm.models.flux:Flux"):
        register(type("Mine", (Flux,), {}))
    install(site, {"Lumina2Pipeline": "elsewhere:Lumina2"})
    with pytest.raises(ValueError, match="Lumina2Pipeline has a family already, elsewhere:Lumina2"):
        register(outside.Lumina2)


@pytest.mark.parametrize(
    "points, message",
    [
        (
            {"Lumina2Pipeline": "not_there:Lumina2"},
            "not_there:Lumina2 for Lumina2Pipeline cannot be imported",
        ),
        (
            {"Lumina2Pipeline": "outside_lumina:Nobody"},
            "outside_lumina:Nobody for Lumina2Pipeline cannot be imported",
        ),
        ({"Lumina2Pipeline": "outside_lumina:Lumina2Parts"}, "lacks velocity"),
        ({"Lumina2Pipeline": "outside_lumina:OwnFamily"}, "is the family of OwnPipeline"),
    ],
)
def test_an_installed_family_that_cannot_be_used_is_one_line(site, points, message):
    install(site, points)
    with pytest.raises(ValueError, match=message):
        find_family("Lumina2Pipeline")
    assert find_family("FluxPipeline") is Flux  # the others are not harmed


def test_two_packages_for_one_pipeline_are_refused(site):
    install(site, {"Lumina2Pipeline": "outside_lumina:Lumina2"})
    install(site, {"Lumina2Pipeline": "another:Lumina2", "FluxPipeline": "another:Flux"}, "another")
    for name in ("Lumina2Pipeline", "FluxPipeline"):
        with pytest.raises(ValueError, match=f"{name} has more than one family: .*another:"):
            find_family(name)
    with pytest.raises(ValueError, match="more than one family"):
        _ = PipelineSource(FLUX).family


def test_an_unknown_pipeline_is_told_what_there_is(site, tmp_path):
    install(site, {"Lumina2Pipeline": "outside_lumina:Lumina2"})
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    with pytest.raises(
        ValueError, match="knows FluxPipeline, StableDiffusion3Pipeline, PixelPipeline, .*, Lumina2Pipeline"
    ):
        _ = PipelineSource(tmp_path).family


# From a folder, by the command line


def test_pipelines_and_parts_may_come_from_outside_diffusers(outside, tmp_path):
    """The classes in model_index.json are imported from the modules that it names."""
    made = outside.build_lumina2()
    own = outside.OwnTransformer.from_config(made.transformer.config)
    own.load_state_dict(made.transformer.state_dict())
    outside.OwnPipeline(own, made.scheduler, made.vae, made.text_encoder, made.tokenizer).save_pretrained(
        tmp_path / "own"
    )
    register(outside.OwnFamily)
    pipe, family = load_pipeline(tmp_path / "own", torch.float32)
    assert (
        type(pipe) is outside.OwnPipeline
        and type(pipe.transformer) is outside.OwnTransformer
        and family is outside.OwnFamily
    )
    assert pipe.vae_scale_factor == PipelineSource(tmp_path / "own").skeleton.vae_scale_factor == 8
    assert type(PipelineSource(tmp_path / "own").empty_transformer()) is outside.OwnTransformer
    bare, _ = load_pipeline(tmp_path / "own", torch.float32, parts="transformer")
    with with_vae(bare, PipelineSource(tmp_path / "own")):
        assert type(bare.vae) is type(made.vae)
    x = torch.randn(3, *family(pipe, *SIZE).latent_shape, generator=torch.Generator().manual_seed(0))
    mine, theirs = family(pipe, *SIZE), outside.Lumina2(made, *SIZE)
    assert torch.equal(mine.sample_stock(CAPTIONS, x, 2, 4.0), theirs.sample_stock(CAPTIONS, x, 2, 4.0))


def test_a_part_that_cannot_be_imported_is_one_line(tmp_path):
    for library, kind in (("not_there", "Any"), ("diffusers", "NoSuchTransformer")):
        (tmp_path / "model_index.json").write_text(json.dumps({"transformer": [library, kind]}))
        with pytest.raises(
            ValueError, match=f"its transformer is a {kind} of {library}, which cannot be imported here"
        ):
            PipelineSource(tmp_path).empty_transformer()


def test_a_vae_of_unknown_scale_is_one_line(tmp_path):
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="no block_out_channels"):
        _ = PipelineSource(tmp_path).skeleton


@pytest.mark.slow
def test_distill_takes_it_and_the_stock_pipeline_takes_the_lora(site, tmp_path, capsys, command, distill):
    """All of it by the real command: an installed family, two training steps, the stock pipeline."""
    source = importlib.import_module("outside_lumina")
    source.build_lumina2().save_pretrained(tmp_path / "pipeline")
    del sys.modules["outside_lumina"]
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    settings = {
        "pretrained_model_name_or_path": tmp_path / "pipeline",
        "prompts": tmp_path / "prompts.txt",
        "output_dir": tmp_path / "run",
        "height": 64,
        "width": 64,
        "max_sequence_length": 48,
        "guidance_scale_range": "4,4",
        "teacher_guidance_scale": 4,
        "select_adapter": "student",
        "validation_steps": 0,
    }
    assert distill(**settings) == 2 and not (tmp_path / "run").exists()  # no family yet
    assert (
        "holds a Lumina2Pipeline, which scfm does not know"
        in capsys.readouterr().err.strip().splitlines()[-1]
    )
    install(site, {"Lumina2Pipeline": "outside_lumina:Lumina2"})
    assert distill(**settings) == 0

    stock = Lumina2Pipeline.from_pretrained(str(tmp_path / "pipeline"), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    family = find_family("Lumina2Pipeline")(stock, *SIZE)
    x = torch.randn(3, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    before = family.sample_stock(CAPTIONS, x, 2, 4.0)
    stock.load_lora_weights(str(tmp_path / "run"))
    assert (family.sample_stock(CAPTIONS, x, 2, 4.0) - before).abs().max() > 1e-3
    assert check_images(family, CAPTIONS, (2,)) and check_velocity(family, CAPTIONS)  # LoRA and all
    image = tmp_path / "a.png"
    assert command("sample", lora=tmp_path / "run", prompt="a red star", steps=2, output=image) == 0
    assert image.is_file()


# The check finds what it is for


def test_the_right_family_passes(lumina):
    report = check_family(lumina, CAPTIONS)
    assert (
        len(report.splitlines()) == 5
        and "45 of 45 linear layers" in report
        and untargeted_layers(lumina) == []
    )


def test_watching_changes_nothing(lumina):
    """No hook stays, the scheduler's step is the class's own again, and the images are the same."""
    x = torch.randn(3, *lumina.latent_shape, generator=torch.Generator().manual_seed(0))
    before = lumina.sample_stock(CAPTIONS, x, 2, 4.0)
    steps = stock_trajectory(lumina, CAPTIONS, x, 2, 4.0)
    assert torch.equal(lumina.sample_stock(CAPTIONS, x, 2, 4.0), before)
    assert torch.equal(steps[0].x, x) and not hasattr(lumina.pipe.scheduler.step, "__wrapped__")
    assert not lumina.pipe.transformer._forward_pre_hooks
    first = x + (steps[1].t - steps[0].t) * steps[0].v  # Euler, in the scheduler's own numbers
    torch.testing.assert_close(first, steps[1].x, rtol=0, atol=1e-6)


def changed(family, **members):
    """The family with some members replaced: functions of (family, its own member, ...)."""
    kind = type(family)
    own = {
        name: value
        if not callable(value)
        else (lambda self, *a, _f=value, _n=name, **k: _f(self, partial(getattr(kind, _n), self), *a, **k))
        for name, value in members.items()
    }
    return type("Changed", (kind,), own)(family.pipe, *SIZE)


def with_timestep(formula):
    """velocity, when the network's timestep is formula(t)."""

    def velocity(self, right, transformer, x, t, cond):
        def change(module, args, kwargs):
            return (args, {**kwargs, "timestep": formula(1 - kwargs["timestep"])})

        hook = transformer.register_forward_pre_hook(change, with_kwargs=True, prepend=True)
        try:
            return right(transformer, x, t, cond)
        finally:
            hook.remove()

    return velocity


@pytest.mark.parametrize("formula", [lambda t: t, lambda t: 1000 * t, lambda t: 1000 * (1 - t)])
def test_a_wrong_timestep_is_named_with_the_right_formula(lumina, formula):
    with pytest.raises(ValueError, match=r"velocity gives the network the timestep .*: give it 1 - t$"):
        check_family(changed(lumina, velocity=with_timestep(formula)), CAPTIONS)


@pytest.mark.parametrize(
    "members, message",
    [
        ({"velocity": lambda self, right, *a: -right(*a)}, "guidance 1, t = 1 has the wrong sign"),
        (
            {"velocity": lambda self, right, *a: 1.01 * right(*a)},
            "guidance 1, t = 1 is 0.01 of the largest away",
        ),
        (
            {
                "velocity": lambda self, right, net, x, t, cond: right(
                    net, x, t, {**cond, "guidance": torch.ones(3)}
                )
            },
            "so it is the guidance",
        ),
        ({"velocity": lambda self, right, *a: right(*a).flatten(1)}, r"velocity gives \(3, 256\)"),
        ({"decode": lambda self, right, x: right(x * 0.9)}, "decode does not undo encode_images"),
        (
            {"encode_images": lambda self, right, p: right(p) + torch.randn(len(p), 4, 8, 8)},
            "encode_images is random",
        ),
        (
            {"encode_images": lambda self, right, p: right(p).flatten(1)},
            r"encode_images gives \(256,\), latent_shape is \(4, 8, 8\)",
        ),
        (
            {"encode_text": lambda self, right, c: {k: v[:1] for k, v in right(c).items()}},
            "tokens has 1 rows for 3 captions",
        ),
        (
            {"encode_text": lambda self, right, c: {"tokens": torch.zeros(len(c), 7 * len(c))}},
            "pad every caption",
        ),
        (
            {"encode_text": lambda self, right, c: {"tokens": torch.full((len(c), 2), float(len(c)))}},
            "depends on the captions beside it",
        ),
        (
            {"encode_text": lambda self, right, c: right(c) | {"empty_mask": right(c)["mask"]}},
            "empty_mask of a caption depends",
        ),
        ({"lora_targets": ("to_q", "to_qq")}, "lora_targets: to_qq matches no layer"),
        ({"lora_targets": ("to_q", "norm1")}, "norm1, which is no linear layer and no convolution"),
        ({"dynamic_shift": 2.0}, r"sample_stock has the times \[1.0, 0.923, 0.75\] instead of"),
    ],
)
def test_each_mistake_has_its_line(lumina, members, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_family(changed(lumina, **members), CAPTIONS)
    assert "\n" not in str(caught.value)


def test_images_that_differ_although_the_velocity_is_right_are_found(lumina):
    wrong = changed(lumina, decode=lambda self, right, x: right(x).flip(-1))
    assert check_velocity(wrong, CAPTIONS)
    with pytest.raises(ValueError, match="images of 1 steps at guidance 1 differ from the stock pipeline's"):
        check_images(wrong, CAPTIONS)


def test_a_grid_that_the_pipeline_chose_itself_is_found(lumina):
    def pipe_call(self, right, captions, noise, steps, guidance, shift=None):
        return (
            self.pipe(
                captions,
                height=64,
                width=64,
                num_inference_steps=steps,
                sigmas=[1, 0.7, 0.01][:steps],
                latents=noise,
                max_sequence_length=48,
                output_type="pt",
            ).images
            * 2
            - 1
        )

    with pytest.raises(ValueError, match="give the pipeline sigmas"):
        check_velocity(changed(lumina, sample_stock=pipe_call), CAPTIONS)


def test_layers_without_lora_are_reported_and_allowed(lumina):
    some = changed(lumina, lora_targets=("to_q", "to_k"))
    assert "on 10 of 45 linear layers, not on x_embedder" in check_lora(some)


def test_what_takes_no_lora_is_named(lumina):
    """Some transformers are no PeftAdapterMixin, and some pipelines have no loader of LoRAs."""
    with_loader, lumina.pipe.transformer = lumina.pipe.transformer, torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Linear has no add_adapter: diffusers gives it no LoRA"):
        check_lora(lumina)
    lumina.pipe.transformer = with_loader
    lumina.pipeline_class = torch.nn.Module
    with pytest.raises(ValueError, match="Module has no save_lora_weights: diffusers gives it no LoRA"):
        check_lora(lumina)


def test_an_instance_that_forgot_its_size_is_refused(lumina):
    del lumina.max_sequence_length, lumina.negative_prompt
    with pytest.raises(ValueError, match="Lumina2 lacks max_sequence_length, negative_prompt "):
        check_family(lumina, CAPTIONS)


def test_single_checks_say_what_they_measured(lumina):
    assert "tokens (48, 64)" in check_text(lumina, CAPTIONS) and "(4, 8, 8)" in check_latents(lumina)
