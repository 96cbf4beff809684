"""The protocol of `scfm evaluate`: the same prompts and noise for every sampler."""

import gc
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scfm.data.caption_length import fewer_remarks, warn_of_long_captions
from scfm.data.fingerprint import fingerprint
from scfm.evaluation.external_models import ExternalModel, lora_samplers, pipeline_samplers
from scfm.evaluation.find_metrics import find_metrics
from scfm.evaluation.image_store import (
    generate_set,
    init_store,
    missing_images,
    stored_distance,
    write_json,
)
from scfm.evaluation.latency import stored_latency
from scfm.evaluation.measure import Row, measure, measure_motion
from scfm.evaluation.samplers import Sampler, lora_digest, reference_samplers
from scfm.files import check_writable
from scfm.inference.adapters import partial_fits
from scfm.inference.config import InferenceConfig
from scfm.inference.step_lora import StepLora, default_device
from scfm.method.distill import setting
from scfm.models.source import PipelineSource
from scfm.training.environment import environment_info

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
ENOUGH = 2048  # images, without which the covariance of Inception's 2048 features is singular


@dataclass
class EvaluateConfig(InferenceConfig):
    """What `scfm evaluate` needs to know, beside what every use of a LoRA needs."""

    prompts: str = setting(
        "", "text file of captions; empty: those of the run (its training captions: the report says so)"
    )
    num_images: int = setting(256, "images of each sampler; FID wants 2048 and more")
    steps: tuple = setting((3, 4, 8), "step counts of the student and of everything that it is compared with")
    teacher_steps: int = setting(32, "steps of the teacher's own images")
    reference_dir: str = setting("", "folder of images that both teacher and student are compared with")
    inception: str = setting(
        "",
        "file of Inception's weights (.safetensors, .pth); empty: from the hub; none: leave FID out",
    )
    imagenet: str = setting(
        "", "features of EfficientNet-Lite0 on ImageNet, carried by a package; none: leave them out"
    )
    clip: str = setting(
        "openai/clip-vit-large-patch14", "folder or hub name of a CLIP model; none: leave the CLIP score out"
    )
    patch_fid: bool = setting(
        False, "FID also on the 299 x 299 pixels in the middle of each image, for images larger than that"
    )
    preference: str = setting(
        "", "folder or hub name of a preference model in CLIP's format (PickScore); empty: none"
    )
    composition: str = setting(
        "",
        "folder or hub name of a BLIP that answers questions, to ask for each part of a caption; empty: none",
    )
    custom_metric: str = setting(
        "",
        "a function of yours that measures images, module:function (see "
        "scfm.evaluation.image_metrics.CustomMetric)",
    )
    batch_size: int = setting(8, "images generated at once")
    latency_repeats: int = setting(5, "images timed one by one for the latency, after one that warms up")
    output_dir: str = setting("", "folder of images and report; empty: evaluation, in the LoRA's folder")

    def fill_in(self) -> None:
        """As of `InferenceConfig`, and where the report goes."""
        super().fill_in()
        self.output_dir = self.output_dir or str(Path(self.lora) / "evaluation")

    def check(self) -> None:
        """As of `InferenceConfig`, and what can be known of a mistake before anything is loaded."""
        super().check()
        if self.imagenet not in ("", "none"):
            raise ValueError(f"--imagenet is {self.imagenet!r}: leave it out, or say none")
        for name in ("num_images", "teacher_steps", "batch_size", "latency_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 or more")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"--steps is {self.steps}: give step counts of 1 or more, e.g. 3,4,8")
        if self.reference_dir:
            images_in(self.reference_dir)
        check_writable(self.resolved().output_dir, "take another --output_dir")


def images_in(folder: str | Path) -> list[Path]:
    """The images of a folder and its subfolders, in order. FileNotFoundError when there is none."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGES)
    if not paths:
        raise FileNotFoundError(
            f"no images in {folder}: --reference_dir wants a folder of {', '.join(IMAGES)} files"
        )
    return paths


def evaluate(
    config: EvaluateConfig,
    captions: Sequence[str],
    external_models: Sequence[ExternalModel] = (),
    progress: bool = True,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Generates what is missing, measures everything, and returns the record, which lies in
    config.output_dir as report.json.

    captions: config.num_images of them

    Resumes: images that are there stay. ValueError when the folder holds those of another protocol.
    """
    config = config.resolved()
    config.check()
    source = PipelineSource(config.pretrained_model_name_or_path)
    _ = source.family  # names a pipeline that is not known
    source.check_files()
    out, protocol = Path(config.output_dir), protocol_of(config, captions)
    protocol["weights"] = fingerprint(source, *source.parts)[:16]  # a name may come to stand for others
    init_store(out, protocol)
    device = device or default_device()
    metrics, missing = find_metrics(
        config.custom_metric,
        config.inception,
        config.clip,
        device,
        config.imagenet,
        config.preference,
        config.composition,
        (config.height, config.width) if config.patch_fid else None,
    )
    evaluation = Evaluation(StepLora(config, device, source), config, captions, progress)
    warn_of_long_captions(evaluation.step_lora.family, captions)
    with fewer_remarks():
        rows = evaluation.generate(external_models)
    reference = images_in(config.reference_dir) if config.reference_dir else []
    if config.num_frames > 1:
        measure_motion(rows, out, len(captions))
    floors = measure(rows, out, captions, metrics, reference, (config.height, config.width), progress)
    protocol |= {
        "lora": lora_digest(config.weights),
        "reference_dir": Path(config.reference_dir).name,
        "reference_images": len(reference),
        "metrics": [metric.name for metric in metrics],
        "weights_of_metrics": {
            metric.name: mark for metric in metrics if (mark := getattr(metric, "mark", ""))
        },
    }
    warnings = warnings_of(config, len(reference), any(metric.distance for metric in metrics))
    warnings = partial_fits(evaluation.step_lora.pipe) + warnings
    versions = {name: value for name, value in environment_info().items() if isinstance(value, str)}
    record = {
        "protocol": protocol,
        "rows": rows,
        "floors": floors,
        "missing": missing,
        "warnings": warnings,
        "versions": versions,
    }
    write_json(out / "report.json", record)
    return record


def protocol_of(config: EvaluateConfig, captions: Sequence[str]) -> dict[str, Any]:
    """All that the numbers of one report have in common, as JSON holds it. Numbers of two protocols share no
    table."""
    shared = (
        "num_images",
        "seed",
        "height",
        "width",
        "max_sequence_length",
        "negative_prompt",
        "weight_dtype",
        "quantize",
        "inference_shift",
        "teacher_guidance_scale",
        "teacher_steps",
    )
    return {
        "pipeline": Path(config.pretrained_model_name_or_path).name,
        "captions": hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:16],
        "num_captions": len(set(captions)),
        **{name: getattr(config, name) for name in shared},
        **({"num_frames": config.num_frames} if config.num_frames > 1 else {}),
    }


class Evaluation:
    """The samplers of one evaluation, whose images are generated and timed.

    captions: one for each image
    Attributes: `rows`, one for each sampler, the teacher's first; `out`, the folder of the samplers' folders.
    """

    def __init__(
        self, step_lora: StepLora, config: EvaluateConfig, captions: Sequence[str], progress: bool = True
    ) -> None:
        self.step_lora, self.config, self.captions = step_lora, config, captions
        self.progress, self.out, self.device = progress, Path(config.output_dir), step_lora.pipe.device
        self.rows: list[Row] = []

    def generate(self, external_models: Sequence[ExternalModel]) -> list[Row]:
        """The rows of all samplers. Whole pipelines come last, one in memory at a time."""
        steps = sorted(set(self.config.steps))
        loras = [model for model in external_models if not model.is_pipeline]
        samplers = [*reference_samplers(self.step_lora, steps, self.config.teacher_steps)]
        for model in loras:  # one that does not fit is refused before anything is generated
            samplers += lora_samplers(self.step_lora, model, steps)
        self.add(samplers)
        for model in external_models:
            if model.is_pipeline:
                self.step_lora.pipe.to("cpu")
                self.add(pipeline_samplers(self.step_lora, model, steps, self.device))
                gc.collect()  # the pipeline, before the next one is loaded
        return self.rows

    def add(self, samplers: Iterable[Sampler]) -> None:
        """Generates and times samplers, and adds their rows."""
        samplers, count = list(samplers), len(self.captions)
        missing = sum(len(missing_images(self.out / sampler.name, count)) for sampler in samplers)
        with tqdm(total=missing, desc="generating", unit="image", disable=not self.progress) as bar:
            for sampler in samplers:
                self.rows.append(self.row_of(sampler, bar))

    def row_of(self, sampler: Sampler, bar: Any) -> Row:
        """What is known of a sampler before its images are measured."""
        family, config, folder = self.step_lora.family, self.config, self.out / sampler.name
        teacher = self.out / self.rows[0]["name"] if self.rows else None
        generate_set(
            sampler, family, self.captions, folder, config.seed, config.batch_size, teacher, bar.update
        )
        latency = stored_latency(
            sampler, family, self.captions, folder, config.seed, config.latency_repeats, self.device
        )
        return {
            "name": sampler.name,
            "kind": sampler.kind,
            "label": sampler.label,
            "steps": sampler.steps,
            "settings": sampler.settings,
            "endpoint_distance": stored_distance(folder, len(self.captions)),
            **latency,
        }


def warnings_of(config: EvaluateConfig, references: int, distances: bool) -> list[str]:
    """What a reader of the numbers has to know.

    references: number of reference images
    distances: whether there are Frechet distances among the numbers
    """
    warnings = []
    if distances and config.num_images < ENOUGH:
        warnings.append(
            f"{config.num_images} images: a Frechet distance of so few is biased upward, and the bias "
            f"differs between samplers (Inception's covariance is singular below {ENOUGH}); compare nothing "
            "with numbers of another count"
        )
    if distances and config.reference_dir and references < ENOUGH:
        warnings.append(f"the reference has {references} images, fewer than {ENOUGH}: the same holds for it")
    if config.num_frames > 1:
        warnings.append(
            "the metrics of images see one frame of each video, the one in its middle, and nothing of how it "
            "moves; the endpoint distance is of all frames' latents, and the mean change of a pixel from one "
            "frame to the next, of a range of 1, says whether a video stands still: neither more nor less is "
            "better, the teacher's is meant"
        )
    if not config.prompts:
        warnings.append(
            "the captions are those of the run's own training: captions that it never saw say more"
        )
    return warnings
