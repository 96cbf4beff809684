"""CIFAR-10: flows trained from scratch, and one of them distilled, at equal network evaluations.

A training is a folder under plan.cells, which a killed one goes on in. An example's forward counts 1
evaluation, its backward 2 (1 where only a LoRA is trained).
"""

import json
import math
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchvision.transforms.functional import to_pil_image

from experiments.recipes import short_decay
from experiments.runner import Job
from experiments.stored import from_stored
from experiments.testbeds import Field, Walk
from experiments.testbeds.cifar_judge import Judge, Sampler, Samples
from scfm.data.labelled_images import LabelledImages, load_labelled_images
from scfm.method.distill import STEP_SCALED
from scfm.method.ema import shorten
from scfm.method.flow import sample, time_grid
from scfm.models.lora import WEIGHT_NAME
from scfm.models.pixels import save_pipeline
from scfm.models.unet import UNetFlow, header_of, load_flow
from scfm.training.config import DistillConfig
from scfm.training.distill_trainer import finalize, init_trainer
from scfm.training.flow_config import SHORTCUT, FlowConfig
from scfm.training.flow_trainer import pretrain

NFE = (1, 2, 4, 8, 16, 32, 64)
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"non_shortcut_ratio": 1.0},
    "scfm 1/8": {"non_shortcut_ratio": 0.875},
    "scfm 1/4": {"non_shortcut_ratio": 0.75},
    "scfm 1/2": {"non_shortcut_ratio": 0.5},
    "shortcut": SHORTCUT,
    "step_scaled 1/4": {"non_shortcut_ratio": 0.75, "algorithm": STEP_SCALED},
}
DISTILLED, LORA, SCALED = "plain, distilled", "plain, LoRA", "plain, step_scaled"
TEACHERS_SHARE = 0.8  # of the budget goes to the teacher of these three, the rest to distilling
LORA_IMAGES = 1000  # real images that the LoRA is trained on
SEARCH_NOISES, GOAL_STEPS = 32, 64  # of the search for scales
SEARCH_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {"global_batch_size": 8, "learning_rate": 1e-3, "lr_warmup_steps": 2, "ema_decay_slow": 0.9},
    "nano": {
        "global_batch_size": 32,
        "learning_rate": 2e-3,
        "lr_warmup_steps": 400,
        "ema_decay_slow": 0.998,
        "weight_dtype": "bf16",
        "checkpointing_steps": 250,
    },
    "small": {
        "global_batch_size": 32,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 400,
        "ema_decay_slow": 0.998,
        "weight_dtype": "bf16",
        "checkpointing_steps": 100,
    },
    "full": {
        "global_batch_size": 256,
        "learning_rate": 2e-4,
        "lr_warmup_steps": 1000,
        "ema_decay_slow": 0.999,
        "weight_dtype": "bf16",
        "checkpointing_steps": 500,
    },
}


class Plan(NamedTuple):
    """What all trainings and measurements share. data: the folder of the parquet files; budget: network
    evaluations of a training; count: images of a measurement; nfe: evaluations of one; searched: step counts
    of the search for scales.
    """

    data: str
    cells: Path
    size: str = "nano"
    budget: int = 600_000
    count: int = 2000
    previews: int = 2000
    inception: str = ""
    nfe: tuple = NFE
    searched: tuple = NFE[:-1]

    @property
    def recipe(self) -> dict[str, Any]:
        return RECIPES[self.size]


def safe(name: str) -> str:
    """A name as part of a file's name."""
    return name.replace(", ", "-").replace(" ", "-").replace("/", "_")


def job_of(name: str, seed: int) -> Job:
    """The training of a method with a seed."""
    return Job("cifar", name, name, "CIFAR-10", seed)


def steps_for(budget: float, recipe: dict[str, Any], non_shortcut_ratio: float) -> int:
    """Training steps that cost `budget` network evaluations: an example costs 3, one with jumps 5. ValueError
    when it buys none.
    """
    batch = recipe["global_batch_size"]
    steps = math.floor(budget / batch / (3 + 2 * (1 - non_shortcut_ratio)))
    if steps < 1:
        raise ValueError(f"{budget:g} network evaluations buy no step of {batch} examples: give more")
    return steps


def shortened(steps: int) -> dict[str, float]:
    """The paper's EMA decays, as short as the run."""
    return {"ema_decay_fast": shorten(0.99, steps), "ema_decay_slow": shorten(0.999, steps)}


def flow_notes(path: Path) -> dict[str, int]:
    """{"train_steps", "evaluations"} of the training of a flow; the first cells call the former "updates"."""
    notes = json.loads(header_of(path)["notes"])
    steps = notes.get("train_steps", notes.get("updates"))
    return {"train_steps": steps, "evaluations": notes["evaluations"]}


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of a training, by today's names."""
    return from_stored(json.loads((folder / "config.json").read_text()))


class Cifar10:
    """The `Testbed` of flows on CIFAR-10. A job's family names the method, its seed is that of training.

    should_stop: asked after each training step; then the training stays where it is.
    """

    shift = 1.0

    def __init__(self, plan: Plan, should_stop: Callable[[], bool] = lambda: False):
        self.plan, self.should_stop = plan, should_stop
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def images(self) -> LabelledImages:
        return load_labelled_images(self.plan.data)

    @cached_property
    def samples(self) -> Samples:
        return Samples(self.plan.cells, self.plan.count, self.device)

    @cached_property
    def eyes(self) -> Judge:
        return Judge(self.plan.data, self.plan.cells, self.plan.count, self.device, self.plan.inception)

    def folder(self, job: Job) -> Path:
        return self.plan.cells / f"{safe(job.family)}-{job.seed}"

    def flow_file(self, job: Job) -> Path:
        return self.folder(job) / "flow.safetensors"

    def teacher_file(self, job: Job) -> Path:
        """The plain flow at the share of the budget that a teacher gets."""
        return self.plan.cells / f"plain-{job.seed}" / "kept.safetensors"

    def teacher(self, job: Job) -> tuple[UNetFlow, str]:
        path = self.teacher_file(job)
        return load_flow(path).to(self.device), str(path)

    def batches(self, job: Job) -> LabelledImages:
        """The training images; the trainer draws from them by the job's seed."""
        return self.images

    def search(self, job: Job, teacher: Field) -> tuple[Walk, torch.Tensor]:
        """From noises and labels that no judge sees."""
        generator = torch.Generator().manual_seed(1000 + job.seed)
        noise = torch.randn(SEARCH_NOISES, 3, 32, 32, generator=generator).to(self.device)
        labels = (torch.arange(SEARCH_NOISES) % 10).to(self.device)

        def walk(velocity: Field, steps: int) -> torch.Tensor:
            return sample(velocity, noise, time_grid(steps), labels)

        return walk, walk(teacher, GOAL_STEPS)

    def judge(self, job: Job) -> Callable[..., dict[str, Any]]:
        """measure(sampler, nfe, solver, about) -> the marks of its images, both stored as files; see
        `Judge.scores`. A sampler stands here for a field: sampler(labels, noise, steps, solver) -> images.
        about: what the file says beside.
        """

        def measure(
            sampler: Sampler | None, nfe: int, solver: str = "euler", about: dict | None = None
        ) -> dict:
            path = self.samples.generate(f"{safe(job.label)}-{job.seed}", sampler, nfe, solver)
            return self.eyes.score_file(path, {"solver": solver, "nfe": nfe}, about or {})

        return measure

    def train(self, job: Job) -> Path | None:
        """One method to the end of its budget; the file of the result, or None when it was stopped."""
        if job.family == LORA:
            return self._train_lora(job)
        if job.family in (DISTILLED, SCALED):
            return self._distil(job)
        if job.family == "plain" and not self.teacher_file(job).is_file():
            flow = self._train_flow(job, TEACHERS_SHARE)
            if flow is None:
                return None
            shutil.copy(flow, self.teacher_file(job))
        return self._train_flow(job)

    def _train_flow(self, job: Job, share: float = 1.0) -> Path | None:
        """Up to a share of the budget."""
        plan, change = self.plan, METHODS[job.family]
        steps = steps_for(plan.budget * share, plan.recipe, change["non_shortcut_ratio"])
        if change.get("algorithm") == STEP_SCALED:
            change = {**change, "ema_decay": short_decay(steps)}
        return self._pretrain(job, {"max_train_steps": steps, "validation_steps": plan.previews, **change})

    def _distil(self, job: Job) -> Path | None:
        """The teacher with all weights, by Algorithm 2, or with the scale trained in as the step size."""
        plan = self.plan
        steps = steps_for(plan.budget * (1 - TEACHERS_SHARE), plan.recipe, 0.0)
        if job.family == SCALED:
            way: dict[str, Any] = {"algorithm": STEP_SCALED, "ema_decay": short_decay(steps)}
        else:
            way = {"algorithm": "dual", "teacher_ratio": 0.4, **shortened(steps)}
        return self._pretrain(
            job,
            {
                "max_train_steps": steps,
                "validation_steps": 0,
                "teacher": str(self.teacher_file(job)),
                "non_shortcut_ratio": 0.0,
                **way,
                "learning_rate": plan.recipe["learning_rate"] / 4,
                "lr_warmup_steps": min(50, steps // 4),
            },
        )

    def _pretrain(self, job: Job, change: dict[str, Any]) -> Path | None:
        plan, flow = self.plan, self.flow_file(job)
        settings = {"train_data_dir": plan.data, "output_dir": str(self.folder(job)), "size": plan.size}
        config = FlowConfig(**{**plan.recipe, **settings, "seed": job.seed, **change})
        if flow.is_file() and flow_notes(flow)["train_steps"] >= config.max_train_steps:
            return flow
        return flow if pretrain(config, self.should_stop, images=self.batches(job)) else None

    def _train_lora(self, job: Job) -> Path | None:
        """The teacher distilled by `scfm distill`: a LoRA on frozen weights.

        An example costs 4: the student's forward, a backward through frozen weights, two jumps. The selection
        of what is saved is not counted.
        """
        path = self.folder(job) / WEIGHT_NAME
        if path.is_file():
            return path
        pipeline = self.teacher_file(job).with_name("kept_pipeline")  # `pipeline` is that of the whole budget
        if not pipeline.is_dir():
            save_pipeline(load_flow(self.teacher_file(job)), self.images.names, pipeline)
        trainer = init_trainer(self._lora_config(job, pipeline))
        trainer.train(should_stop=self.should_stop)
        return path if finalize(trainer) and trainer.global_step == trainer.config.max_train_steps else None

    def _lora_config(self, job: Job, pipeline: Path) -> DistillConfig:
        plan, batch = self.plan, self.plan.recipe["global_batch_size"]
        steps = max(1, round(plan.budget * (1 - TEACHERS_SHARE)) // (4 * batch))
        return DistillConfig(
            pretrained_model_name_or_path=str(pipeline),
            train_data_dir=str(self.image_folder()),
            output_dir=str(self.folder(job)),
            cache_dir=str(plan.cells / "cache"),
            height=32,
            width=32,
            max_sequence_length=1,
            algorithm="dual",
            rank=16,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            global_batch_size=batch,
            max_train_steps=steps,
            seed=job.seed,
            guidance_scale_range=(1.0, 1.0),
            teacher_guidance_scale=1.0,
            shift=(1.0, 2.0),
            inference_shift=1.0,
            **shortened(steps),
            validation_steps=0,
            select_adapter="ema_slow",
            report_to="none",
            checkpointing_steps=plan.recipe.get("checkpointing_steps", 100),
            num_eval_prompts=min(32, plan.count),
        )

    def image_folder(self) -> Path:
        """The first `LORA_IMAGES` training images as an image folder with captions; written once."""
        folder, part = self.plan.cells / "images", self.plan.cells / "images.part"
        if folder.is_dir():
            return folder
        part.mkdir(parents=True, exist_ok=True)
        lines = []
        first = zip(self.images.pixels[:LORA_IMAGES], self.images.labels[:LORA_IMAGES], strict=True)
        for i, (pixels, label) in enumerate(first):
            to_pil_image(pixels).save(part / f"{i:05d}.png")
            lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": f"a {self.images.names[label]}"}))
        (part / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return part.replace(folder)
