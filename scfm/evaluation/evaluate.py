"""The protocol of `scfm evaluate`: the same prompts and noise for every sampler."""
import gc
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from scfm.evaluation.image_metrics import find_eyes, frechet
from scfm.evaluation.image_store import batches, begin, distance_in, known_latency, paint_set, write_json
from scfm.evaluation.samplers import lora_samplers, own_samplers, pipeline_samplers, weights_of
from scfm.inference.step_lora import StepLora, UseConfig
from scfm.method.distill import option
from scfm.models.family import family_of
from scfm.models.lora import WEIGHT_NAME
from scfm.models.sampling import start_noise
from scfm.models.source import local_folder
from scfm.training.config import surroundings


@dataclass
class EvaluateConfig(UseConfig):
    """What `scfm evaluate` needs to know, beside what every use of a LoRA needs."""
    prompts: str = option("", "text file of captions; empty: those of the run (its training captions: the report says so)")
    count: int = option(256, "pictures of each sampler; FID wants 2048 and more")
    steps: tuple = option((3, 4, 8), "step counts of the student and of everything that it is compared with")
    teacher_steps: int = option(32, "steps of the teacher's own pictures")
    reference: str = option("", "folder of pictures that both teacher and student are held against")
    inception: str = option("", "file of Inception's weights (.safetensors, .pth); empty: from the hub; none: leave FID out")
    clip: str = option("openai/clip-vit-large-patch14", "folder or hub name of a CLIP model; none: leave the CLIP score out")
    judge: str = option("", "a function of yours that looks at pictures, module:function (see scfm.evaluation.image_metrics.own_eye)")
    batch: int = option(8, "pictures painted at once")
    repeats: int = option(5, "pictures timed one by one for the latency, after one that warms up")
    out: str = option("", "folder of pictures and report; empty: evaluation, in the LoRA's folder")

    def check(self):
        """As `UseConfig.check`, and what can be known of a mistake before anything is loaded."""
        super().check()
        for name in ("count", "teacher_steps", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 or more")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"--steps is {self.steps}: give step counts of 1 or more, e.g. 3,4,8")
        family_of(local_folder(self.pipeline))
        if self.reference:
            pictures_in(self.reference)
        self.out = self.out or str(Path(self.lora) / "evaluation")


def pictures_in(folder):
    """The pictures of a folder and its subfolders, in order. FileNotFoundError when there is none."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in kinds) if Path(folder).is_dir() else []
    if not found:
        raise FileNotFoundError(f"no pictures in {folder}: --reference wants a folder of {', '.join(kinds)} files")
    return found


def protocol_of(config, captions):
    """All that the numbers of one report have in common, as JSON holds it. Numbers of two protocols share no table."""
    return {"pipeline": Path(config.pipeline).name, "count": config.count, "prompts": len(set(captions)),
            "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16], "seed": config.seed,
            "height": config.height, "width": config.width, "max_tokens": config.max_tokens, "negative": config.negative,
            "precision": config.precision, "shift": config.shift, "teacher_guidance": config.teacher_guidance,
            "teacher_steps": config.teacher_steps}


def measure(rows, out, captions, eyes, reference, size, progress=True):
    """Adds to each row what each eye says: scores, the Frechet distance to the teacher's pictures and to the reference's.

    rows[0] is the teacher. "distances": {eye's distance: {"teacher", "reference", "difference"}}, difference being
    |the row's distance to the reference - the teacher's|, the |dFID| of the paper.
    """
    bar = tqdm(total=len(eyes) * len(rows), desc="judging", disable=not progress)
    for eye in eyes:
        fixed = eye.look(batches(reference, size=size))[0] if reference and eye.distance else None
        teacher = own = None
        for row in rows:
            paths = [out / row["name"] / f"{i:05d}.png" for i in range(len(captions))]
            features, scores = eye.look(batches(paths, captions))
            row.setdefault("scores", {}).update(scores)
            if features is not None:
                teacher = features if teacher is None else teacher
                to_reference = frechet(features, fixed)
                own = to_reference if row is rows[0] else own
                row.setdefault("distances", {})[eye.distance] = {
                    "teacher": None if row is rows[0] else frechet(features, teacher), "reference": to_reference,
                    "difference": None if row is rows[0] or own is None else abs(to_reference - own)}
            bar.update(1)
    bar.close()


def evaluate(config, captions, peers=(), progress=True, device=None):
    """Paints what is missing, measures everything, and returns the record, which lies in out/report.json.

    captions: config.count of them. peers: `scfm.evaluation.samplers.Peer`s. Resumes: whole pictures are kept. ValueError when `out` holds
    pictures of another protocol.
    """
    config.check()
    out, protocol = Path(config.out), protocol_of(config, captions)
    begin(out, protocol, "pictures")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    eyes, missing = find_eyes(config, device)
    rows = paint_all(config, captions, peers, out, progress, device)
    reference = pictures_in(config.reference) if config.reference else []
    measure(rows, out, captions, eyes, reference, (config.height, config.width), progress)
    record = {"protocol": {**protocol, "lora": weights_of(Path(config.lora) / WEIGHT_NAME), "reference": len(reference),
                           "reference_folder": Path(config.reference).name, "eyes": [eye.name for eye in eyes]},
              "rows": rows, "missing": missing,
              "warnings": warnings_of(config, len(reference), any(eye.distance for eye in eyes)),
              "versions": {k: v for k, v in surroundings().items() if isinstance(v, str)}}
    write_json(out / "report.json", record)
    return record


def paint_all(config, captions, peers, out, progress, device):
    """The rows of all samplers, painted and timed, the teacher first. Pipelines by folder come last, one at a time."""
    tuned = StepLora(config, device)
    family, device = tuned.family, tuned.pipe.device
    rows, steps = [], sorted(set(config.steps))

    def add(samplers):
        todo = sum(not (out / s.name / f"{i:05d}.png").is_file() for s in samplers for i in range(len(captions)))
        with tqdm(total=todo, desc="painting", unit="picture", disable=not progress) as bar:
            for sampler in samplers:
                folder, goal = out / sampler.name, out / rows[0]["name"] if rows else None
                paint_set(sampler, family, captions, folder, config.seed, config.batch, goal, bar.update)
                rows.append({"name": sampler.name, "kind": sampler.kind, "label": sampler.label, "steps": sampler.steps,
                             "settings": sampler.settings, "endpoint": distance_in(folder, len(captions)),
                             **known_latency(sampler, family, captions, folder, config.seed, config.repeats, device)})
    add([*own_samplers(tuned, steps, config.teacher_steps),
         *(s for peer in peers if not peer.is_pipeline for s in lora_samplers(tuned, peer, steps))])
    for peer in (p for p in peers if p.is_pipeline):
        tuned.pipe.to("cpu")
        add([*pipeline_samplers(config, peer, steps, device, lambda numbers: start_noise(family, numbers, config.seed))])
        gc.collect()                    # the pipeline and the closures that hold it, before the next one is loaded
    return rows


def warnings_of(config, references, distances):
    """What a reader of the numbers has to know; distances: whether there are Frechet distances among them."""
    said = []
    if distances and config.count < ENOUGH:
        said.append(f"{config.count} pictures: a Frechet distance of so few is biased upward, and the bias differs between "
                    f"samplers (Inception's covariance is singular below {ENOUGH}); compare nothing with numbers of "
                    "another count")
    if distances and config.reference and references < ENOUGH:
        said.append(f"the reference has {references} pictures, fewer than {ENOUGH}: the same holds for it")
    if not config.prompts:
        said.append("the captions are those of the run's own training: captions that it never saw say more")
    return said


ENOUGH = 2048
