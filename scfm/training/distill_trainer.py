"""One distillation of a pipeline, on one process or several: `scfm distill`."""

from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch

from scfm.data.cache import CachedDataset, batch_indices
from scfm.data.fingerprint import fingerprint
from scfm.data.images import Size
from scfm.data.prepare import (
    Inputs,
    check_processes,
    fingerprint_of,
    make_data,
    make_families,
    read_inputs,
)
from scfm.method.consistency import Jumps
from scfm.method.distill import STEP_SCALED, Batch, jumps_from_config, make_emas, make_optimizer
from scfm.models.blocks import compile_blocks, first_blocks, recompute_blocks
from scfm.models.check import LAYERS
from scfm.models.family import velocities
from scfm.models.loading import DTYPES, load_pipeline
from scfm.models.lora import LoraModels, adapter_state, load_adapter_state
from scfm.models.quantize import require_quantizer
from scfm.models.sampling import on_device
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.models.source import PipelineSource
from scfm.streams import Stream, keyed_generator
from scfm.training.checkpoint import find_checkpoint, load_checkpoint, refuse_fewer_steps
from scfm.training.config import DistillConfig
from scfm.training.optimizer import in_8_bits, require_8bit_adam
from scfm.training.selection import select_and_save, validation_image
from scfm.training.sharding import (
    check_rows,
    check_sharding,
    check_slices,
    full_shapes,
    load_sharded,
    split_into,
)
from scfm.training.trainer import StepPlan, Trainer, make_accelerator
from scfm.types import Family


class DistillTrainer(Trainer):
    """A LoRA on a frozen pipeline, trained by SCFM.

    Attributes beside those of `Trainer`: source (the pipeline's files), dataset (`CachedDataset`), pipe
    (the transformer alone: no encoders, no VAE), families by size, family (of the main size).
    """

    config: DistillConfig

    def __init__(self, config: DistillConfig, progress: bool = True) -> None:
        config.check()
        log_with = None if config.report_to == "none" else config.report_to
        super().__init__(config, make_accelerator(log_with=log_with, project_dir=config.output_dir), progress)
        check_processes(self.accelerator)
        check_sharding(config.shard, self.accelerator.num_processes)
        self.takes_all = bool(config.shard)
        self.source, data = PipelineSource(config.pretrained_model_name_or_path), config.data_config()
        inputs = self.check_inputs(read_inputs(data, self.source))  # before a folder of ours is made
        marks = {
            "transformer": fingerprint(self.source, "transformer", "scheduler"),
            "data": fingerprint_of(inputs),
        }
        self.resume_from = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        refuse_fewer_steps(self.resume_from, config.max_train_steps)
        with self.accelerator.main_process_first():
            self.take_folder(marks)
        dataset = make_data(data, self.source, inputs, self.accelerator, progress)[1]
        assert dataset is not None  # a run's own data are always cached
        self.dataset: CachedDataset = dataset
        self.pipe = self.load_base()
        self.families = make_families(data, self.source, self.pipe)
        for family in self.families.values():
            family.encode_text = self.dataset.text_of  # of the run's own captions: no encoder is loaded
        self.family: Family = self.families[config.height, config.width]
        with full_shapes(self.pipe.transformer):
            self.models = self.make_models()
        if config.compile_blocks:
            compile_blocks(self.pipe.transformer)  # after the LoRA layers have got their own forward
        self.optimizer, self.scheduler = make_optimizer(self.models, config)
        if config.use_8bit_adam:
            self.optimizer, self.scheduler = in_8_bits(self.optimizer, self.scheduler)
        self.emas = make_emas(self.models, config)
        self.teacher_images: torch.Tensor | None = None  # of validation: the teacher does not change

    def load_base(self) -> Any:
        """The pipeline with its transformer alone, whole or this process's slices of it."""
        config, device = self.config, self.accelerator.device
        if config.shard:
            return load_sharded(self.source, DTYPES[config.weight_dtype], device, config.shard)
        dtype = DTYPES[config.weight_dtype]
        parts = "transformer"
        return load_pipeline(self.source, dtype, device, parts, config.quantize, config.blocks_to_swap)[0]

    def check_inputs(self, inputs: Inputs) -> Inputs:
        """ValueError for what the pipeline's configuration rules out: no weight is read."""
        config, source = self.config, self.source
        family = make_families(config.data_config(), source)[config.height, config.width]
        velocities(family, config.guidance_mode)
        require_quantizer(config.quantize)
        if config.shard:
            check_slices(source)
            check_rows(family)
        if config.report_to != "none" and find_spec(config.report_to) is None:
            raise ValueError(
                f"report_to {config.report_to} needs it installed: pip install {config.report_to}, or "
                f"--report_to none"
            )
        check_layers(config.lora_layers, source, family)
        for name in ("checkpoint_blocks", "blocks_to_swap"):
            if getattr(config, name):
                first_blocks(source.empty_transformer(), getattr(config, name), name)
        if config.use_8bit_adam:
            require_8bit_adam(self.accelerator.device)
        return inputs

    def make_models(self) -> LoraModels | ScaledLoraModels:
        """Student, teacher and EMAs on the one transformer."""
        config, transformer = self.config, self.pipe.transformer
        velocity, teacher_velocity = velocities(self.family, config.guidance_mode)
        if config.gradient_checkpointing:
            recompute_blocks(transformer, config.checkpoint_blocks)
        torch.manual_seed(config.seed)  # PEFT draws A from the global state
        targets, alpha = config.lora_layers or self.family.lora_targets, config.lora_alpha or None
        rows = getattr(self.family, "forward_rows", None)
        if config.algorithm == STEP_SCALED:
            # a family that does not say has one row for each example; if not, the first forward says so
            rows = rows or (lambda cond: None)
            teachers = teacher_velocity if config.guidance_mode == "distilled" else None
            return ScaledLoraModels(
                transformer,
                velocity,
                targets,
                config.rank,
                alpha,
                config.scale_order,
                rows,
                teacher_velocity=teachers,
            )
        return LoraModels(
            transformer,
            velocity,
            targets,
            config.rank,
            alpha,
            teacher_velocity=teacher_velocity,
            forward_rows=rows,
        )

    def plan_step(self, step: int) -> StepPlan:
        index = batch_indices(step, self.config.global_batch_size, self.dataset.size_of, self.config.seed)
        jumps, guidance = self.draw(step, index)
        parts = self.micro_batches(index)
        return StepPlan(jumps, torch.cat(parts), self.batches(step, index, parts, jumps, guidance))

    def draw(self, step: int, index: torch.Tensor) -> tuple[Jumps, torch.Tensor]:
        """`Jumps` and guidance scales (B,) of all examples of a step. index: (B,) into the dataset."""
        config, n = self.config, self.config.global_batch_size
        shifts = [self.families[size].dynamic_shift for size in self.dataset.sizes]
        shift = None if None in shifts else torch.tensor(shifts)[self.dataset.size_of[index]]
        jumps = jumps_from_config(
            config,
            n,
            keyed_generator(config.seed, step),
            self.family.time_dtype,
            shift,
            config.dynamic_shift_prob,
        )
        low, high = config.guidance_range
        chance = torch.rand(n, generator=keyed_generator(config.seed, step, Stream.GUIDANCE))
        return jumps, low + (high - low) * chance

    def micro_batches(self, index: torch.Tensor) -> list[torch.Tensor]:
        """This process's examples of a step as places in it: of one size each, at most
        config.micro_batch_size together. Where a forward takes all processes, each has equally many parts."""
        accelerator = self.accelerator
        if not self.takes_all:
            return self.parts_of(index, accelerator.process_index)
        each = [self.parts_of(index, process) for process in range(accelerator.num_processes)]
        return split_into(each[accelerator.process_index], max(map(len, each)))

    def parts_of(self, index: torch.Tensor, process: int) -> list[torch.Tensor]:
        """The fewest micro-batches of one process."""
        count = self.config.global_batch_size // self.accelerator.num_processes
        mine = torch.arange(count) + count * process
        size = self.dataset.size_of[index[mine]]
        present: list[int] = size.unique().tolist()
        alike = [mine[torch.eq(size, s)] for s in present]
        most: int = self.config.micro_batch_size or count
        return [part for places in alike for part in torch.split(places, most)]

    def batches(
        self, step: int, index: torch.Tensor, parts: list[torch.Tensor], jumps: Jumps, guidance: torch.Tensor
    ) -> Iterator[Batch]:
        """The micro-batches on the device; the models read latents of each one's size while it is in use."""
        device = self.accelerator.device
        for part in parts:
            size = self.dataset.sizes[int(self.dataset.size_of[index[part[0]]])]
            self.set_resolution(size)
            cond = on_device({**self.dataset.text(index[part]), "guidance": guidance[part]}, device)
            yield Batch(
                self.dataset.latents(index[part]).to(device),
                self.noise(step, part, size).to(device),
                jumps.rows(part),
                cond,
            )
        self.set_resolution((self.config.height, self.config.width))

    def noise(self, step: int, part: torch.Tensor, size: Size) -> torch.Tensor:
        """(n, *latent_shape) for the examples at these places of a step: each one's own, whatever its
        company."""
        numbers = (step * self.config.global_batch_size + int(place) for place in part)
        generators = (keyed_generator(self.config.seed, number, Stream.EXAMPLE_NOISE) for number in numbers)
        shape = self.families[size].latent_shape
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    def set_resolution(self, size: Size) -> None:
        """All models now read latents of this size: a family's velocity knows where in the image a latent
        lies."""
        pair = velocities(self.families[size], self.config.guidance_mode)
        self.models.velocity, self.models.teacher_velocity = pair

    def validate(self) -> torch.Tensor | None:
        return validation_image(self)

    def state_dict(self) -> dict[str, Any]:
        """All adapters and a counter. Never the base."""
        transformer = self.models.transformer
        return {
            "adapters": {name: adapter_state(transformer, name) for name in self.models.adapter_names},
            "ema_updates": self.emas.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.models.adapter_names:
            load_adapter_state(self.models.transformer, name, state["adapters"][name])
        self.emas.updates = state["ema_updates"]

    def resume(self) -> int:
        """Goes on from the checkpoint that config.resume_from_checkpoint means, if there is one; returns the
        steps done."""
        return self.restore(load_checkpoint(self.resume_from)) if self.resume_from else 0


def check_layers(lora_layers: tuple, source: PipelineSource, family: Family) -> None:
    """ValueError for a name that no layer of the transformer ends with."""
    if not lora_layers:
        return
    names = [
        name for name, module in source.empty_transformer().named_modules() if isinstance(module, LAYERS)
    ]
    for layer in lora_layers:
        if not any(f".{name}".endswith(f".{layer}") for name in names):
            raise ValueError(
                f"lora_layers: {layer} is no linear layer (or convolution) of "
                f"{source.folder.name}: take "
                f"endings such as {', '.join(family.lora_targets[:4])}"
            )


def init_trainer(config: DistillConfig, progress: bool = True) -> DistillTrainer:
    """A `DistillTrainer` that is ready to train, where an earlier call was killed if there was one, with its
    tracker."""
    trainer = DistillTrainer(config, progress)
    trainer.resume()
    settings = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in asdict(config).items()}
    trainer.accelerator.init_trackers("logs", settings)
    return trainer


def finalize(trainer: DistillTrainer) -> dict[str, Any] | None:
    """The record of `select_and_save`: the first process compares and writes the LoRA, the others have
    nothing left to do, unless a forward takes all."""
    if trainer.takes_all:
        record = select_and_save(trainer)
        trainer.accelerator.end_training()
    else:
        trainer.accelerator.end_training()
        record = select_and_save(trainer) if trainer.is_main else None
    trainer.close()
    return record


def distill_pipeline(config: DistillConfig, progress: bool = True) -> dict[str, Any] | None:
    """Everything from the pipeline's folder to the LoRA, as `scfm distill` does it; returns the record of the
    selection."""
    trainer = init_trainer(config, progress)
    trainer.train()
    return finalize(trainer)
