"""Student and EMA as LoRA adapters at a scale of its own for every example, for the algorithm step_scaled."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

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

    All examples go through one forward, whatever their scales. The student's scales stand until its next
    forward: gradient checkpointing runs it again during backward, and needs the same.
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
    ) -> None:
        self.adapters = {name: names_of(name, order) for name in MODELS}
        copies = {a: (b,) for a, b in zip(*self.adapters.values(), strict=True)}
        add_adapters(transformer, targets, rank, alpha, copies)
        self.transformer, self.velocity, self.forward_rows = transformer, velocity, forward_rows
        self.teacher_velocity = velocity
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
        return {power: self.tensors[adapter] for power, adapter in enumerate(self.adapters[name], 1)}

    def at(self, name: str, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scale of each adapter of "student" or "ema"; none for "teacher". scales: (rows,), or (1,)."""
        return {a: scales.float() ** power for power, a in enumerate(self.adapters.get(name, ()), 1)}

    def scaled_velocity(
        self, name: str, scales: torch.Tensor, x: torch.Tensor, t: torch.Tensor, cond: Condition = None
    ) -> torch.Tensor:
        """Velocities (B, ...) of "student", with a gradient, or "ema" at x (B, ...) and t (B,), each example
        at its own scale (B,)."""
        index = self.forward_rows(cond)
        rows = scales if index is None else scales[index.to(scales.device)]
        if name == "student":
            self.switch.rest(self.at(name, rows.to(x.device)))  # and stand until backward is through
            return self.velocity(self.model, x, t, cond)
        with self.switch.using(self.at(name, rows.to(x.device))), torch.no_grad():
            return self.velocity(self.transformer, x, t, cond)

    def field(self, name: str, scale: float = 1.0) -> VelocityField:
        """One model at one scale, without a gradient.

        name: "teacher", "student" or "ema"
        """
        call = self.teacher_velocity if name == "teacher" else self.velocity

        def velocity(x: torch.Tensor, t: torch.Tensor, cond: Condition = None) -> torch.Tensor:
            with self.switch.using(self.at(name, torch.tensor([scale], device=x.device))), torch.no_grad():
                return call(self.transformer, x, t, cond)

        return velocity

    def save(self, pipeline_class: Any, folder: str | Path, name: str) -> Path:
        """Writes one model as LoRA files that stock diffusers loads, the second beside the first, under the
        name of `second_file`; returns the first."""
        path = Path(folder) / WEIGHT_NAME
        for adapter, file in zip(self.adapters[name], (path, second_file(path)), strict=False):
            save_lora(pipeline_class, self.transformer, folder, adapter, file.name)
        return path


def names_of(name: str, order: int) -> list[str]:
    """The adapters of a model: NAME, and NAME_2 for the second order."""
    return [name, f"{name}_2"][:order]


def second_file(path: str | Path) -> Path:
    """Where the second LoRA of a pair lies: beside the first, its name ending in _2."""
    path = Path(path)
    return path.with_name(f"{path.stem}_2{path.suffix}")
