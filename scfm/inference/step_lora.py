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

from scfm.files import write_whole
from scfm.method.distill import option
from scfm.method.flow import time_grid
from scfm.method.lora_scale import choose, endpoint_curve, read_dial
from scfm.method.metrics import endpoint_distance
from scfm.method.scale_schedule import by_step, in_turn
from scfm.models.loading import DTYPES, can_quantize, load_pipeline
from scfm.models.lora import WEIGHT_NAME
from scfm.models.sampling import start_noise, teacher_endpoints
from scfm.training.config import RunConfig


@dataclass
class UseConfig:
    """What `scfm sample` and `scfm dial` share. Empty or negative values are read from the run's config.json."""
    lora: str = option("", "folder of the LoRA, as scfm distill writes it")
    pipeline: str = option("", "folder of the pipeline; empty: the one that the LoRA was made for")
    height: int = option(0, "picture height in pixels; 0: that of the run")
    width: int = option(0, "picture width in pixels; 0: that of the run")
    max_tokens: int = option(0, "length of the text sequence; 0: that of the run")
    guidance_scale: float = option(-1.0, "guidance scale; below 0: that of the run's own pictures, or 1 if it is in the weights")
    teacher_guidance: float = option(-1.0, "guidance scale of the teacher's walks that the dial is held against; below 0: the same, "
                                     "or that of the run's own pictures if it is in the weights")
    shift: float = option(0.0, "time shift of the sampling grid; 0: the one that the run was judged at")
    negative: str = option("", "negative prompt, for families with true guidance; empty: that of the run")
    precision: str = option("", "fp32 or bf16; empty: that of the run")
    quantize: str = option("", "nf4: the base in 4 bits, for 24 GB cards; none: as it is; empty: as in the run")
    seed: int = option(0, "of the noise")

    def check(self):
        """Fills in what the run says. FileNotFoundError or ValueError names what is missing, before anything is loaded."""
        weights = Path(self.lora) / WEIGHT_NAME
        if not self.lora or not weights.is_file():
            raise FileNotFoundError(f"no LoRA at {weights}: say --lora FOLDER, a folder that scfm distill wrote")
        told = Path(self.lora) / "config.json"
        run = {**asdict(RunConfig()), **(json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {})}
        if run["guidance_mode"] == "distilled":  # the LoRA was taught by a guided teacher to do without
            if self.teacher_guidance < 0:
                self.teacher_guidance = run["teacher_guidance"]
            run["teacher_guidance"] = 1.
        for mine, theirs in FROM_RUN.items():
            if getattr(self, mine) == type(self).__dataclass_fields__[mine].default:
                setattr(self, mine, run.get(theirs, getattr(self, mine)))
        if self.teacher_guidance < 0:
            self.teacher_guidance = self.guidance_scale
        if not self.pipeline:
            raise ValueError(f"{self.lora} does not say which pipeline it is for: say --pipeline FOLDER")
        if self.precision not in DTYPES:
            raise ValueError(f"precision is {self.precision!r}: take one of {', '.join(DTYPES)}")
        if self.quantize not in ("", "none", "nf4"):
            raise ValueError(f"quantize is {self.quantize!r}: take nf4 or none")
        self.quantize = self.quantize.replace("none", "")
        if self.quantize:
            can_quantize("--quantize none")
        if not self.shift > 0:
            raise ValueError(f"shift is {self.shift}: give a number above 0")

FROM_RUN = {"pipeline": "pipeline", "height": "height", "width": "width", "max_tokens": "max_tokens",
            "guidance_scale": "teacher_guidance", "shift": "sample_shift", "negative": "negative",
            "precision": "precision", "quantize": "quantize"}


class StepLora:
    """A pipeline with a step LoRA at a strength that can be turned. Attribute `dial`: the one in the file's header, or None.

    `pipe.scheduler` walks the grid of config.shift, whatever the size; `stock_scheduler` is the one that the folder came with.
    """

    def __init__(self, config, device=None):
        config.check()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.path = config, Path(config.lora) / WEIGHT_NAME
        self.pipe, family_class = load_pipeline(config.pipeline, DTYPES[config.precision], device, quantize=config.quantize)
        self.family = family_class(self.pipe, config.height, config.width, config.max_tokens)
        if config.negative and not hasattr(self.family, "negative"):
            raise ValueError(f"a negative prompt means nothing to {family_class.__name__}: its guidance "
                             "is an input of the network")
        if config.negative:
            self.family.negative = config.negative
        self.stock_scheduler = self.pipe.scheduler
        self.pipe.scheduler = fixed_shift(self.stock_scheduler, config.shift)
        load_adapter(self.pipe, self.path, "step")
        self.dial, self.goals = read_dial(self.path), {}

    def set_scale(self, scale):
        """0 is the teacher, 1 the LoRA as it was trained."""
        self.pipe.set_adapters(["step"], [float(scale)])

    def field(self, x, t, cond):
        """The velocity at the strength that is set."""
        return self.family.velocity(self.pipe.transformer, x, t, cond)

    def at(self, scale):
        """The field at a strength of its own."""
        def field(x, t, cond):
            self.set_scale(scale)
            return self.field(x, t, cond)
        return field

    def endpoints(self, captions, noise, steps, scale):
        """Latents, shaped as `noise`, that the LoRA reaches from it in `steps` Euler steps. scale: a number, or a tuple with one
        for each step; 0 is the teacher, at its own guidance scale."""
        guidance = self.config.teacher_guidance if scale == 0 else self.config.guidance_scale
        field = in_turn(self.at, time_grid(steps, self.config.shift), scale) if isinstance(scale, tuple) else self.at(scale)
        return teacher_endpoints(self.family, field, captions, noise, steps, self.config.shift, guidance)

    def goal(self, captions, steps, seed):
        """(noise, ends): a noise for each caption, and where the teacher's own steps take it. Kept, for on a large model it is dear."""
        key = tuple(captions), steps, seed
        if key not in self.goals:
            noise = start_noise(self.family, range(len(captions)), seed)
            self.goals[key] = noise, self.endpoints(captions, noise, steps, 0)
        return self.goals[key]

    @contextmanager
    def turned(self, scales):
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
    a shift by the size of the picture."""
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift, use_dynamic_shifting=False)


def find_dial(tuned, captions, steps=(1, 2, 3, 4, 8, 16), scales=tuple(i / 4 for i in range(9)), goal_steps=64,
              seed=1, progress=True):
    """(Dial, curve) of a `StepLora` on its captions, one noise for each. curve: see `scfm.method.lora_scale.endpoint_curve`."""
    noise, goal = tuned.goal(captions, goal_steps, seed)
    bar = tqdm(total=len(steps) * len(scales), desc="turning the dial", disable=not progress)

    def ends(n, scale):
        bar.update(1)
        return tuned.endpoints(captions, noise, n, scale)
    curve = endpoint_curve(ends, goal, steps, scales)
    bar.close()
    distilled = tuned.config.teacher_guidance != tuned.config.guidance_scale     # strength 0 is then no choice: it has no guidance
    return choose({k: d for k, d in curve.items() if k[1] or not distilled}, tuned.config.shift), curve


def find_schedules(tuned, captions, dial, steps=(2, 3, 4, 8), goal_steps=64, seed=1, progress=True):
    """{steps: `StepScales`} of a `StepLora`: a strength for each step of a walk, searched from the dial's one by `by_step`.

    Captions, goal and noises are those of `find_dial` with the same arguments. Some 30 walks for each number of steps.
    """
    noise, goal = tuned.goal(captions, goal_steps, seed)
    bar = tqdm(desc="turning each step", unit="walk", disable=not progress)

    def distance(scales):
        bar.update(1)
        return endpoint_distance(tuned.endpoints(captions, noise, len(scales), scales), goal)
    found = {n: by_step(distance, n, dial.scale(n)) for n in steps}
    bar.close()
    return found


def paint(tuned, prompts, steps, scale=None):
    """(pictures (n, 3, H, W) in [-1, 1], the scales used, one for each step).

    scale: a number, or a tuple with one for each step; None: what the dial says, or 1 where there is no dial. ValueError for steps below 1
    or another number of scales.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: give 1 or more")
    scales = tuned.dial.strengths(steps) if scale is None and tuned.dial else scale if isinstance(scale, tuple) else (1. if scale is None else scale,) * steps
    if len(scales) != steps:
        raise ValueError(f"{len(scales)} strengths for {steps} steps: give one, or one for each step")
    noise = start_noise(tuned.family, range(len(prompts)), tuned.config.seed).to(tuned.pipe.device, tuned.pipe.dtype)
    with tuned.turned(scales):
        return tuned.family.stock_pictures(prompts, noise, steps, tuned.config.guidance_scale), scales


def in_words(scales):
    """Strengths as people read them: one number where all are the same."""
    return ", ".join(f"{s:.3g}" for s in (scales[:1] if len(set(scales)) == 1 else scales))


def save_pictures(pictures, path):
    """One picture, or a grid of several, as a PNG file."""
    grid = make_grid(pictures.cpu().float() / 2 + .5, nrow=math.ceil(math.sqrt(len(pictures))), padding=0)
    write_whole(Path(path), lambda new: to_pil_image(grid).save(new, format="png"))


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
