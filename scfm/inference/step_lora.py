"""A pipeline with a step LoRA whose scale can be set, searched for and sampled at."""
import itertools
import json
import logging
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError, safe_open
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from scfm.files import atomic_write
from scfm.method.distill import setting
from scfm.method.flow import time_grid
from scfm.method.lora_scale import choose_lora_scales, endpoint_curve
from scfm.models.lora_file import read_lora_scales
from scfm.method.metrics import endpoint_distance
from scfm.method.scale_schedule import search_per_step, per_step_field
from scfm.models.loading import DTYPES, require_bitsandbytes, load_pipeline
from scfm.models.lora import WEIGHT_NAME
from scfm.models.sampling import start_noise, teacher_endpoints
from scfm.training.config import DistillConfig


@dataclass
class InferenceConfig:
    """What `scfm sample` and `scfm dial` share. Empty or negative values are read from the run's config.json."""
    lora: str = setting("", "folder of the LoRA, as scfm distill writes it")
    pretrained_model_name_or_path: str = setting("", "folder of the pipeline; empty: the one that the LoRA was made for")
    height: int = setting(0, "image height in pixels; 0: that of the run")
    width: int = setting(0, "image width in pixels; 0: that of the run")
    max_sequence_length: int = setting(0, "length of the text sequence; 0: that of the run")
    guidance_scale: float = setting(-1.0, "guidance scale; below 0: that of the run's own images, or 1 if it is in the weights")
    teacher_guidance_scale: float = setting(-1.0, "guidance scale of the teacher's walks that the dial is held against; below 0: the same, "
                                     "or that of the run's own images if it is in the weights")
    inference_shift: float = setting(0.0, "time shift of the sampling grid; 0: the one that the run was judged at")
    negative_prompt: str = setting("", "negative prompt, for families with true guidance; empty: that of the run")
    weight_dtype: str = setting("", "fp32 or bf16; empty: that of the run")
    quantize: str = setting("", "nf4: the base in 4 bits, for 24 GB cards; none: as it is; empty: as in the run")
    seed: int = setting(0, "of the noise")

    def check(self):
        """Fills in what the run says. FileNotFoundError or ValueError names what is missing, before anything is loaded."""
        weights = Path(self.lora) / WEIGHT_NAME
        if not self.lora or not weights.is_file():
            raise FileNotFoundError(f"no LoRA at {weights}: say --lora FOLDER, a folder that scfm distill wrote")
        told = Path(self.lora) / "config.json"
        run = {**asdict(DistillConfig()), **(json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {})}
        if run["guidance_mode"] == "distilled":  # the LoRA was taught by a guided teacher to do without
            if self.teacher_guidance_scale < 0:
                self.teacher_guidance_scale = run["teacher_guidance_scale"]
            run["teacher_guidance_scale"] = 1.
        for mine, theirs in FROM_RUN.items():
            if getattr(self, mine) == type(self).__dataclass_fields__[mine].default:
                setattr(self, mine, run.get(theirs, getattr(self, mine)))
        if self.teacher_guidance_scale < 0:
            self.teacher_guidance_scale = self.guidance_scale
        if not self.pretrained_model_name_or_path:
            raise ValueError(f"{self.lora} does not say which pipeline it is for: say --pretrained_model_name_or_path FOLDER")
        if self.weight_dtype not in DTYPES:
            raise ValueError(f"weight_dtype is {self.weight_dtype!r}: take one of {', '.join(DTYPES)}")
        if self.quantize not in ("", "none", "nf4"):
            raise ValueError(f"quantize is {self.quantize!r}: take nf4 or none")
        self.quantize = self.quantize.replace("none", "")
        if self.quantize:
            require_bitsandbytes("--quantize none")
        if not self.inference_shift > 0:
            raise ValueError(f"inference_shift is {self.inference_shift}: give a number above 0")

FROM_RUN = {"pretrained_model_name_or_path": "pretrained_model_name_or_path", "height": "height", "width": "width",
            "max_sequence_length": "max_sequence_length", "guidance_scale": "teacher_guidance_scale",
            "inference_shift": "inference_shift", "negative_prompt": "negative_prompt", "weight_dtype": "weight_dtype",
            "quantize": "quantize"}


class StepLora:
    """A pipeline with a step LoRA at a strength that can be turned. Attribute `dial`: the one in the file's header, or None.

    `pipe.scheduler` walks the grid of config.shift, whatever the size; `stock_scheduler` is the one that the folder came with.
    """

    def __init__(self, config, device=None):
        config.check()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.path = config, Path(config.lora) / WEIGHT_NAME
        self.pipe, family_class = load_pipeline(config.pretrained_model_name_or_path, DTYPES[config.weight_dtype], device, quantize=config.quantize)
        self.family = family_class(self.pipe, config.height, config.width, config.max_sequence_length)
        if config.negative_prompt and not hasattr(self.family, "negative_prompt"):
            raise ValueError(f"a negative prompt means nothing to {family_class.__name__}: its guidance "
                             "is an input of the network")
        if config.negative_prompt:
            self.family.negative_prompt = config.negative_prompt
        self.stock_scheduler = self.pipe.scheduler
        self.pipe.scheduler = fixed_shift(self.stock_scheduler, config.inference_shift)
        load_adapter(self.pipe, self.path, "step")
        self.lora_scales, self.goals = read_lora_scales(self.path), {}

    def set_scale(self, scale):
        """0 is the teacher, 1 the LoRA as it was trained."""
        self.pipe.set_adapters(["step"], [float(scale)])

    def field(self, x, t, cond):
        """The velocity at the strength that is set."""
        return self.family.velocity(self.pipe.transformer, x, t, cond)

    def at_scale(self, scale):
        """The field at a strength of its own."""
        def field(x, t, cond):
            self.set_scale(scale)
            return self.field(x, t, cond)
        return field

    def endpoints(self, captions, noise, steps, scale):
        """Latents, shaped as `noise`, that the LoRA reaches from it in `steps` Euler steps. scale: a number, or a tuple with one
        for each step; 0 is the teacher, at its own guidance scale."""
        guidance = self.config.teacher_guidance_scale if scale == 0 else self.config.guidance_scale
        field = per_step_field(self.at_scale, time_grid(steps, self.config.inference_shift), scale) if isinstance(scale, tuple) else self.at_scale(scale)
        return teacher_endpoints(self.family, field, captions, noise, steps, self.config.inference_shift, guidance)

    def target_endpoints(self, captions, steps, seed):
        """(noise, ends): a noise for each caption, and where the teacher's own steps take it. Kept, for on a large model it is dear."""
        key = tuple(captions), steps, seed
        if key not in self.goals:
            noise = start_noise(self.family, range(len(captions)), seed)
            self.goals[key] = noise, self.endpoints(captions, noise, steps, 0)
        return self.goals[key]

    @contextmanager
    def scale_schedule(self, scales):
        """While it lasts the pipeline takes its k-th step with the LoRA at scales[k], and after the last it begins again."""
        scheduler, order = self.pipe.scheduler, itertools.cycle(scales)
        step = scheduler.step

        def step_and_turn(*args, **kwargs):
            done = step(*args, **kwargs)
            self.set_scale(next(order))
            return done
        self.set_scale(next(order))
        scheduler.step = step_and_turn
        try:
            yield
        finally:
            del scheduler.step                              # the class's own is seen again


def load_adapter(pipe, path, name):
    """Loads a LoRA file into a pipeline as adapter `name`. ValueError when nothing in it fits the transformer."""
    remarks = [logging.getLogger(f"diffusers.loaders.{part}") for part in ("lora_base", "peft")]
    for logger in remarks:                              # they remark on text encoders that a step LoRA leaves alone
        logger.setLevel(logging.CRITICAL)
    try:
        pipe.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name, adapter_name=name, use_safetensors=True)
    except (ValueError, KeyError, RuntimeError, IndexError) as error:   # what diffusers raises depends on what does not fit
        raise ValueError(f"{path} does not fit this {type(pipe).__name__} ({' '.join(str(error).split())[:200]})") from None
    finally:
        for logger in remarks:
            logger.setLevel(logging.NOTSET)
    if name not in pipe.get_list_adapters().get("transformer", []):
        raise ValueError(f"{path} has nothing for the transformer of this {type(pipe).__name__}")


def fixed_shift(scheduler, shift):
    """The flow-matching scheduler with this time shift at every size: FLUX.1-dev's own would ignore `set_shift` and choose
    a shift by the size of the image."""
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift, use_dynamic_shifting=False)


def search_lora_scales(step_lora, captions, steps=(1, 2, 3, 4, 8, 16), scales=tuple(i / 4 for i in range(9)), goal_steps=64,
              seed=1, progress=True):
    """(LoraScales, curve) of a `StepLora` on its captions, one noise for each. curve: see `scfm.method.lora_scale.endpoint_curve`."""
    noise, goal = step_lora.target_endpoints(captions, goal_steps, seed)
    bar = tqdm(total=len(steps) * len(scales), desc="turning the dial", disable=not progress)

    def ends(n, scale):
        bar.update(1)
        return step_lora.endpoints(captions, noise, n, scale)
    curve = endpoint_curve(ends, goal, steps, scales)
    bar.close()
    distilled = step_lora.config.teacher_guidance_scale != step_lora.config.guidance_scale     # strength 0 is then no choice: it has no guidance
    return choose_lora_scales({k: d for k, d in curve.items() if k[1] or not distilled}, step_lora.config.inference_shift), curve


def search_schedules(step_lora, captions, dial, steps=(2, 3, 4, 8), goal_steps=64, seed=1, progress=True):
    """{steps: `ScaleSchedule`} of a `StepLora`: a strength for each step of a walk, searched from the dial's one by `search_per_step`.

    Captions, goal and noises are those of `search_lora_scales` with the same arguments. Some 30 walks for each number of steps.
    """
    noise, goal = step_lora.target_endpoints(captions, goal_steps, seed)
    bar = tqdm(desc="turning each step", unit="walk", disable=not progress)

    def distance(scales):
        bar.update(1)
        return endpoint_distance(step_lora.endpoints(captions, noise, len(scales), scales), goal)
    found = {n: search_per_step(distance, n, dial.scale(n)) for n in steps}
    bar.close()
    return found


def generate(step_lora, prompts, steps, scale=None):
    """(images (n, 3, H, W) in [-1, 1], the scales used, one for each step).

    scale: a number, or a tuple with one for each step; None: what the dial says, or 1 where there is no dial. ValueError for steps below 1
    or another number of scales.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: give 1 or more")
    scales = step_lora.lora_scales.per_step(steps) if scale is None and step_lora.lora_scales else scale if isinstance(scale, tuple) else (1. if scale is None else scale,) * steps
    if len(scales) != steps:
        raise ValueError(f"{len(scales)} strengths for {steps} steps: give one, or one for each step")
    noise = start_noise(step_lora.family, range(len(prompts)), step_lora.config.seed).to(step_lora.pipe.device, step_lora.pipe.dtype)
    with step_lora.scale_schedule(scales):
        return step_lora.family.sample_stock(prompts, noise, steps, step_lora.config.guidance_scale), scales


def format_scales(scales):
    """Strengths as people read them: one number where all are the same."""
    return ", ".join(f"{s:.3g}" for s in (scales[:1] if len(set(scales)) == 1 else scales))


def save_images(images, path):
    """One image, or a grid of several, as a PNG file."""
    grid = make_grid(images.cpu().float() / 2 + .5, nrow=math.ceil(math.sqrt(len(images))), padding=0)
    atomic_write(Path(path), lambda new: to_pil_image(grid).save(new, format="png"))


def lora_file(path):
    """The safetensors file of a LoRA, by file or folder. FileNotFoundError; ValueError for other formats: they may hold code."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        path = path / WEIGHT_NAME if path / WEIGHT_NAME in found or len(found) != 1 else found[0]
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA and no pipeline at {path}: give a .safetensors file, or a folder with one")
    try:
        with safe_open(str(path), framework="pt") as opened:
            names = list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); pickles are not opened") from None
    if not any("lora" in name.lower() for name in names):
        raise ValueError(f"{path} holds no LoRA: none of its {len(names)} tensors is named so")
    return path
