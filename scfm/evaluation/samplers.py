"""Teacher, student, free solvers and external models as samplers of one protocol."""
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors import safe_open

from scfm.inference.step_lora import fixed_shift, format_scales, load_adapter, lora_file
from scfm.method.flow import EVALUATIONS, sample, time_grid
from scfm.models.loading import DTYPES, no_loading_bars
from scfm.models.sampling import on_device, stock_latents
from scfm.models.source import PipelineSource


def conditioned_field(family, captions, guidance):
    """A field (x, t, cond) of the family's transformer that knows its captions; cond is not looked at."""
    device = family.pipe.device
    cond = on_device(family.encode_text(list(captions)), device)
    cond["guidance"] = torch.full((len(captions),), float(guidance), device=device)
    return lambda x, t, _=None: family.velocity(family.pipe.transformer, x, t, cond)


@torch.no_grad()
def second_order(family, captions, noise, evaluations, guidance, shift, solver):
    """Latents reached by Heun or midpoint in exactly so many evaluations: an odd number ends with an Euler step, as in
    diffusers' `FlowMatchHeunDiscreteScheduler`. ValueError below 2 evaluations."""
    if evaluations < 2:
        raise ValueError(f"{solver} needs 2 evaluations, not {evaluations}")
    said, x = conditioned_field(family, captions, guidance), noise.to(family.pipe.device)
    times = time_grid(-(-evaluations // EVALUATIONS[solver]), shift)
    if evaluations % 2:
        return sample(said, sample(said, x, times[:-1], solver=solver), times[-2:])
    return sample(said, x, times, solver=solver)


@torch.no_grad()
def dpm_solver_pp(family, captions, noise, steps, guidance, shift):
    """Latents reached by DPM-Solver++(2M), diffusers' own with flow sigmas, by our walk: the Flux pipeline
    would choose the shift itself, and a stock pipeline hands the network times rounded down to thousandths."""
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    solver.set_timesteps(steps)
    said, x = conditioned_field(family, captions, guidance), noise.to(family.pipe.device)
    for t, sigma in zip(solver.timesteps, solver.sigmas):
        x = solver.step(said(x, sigma.to(x).expand(len(x))), t, x).prev_sample
    return x


class Sampler(NamedTuple):
    """What is judged. name: of its folder; kind: teacher, student, solver or peer; label: for people; steps.

    settings: all that its images depend on, for JSON. latents(captions, noise (n, ...)) -> (n, ...), or, where `latents` is
    None, images(captions, numbers) -> (n, 3, H, W) in [-1, 1]. network: the module whose calls are the evaluations.
    """
    name: str
    kind: str
    label: str
    steps: int
    settings: dict
    network: object
    latents: object = None
    images: object = None


def reference_samplers(step_lora, steps, teacher_steps):
    """The teacher at its steps, then for each step count: the student at its dial, and what costs nothing to try on the teacher.

    tuned: a `StepLora`. The teacher speaks without the LoRA and at its own guidance scale.
    """
    config, family, pipe = step_lora.config, step_lora.family, step_lora.pipe
    fixed, guided = pipe.scheduler, {"shift": config.inference_shift, "guidance": config.teacher_guidance_scale}

    def teacher(walk):
        def go(captions, noise):
            pipe.disable_lora()
            try:
                return walk(captions, noise)
            finally:
                pipe.enable_lora()
        return go

    def sampler(name, kind, label, n, settings, latents):
        return Sampler(f"{name}-{n}", kind, label, n, {"steps": n, **settings}, pipe.transformer, latents)

    def euler(n, kind="solver"):
        return sampler("teacher", kind, "teacher, Euler", n, {**guided, "solver": "Euler"}, teacher(
            lambda c, x: stock_latents(family, c, x, n, guided["guidance"], fixed)))

    def student(n):
        scales = step_lora.lora_scales.per_step(n) if step_lora.lora_scales else (1.,) * n
        def go(captions, noise):
            with step_lora.scale_schedule(scales):
                return stock_latents(family, captions, noise, n, config.guidance_scale, fixed)
        scale = scales[0] if len(set(scales)) == 1 else list(scales)
        told = {"shift": config.inference_shift, "guidance": config.guidance_scale, "scale": scale, "weights": weights_of(step_lora.path)}
        return sampler("student", "student", f"student, strength {format_scales(scales)}", n, told, go)

    def second(solver, n):
        return sampler(f"teacher-{solver}", "solver", f"teacher, {solver.capitalize()}", n, {**guided, "solver": solver}, teacher(
            lambda c, x: second_order(family, c, x, n, guided["guidance"], config.inference_shift, solver)))

    def dpm(n):
        return sampler("teacher-dpm", "solver", "teacher, DPM++ 2M", n, {**guided, "solver": "DPM++ 2M"}, teacher(
            lambda c, x: dpm_solver_pp(family, c, x, n, guided["guidance"], config.inference_shift)))

    def left_alone(n):
        told = {"guidance": guided["guidance"], "solver": "stock"}
        return sampler("teacher-stock", "solver", "teacher, stock grid", n, told, teacher(
            lambda c, x: stock_latents(family, c, x, n, guided["guidance"], step_lora.stock_scheduler, grid=False)))

    yield euler(teacher_steps, "teacher")
    for n in steps:
        yield student(n)
        if n != teacher_steps:
            yield euler(n)
        if n > 1:
            yield second("heun", n)
            if n % 2 == 0:
                yield second("midpoint", n)
        yield dpm(n)
        yield left_alone(n)


def weights_of(path):
    """A LoRA file's own digest: of its tensors, not of the header with the dial."""
    digest = hashlib.sha256()
    with safe_open(str(path), framework="pt") as opened:
        for key in sorted(opened.keys()):
            tensor = opened.get_tensor(key)
            digest.update(f"{key} {tuple(tensor.shape)} ".encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class ExternalModel:
    """Another few-step sampler, by path: a LoRA for the same base, or a whole pipeline."""
    name: str
    path: Path
    scale: float = 1.
    steps: tuple = ()
    guidance: float = None
    shift: float = None

    @property
    def is_pipeline(self):
        return (self.path / "model_index.json").is_file()


EXTERNAL_OPTIONS = {"scale": float, "steps": lambda text: tuple(int(n) for n in text.split("+")), "guidance": float, "shift": float}
OWN_NAMES = ("teacher", "student")


def parse_external_model(text):
    """`NAME=PATH,scale=.125,steps=4+8,guidance=3.5,shift=3` as a `ExternalModel`. ValueError or FileNotFoundError names the mistake."""
    head, *options = text.split(",")
    name, _, path = head.partition("=")
    if not path or not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in OWN_NAMES:
        raise ValueError(f"--external_model {text}: say NAME=PATH, NAME of letters, digits and _, none of {', '.join(OWN_NAMES)}")
    told = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in EXTERNAL_OPTIONS:
            raise ValueError(f"--external_model {name}: no option {key!r}; there are {', '.join(EXTERNAL_OPTIONS)}")
        try:
            told[key] = EXTERNAL_OPTIONS[key](value)
        except ValueError:
            raise ValueError(f"--external_model {name}: {key} is {value!r}: give numbers, several step counts as 4+8") from None
    if min(told.get("steps", (1,))) < 1 or not told.get("shift", 1) > 0:
        raise ValueError(f"--external_model {name}: steps are 1 or more, a shift is above 0")
    peer = ExternalModel(name, Path(path), **told)
    if peer.is_pipeline and "scale" in told:
        raise ValueError(f"--external_model {name}: a pipeline has no scale")
    if not peer.is_pipeline:
        peer.path = lora_file(path)
    return peer


def lora_samplers(step_lora, peer, steps):
    """The samplers of a LoRA peer, which joins the pipeline of `step_lora` as one more adapter, active only when it generates.

    Without a shift it runs under the scheduler that the pipeline came with, as its makers mean it.
    """
    load_adapter(step_lora.pipe, peer.path, peer.name)
    family, guidance = step_lora.family, step_lora.config.teacher_guidance_scale if peer.guidance is None else peer.guidance
    scheduler = fixed_shift(step_lora.stock_scheduler, peer.shift) if peer.shift else step_lora.stock_scheduler

    def latents(n):
        def go(captions, noise):
            step_lora.pipe.set_adapters([peer.name], [peer.scale])
            return stock_latents(family, captions, noise, n, guidance, scheduler, grid=bool(peer.shift))
        return go
    told = {"scale": peer.scale, "guidance": guidance, "shift": peer.shift, "weights": weights_of(peer.path)}
    for n in peer.steps or steps:
        yield Sampler(f"{peer.name}-{n}", "peer", f"{peer.name}, strength {peer.scale:g}", n, {"steps": n, **told},
                      step_lora.pipe.transformer, latents(n))


def pipeline_samplers(config, peer, steps, device, latent_noise):
    """The samplers of a pipeline by folder, called as its makers mean it: its own scheduler and grid, unless a shift is given.

    latent_noise(numbers) -> the noise of the others, which it starts from where it takes the same; else from seeds of its own.
    """
    with no_loading_bars():
        pipe = DiffusionPipeline.from_pretrained(str(peer.path), dtype=DTYPES[config.weight_dtype]).to(device)
    pipe.set_progress_bar_config(disable=True)
    if peer.shift:
        pipe.scheduler = fixed_shift(pipe.scheduler, peer.shift)
    own_class = PipelineSource(peer.path).class_name
    same = own_class == PipelineSource(config.pretrained_model_name_or_path).class_name
    network = getattr(pipe, "transformer", None) or pipe.unet

    def images(n):
        def go(captions, numbers):
            start = ({"latents": latent_noise(numbers).to(device, pipe.dtype)} if same else
                     {"generator": [torch.Generator().manual_seed(config.seed * 1_000_003 + i) for i in numbers]})
            if peer.guidance is not None:
                start["guidance_scale"] = peer.guidance
            if same:
                start["max_sequence_length"] = config.max_sequence_length
            if peer.shift:
                start["sigmas"] = [1 - i / n for i in range(n)]
            return pipe(list(captions), height=config.height, width=config.width, num_inference_steps=n, output_type="pt",
                        **start).images * 2 - 1
        return go
    told = {"guidance": peer.guidance, "shift": peer.shift, "folder": peer.path.name,
            "pipeline": own_class}
    for n in peer.steps or steps:
        yield Sampler(f"{peer.name}-{n}", "peer", f"{peer.name}, a pipeline", n, {"steps": n, **told}, network,
                      images=images(n))
