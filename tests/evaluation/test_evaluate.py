"""`scfm evaluate`: every sampler beside diffusers' own, the eyes beside torchmetrics and transformers, and the command itself."""
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxTransformer2DModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from scfm.cli import main
from scfm.evaluation.image_metrics import MetricUnavailable, clip, frechet, inception, custom_metric
from scfm.models.flux import Flux
from scfm.models.sd3 import SD3
from scfm.evaluation.image_store import latency, generate_set
from scfm.models.lora import save_lora
from scfm.evaluation.samplers import conditioned_field, dpm_solver_pp, reference_samplers, parse_external_model, second_order
from scfm.models.sampling import stock_latents
from scfm.evaluation.report import best_of, groups_of
from scfm.inference.step_lora import StepLora, InferenceConfig, fixed_shift
from scfm.models.sampling import start_noise
from toy.pipelines import FLUX, TOKENS, WEIGHTS, build_flux, build_sd3, clip_tokenizer, load_flux

CAPTIONS = ["a large red cross", "a small blue ring on the left", "a pink star"]
TINY = ["--num_images", "3", "--steps", "2", "--teacher_steps", "4", "--latency_repeats", "1", "--batch_size", "2"]
BLIND = ["--inception", "none", "--clip", "none"]


@pytest.fixture(scope="module")
def flux():
    return Flux(load_flux(), 32, 32, TOKENS)


@pytest.fixture(scope="module")
def sd3():
    pipe = build_sd3()
    pipe.set_progress_bar_config(disable=True)
    return SD3(pipe, 32, 32, TOKENS)


@pytest.fixture
def lora(tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(WEIGHTS / "lora", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "pretrained_model_name_or_path": str(FLUX)}))
    return folder


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    return tmp_path / "prompts.txt"


def noise_for(family):
    return start_noise(family, range(3), 5)


# The samplers


@pytest.mark.parametrize("steps", [1, 3])
def test_the_samplers_of_a_lora_are_the_stock_pipelines(lora, steps):
    step_lora = StepLora(InferenceConfig(lora=str(lora)), "cpu")
    found = {s.name: s for s in reference_samplers(step_lora, [steps], 4)}
    noise, family, pipe = noise_for(step_lora.family), step_lora.family, load_flux()
    plain = Flux(pipe, 32, 32, TOKENS)
    mine = {name: family.decode(s.latents(CAPTIONS, noise)) for name, s in found.items()}
    theirs = {f"teacher-{n}": plain.sample_stock(CAPTIONS, noise, n, 2.5, 3.) for n in (4, steps)}
    theirs[f"teacher-stock-{steps}"] = pipe(CAPTIONS, height=32, width=32, num_inference_steps=steps, guidance_scale=2.5, latents=noise,
                                            max_sequence_length=TOKENS, output_type="pt").images * 2 - 1
    pipe.load_lora_weights(str(lora), adapter_name="a")
    pipe.set_adapters(["a"], [step_lora.lora_scales.scale(steps)])
    theirs[f"student-{steps}"] = plain.sample_stock(CAPTIONS, noise, steps, 2.5, 3.)
    for name, image in theirs.items():
        torch.testing.assert_close(mine[name], image, rtol=0, atol=2e-5, msg=name)
    assert not torch.allclose(mine[f"student-{steps}"], mine[f"teacher-{steps}"], atol=.1)


@pytest.mark.parametrize("evaluations, solver", [(3, "heun"), (5, "heun"), (2, "heun"), (4, "midpoint"), (3, "midpoint")])
def test_second_order_costs_what_it_says(flux, evaluations, solver):
    asked_for = []
    hook = flux.pipe.transformer.register_forward_pre_hook(lambda *_: asked_for.append(1))
    second_order(flux, CAPTIONS, noise_for(flux), evaluations, 2.5, 3., solver)
    hook.remove()
    assert len(asked_for) == evaluations


@pytest.mark.parametrize("evaluations", [3, 5])
def test_heun_is_diffusers_heun(flux, evaluations):
    noise, solver = noise_for(flux), FlowMatchHeunDiscreteScheduler(shift=3.)
    steps = (evaluations + 1) // 2
    solver.set_timesteps(steps)
    # its own grid runs from 1 to 1/1000 before the zero: hand it ours, every inner time twice, as it keeps them
    times = torch.tensor([3 * t / (1 + 2 * t) for t in (1 - i / steps for i in range(steps))] + [0.])
    solver.sigmas = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]])
    solver.timesteps = 1000 * solver.sigmas[:-1]
    field, x = conditioned_field(flux, CAPTIONS, 2.5), noise
    with torch.no_grad():
        for t in solver.timesteps:
            x = solver.step(field(x, (t / 1000).expand(3)), t, x).prev_sample
    torch.testing.assert_close(second_order(flux, CAPTIONS, noise, evaluations, 2.5, 3., "heun"), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("guidance", [1., 3.])
def test_the_multistep_solver_is_that_of_the_stock_pipeline(sd3, guidance):
    """SD3's pipeline takes it as it is (Flux's insists on a shift of its own), and rounds the times down to thousandths, which we
    do not: hence the tolerance, a hundredth of the latents' spread."""
    noise = noise_for(sd3)
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.)
    stock = stock_latents(sd3, CAPTIONS, noise, 4, guidance, solver, grid=False)
    torch.testing.assert_close(dpm_solver_pp(sd3, CAPTIONS, noise, 4, guidance, 2.), stock, rtol=0, atol=.02)


def test_a_fixed_shift_holds_where_the_pipeline_would_choose_its_own(flux):
    """FLUX.1-dev's scheduler ignores set_shift; this one has its settings."""
    moving = FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=True)
    noise = noise_for(flux)
    fixed = stock_latents(flux, CAPTIONS, noise, 3, 2.5, fixed_shift(moving, 3.))
    torch.testing.assert_close(fixed, stock_latents(flux, CAPTIONS, noise, 3, 2.5, flux.pipe.scheduler), rtol=0, atol=1e-6)
    assert not torch.allclose(fixed, stock_latents(flux, CAPTIONS, noise, 3, 2.5, moving), atol=.01)


@pytest.mark.parametrize("guidance, evaluations", [(1., 3), (3., 6)])
def test_evaluations_are_counted_and_guidance_by_a_second_row_counts_twice(sd3, guidance, evaluations):
    sampler = SimpleNamespace(network=sd3.pipe.transformer, latents=lambda c, x: stock_latents(
        sd3, c, x, 3, guidance, sd3.pipe.scheduler))
    told = latency(sampler, sd3, CAPTIONS, 0, 1, "cpu")
    assert told["evaluations"] == evaluations and 0 < told["network_seconds"] < told["seconds"]


def test_the_negative_prompt_reaches_the_stock_pipeline(sd3):
    noise, scheduler = noise_for(sd3), sd3.pipe.scheduler
    plain = stock_latents(sd3, CAPTIONS, noise, 2, 3., scheduler)
    sd3.negative_prompt = "a red star"
    try:
        told = stock_latents(sd3, CAPTIONS, noise, 2, 3., scheduler)
        again = sd3.sample_stock(CAPTIONS, noise, 2, 3.)
    finally:
        sd3.negative_prompt = ""
    assert not torch.equal(plain, told)
    torch.testing.assert_close(sd3.decode(told), again, rtol=0, atol=1e-5)


# The eyes


class Small(torch.nn.Module):
    """Stands in for Inception: eight features of bytes."""
    num_features = 8

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Conv2d(3, 8, 4, 4)

    def forward(self, images):
        return self.body(images.float() / 255).square().mean((2, 3))


@torch.no_grad()
def test_our_fid_is_that_of_torchmetrics():
    torch.manual_seed(1)
    a, b = (torch.randint(low, 256, (40, 3, 16, 16), dtype=torch.uint8) for low in (0, 90))
    theirs, network = FrechetInceptionDistance(feature=Small()), Small()
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert frechet(network(a), network(b)) == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert frechet(network(a[:1]), network(b)) is None


def test_inception_takes_weights_from_a_file_and_unpickles_no_code(tmp_path):
    from torchmetrics.image.fid import NoTrainInceptionV3
    torch.manual_seed(0)
    network = NoTrainInceptionV3.__mro__[1]                     # torch-fidelity's, which wants a file: random weights of its shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda *_: None)
        torch.save({}, tmp_path / "empty.pth")
        state = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth")).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    save_file(state, tmp_path / "weights.safetensors")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    both = [inception(str(tmp_path / name)).look([(images, None)])[0] for name in ("weights.pth", "weights.safetensors")]
    assert both[0].shape == (2, 2048) and torch.equal(*both)

    torch.save({"weights": SimpleNamespace()}, tmp_path / "code.pth")
    for name, word in (("code.pth", "could not be loaded"), ("nowhere.pth", "nowhere.pth"), ("empty.pth", "Missing key")):
        with pytest.raises(MetricUnavailable, match=word):
            inception(str(tmp_path / name))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP, saved as transformers saves them."""
    folder, words = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16))
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), words).save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_cosine_of_transformers(clip_folder):
    """transformers 5 wraps what torchmetrics 1.9 expects plain; a caption longer than the model keeps its end mark."""
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    captions = [*CAPTIONS[:2], "an image of a small red star at the top at the top at the top"]
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(text=captions, images=list(images), return_tensors="pt", padding=True, truncation=True, max_length=8)
    with torch.no_grad():
        out = model(**inputs)
    cosines = (out.logits_per_image / model.logit_scale.exp()).diagonal()
    features, scores = clip(str(clip_folder)).look([(images[:2], captions[:2]), (images[2:], captions[2:])])
    assert features is None
    assert scores["CLIP score"] == pytest.approx(max(0., 100 * cosines.mean().item()), abs=1e-3)


def test_an_eye_of_ones_own():
    eye = custom_metric("toy.judge:look")
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    features, scores = eye.look([(images[:3], CAPTIONS), (images[3:], ["a red star", "nothing of the kind"])])
    assert features.shape == (5, 64) and 0 <= scores["prompt accuracy"] <= 1
    assert eye.look([(images, None)])[1] == {}


# The command


def evaluate(lora, prompts, out, *more):
    words = ["evaluate", "--lora", lora, "--prompts", prompts, "--output_dir", out, *TINY, *more]
    return main([str(word) for word in words])


def test_the_report_and_what_is_missing(lora, prompts, clip_folder, tmp_path, capsys):
    out, reference = tmp_path / "out", tmp_path / "reference"
    (reference / "deep").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (40, 50), (80 * i, 20, 90)).save(reference / "deep" / f"{i}.jpg")
    more = ["--custom_metric", "toy.judge:look", "--clip", clip_folder, "--inception", tmp_path / "nowhere.pth", "--reference_dir", reference]
    assert evaluate(lora, prompts, out, *more) == 0
    said = capsys.readouterr().out
    assert "missing: Inception (FID): Inception's weights could not be loaded from" in said and said.count("missing:") == 1
    record = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["teacher-4", "student-2", "teacher-2", "teacher-heun-2", "teacher-midpoint-2", "teacher-dpm-2", "teacher-stock-2"]
    assert record["protocol"]["count"] == 3 and record["protocol"]["reference"] == 3 and list(record["missing"]) == ["Inception (FID)"]
    for name, row in rows.items():
        assert row["evaluations"] == (4 if name == "teacher-4" else 2) and row["seconds"] > 0
        told = row["distances"]["Frechet distance on toy.judge:look"]
        assert 0 <= row["scores"]["prompt accuracy"] <= 1 and "CLIP score" in row["scores"]
        if name == "teacher-4":
            assert row["endpoint"] is None and told["teacher"] is None and told["reference"] > 0
        else:
            assert row["endpoint"] > 0 and told["teacher"] > 0
            theirs = rows["teacher-4"]["distances"]["Frechet distance on toy.judge:look"]["reference"]
            assert told["difference"] == pytest.approx(abs(told["reference"] - theirs))
    assert any("biased" in text for text in record["warnings"])
    page = (out / "report.html").read_text()
    assert "Missing: Inception (FID)" in page and "data:image/png;base64," in page
    assert not [word for word in ("http://", "https://", "<script", "<link", "src=\"/") if word in page]
    grid = Image.open(out / "grid.png")
    assert grid.width > grid.height / 3 and (out / "teacher-4/00002.safetensors").is_file()


def test_the_endpoint_distance_is_that_of_the_latents(lora, prompts, tmp_path, flux):
    assert evaluate(lora, prompts, tmp_path / "out", *BLIND) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/report.json").read_text())["rows"]}
    noise, scheduler = start_noise(flux, range(3), 0), flux.pipe.scheduler
    goal, two = (stock_latents(flux, CAPTIONS, noise, n, 2.5, scheduler) for n in (4, 2))
    assert rows["teacher-2"]["endpoint"] == pytest.approx((goal - two).square().mean().sqrt().item(), rel=1e-4)


def test_it_resumes_and_a_image_is_the_same_alone_and_in_a_batch(lora, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(lora, prompts, out, *BLIND) == 0
    first = {p: p.read_bytes() for p in out.rglob("*.png") if p.parent != out}
    ages = {p: p.stat().st_mtime_ns for p in first}
    record = (out / "report.json").read_text()
    lost = [out / "student-2/00001.png", out / "teacher-4/00000.png"]
    for path in lost:
        path.unlink()
    assert evaluate(lora, prompts, out, *BLIND) == 0
    assert {p for p in first if p.stat().st_mtime_ns != ages[p]} == set(lost)
    for path in lost:
        assert (pixels(path) - pixels(io.BytesIO(first[path]))).abs().max() <= 1
    old, new = (json.loads(text)["rows"] for text in (record, (out / "report.json").read_text()))
    assert [row["endpoint"] for row in new[1:]] == pytest.approx([row["endpoint"] for row in old[1:]], rel=1e-4)

    capsys.readouterr()
    assert evaluate(lora, prompts, out, *BLIND, "--seed", "3") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"scfm evaluate: {out} holds images of another seed: take another --output_dir, or delete it")


def test_images_of_another_sampler_are_refused(tmp_path, flux):
    sampler = SimpleNamespace(settings={"scale": 1}, latents=lambda c, x: x, images=None)
    generate_set(sampler, flux, CAPTIONS, tmp_path / "a", 0)
    sampler.settings = {"scale": .5}
    with pytest.raises(ValueError, match="images of another scale"):
        generate_set(sampler, flux, CAPTIONS, tmp_path / "a", 0)


def pixels(file):
    """(3, H, W), 0 to 255."""
    return pil_to_tensor(Image.open(file)).float()


def random_lora(folder):
    """A LoRA of the tiny Flux that does something, saved as diffusers saves them."""
    pipe = build_flux()
    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=False), "style")
    return save_lora(type(pipe), pipe.transformer, folder, "style")


def test_peers_come_through_the_same_door(lora, prompts, tmp_path):
    random_lora(tmp_path / "hyper")
    schnell = build_flux(seed=1)
    told = {**schnell.transformer.config, "guidance_embeds": False}
    schnell.transformer = FluxTransformer2DModel.from_config(told)
    schnell.save_pretrained(tmp_path / "schnell")
    before = tmp_path / "alone"
    assert evaluate(lora, prompts, before, *BLIND) == 0
    out = tmp_path / "out"
    assert evaluate(lora, prompts, out, *BLIND, "--external_model", f"hyper={tmp_path / 'hyper'},scale=.5,steps=1+2,guidance=3.5",
                    "--external_model", f"schnell={tmp_path / 'schnell'},steps=1,guidance=0") == 0
    record = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert {"hyper-1", "hyper-2", "schnell-1"} <= set(rows)
    assert rows["schnell-1"]["endpoint"] is None and rows["hyper-1"]["endpoint"] > 0 and rows["schnell-1"]["evaluations"] == 1
    assert [heading for heading, _ in groups_of(record)] == ["the teacher at its steps", "1 evaluation an image",
                                                            "2 evaluations an image"]
    for name in ("student-2", "teacher-2"):                     # a third adapter in the pipeline changes nobody else
        assert Image.open(out / name / "00000.png").tobytes() == Image.open(before / name / "00000.png").tobytes()

    pipe = load_flux()                                           # and the peer is what a stock pipeline generates with it
    pipe.load_lora_weights(str(tmp_path / "hyper"), adapter_name="x")
    pipe.set_adapters(["x"], [.5])
    noise = start_noise(Flux(pipe, 32, 32, TOKENS), range(1), 0)
    stock = pipe(CAPTIONS[:1], height=32, width=32, num_inference_steps=2, guidance_scale=3.5, latents=noise, max_sequence_length=TOKENS,
                 output_type="pt").images[0]
    assert (pixels(out / "hyper-2/00000.png") / 255 - stock).abs().max() < .01


def test_the_best_of_a_column_is_marked_among_equals_only():
    rows = [{"name": n, "evaluations": e, "endpoint": d, "seconds": 1., "scores": {"score": s}} for n, e, d, s in
            [("teacher", 9, None, .9), ("a", 2, .3, .5), ("b", 2, .2, .4), ("c", 3, .1, .1)]]
    record = {"rows": rows}
    assert [len(group) for _, group in groups_of(record)] == [1, 2, 1]
    assert best_of(record, rows[1:3]) == {("b", "endpoint distance"), ("a", "score")}
    assert best_of(record, rows[3:]) == set()


# What is wrong is said before anything is loaded


@pytest.mark.parametrize("change, message", [
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
    (["--custom_metric", "toy.judge:nobody"], "no such function"),
    (["--custom_metric", "toy.judge"], "no such function"),
    (["--negative_prompt", "ugly"], "a negative prompt means nothing to Flux"),
    (["--external_model", "hyper"], "say NAME=PATH"),
    (["--external_model", "teacher=x.safetensors"], "none of teacher, student"),
    (["--external_model", "a-b=x.safetensors"], "letters, digits"),
    (["--external_model", "hyper=nowhere.safetensors"], "no LoRA and no pipeline at nowhere.safetensors"),
    (["--external_model", f"hyper={WEIGHTS / 'lora'},weight=1"], "no option 'weight'; there are scale, steps, guidance, shift"),
    (["--external_model", f"hyper={WEIGHTS / 'lora'},scale=much"], "scale is 'much'"),
    (["--external_model", f"hyper={WEIGHTS / 'lora'},steps=0"], "steps are 1 or more"),
    (["--external_model", f"hyper={FLUX},scale=1"], "a pipeline has no scale"),
    (["--external_model", f"hyper={FLUX / 'vae'}"], "holds no LoRA"),
    (["--external_model", f"hyper={FLUX / 'model_index.json'}"], "no safetensors file"),
    (["--external_model", f"a={WEIGHTS / 'lora'}", "--external_model", f"a={FLUX}"], "two external models are called a"),
])
def test_bad_input_is_one_line_and_code_2(lora, prompts, tmp_path, capsys, monkeypatch, change, message):
    if "--negative_prompt" not in change:
        monkeypatch.setattr("scfm.inference.step_lora.load_pipeline", lambda *_, **__: pytest.fail("something was loaded"))
    words = ["evaluate", "--lora", str(lora), "--prompts", str(prompts), "--output_dir", str(tmp_path / "out"), *TINY, *BLIND, *change]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("scfm evaluate: ") and message in said


def test_a_peer_in_full():
    peer = parse_external_model(f"hyper={WEIGHTS / 'lora'},scale=.125,steps=4+8,guidance=3.5,shift=3")
    assert (peer.name, peer.scale, peer.steps, peer.guidance, peer.shift, peer.is_pipeline) == ("hyper", .125, (4, 8), 3.5, 3., False)
    assert peer.path.name == "pytorch_lora_weights.safetensors" and parse_external_model(f"schnell={FLUX}").is_pipeline


def test_a_lora_that_fits_nothing_is_named(lora, prompts, tmp_path, capsys):
    save_file({"transformer.elsewhere.lora_A.weight": torch.zeros(2, 4), "transformer.elsewhere.lora_B.weight": torch.zeros(4, 2)},
              tmp_path / "x.safetensors")
    assert evaluate(lora, prompts, tmp_path / "out", *BLIND, "--external_model", f"x={tmp_path / 'x.safetensors'}") == 2
    assert "x.safetensors" in capsys.readouterr().err.strip().splitlines()[-1]
