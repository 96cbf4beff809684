"""Asks every family on a tiny pipeline what it is, and writes docs/families.md:

    python scripts/families_table.py

The time that a network is given, the sign of its output and what guidance does to its velocity are measured
on the stock pipeline's own steps, not copied from anywhere.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from scfm.models.check import TIMESTEP_FORMULAS, noise_and_cond, same_time, stock_trajectory
from scfm.models.family import FAMILIES
from scfm.models.pixels import pipeline_of
from scfm.models.unet import UNetFlow
from scfm.training.plan import SHAPES
from toy.pipelines import BUILD, build_flux, build_sd3

ROOT = Path(__file__).parents[1]
HEAD = """# The families

Made by `python scripts/families_table.py`, and a test makes it again. t is 1 at noise; the velocity is noise
minus data. Time, sign and guidance are measured on the steps of the stock pipeline, of tiny genuine ones: the
classes of diffusers and transformers with random weights. The contract: our sampler without LoRA gives the
stock pipeline's images at 1, 3 and 8 steps, guided and not; a LoRA goes through the stock pipeline's loader;
the commands from `data` to `export` ran. It says nothing about a published checkpoint. "For ComfyUI":
whether `scfm export --format comfyui` knows the names of its layers there; that was not run in ComfyUI.

"""
COLUMNS = [
    "pipeline",
    "its network is given",
    "its output is",
    "guidance",
    "the stock call says",
    "one image's x",
    "for ComfyUI",
    "tried",
]
TAIL = """
`scfm plan --shape NAME` knows these published sizes: {shapes}.
Where guidance is classifier-free a step takes two evaluations, of teacher and student; `--guidance_mode
distilled` puts it into the weights, and a step of the student takes one (`nbs/learn/21_sd3.ipynb`).
A further family is one class: `nbs/learn/21_new_family.ipynb`.

## A walk with a newer one

Every family above but `PixelPipeline` has the same lines, with its own preset; Wan's alone are the frames. A
test runs them on the tiny Wan pipeline.

```
scfm plan --config wan-2.1-1.3b-step-scaled
scfm data --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts captions.txt \\
    --output_dir videos --sizes 480x832 --num_frames 81 --teacher_guidance_scale 5 --weight_dtype bf16
scfm distill --config wan-2.1-1.3b-step-scaled --train_data_dir videos --output_dir runs/wan \\
    --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers
scfm sample --lora runs/wan --prompt "a cat walks along a wall" --steps 4 --output cat.png
scfm evaluate --lora runs/wan --prompts held_out.txt --num_images 32 --steps 2,4
scfm export --lora runs/wan --steps 4 --output_dir wan-in-four-steps
```

- `--num_frames` is 1 more than a multiple of 4; with 1, the default, Wan is a model of images. Two
  transformers (Wan2.2-A14B) are refused.
- The teacher's videos are PNG files of all their frames, which lose nothing and play in a browser. Videos of
  your own go to `--train_data_dir`: each a folder of frames, a GIF, PNG or WebP, or with
  `pip install 'scfm[video]'` an MP4; of each its first frames are taken, whatever its frame rate. Captions
  are in `metadata.jsonl`, or in `NAME.txt` beside each.
- `scfm sample` and validation show a strip of frames (`cat.png`) and a GIF beside it; `scfm app` plays them.
- `scfm evaluate` measures images on the frame in the middle of each video, and how much a pixel changes from
  one frame to the next beside the teacher's: nothing else there sees motion. The endpoint distance is of the
  latents of all frames.
- Wan's pipeline is told no sigmas: `runs/wan/README.md` has the line that gives its scheduler the plain grid.
"""
LENGTH, GUIDANCE = 32, 4.0
CAPTIONS = ["a large red cross", "a small blue ring on the left"]
LEARNED = {"FluxPipeline": ", and a trained tiny one", "PixelPipeline": ", and trained ones"}


def build_pixels() -> Any:
    """A PixelPipeline with random weights."""
    torch.manual_seed(0)
    return pipeline_of(UNetFlow("nano", classes=4).eval(), ("circle", "cross", "ring", "star"))


TINY: dict[str, Callable[[], Any]] = {
    "FluxPipeline": build_flux,
    "StableDiffusion3Pipeline": build_sd3,
    "PixelPipeline": build_pixels,
    **BUILD,
}


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/families.md", help="the table")
    out = parser.parse_args(argv).out.absolute()
    logging.set_verbosity_error()
    rows = [row_of(name, TINY[name]) for name in FAMILIES]
    shapes = [f"`{shape}`" for shape in SHAPES]
    new = out.with_suffix(".new")
    head = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    text = HEAD + "\n".join([*head, *rows]) + "\n" + TAIL.format(shapes=", ".join(shapes))
    new.write_text(text, encoding="utf-8")
    os.replace(new, out)
    print(f"{len(rows)} families: {out.name}")


def row_of(name: str, build: Callable[[], Any]) -> str:
    """A family's row of the table."""
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    family_class = FAMILIES[name]
    family = family_class(pipe, 32, 32, 16 if name == "FluxPipeline" else LENGTH)
    captions = list(getattr(family, "captions", CAPTIONS))
    time, sign = time_and_sign(family, captions)
    call = ", ".join(f"`{k}={v!r}`" for k, v in family_class.guidance_arguments(GUIDANCE).items())
    cells = [
        f"`{name}`",
        time,
        sign,
        guidance_of(family, captions),
        call,
        " x ".join(map(str, layout_of(family))),
        "yes" if getattr(family_class, "comfyui_names", None) else "no",
        "contract" + LEARNED.get(name, "") + ", images and videos" * getattr(family, "makes_videos", False),
    ]
    return f"| {' | '.join(cells)} |"


def layout_of(family: Any) -> list[str]:
    """What the dimensions of one image's x are."""
    axes = ["channels", "frames", "rows", "columns"]
    return {2: ["tokens", "channels"], 3: [axes[0], *axes[2:]], 4: axes}[len(family.latent_shape)]


@torch.no_grad()
def time_and_sign(family: Any, captions: list[str]) -> tuple[str, str]:
    """Which of the usual times the network is given in the stock pipeline's steps, and whether its output or
    minus that goes to the scheduler, where there is no guidance."""
    outputs: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        outputs.append(torch.stack(first) if isinstance(first, list) else first)

    hook = family.pipe.transformer.register_forward_hook(keep)
    steps = stock_trajectory(family, captions, noise_and_cond(family, captions, 1.0)[0], 3, 1.0)
    hook.remove()
    times = [
        name
        for name, formula in TIMESTEP_FORMULAS.items()
        if all(same_time(formula(step.t), step.timestep) for step in steps)
    ]
    output, v = outputs[0].float().reshape(-1), steps[0].v.reshape(-1)
    signs = {"the velocity": v, "minus the velocity": -v}
    return times[0], next(what for what, want in signs.items() if torch.allclose(output, want, atol=1e-5))


@torch.no_grad()
def guidance_of(family: Any, captions: list[str]) -> str:
    """What a guidance scale does: an input, or a second evaluation, in whose scale the velocity is linear or
    not."""
    if not family.uses_cfg:
        return "an input of the network"
    noise, _ = noise_and_cond(family, captions, 1.0)
    t = torch.full((len(noise),), 0.5)
    one, two, three = (
        family.velocity(family.pipe.transformer, noise, t, noise_and_cond(family, captions, scale)[1])
        for scale in (1.0, 2.0, 3.0)
    )
    linear = torch.allclose(three - two, two - one, atol=1e-4)
    return "classifier-free" if linear else "classifier-free, scaled back to the unguided length"


if __name__ == "__main__":
    sys.exit(main())
