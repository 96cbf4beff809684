"""What every training run has: one loop, gradients of several processes, validation, checkpoints, resume."""

import atexit
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from scfm.files import lock_folder, unlock_folder
from scfm.method.consistency import Jumps
from scfm.method.distill import Batch, StepOutput, TimeBins, parameter_groups, train_step, training_loop
from scfm.training.checkpoint import latest, save_checkpoint, set_aside
from scfm.training.config import as_json
from scfm.training.output_dir import init_output_dir, refuse_strangers

log = logging.getLogger(__name__)
OPTIMIZER_SETTINGS = ("learning_rate", "adam_weight_decay", "max_grad_norm", "lr_scheduler")


def make_accelerator(**more: Any) -> Accelerator:
    """An Accelerator that the environment of somebody's `accelerate config` cannot make accumulate or change
    precision."""
    return Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), mixed_precision="no", **more
    )


class StepPlan(NamedTuple):
    """The examples of a training step. jumps: of all of them; places: (m,) which of them this process
    computes, in order.

    batches: this process's, drawn lazily: each may change the state of the models before it is
    handed out.
    """

    jumps: Jumps
    places: torch.Tensor
    batches: Iterable[Batch]


class Trainer(ABC):
    """A run: everything that it writes lies under config.output_dir.

    A subclass makes `models`, `emas`, `optimizer` and `scheduler`, and knows the examples of each step
    (`plan_step`), what a
    checkpoint holds (`state_dict`, `load_state_dict`) and what validation shows (`validate`).
    Attributes: config, output_dir, accelerator, is_main, global_step (steps done), bins (loss by time);
    `takes_all`: whether the models are shared, so that every forward is one of all processes: then all
    validate, and the first writes.
    """

    takes_all = False

    models: Any
    emas: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any

    def __init__(self, config: Any, accelerator: Accelerator, progress: bool = True) -> None:
        self.config, self.output_dir = config, Path(config.output_dir)
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.progress = progress and self.is_main
        self.bins, self.global_step = TimeBins(), 0
        if config.global_batch_size % accelerator.num_processes:
            raise ValueError(
                f"global_batch_size {config.global_batch_size} cannot be dealt evenly to "
                f"{accelerator.num_processes} processes"
            )

    @abstractmethod
    def plan_step(self, step: int) -> StepPlan:
        """The examples of training step number `step`, keyed by the seed and the number alone."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes: tensors, numbers and strings, in dicts and lists."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""

    @abstractmethod
    def validate(self) -> torch.Tensor | None:
        """Writes what people look at during the run, in the main process; returns an image (3, H, W) for the
        trackers, or None."""

    def take_folder(self, inputs: dict[str, str]) -> None:
        """Makes the folder this run's own, see `init_output_dir`. ValueError when another process trains in
        it."""
        if self.is_main:
            refuse_strangers(self.output_dir)
            lock_folder(self.output_dir)
            atexit.register(unlock_folder, self.output_dir)
        try:
            init_output_dir(self.output_dir, self.config, inputs)
        except ValueError:
            self.close()
            raise

    def train(self, until: int | None = None, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Steps up to `until` (config.max_train_steps when None), or until should_stop() holds in any process
        after a step."""
        last_step: int = self.config.max_train_steps if until is None else until
        clock = time.perf_counter()
        if self.is_main:
            set_aside(self.output_dir, self.global_step)  # of a run that went back to an earlier one

        def after(step: int, output: StepOutput) -> bool:
            nonlocal clock
            self.log(output, time.perf_counter() - clock)
            clock = time.perf_counter()
            last = self.global_step == self.config.max_train_steps or self.any_process(should_stop())
            self.save_and_validate(last)
            return last

        training_loop(
            self.train_step,
            last_step,
            self.global_step,
            after,
            self.progress,
            self.output_dir.name,
            self.bins,
        )

    def train_step(self, step: int) -> StepOutput:
        """The next step; its output is of all examples, whichever process had them."""
        plan = self.plan_step(step)
        try:
            output = train_step(
                self.models,
                self.emas,
                self.optimizer,
                plan.batches,
                self.config,
                self.accelerator.backward,
                self.config.global_batch_size,
                lambda losses: self.sync(losses, plan.places),
            )
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}; the last good state is {latest(self.output_dir) or 'none'}"
            ) from None
        self.scheduler.step()
        self.global_step = step + 1
        return StepOutput(output.losses, plan.jumps, output.norm)

    def sync(self, losses: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Gives every process the gradient of the whole step, the sum of what each has from its own examples,
        and all losses.

        Nothing is wrapped: the gradients are added up in the open, so that a model that is looked up by name
        is what it was.
        """
        everyone = torch.zeros(self.config.global_batch_size, device=self.accelerator.device)
        everyone[places] = losses.to(everyone.device)
        for weight in self.models.parameters("student"):
            if weight.grad is None:  # no example of this step, or of this process, trains it
                weight.grad = torch.zeros_like(weight)
        if self.accelerator.num_processes == 1:
            return everyone.cpu()
        self.sum_gradients()
        return self.accelerator.reduce(everyone, "sum").cpu()  # type: ignore[union-attr]

    def sum_gradients(self) -> None:
        """The student's gradients become their sums over the processes, by one message in place of one for
        each of some 1,000 tensors."""
        gradients: list[Any] = [weight.grad for weight in self.models.parameters("student")]
        together: Any = self.accelerator.reduce(torch.cat([grad.flatten() for grad in gradients]), "sum")
        for grad, part in zip(gradients, together.split([grad.numel() for grad in gradients]), strict=True):
            grad.copy_(part.view_as(grad))

    def any_process(self, yes: bool) -> bool:
        """True when `yes` holds in any process: all must agree to leave, or some would wait for the others
        for ever."""
        if self.accelerator.num_processes == 1:
            return yes
        votes: Any = self.accelerator.reduce(torch.tensor(float(yes), device=self.accelerator.device), "sum")
        return bool(votes > 0)

    def log(self, output: StepOutput, seconds: float) -> None:
        """Hands a step's numbers to the trackers."""
        values = {
            "loss": float(output.losses.mean()),
            "gradient norm": output.norm,
            "lr": self.scheduler.get_last_lr()[0],
            "seconds": seconds,
        }
        self.accelerator.log(values, step=self.global_step)

    def save_and_validate(self, last: bool) -> None:
        """What is due after a step: a checkpoint, validation; both after the last one."""
        config = self.config
        if self.is_main and (self.global_step % config.checkpointing_steps == 0 or last):
            self.save()
        if (
            (self.is_main or self.takes_all)
            and config.validation_steps
            and (self.global_step % config.validation_steps == 0 or last)
        ):
            image = self.validate()
            for tracker in self.accelerator.trackers if image is not None else ():
                tracker.log_images({"validation": image[None]}, step=self.global_step)  # type: ignore[index]

    def save(self) -> Path:
        """Writes a checkpoint; returns its folder."""
        state = self.state_dict() | {
            "config": as_json(self.config),
            "step": self.global_step,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "bins": [self.bins.total, self.bins.count],
        }
        return save_checkpoint(self.output_dir, self.global_step, state, self.config.checkpoints_total_limit)

    def restore(self, state: dict[str, Any]) -> int:
        """Goes on from the state of a checkpoint; returns the number of steps done."""
        if state["step"] > self.config.max_train_steps:
            raise ValueError(
                f"max_train_steps={self.config.max_train_steps}: the checkpoint is at {state['step']} already"
            )
        self.load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.follow_config(state["config"])
        self.bins.total, self.bins.count = state["bins"]
        self.global_step = state["step"]
        return self.global_step

    def follow_config(self, old: dict[str, Any]) -> None:
        """The optimizer's settings are those of this run's config, whatever run the checkpoint is of."""
        config = self.config
        self.scheduler.base_lrs = [group["lr"] for group in parameter_groups(self.models, config)]
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["initial_lr"], group["weight_decay"] = base, config.adam_weight_decay
        rates = [
            base * rate(self.scheduler.last_epoch)
            for base, rate in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        self.scheduler._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        changed = [name for name in OPTIMIZER_SETTINGS if old.get(name) != getattr(config, name)]
        if changed and self.is_main:
            values = "; ".join(
                f"{name} {old.get(name)} before, {getattr(config, name)} from here" for name in changed
            )
            log.warning("the checkpoint is of a run with another %s (%s)", ", ".join(changed), values)

    def close(self) -> None:
        """Lets another process have the folder."""
        if self.is_main:
            unlock_folder(self.output_dir)
