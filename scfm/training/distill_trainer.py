"""One distillation of a pipeline, on one process or several: `scfm distill`."""
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from scfm.data.cache import batch_indices
from scfm.data.prepare import check_inputs, check_processes, data_of, make_data
from scfm.method.consistency import keyed_generator, scfm_loss
from scfm.method.distill import TimeBins, optimizer_step, jumps_from_config, make_emas, make_optimizer
from scfm.models.family import velocities
from scfm.models.loading import DTYPES, load_pipeline
from scfm.models.lora import ADAPTERS, LoraModels, adapter_state, load_adapter_state
from scfm.models.sampling import on_device
from scfm.training.checkpoint import find_checkpoint, latest, load_checkpoint, save_checkpoint
from scfm.training.config import init_output_dir
from scfm.training.selection import finish, preview


class DistillTrainer:
    """One distillation of a pipeline: prepare, train, save. Everything it writes lies under config.out.

    Attributes: config, accelerator, rows (`CachedDataset`), pipe (the transformer alone: no encoders, no VAE), families by size,
    family (of the main size), models, emas, optimizer, scheduler, update (updates done).
    """

    def __init__(self, config, progress=True):
        config.check()
        self.config, self.out = config, Path(config.output_dir)
        self.accelerator = Accelerator(log_with=None if config.report_to == "none" else config.report_to, project_dir=config.output_dir)
        self.main = self.accelerator.is_main_process
        self.progress = progress and self.main
        if config.global_batch_size % self.accelerator.num_processes:
            raise ValueError(f"batch {config.global_batch_size} cannot be dealt evenly to {self.accelerator.num_processes} processes")
        check_processes(self.accelerator)
        check_inputs(config)                          # before a folder of ours is made
        self.resume_from = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        with self.accelerator.main_process_first():
            init_output_dir(self.out, config)
        _, self.rows = make_data(data_of(config), self.accelerator, progress)
        self.pipe, _ = load_pipeline(config.pretrained_model_name_or_path, DTYPES[config.weight_dtype], self.accelerator.device, "transformer",
                                     config.quantize)
        self.families = data_of(config).families_of(self.pipe)
        for family in self.families.values():
            family.encode_text = self.rows.text_of    # of the run's own captions: no encoder is loaded
        self.family = self.families[config.height, config.width]
        self.models = self.make_models()
        self.optimizer, self.scheduler = make_optimizer(self.models, config)
        self.emas = make_emas(self.models, config)
        self.bins, self.update, self.teacher_row = TimeBins(), 0, None

    def make_models(self):
        config, transformer = self.config, self.pipe.transformer
        velocity, teachers = velocities(self.family, config.guidance_mode)    # an impossible mode is named here
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
            transformer.train()
        torch.backends.cuda.matmul.allow_tf32 = config.weight_dtype == "bf16"     # the adapters' float32 products on tensor cores
        torch.manual_seed(config.seed)                # PEFT draws A from the global state
        return LoraModels(transformer, velocity, config.lora_layers or self.family.lora_targets, config.rank,
                            config.lora_alpha or None, teacher_velocity=teachers)

    def train(self, until=None, keep_going=lambda: True):
        """Updates up to `until` (config.updates when None), or until keep_going() says no, in any process, at an update's end."""
        config = self.config
        until = config.max_train_steps if until is None else until
        with tqdm(total=config.max_train_steps, initial=self.update, desc="distilling", disable=not self.progress) as bar:
            while self.update < until:
                begun = time.perf_counter()
                losses, jumps, norm = self.one()
                self.bins.add(losses, jumps.t1)
                self.accelerator.log({"loss": float(losses.mean()), "gradient norm": norm, "lr": self.scheduler.get_last_lr()[0],
                                      "seconds": time.perf_counter() - begun}, step=self.update)
                bar.update(1)
                bar.set_postfix_str(str(self.bins), refresh=False)
                if self.write(self.update == config.max_train_steps or self.anybody(not keep_going())):
                    break

    def write(self, last):
        """What is due after an update: a checkpoint, a preview; both after the last one. Returns `last`."""
        config = self.config
        if self.main and (self.update % config.checkpointing_steps == 0 or last):
            self.save_state()
        if self.main and config.validation_steps and (self.update % config.validation_steps == 0 or last):
            image = preview(self)
            for tracker in self.accelerator.trackers:
                tracker.log_images({"preview": image[None]}, step=self.update)
        return last

    def one(self):
        """The next update; returns (losses (B,), `Jumps`, gradient norm) of all its rows, whichever process had them."""
        config, device = self.config, self.accelerator.device
        index = batch_indices(self.update, config.global_batch_size, self.rows.size_of, config.seed)
        jumps, guidance = self.draw(index)
        losses = torch.zeros(config.global_batch_size, device=device)
        for part in self.parts(index):
            size = self.rows.sizes[self.rows.size_of[index[part[0]]]]
            self.turn_to(size)
            data = self.rows.latents(index[part]).to(device)
            cond = on_device({**self.rows.text(index[part]), "guidance": guidance[part]}, device)
            found = scfm_loss(data, self.noise(part, self.families[size]).to(device), jumps.rows(part).to(device), self.models,
                              cond, config.algorithm, config.loss)
            self.accelerator.backward(found.sum() / config.global_batch_size)
            losses[part] = found.detach().float()
        self.turn_to((config.height, config.width))
        losses = self.accelerator.reduce(losses, "sum").cpu()
        self.add_gradients()
        try:
            if not torch.isfinite(losses).all():
                raise FloatingPointError(f"a loss of update {self.update + 1} is not finite: try a lower lr, or fp32")
            norm = optimizer_step(self.models, self.emas, self.optimizer, config)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; the last good state is {latest(self.out) or 'none'}") from None
        self.scheduler.step()
        self.update += 1
        return losses, jumps, norm


def draw(self, index):
    """`Jumps` and guidance scales (B,) of the rows of this update, keyed by seed and update; index: (B,) into self.rows."""
    config = self.config
    own = [self.families[size].dynamic_shift for size in self.rows.sizes]
    own = None if None in own else torch.tensor(own)[self.rows.size_of[index]]
    dtype = self.family.time_dtype
    jumps = jumps_from_config(config, config.global_batch_size, keyed_generator(config.seed, self.update), dtype, own)
    low, high = config.guidance_scale_range
    return jumps, low + (high - low) * torch.rand(config.global_batch_size, generator=keyed_generator(config.seed, self.update, stream=2))


def parts(self, index):
    """This process's rows of an update as lists of places in it: of one size each, at most config.micro_batch_size long."""
    count = self.config.global_batch_size // self.accelerator.num_processes
    mine = torch.arange(count) + count * self.accelerator.process_index
    size = self.rows.size_of[index[mine]]
    alike = [mine[size == s] for s in size.unique()]
    return [part for rows in alike for part in rows.split(self.config.micro_batch_size or count)]


def noise(self, part, family):
    """(n, *latent_shape) for the rows at these places of the update: each row's own, whatever its company."""
    place = lambda j: self.update * self.config.global_batch_size + int(j)
    return torch.stack([torch.randn(family.latent_shape, generator=keyed_generator(self.config.seed, place(j), stream=4))
                        for j in part])


def turn_to(self, size):
    """All models now read latents of this size: a family's velocity knows where in the image a latent lies."""
    self.models.velocity, self.models.teacher_velocity = velocities(self.families[size], self.config.guidance_mode)


def add_gradients(self):
    """Gives every process the gradient of the whole update: the sum of what each has from its own rows."""
    if self.accelerator.num_processes > 1:
        for weight in self.models.parameters("student"):
            weight.grad = self.accelerator.reduce(weight.grad, "sum")


def anybody(self, yes):
    """True when `yes` holds in any process: all must agree to leave, or some would wait for the others for ever."""
    if self.accelerator.num_processes == 1:
        return yes
    return bool(self.accelerator.reduce(torch.tensor(float(yes), device=self.accelerator.device), "sum") > 0)


DistillTrainer.draw, DistillTrainer.parts, DistillTrainer.noise, DistillTrainer.turn_to = draw, parts, noise, turn_to
DistillTrainer.add_gradients, DistillTrainer.anybody = add_gradients, anybody


def save_state(self):
    """A checkpoint of everything that an update changes: three adapters, the optimizer, the counters. Never the base."""
    state = {"update": self.update, "adapters": {n: adapter_state(self.models.transformer, n) for n in ADAPTERS},
             "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(), "ema_updates": self.emas.updates}
    return save_checkpoint(self.out, self.update, state, self.config.checkpoints_total_limit)


def resume(self):
    """Continues from the checkpoint that config.resume means, if there is one; returns the number of updates done."""
    if self.resume_from:
        state = load_checkpoint(self.resume_from)
        for name in ADAPTERS:
            load_adapter_state(self.models.transformer, name, state["adapters"][name])
        self.models.transformer.set_adapter("student")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.update, self.emas.updates = state["update"], state["ema_updates"]
    return self.update


DistillTrainer.save_state, DistillTrainer.resume = save_state, resume


def begin(config, progress=True):
    """A `DistillTrainer` that is ready to train, where an earlier call was killed if there was one, with its tracker."""
    run = DistillTrainer(config, progress)
    run.resume()
    told = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in asdict(config).items()}
    run.accelerator.init_trackers("logs", told)
    return run


def end(run):
    """The record of `finish`: the first process judges and writes the LoRA, the others have nothing left to do (None)."""
    run.accelerator.end_training()
    return finish(run) if run.main else None


def distill_pipeline(config, progress=True):
    """Everything from the pipeline's folder to the LoRA, as `scfm distill` does it; returns the record of `finish`."""
    run = begin(config, progress)
    run.train()
    return end(run)
