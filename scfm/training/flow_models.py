"""The networks of `scfm pretrain`: what is trained, its averages, and what is sampled with."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from scfm.data.labelled_images import LabelledImages
from scfm.method.distill import STEP_SCALED, CopiedModels
from scfm.method.step_scale import ScaledNetwork, StepScale
from scfm.models.unet import UNetFlow, load_flow, save_flow
from scfm.training.flow_config import LEVELS, FlowConfig


class NamedNetworks:
    """What models that are whole networks share; `ema_slow` is what is sampled with and saved."""

    networks: dict[str, Any]

    def sampled(self, steps: int) -> UNetFlow:
        """The network that a path of so many steps is sampled with."""
        return self.networks["ema_slow"]

    def save(self, path: Path, notes: dict[str, Any]) -> None:
        """Writes what is sampled with, as by `save_flow`."""
        save_flow(self.networks["ema_slow"], path, notes=notes)

    def state_dict(self) -> dict[str, Any]:
        """All networks but the teacher, which does not change."""
        return {name: net.state_dict() for name, net in self.networks.items() if name != "teacher"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        for name, weights in state.items():
            self.networks[name].load_state_dict(weights)


class FlowModels(NamedNetworks):
    """The two models of pre-training: the student, and `ema_slow`, its average, which makes the targets.

    A network whose input is the step size (labels and levels, (B, 2)) is given half of it for targets: one
    level more.
    """

    def __init__(self, network: UNetFlow) -> None:
        self.networks = {"student": network, "ema_slow": copy.deepcopy(network).eval().requires_grad_(False)}
        self.half = network.levels > 0

    def student(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        """The only model with a gradient."""
        return self.networks["student"](x, t, cond)

    @torch.no_grad()
    def ema_slow(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        """The average, at half the step size where that is an input."""
        if self.half:
            cond = cond + torch.tensor([0, 1], device=cond.device)
        return self.networks["ema_slow"](x, t, cond)

    def parameters(self, name: str) -> list[torch.Tensor]:
        """The tensors of one model, as a list."""
        return list(self.networks[name].parameters())


class TaughtFlowModels(NamedNetworks, CopiedModels):
    """The four models of chapter 03_distill, for a flow that has a teacher."""


class ScaledFlowModels(ScaledNetwork):
    """A network and its differences (chapter 06_step_scale).

    network: the base, in the mode (dropout) in which the student is to be trained
    rule: says the scale for a number of steps
    train_base: see `ScaledNetwork`
    """

    network: UNetFlow

    def __init__(self, network: UNetFlow, rule: StepScale, order: int, train_base: bool) -> None:
        super().__init__(network, order, train_base)
        self.rule = rule

    def sampled(self, steps: int) -> UNetFlow:
        """A copy of the network with the EMA's weights at the scale for so many steps; 0 steps: scale 0."""
        network = copy.deepcopy(self.network).eval().requires_grad_(False)
        weights = self.weights("ema", self.rule.scale(steps) if steps else 0)
        network.load_state_dict({**network.state_dict(), **weights})
        return network

    def save(self, path: Path, notes: dict[str, Any]) -> None:
        """Writes the EMA of the base with those of the differences, as by `save_flow`."""
        count, parts = len(self.names), self.differences["ema"]
        differences = [
            dict(zip(self.names, parts[k * count : (k + 1) * count], strict=True)) for k in range(self.order)
        ]
        save_flow(self.sampled(0), path, notes=notes, differences=differences, exponent=self.rule.exponent)

    def state_dict(self) -> dict[str, Any]:
        """What is trained of the student, and its EMA, as lists."""
        return {name: [w.detach() for w in self.parameters(name)] for name in ("student", "ema")}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        for name, tensors in state.items():
            for mine, stored in zip(self.parameters(name), tensors, strict=True):
                mine.copy_(stored)


FlowNetworks: TypeAlias = FlowModels | TaughtFlowModels | ScaledFlowModels


def make_models(config: FlowConfig, images: LabelledImages, device: torch.device) -> FlowNetworks:
    """The models of a run: of a new network, or of the teacher that config names."""
    if config.teacher:
        network = load_flow(config.teacher)
    else:
        levels = LEVELS if config.method == "shortcut" else 0
        network = UNetFlow(config.size, len(images.names), levels, images.pixels.shape[-1])
    network.bf16 = config.weight_dtype == "bf16"
    torch.nn.Module.to(network, device).train()
    if config.algorithm == STEP_SCALED:
        return ScaledFlowModels(network, config.step_scale, config.scale_order, not config.teacher)
    return TaughtFlowModels(network) if config.teacher else FlowModels(network)
