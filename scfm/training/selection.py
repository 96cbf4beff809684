"""Validation images during a run, and which of the three adapters is saved on top at its end."""
import json
import math

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from scfm.method.consistency import keyed_generator
from scfm.method.lora_scale import choose_lora_scales, endpoint_curve
from scfm.models.lora_file import write_lora_scales
from scfm.models.loading import with_vae
from scfm.models.lora import ADAPTERS, save_lora
from scfm.models.sampling import start_noise, teacher_endpoints


def eval_captions(run, count):
    """`count` of the run's own captions and noises for them, the same at every call."""
    pick = torch.randint(len(run.rows.captions), (count,), generator=keyed_generator(run.config.seed, 0, stream=3))
    return [run.rows.captions[i] for i in pick], start_noise(run.family, range(count), run.config.seed + 1)


def endpoints(run, name, captions, noise, steps, scale=1.):
    """Latents that the speaker `name`, its LoRA at `scale`, reaches in `steps` Euler steps at config.inference_shift.

    captions: of the run, whose embeddings are read from its cache. noise: (n, *latent_shape) -> the same shape.
    """
    config = run.config
    return teacher_endpoints(run.family, run.models.field(name, scale), captions, noise, steps, config.inference_shift,
                             config.teacher_guidance_scale, batch=2 * config.global_batch_size)


@torch.no_grad()
def preview(run, count=8):
    """(3, H, W) image, also written to previews/UPDATE.png: a row of the teacher's, then one of the student's per step count."""
    captions, noise = eval_captions(run, count)
    config = run.config
    if run.teacher_row is None:                       # the teacher does not change: generated once a run
        run.teacher_row = endpoints(run, "teacher", captions, noise, config.teacher_steps)
    rows = [run.teacher_row] + [endpoints(run, "student", captions, noise, n) for n in config.eval_num_steps]
    with with_vae(run.pipe, config.pretrained_model_name_or_path):
        images = torch.cat([run.family.decode(row.to(run.pipe.device)).cpu().float() for row in rows])
    folder = run.out / "previews"
    folder.mkdir(exist_ok=True)
    grid = make_grid(images / 2 + .5, nrow=count, padding=1)
    to_pil_image(grid).save(folder / "new.png")
    (folder / "new.png").replace(folder / f"{run.update:06d}.png")
    return grid


@torch.no_grad()
def finish(run):
    """Saves all three adapters with their dials, puts the one that lands nearest on top; returns the record.

    Each is given, for each of config.eval_num_steps, the strength among config.eval_lora_scales at which its endpoints lie
    nearest to the teacher's own in config.teacher_steps; the smallest sum of log distances is saved on top, or the one that config.select_adapter names.
    """
    config = run.config
    captions, noise = eval_captions(run, config.num_eval_prompts)
    goal = endpoints(run, "teacher", captions, noise, config.teacher_steps)
    curve = lambda name, scales: endpoint_curve(
        lambda steps, scale: endpoints(run, name, captions, noise, steps, scale), goal, config.eval_num_steps, scales)
    distance = {"teacher": {str(n): round(d, 5) for (n, _), d in curve("teacher", (0.,)).items()}}
    dials, sums = {}, {}
    for name in ADAPTERS:
        found = curve(name, config.eval_lora_scales)
        dials[name] = choose_lora_scales(found, config.inference_shift)
        at_dial = {n: found[n, dials[name].scale(n)] for n in dials[name].steps}
        distance[name] = {str(n): round(d, 5) for n, d in at_dial.items()}
        sums[name] = sum(math.log(max(d, 1e-12)) for d in at_dial.values())
    best = min(ADAPTERS, key=sums.get) if config.select_adapter == "best" else config.select_adapter
    for name, folder in [*((name, run.out / name) for name in ADAPTERS), (best, run.out)]:
        write_lora_scales(save_lora(run.family.pipeline_class, run.models.transformer, folder, name), dials[name])
    (run.out / "lora_scales.json").unlink(missing_ok=True)   # what `scfm dial` found was of the file that has just been replaced
    record = {"train_steps": run.update, "selected": best, "captions": config.num_eval_prompts, "teacher_steps": config.teacher_steps,
              "shift": config.inference_shift, "guidance": config.teacher_guidance_scale, "guidance_mode": config.guidance_mode,
              "endpoint_distance": distance,
              "lora_scales": {name: {str(n): s for n, s in zip(d.steps, d.scales)} for name, d in dials.items()}}
    (run.out / "choice.new").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (run.out / "choice.new").replace(run.out / "selection.json")
    return record
