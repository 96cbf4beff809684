"""The interfaces that the parts of the library meet at: a velocity field, the four models of a distillation,
a family."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch

Condition: TypeAlias = Any
"""What a network is conditioned on: None, a tensor (B, ...), or a dict, list or tuple of these; its first dim
is the batch."""


FamilyVelocity: TypeAlias = Callable[[Any, torch.Tensor, torch.Tensor, Condition], torch.Tensor]
"""How a family calls its transformer: (transformer, x (B, ...), t (B,), cond) -> velocity (B, ...)."""


class VelocityField(Protocol):
    """dx/dt, called as field(x (B, ...), t (B,), cond) -> velocity (B, ...). t lies in [0, 1], 1 is noise."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Condition = None, /) -> torch.Tensor: ...


class Models(Protocol):
    """Student, teacher and EMAs as fields. Only the student's velocity carries a gradient."""

    @property
    def student(self) -> VelocityField: ...


class TrainableModels(Models, Protocol):
    """`Models` whose tensors a training step can change."""

    ema_target_scale: float

    def parameters(self, name: str) -> list[torch.Tensor]:
        """The tensors of one model, "student", "ema_fast" or "ema_slow", in one order for all."""
        ...


class ScaledModels(Protocol):
    """Student and EMA whose weights depend on a scale, for the algorithm step_scaled; at 0 both are the
    teacher."""

    def scaled_velocity(
        self, name: str, scales: torch.Tensor, x: torch.Tensor, t: torch.Tensor, cond: Condition = None
    ) -> torch.Tensor:
        """Velocities (B, ...) of "student", with a gradient, or "ema" at x (B, ...) and t (B,), each example
        at its own scale (B,)."""
        ...

    def field(self, name: str, scale: float = 1.0) -> VelocityField:
        """One of both at one scale, without a gradient."""
        ...

    def parameters(self, name: str) -> list[torch.Tensor]:
        """The tensors of "student" or "ema", in one order for both."""
        ...

    def by_power(self, name: str) -> dict[int, list[torch.Tensor]]:
        """The same by the power of the scale that they are multiplied by."""
        ...


class Averages(Protocol):
    """EMAs of the student: `scfm.method.ema.EMA` or `FastSlow`. `updates` counts the calls of update()."""

    updates: int

    def update(self) -> None: ...


class Family(Protocol):
    """What differs between model families, bound to one pipeline and image size; `scfm.models.check` holds a
    class to it."""

    pipe: Any
    height: int
    width: int
    max_sequence_length: int

    @property
    def pipeline_class(self) -> type: ...

    @property
    def uses_cfg(self) -> bool: ...

    @property
    def extra_text_tokens(self) -> int: ...

    @property
    def lora_targets(self) -> Sequence[str]: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def tokens(self) -> int: ...

    @property
    def time_dtype(self) -> torch.dtype: ...

    @property
    def dynamic_shift(self) -> float | None: ...

    def encode_text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]: ...

    def encode_images(self, images: torch.Tensor) -> torch.Tensor: ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...

    def velocity(
        self, transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor: ...

    def sample_stock(
        self,
        captions: Sequence[str],
        noise: torch.Tensor,
        steps: int,
        guidance: float,
        shift: float | None = None,
    ) -> torch.Tensor: ...
