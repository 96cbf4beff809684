"""Student and EMA as LoRA adapters at a scale of its own for every example, for the algorithm step_scaled."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from scfm.method.consistency import index_cond
from scfm.method.lora_scale import scale_powers
from scfm.models.family import without_guidance
from scfm.models.lora import WEIGHT_NAME, AdapterSwitch, adapter_parameters, add_adapters, save_lora
from scfm.types import Condition, FamilyVelocity, VelocityField

MODELS = ("student", "ema")


class ScaledLoraModels:
    """`ScaledModels` as one frozen base with adapters: at scale s, the base + s LoRA 1 (+ s^2 LoRA 2).

    transformer: a diffusers model without adapters
    velocity: calls it, as a `Family`'s velocity: (transformer, x, t, cond) -> velocity
    targets, rank, alpha: as in `add_adapters`
    order: 1 or 2 LoRAs
    forward_rows: a `Family`'s: (cond) -> (rows,), which example each row of a forward is of
    model: what the student's forward goes through where the transformer is wrapped; itself when None
    teacher_velocity: how the teacher calls it, where that differs: with guidance, which the others learn to
        do without. What it adds is there at every scale, so one more LoRA, of power 0, stands before them

    All examples go through one forward, whatever their scales; the teacher's through one of their own where
    it is called otherwise. The student's scales stand until its next forward: gradient checkpointing runs it
    again during backward, and needs the same.
    """

    def __init__(
        self,
        transformer: Any,
        velocity: FamilyVelocity,
        targets: Sequence[str],
        rank: int = 64,
        alpha: int | None = None,
        order: int = 2,
        forward_rows: Callable[[Condition], torch.Tensor | None] = lambda cond: None,
        model: Any = None,
        teacher_velocity: FamilyVelocity | None = None,
    ) -> None:
        self.guidance = teacher_velocity is not None
        self.powers = scale_powers(order, 0 if self.guidance else 1)
        self.adapters = {name: names_of(name, self.powers) for name in MODELS}
        copies = {a: (b,) for a, b in zip(*self.adapters.values(), strict=True)}
        add_adapters(transformer, targets, rank, alpha, copies)
        self.transformer, self.velocity, self.forward_rows = transformer, velocity, forward_rows
        self.teacher_velocity = teacher_velocity or velocity
        self.model = transformer if model is None else model
        self.adapter_names = [adapter for adapters in self.adapters.values() for adapter in adapters]
        self.switch = AdapterSwitch(transformer, (alpha or rank) / rank, self.adapters["student"])
        self.tensors = {name: adapter_parameters(transformer, name) for name in self.adapter_names}
        for name in MODELS:
            for weight in self.parameters(name):
                weight.requires_grad_(name == "student")

    def parameters(self, name: str) -> list[torch.Tensor]:
        """The tensors of "student" or "ema"."""
        return [weight for adapter in self.adapters[name] for weight in self.tensors[adapter]]

    def by_power(self, name: str) -> dict[int, list[torch.Tensor]]:
        """The same by the power of the scale that they are multiplied by: {1: of the first LoRA, 2: ...}."""
        pairs = zip(self.powers, self.adapters[name], strict=True)
        return {power: self.tensors[adapter] for power, adapter in pairs}

    def at(self, name: str, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scale of each adapter of "student" or "ema"; none for "teacher". scales: (rows,), or (1,)."""
        pairs = zip(self.powers, self.adapters.get(name, ()), strict=False)
        return {adapter: scales.float() ** power for power, adapter in pairs}

    def scaled_velocity(
        self, name: str, scales: torch.Tensor, x: torch.Tensor, t: torch.Tensor, cond: Condition = None
    ) -> torch.Tensor:
        """Velocities (B, ...) of "student", with a gradient, or "ema" at x (B, ...) and t (B,), each example
        at its own scale (B,). The EMA's at 0 are the teacher's."""
        is_teacher = scales == 0
        if self.guidance and name == "ema" and is_teacher.any():
            return self._beside_teacher(is_teacher, scales, x, t, cond)
        index = self.forward_rows(without_guidance(cond) if self.guidance else cond)
        rows = scales if index is None else scales[index.to(scales.device)]
        if name == "student":
            self.switch.rest(self.at(name, rows.to(x.device)))  # and stand until backward is through
            return self.velocity(self.model, x, t, cond)
        with self.switch.using(self.at(name, rows.to(x.device))), torch.no_grad():
            return self.velocity(self.transformer, x, t, cond)

    def _beside_teacher(
        self,
        is_teacher: torch.Tensor,
        scales: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: Condition,
    ) -> torch.Tensor:
        """The teacher's velocities where `is_teacher` (B,), the EMA's at their scales elsewhere."""
        rows = is_teacher.nonzero().flatten().to(x.device)
        v = torch.empty_like(x)
        v[rows] = self.field("teacher")(x[rows], t[rows], index_cond(cond, rows)).to(x.dtype)
        rest = (~is_teacher).nonzero().flatten()
        if len(rest):
            rows, some = rest.to(x.device), scales[rest]
            v[rows] = self.scaled_velocity("ema", some, x[rows], t[rows], index_cond(cond, rows)).to(x.dtype)
        return v

    def field(self, name: str, scale: float = 1.0) -> VelocityField:
        """One model at one scale, without a gradient.

        name: "teacher", "student" or "ema"
        scale: at 0 the two are the teacher
        """
        name = name if scale else "teacher"
        call = self.teacher_velocity if name == "teacher" else self.velocity

        def velocity(x: torch.Tensor, t: torch.Tensor, cond: Condition = None) -> torch.Tensor:
            with self.switch.using(self.at(name, torch.tensor([scale], device=x.device))), torch.no_grad():
                return call(self.transformer, x, t, cond)

        return velocity

    def save(self, pipeline_class: Any, folder: str | Path, name: str) -> Path:
        """Writes one model as LoRA files that stock diffusers loads, beside each other under the names of
        `power_file`; returns that of power 1."""
        path = Path(folder) / WEIGHT_NAME
        for power, adapter in zip(self.powers, self.adapters[name], strict=True):
            save_lora(pipeline_class, self.transformer, folder, adapter, power_file(path, power).name)
        return path


def names_of(name: str, powers: Sequence[int]) -> list[str]:
    """The adapters of a model: NAME for power 1, NAME_2 for 2, NAME_0 for 0."""
    return [name if power == 1 else f"{name}_{power}" for power in powers]


def power_file(path: str | Path, power: int) -> Path:
    """Where the LoRA of a power of the scale lies: beside that of power 1, `path`, its name ending in _2, or
    _0."""
    path = Path(path)
    return path if power == 1 else path.with_name(f"{path.stem}_{power}{path.suffix}")
