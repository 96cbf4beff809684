"""Pre-training of few-step flows on labelled images, and their distillation: `scfm pretrain`."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from scfm.data.labelled_images import LabelledImages, load_labelled_images
from scfm.files import atomic_write
from scfm.method.consistency import Jumps
from scfm.method.distill import Batch, StepOutput, make_emas, make_optimizer, sample_batch
from scfm.method.ema import EMA
from scfm.method.metrics import endpoint_distance
from scfm.models.pixels import save_pipeline
from scfm.models.unet import drop_labels, generate
from scfm.streams import Stream, keyed_generator
from scfm.training.checkpoint import latest, load_checkpoint, refuse_fewer_steps
from scfm.training.flow_config import LEVELS, FlowConfig
from scfm.training.flow_models import FlowModels, make_models
from scfm.training.trainer import StepPlan, Trainer, make_accelerator
from scfm.types import Averages


def sample_images(
    config: FlowConfig, step: int, images: LabelledImages
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(numbers (B,), mirrored (B,) bool, labels (B,)) of a step: drawn with replacement, labels hidden here
    and there."""
    generator = keyed_generator(config.seed, step, Stream.DATA)
    numbers = torch.randint(len(images.labels), (config.global_batch_size,), generator=generator)
    mirrored = torch.rand(config.global_batch_size, generator=generator) < 0.5 * config.random_flip
    labels = drop_labels(images.labels[numbers], config.label_dropout, len(images.names), generator)
    return numbers, mirrored, labels


def load_pixels(images: LabelledImages, numbers: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) in [-1, 1] of the images with these numbers."""
    data = images.pixels[numbers].float() / 127.5 - 1
    return torch.where(mirrored[:, None, None, None], data.flip(-1), data)


def with_level(labels: torch.Tensor, jumps: Jumps) -> torch.Tensor:
    """Labels (B,) -> (B, 2): beside each the level of its jump, log2(1 / jump); flow-matching examples get
    the last one."""
    level = jumps.steps.clamp(min=2).log2().long() - 1  # a jump is 2 of `steps`
    return torch.stack([labels, torch.where(jumps.is_flow, LEVELS - 1, level)], 1)


def evaluations(jumps: Jumps) -> int:
    """Network evaluations of a step: an example's forward counts 1, its backward 2, each step of its jump 1
    (none for flow)."""
    return 3 * len(jumps.steps) + (jumps.times.shape[1] - 1) * int((~jumps.is_flow).sum())


class FlowTrainer(Trainer):
    """A flow on labelled images, from scratch or distilled. images: what config.train_data_dir would give."""

    config: FlowConfig

    def __init__(
        self, config: FlowConfig, progress: bool = True, images: LabelledImages | None = None
    ) -> None:
        config.check()
        super().__init__(config, make_accelerator(), progress)
        self.images = images or load_labelled_images(config.train_data_dir)
        torch.manual_seed(config.seed)
        refuse_fewer_steps(latest(config.output_dir), config.max_train_steps)
        with self.accelerator.main_process_first():
            self.take_folder({})
        self.models = make_models(config, self.images, self.accelerator.device)
        self.optimizer, self.scheduler = make_optimizer(self.models, config)
        self.emas = self.make_averages()
        self.evaluations = 0

    def make_averages(self) -> Averages:
        """One EMA without a teacher, unless the scale is trained in; else those of the algorithm."""
        config, models = self.config, self.models
        if isinstance(models, FlowModels):
            return EMA(models.parameters("ema_slow"), models.parameters("student"), config.ema_decay_slow)
        return make_emas(models, config)

    def plan_step(self, step: int) -> StepPlan:
        config, device = self.config, self.accelerator.device
        numbers, mirrored, labels = sample_images(config, step, self.images)
        noise, jumps = sample_batch(
            config, step, config.global_batch_size, tuple(self.images.pixels.shape[1:])
        )
        cond = with_level(labels, jumps) if config.method == "shortcut" else labels
        count = config.global_batch_size // self.accelerator.num_processes
        mine = torch.arange(count) + count * self.accelerator.process_index
        data = load_pixels(self.images, numbers[mine], mirrored[mine])
        batch = Batch(
            data.to(device), noise[mine].to(device), jumps.rows(mine).to(device), cond[mine].to(device)
        )
        return StepPlan(jumps, mine, [batch])

    def train_step(self, step: int) -> StepOutput:
        """The next step, with the learning rates of the warm-up; counts the evaluations."""
        warm = min(1, (step + 1) / max(1, self.config.lr_warmup_steps))
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * warm
        output = super().train_step(step)
        if output.jumps is not None:
            self.evaluations += evaluations(output.jumps)
        return output

    @torch.no_grad()
    def validate(self, each: int = 4) -> None:
        """Writes validation/STEP.png, a row per step count from the same noise, and a line of
        validation/quality.jsonl.

        The line holds, for each of config.eval_num_steps but the last, the distance to the endpoints of the
        last: how far few
        steps of this network are from many of its own. Whether the images are good it does not say. each:
        images of a class.
        """
        config, models, device = self.config, self.models, self.accelerator.device
        classes, folder = len(self.images.names), self.output_dir / "validation"
        labels = torch.arange(each * classes, device=device) % classes
        generator = keyed_generator(config.seed, 0, Stream.EVAL)
        noise = torch.randn(len(labels), *self.images.pixels.shape[1:], generator=generator).to(device)
        endpoints = [generate(models.sampled(n), labels, noise, n) for n in config.eval_num_steps]
        grid = make_grid(
            torch.cat([e[:classes] for e in endpoints]).cpu().clamp(-1, 1) / 2 + 0.5, nrow=classes, padding=1
        )
        atomic_write(
            folder / f"{self.global_step:06d}.png", lambda new: to_pil_image(grid).save(new, format="png")
        )
        few = zip(config.eval_num_steps, endpoints[:-1], strict=False)
        line = {
            "step": self.global_step,
            "evaluations": self.evaluations,
            "loss": [round(v, 4) for v in self.bins.values.tolist()],
            "distance": {n: round(endpoint_distance(e, endpoints[-1]), 4) for n, e in few},
        }
        with open(folder / "quality.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> Any:
        """A checkpoint, and what is used afterwards: the average, as flow.safetensors."""
        path = super().save()
        notes = {"train_steps": self.global_step, "evaluations": self.evaluations}
        self.models.save(self.output_dir / "flow.safetensors", notes)
        return path

    def state_dict(self) -> dict[str, Any]:
        """The networks but the teacher, and the counters."""
        return {
            "networks": self.models.state_dict(),
            "evaluations": self.evaluations,
            "ema_updates": self.emas.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.models.load_state_dict(state["networks"])
        self.evaluations, self.emas.updates = state["evaluations"], state["ema_updates"]

    def resume(self) -> int:
        """Goes on from the newest checkpoint, if there is one; returns the number of steps done."""
        newest = latest(self.output_dir)
        return self.restore(load_checkpoint(newest)) if newest else 0


def pretrain(
    config: FlowConfig,
    should_stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
    images: LabelledImages | None = None,
) -> FlowTrainer | None:
    """`scfm pretrain`: trains up to config.max_train_steps, from the newest checkpoint on; None when it was
    stopped.

    At the end the average lies in config.output_dir as flow.safetensors and, unless its input is the step
    size, as a pipeline. Where the scale is trained in, the pipeline is the plain flow, and
    `load_flow(file, steps)` the network for a number of steps.
    """
    trainer = FlowTrainer(config, progress, images)
    if trainer.resume() > config.max_train_steps:
        raise ValueError(
            f"max_train_steps={config.max_train_steps}: {trainer.output_dir} is at "
            f"{trainer.global_step} already"
        )
    trainer.train(should_stop=should_stop)
    if trainer.global_step < config.max_train_steps:
        return None
    if trainer.is_main and config.method == "scfm":
        save_pipeline(trainer.models.sampled(0), trainer.images.names, trainer.output_dir / "pipeline")
    return trainer
