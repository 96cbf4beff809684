"""The protocol of `scfm evaluate`: the same prompts and noise for every sampler."""
import gc
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from scfm.evaluation.image_metrics import find_metrics, frechet
from scfm.evaluation.image_store import batches, begin, distance_in, generate_set, known_latency, write_json
from scfm.evaluation.samplers import lora_samplers, pipeline_samplers, reference_samplers, weights_of
from scfm.inference.step_lora import InferenceConfig, StepLora
from scfm.method.distill import setting
from scfm.models.lora import WEIGHT_NAME
from scfm.models.sampling import start_noise
from scfm.models.source import PipelineSource
from scfm.training.environment import environment_info


@dataclass
class EvaluateConfig(InferenceConfig):
    """What `scfm evaluate` needs to know, beside what every use of a LoRA needs."""
    prompts: str = setting("", "text file of captions; empty: those of the run (its training captions: the report says so)")
    num_images: int = setting(256, "images of each sampler; FID wants 2048 and more")
    steps: tuple = setting((3, 4, 8), "step counts of the student and of everything that it is compared with")
    teacher_steps: int = setting(32, "steps of the teacher's own images")
    reference_dir: str = setting("", "folder of images that both teacher and student are held against")
    inception: str = setting("", "file of Inception's weights (.safetensors, .pth); empty: from the hub; none: leave FID out")
    clip: str = setting("openai/clip-vit-large-patch14", "folder or hub name of a CLIP model; none: leave the CLIP score out")
    custom_metric: str = setting("", "a function of yours that looks at images, module:function (see scfm.evaluation.image_metrics.custom_metric)")
    batch_size: int = setting(8, "images generated at once")
    latency_repeats: int = setting(5, "images timed one by one for the latency, after one that warms up")
    output_dir: str = setting("", "folder of images and report; empty: evaluation, in the LoRA's folder")

    def check(self):
        """As `InferenceConfig.check`, and what can be known of a mistake before anything is loaded."""
        super().check()
        for name in ("num_images", "teacher_steps", "batch_size", "latency_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 or more")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"--steps is {self.steps}: give step counts of 1 or more, e.g. 3,4,8")
        _ = PipelineSource(self.pretrained_model_name_or_path).family    # names a folder that is no pipeline
        if self.reference_dir:
            images_in(self.reference_dir)
        self.output_dir = self.output_dir or str(Path(self.lora) / "evaluation")


def images_in(folder):
    """The images of a folder and its subfolders, in order. FileNotFoundError when there is none."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in kinds) if Path(folder).is_dir() else []
    if not found:
        raise FileNotFoundError(f"no images in {folder}: --reference wants a folder of {', '.join(kinds)} files")
    return found


def protocol_of(config, captions):
    """All that the numbers of one report have in common, as JSON holds it. Numbers of two protocols share no table."""
    return {"pipeline": Path(config.pretrained_model_name_or_path).name, "count": config.num_images, "prompts": len(set(captions)),
            "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16], "seed": config.seed,
            "height": config.height, "width": config.width, "max_sequence_length": config.max_sequence_length, "negative_prompt": config.negative_prompt,
            "precision": config.weight_dtype, "shift": config.inference_shift, "teacher_guidance_scale": config.teacher_guidance_scale,
            "teacher_steps": config.teacher_steps}


def measure(rows, out, captions, eyes, reference, size, progress=True):
    """Adds to each row what each eye says: scores, the Frechet distance to the teacher's images and to the reference's.

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


def evaluate(config, captions, external_models=(), progress=True, device=None):
    """Generates what is missing, measures everything, and returns the record, which lies in out/report.json.

    captions: config.count of them. external_models: `scfm.evaluation.samplers.ExternalModel`s. Resumes: whole images are kept. ValueError when `out` holds
    images of another protocol.
    """
    config.check()
    out, protocol = Path(config.output_dir), protocol_of(config, captions)
    begin(out, protocol, "images")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    eyes, missing = find_metrics(config, device)
    rows = generate_all(config, captions, external_models, out, progress, device)
    reference = images_in(config.reference_dir) if config.reference_dir else []
    measure(rows, out, captions, eyes, reference, (config.height, config.width), progress)
    record = {"protocol": {**protocol, "lora": weights_of(Path(config.lora) / WEIGHT_NAME), "reference": len(reference),
                           "reference_folder": Path(config.reference_dir).name, "eyes": [eye.name for eye in eyes]},
              "rows": rows, "missing": missing,
              "warnings": warnings_of(config, len(reference), any(eye.distance for eye in eyes)),
              "versions": {k: v for k, v in environment_info().items() if isinstance(v, str)}}
    write_json(out / "report.json", record)
    return record


def generate_all(config, captions, external_models, out, progress, device):
    """The rows of all samplers, generated and timed, the teacher first. Pipelines by folder come last, one at a time."""
    step_lora = StepLora(config, device)
    family, device = step_lora.family, step_lora.pipe.device
    rows, steps = [], sorted(set(config.steps))

    def add(samplers):
        todo = sum(not (out / s.name / f"{i:05d}.png").is_file() for s in samplers for i in range(len(captions)))
        with tqdm(total=todo, desc="generating", unit="image", disable=not progress) as bar:
            for sampler in samplers:
                folder, goal = out / sampler.name, out / rows[0]["name"] if rows else None
                generate_set(sampler, family, captions, folder, config.seed, config.batch_size, goal, bar.update)
                rows.append({"name": sampler.name, "kind": sampler.kind, "label": sampler.label, "steps": sampler.steps,
                             "settings": sampler.settings, "endpoint": distance_in(folder, len(captions)),
                             **known_latency(sampler, family, captions, folder, config.seed, config.latency_repeats, device)})
    add([*reference_samplers(step_lora, steps, config.teacher_steps),
         *(s for peer in external_models if not peer.is_pipeline for s in lora_samplers(step_lora, peer, steps))])
    for peer in (p for p in external_models if p.is_pipeline):
        step_lora.pipe.to("cpu")
        add([*pipeline_samplers(config, peer, steps, device, lambda numbers: start_noise(family, numbers, config.seed))])
        gc.collect()                    # the pipeline and the closures that hold it, before the next one is loaded
    return rows


def warnings_of(config, references, distances):
    """What a reader of the numbers has to know; distances: whether there are Frechet distances among them."""
    said = []
    if distances and config.num_images < ENOUGH:
        said.append(f"{config.num_images} images: a Frechet distance of so few is biased upward, and the bias differs between "
                    f"samplers (Inception's covariance is singular below {ENOUGH}); compare nothing with numbers of "
                    "another count")
    if distances and config.reference_dir and references < ENOUGH:
        said.append(f"the reference has {references} images, fewer than {ENOUGH}: the same holds for it")
    if not config.prompts:
        said.append("the captions are those of the run's own training: captions that it never saw say more")
    return said


ENOUGH = 2048
