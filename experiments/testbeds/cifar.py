"""The trainings of bench/cifar.py: one cell each, a folder that a killed bench goes on in."""
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

from torchvision.transforms.functional import to_pil_image

from scfm.training.config import DistillConfig
from scfm.method.ema import shorten
from scfm.models.pixels import save_pipeline
from scfm.models.lora import WEIGHT_NAME
from scfm.training.flow_trainer import SHORTCUT, FlowConfig, pretrain
from scfm.training.distill_trainer import begin, end
from scfm.models.unet import header_of, load_flow

NFE = (1, 2, 4, 8, 16, 32, 64)
METHODS = {"plain": {"non_shortcut_ratio": 1.}, "scfm 1/8": {"non_shortcut_ratio": .875}, "scfm 1/4": {"non_shortcut_ratio": .75},
           "scfm 1/2": {"non_shortcut_ratio": .5}, "shortcut": SHORTCUT}
DISTILLED, LORA = "plain, distilled", "plain, LoRA"
KEPT = .8                                                   # of the budget goes to the teacher of these two, the rest to distilling
SHOWN = 1000                                                # real images that the LoRA's updates see
RECIPES = {"tiny": {"batch": 8, "lr": 1e-3, "warmup": 2, "ema_decay_slow": .9},
           "nano": {"batch": 32, "lr": 2e-3, "warmup": 400, "ema_decay_slow": .998, "precision": "bf16", "checkpointing_steps": 250},
           "small": {"batch": 32, "lr": 1e-3, "warmup": 400, "ema_decay_slow": .998, "precision": "bf16", "checkpointing_steps": 100},
           "full": {"batch": 256, "lr": 2e-4, "warmup": 1000, "ema_decay_slow": .999, "precision": "bf16", "checkpointing_steps": 500}}


class Plan(NamedTuple):
    """What the cells of one bench share. budget: network evaluations of a training; count: images of a measurement; nfe: evaluations of one."""
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
    updates = math.floor(budget / recipe["batch"] / (3 + 2 * (1 - told["non_shortcut_ratio"])))
    if updates < 1:
        raise ValueError(f"{budget:g} network evaluations buy no update at batch {recipe['batch']}: give more")
    return updates


def train(plan, name, seed, images, share=1., keep_going=lambda: True):
    """Trains up to a share of the budget; returns the file of the result, or None when keep_going said no."""
    recipe, told = RECIPES[plan.size], METHODS[name]
    out = folder_of(plan, name, seed)
    config = FlowConfig(train_data_dir=plan.data, output_dir=str(out), size=plan.size, seed=seed, max_train_steps=updates_for(plan.budget * share, recipe, told),
                            validation_steps=plan.previews, **{**recipe, **told})
    if done(out) >= config.max_train_steps:
        return out / "flow.safetensors"
    return pretrain(config, keep_going, images=images) and out / "flow.safetensors"


def done(out):
    """Updates of the result in a folder; 0 without one."""
    path = out / "flow.safetensors"
    return json.loads(header_of(path)["notes"])["updates"] if path.is_file() else 0


def train_all(plan, name, seed, images, keep_going=lambda: True):
    """One method to the end of its budget; plain flow matching leaves a copy at `KEPT` of it, and that is distilled."""
    if name == LORA:
        return train_lora(plan, seed, images, keep_going)
    if name != DISTILLED:
        kept = folder_of(plan, "plain", seed) / "kept.safetensors"
        if name == "plain" and not kept.is_file():
            flow = train(plan, name, seed, images, KEPT, keep_going)
            if flow is None:
                return None
            shutil.copy(flow, kept)
        return train(plan, name, seed, images, keep_going=keep_going)
    kept, out = folder_of(plan, "plain", seed) / "kept.safetensors", folder_of(plan, name, seed)
    recipe, told = RECIPES[plan.size], {"non_shortcut_ratio": 0., "teacher_ratio": .4, "algorithm": "dual"}
    updates = updates_for(plan.budget * (1 - KEPT), recipe, told)
    config = FlowConfig(**{**recipe, **told, "data": plan.data, "out": str(out), "size": plan.size, "seed": seed, "updates": updates,
                               "teacher": str(kept), "lr": recipe["lr"] / 4, "warmup": min(50, updates // 4), "validation_steps": 0,
                               "ema_decay_fast": shorten(.99, updates), "ema_decay_slow": shorten(.999, updates)})
    if done(out) < updates and pretrain(config, keep_going, images=images) is None:
        return None
    return out / "flow.safetensors"


def train_lora(plan, seed, images, keep_going=lambda: True):
    """The kept flow distilled by `scfm distill`: a LoRA on frozen weights. Returns the LoRA's file, or None.

    A row costs 4: the student's forward, a backward through frozen weights, two jumps. Judging what ships is not counted.
    """
    out, recipe = folder_of(plan, LORA, seed), RECIPES[plan.size]
    folder = folder_of(plan, "plain", seed) / "kept_pipeline"            # `pipeline` is that of the whole budget
    updates = max(1, round(plan.budget * (1 - KEPT)) // (4 * recipe["batch"]))
    if (out / WEIGHT_NAME).is_file():
        return out / WEIGHT_NAME
    if not folder.is_dir():
        save_pipeline(load_flow(folder_of(plan, "plain", seed) / "kept.safetensors"), images.names, folder)
    config = DistillConfig(pretrained_model_name_or_path=str(folder), train_data_dir=str(image_folder(plan, images)), output_dir=str(out), cache_dir=str(plan.cells / "cache"), height=32, width=32,
                       max_sequence_length=1, rank=16, learning_rate=1e-3, lr_scheduler="cosine", global_batch_size=recipe["batch"], max_train_steps=updates, seed=seed, guidance_scale_range=(1., 1.),
                       teacher_guidance_scale=1., shift=(1., 2.), inference_shift=1., ema_decay_fast=shorten(.99, updates), ema_decay_slow=shorten(.999, updates),
                       checkpointing_steps=recipe.get("checkpointing_steps", 100), validation_steps=0, num_eval_prompts=min(32, plan.count), select_adapter="ema_slow", report_to="none")
    run = begin(config)
    run.train(keep_going=keep_going)
    return end(run) and out / WEIGHT_NAME if run.update == updates else None


def image_folder(plan, images):
    """The first `SHOWN` training images as an image folder with captions; written once."""
    folder, part = plan.cells / "images", plan.cells / "images.part"
    if not folder.is_dir():
        part.mkdir(parents=True, exist_ok=True)
        rows = []
        for i, (pixels, label) in enumerate(zip(images.pixels[:SHOWN], images.labels)):
            to_pil_image(pixels).save(part / f"{i:05d}.png")
            rows.append(json.dumps({"file_name": f"{i:05d}.png", "text": f"a {images.names[label]}"}))
        (part / "metadata.jsonl").write_text("\n".join(rows) + "\n")
        part.replace(folder)
    return folder
