"""Validation images during a run, and which of the three adapters is saved on top at its end."""
import json
import math

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from scfm.method.consistency import keyed_generator
from scfm.method.lora_scale import choose, endpoint_curve, write_dial
from scfm.models.loading import with_vae
from scfm.models.lora import ADAPTERS, save_lora
from scfm.models.sampling import start_noise, teacher_endpoints


def judged_captions(run, count):
    """`count` of the run's own captions and noises for them, the same at every call."""
    pick = torch.randint(len(run.rows.captions), (count,), generator=keyed_generator(run.config.seed, 0, stream=3))
    return [run.rows.captions[i] for i in pick], start_noise(run.family, range(count), run.config.seed + 1)


def endpoints(run, name, captions, noise, steps, scale=1.):
    """Latents that the speaker `name`, its LoRA at `scale`, reaches in `steps` Euler steps at config.sample_shift.

    captions: of the run, whose embeddings are read from its cache. noise: (n, *latent_shape) -> the same shape.
    """
    config = run.config
    return teacher_endpoints(run.family, run.speakers.field(name, scale), captions, noise, steps, config.sample_shift,
                             config.teacher_guidance, batch=2 * config.batch)


@torch.no_grad()
def preview(run, count=8):
    """(3, H, W) picture, also written to previews/UPDATE.png: a row of the teacher's, then one of the student's per step count."""
    captions, noise = judged_captions(run, count)
    config = run.config
    if run.teacher_row is None:                       # the teacher does not change: painted once a run
        run.teacher_row = endpoints(run, "teacher", captions, noise, config.teacher_steps)
    rows = [run.teacher_row] + [endpoints(run, "student", captions, noise, n) for n in config.student_steps]
    with with_vae(run.pipe, config.pipeline):
        pictures = torch.cat([run.family.decode(row.to(run.pipe.device)).cpu().float() for row in rows])
    folder = run.out / "previews"
    folder.mkdir(exist_ok=True)
    grid = make_grid(pictures / 2 + .5, nrow=count, padding=1)
    to_pil_image(grid).save(folder / "new.png")
    (folder / "new.png").replace(folder / f"{run.update:06d}.png")
    return grid


@torch.no_grad()
def finish(run):
    """Saves all three adapters with their dials, puts the one that lands nearest on top; returns the record.

    Each is given, for each of config.student_steps, the strength among config.judge_scales at which its endpoints lie
    nearest to the teacher's own in config.teacher_steps; the smallest sum of log distances ships, or whom config.ship names.
    """
    config = run.config
    captions, noise = judged_captions(run, config.judge)
    goal = endpoints(run, "teacher", captions, noise, config.teacher_steps)
    curve = lambda name, scales: endpoint_curve(
        lambda steps, scale: endpoints(run, name, captions, noise, steps, scale), goal, config.student_steps, scales)
    distance = {"teacher": {str(n): round(d, 5) for (n, _), d in curve("teacher", (0.,)).items()}}
    dials, sums = {}, {}
    for name in ADAPTERS:
        found = curve(name, config.judge_scales)
        dials[name] = choose(found, config.sample_shift)
        at_dial = {n: found[n, dials[name].scale(n)] for n in dials[name].steps}
        distance[name] = {str(n): round(d, 5) for n, d in at_dial.items()}
        sums[name] = sum(math.log(max(d, 1e-12)) for d in at_dial.values())
    best = min(ADAPTERS, key=sums.get) if config.ship == "best" else config.ship
    for name, folder in [*((name, run.out / name) for name in ADAPTERS), (best, run.out)]:
        write_dial(save_lora(run.family.pipeline_class, run.speakers.transformer, folder, name), dials[name])
    (run.out / "dial.json").unlink(missing_ok=True)   # what `scfm dial` found was of the file that has just been replaced
    record = {"updates": run.update, "ships": best, "captions": config.judge, "teacher_steps": config.teacher_steps,
              "shift": config.sample_shift, "guidance": config.teacher_guidance, "guidance_mode": config.guidance_mode,
              "endpoint_distance": distance,
              "dial": {name: {str(n): s for n, s in zip(d.steps, d.scales)} for name, d in dials.items()}}
    (run.out / "choice.new").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (run.out / "choice.new").replace(run.out / "choice.json")
    return record
