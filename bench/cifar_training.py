"""The trainings of bench/cifar.py: one cell each, a folder that a killed bench goes on in."""
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

from torchvision.transforms.functional import to_pil_image

from scfm.training.config import RunConfig
from scfm.method.ema import shorten
from scfm.models.pixels import save_pipeline
from scfm.models.lora import WEIGHT_NAME
from scfm.training.flow_trainer import SHORTCUT, PretrainConfig, pretrain
from scfm.training.distill_trainer import begin, end
from scfm.models.unet import header_of, load_flow

NFE = (1, 2, 4, 8, 16, 32, 64)
METHODS = {"plain": {"flow_share": 1.}, "scfm 1/8": {"flow_share": .875}, "scfm 1/4": {"flow_share": .75},
           "scfm 1/2": {"flow_share": .5}, "shortcut": SHORTCUT}
DISTILLED, LORA = "plain, distilled", "plain, LoRA"
KEPT = .8                                                   # of the budget goes to the teacher of these two, the rest to distilling
SHOWN = 1000                                                # real pictures that the LoRA's updates see
RECIPES = {"tiny": {"batch": 8, "lr": 1e-3, "warmup": 2, "slow_decay": .9},
           "nano": {"batch": 32, "lr": 2e-3, "warmup": 400, "slow_decay": .998, "precision": "bf16", "checkpoint_every": 250},
           "small": {"batch": 32, "lr": 1e-3, "warmup": 400, "slow_decay": .998, "precision": "bf16", "checkpoint_every": 100},
           "full": {"batch": 256, "lr": 2e-4, "warmup": 1000, "slow_decay": .999, "precision": "bf16", "checkpoint_every": 500}}


class Plan(NamedTuple):
    """What the cells of one bench share. budget: network evaluations of a training; count: pictures of a measurement; nfe: evaluations of one."""
    data: str
    cells: Path
    size: str = "nano"
    budget: int = 600_000
    count: int = 2000
    previews: int = 2000
    inception: str = ""
    nfe: tuple = NFE


def safe(name):
    """A name as part of a file's name."""
    return name.replace(", ", "-").replace(" ", "-").replace("/", "_")


def folder_of(plan, name, seed):
    return plan.cells / f"{safe(name)}-{seed}"


def updates_for(budget, recipe, told):
    """Updates that cost `budget` network evaluations: a row costs 3, one that is asked by jumps 5. ValueError when it buys none."""
    updates = math.floor(budget / recipe["batch"] / (3 + 2 * (1 - told["flow_share"])))
    if updates < 1:
        raise ValueError(f"{budget:g} network evaluations buy no update at batch {recipe['batch']}: give more")
    return updates


def train(plan, name, seed, pictures, share=1., keep_going=lambda: True):
    """Trains up to a share of the budget; returns the file of the result, or None when keep_going said no."""
    recipe, told = RECIPES[plan.size], METHODS[name]
    out = folder_of(plan, name, seed)
    config = PretrainConfig(data=plan.data, out=str(out), size=plan.size, seed=seed, updates=updates_for(plan.budget * share, recipe, told),
                            preview_every=plan.previews, **{**recipe, **told})
    if done(out) >= config.updates:
        return out / "flow.safetensors"
    return pretrain(config, keep_going, pictures=pictures) and out / "flow.safetensors"


def done(out):
    """Updates of the result in a folder; 0 without one."""
    path = out / "flow.safetensors"
    return json.loads(header_of(path)["notes"])["updates"] if path.is_file() else 0


def train_all(plan, name, seed, pictures, keep_going=lambda: True):
    """One method to the end of its budget; plain flow matching leaves a copy at `KEPT` of it, and that is distilled."""
    if name == LORA:
        return train_lora(plan, seed, pictures, keep_going)
    if name != DISTILLED:
        kept = folder_of(plan, "plain", seed) / "kept.safetensors"
        if name == "plain" and not kept.is_file():
            flow = train(plan, name, seed, pictures, KEPT, keep_going)
            if flow is None:
                return None
            shutil.copy(flow, kept)
        return train(plan, name, seed, pictures, keep_going=keep_going)
    kept, out = folder_of(plan, "plain", seed) / "kept.safetensors", folder_of(plan, name, seed)
    recipe, told = RECIPES[plan.size], {"flow_share": 0., "teacher_share": .4, "algorithm": "dual"}
    updates = updates_for(plan.budget * (1 - KEPT), recipe, told)
    config = PretrainConfig(**{**recipe, **told, "data": plan.data, "out": str(out), "size": plan.size, "seed": seed, "updates": updates,
                               "teacher": str(kept), "lr": recipe["lr"] / 4, "warmup": min(50, updates // 4), "preview_every": 0,
                               "fast_decay": shorten(.99, updates), "slow_decay": shorten(.999, updates)})
    if done(out) < updates and pretrain(config, keep_going, pictures=pictures) is None:
        return None
    return out / "flow.safetensors"


def train_lora(plan, seed, pictures, keep_going=lambda: True):
    """The kept flow distilled by `scfm distill`: a LoRA on frozen weights. Returns the LoRA's file, or None.

    A row costs 4: the student's forward, a backward through frozen weights, two jumps. Judging what ships is not counted.
    """
    out, recipe = folder_of(plan, LORA, seed), RECIPES[plan.size]
    folder = folder_of(plan, "plain", seed) / "kept_pipeline"            # `pipeline` is that of the whole budget
    updates = max(1, round(plan.budget * (1 - KEPT)) // (4 * recipe["batch"]))
    if (out / WEIGHT_NAME).is_file():
        return out / WEIGHT_NAME
    if not folder.is_dir():
        save_pipeline(load_flow(folder_of(plan, "plain", seed) / "kept.safetensors"), pictures.names, folder)
    config = RunConfig(pipeline=str(folder), pictures=str(picture_folder(plan, pictures)), out=str(out), cache=str(plan.cells / "cache"), height=32, width=32,
                       max_tokens=1, rank=16, lr=1e-3, schedule="cosine", batch=recipe["batch"], updates=updates, seed=seed, guidance=(1., 1.),
                       teacher_guidance=1., shift=(1., 2.), sample_shift=1., fast_decay=shorten(.99, updates), slow_decay=shorten(.999, updates),
                       checkpoint_every=recipe.get("checkpoint_every", 100), preview_every=0, judge=min(32, plan.count), ship="slow", tracker="none")
    run = begin(config)
    run.train(keep_going=keep_going)
    return end(run) and out / WEIGHT_NAME if run.update == updates else None


def picture_folder(plan, pictures):
    """The first `SHOWN` training pictures as a picture folder with captions; written once."""
    folder, part = plan.cells / "pictures", plan.cells / "pictures.part"
    if not folder.is_dir():
        part.mkdir(parents=True, exist_ok=True)
        rows = []
        for i, (pixels, label) in enumerate(zip(pictures.pixels[:SHOWN], pictures.labels)):
            to_pil_image(pixels).save(part / f"{i:05d}.png")
            rows.append(json.dumps({"file_name": f"{i:05d}.png", "text": f"a {pictures.names[label]}"}))
        (part / "metadata.jsonl").write_text("\n".join(rows) + "\n")
        part.replace(folder)
    return folder
