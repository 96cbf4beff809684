"""Few-step sampling from pre-trained flow-matching models (SCFM, arXiv 2510.17858).

The names below are imported when they are first used: `import scfm` loads nothing but this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from scfm.inference.step_lora import InferenceConfig, StepLora, generate
    from scfm.method.consistency import DistillModels, Jumps, consistency_target, draw_jumps, scfm_loss
    from scfm.method.distill import Batch, CopiedModels, SCFMConfig, distill, train_step
    from scfm.method.ema import EMA, FastSlow
    from scfm.method.flow import interpolate, sample, shift_time, time_grid
    from scfm.method.lora_scale import LoraScales
    from scfm.method.step_scale import ScaledNetwork, StepScale, draw_step_jumps, step_scale_loss
    from scfm.models.check import check_family
    from scfm.models.family import register
    from scfm.models.loading import load_pipeline
    from scfm.models.lora import LoraModels
    from scfm.models.scaled_lora import ScaledLoraModels
    from scfm.models.source import PipelineSource
    from scfm.models.unet import UNetFlow
    from scfm.training.config import DistillConfig
    from scfm.training.distill_trainer import DistillTrainer, distill_pipeline
    from scfm.training.flow_config import FlowConfig
    from scfm.training.flow_trainer import FlowTrainer, pretrain

_HOME = {
    "method.flow": ("interpolate", "sample", "shift_time", "time_grid"),
    "method.consistency": ("DistillModels", "Jumps", "consistency_target", "draw_jumps", "scfm_loss"),
    "method.ema": ("EMA", "FastSlow"),
    "method.distill": ("Batch", "CopiedModels", "SCFMConfig", "distill", "train_step"),
    "method.lora_scale": ("LoraScales",),
    "method.step_scale": ("ScaledNetwork", "StepScale", "draw_step_jumps", "step_scale_loss"),
    "models.source": ("PipelineSource",),
    "models.loading": ("load_pipeline",),
    "models.family": ("register",),
    "models.check": ("check_family",),
    "models.lora": ("LoraModels",),
    "models.scaled_lora": ("ScaledLoraModels",),
    "models.unet": ("UNetFlow",),
    "training.config": ("DistillConfig",),
    "training.distill_trainer": ("DistillTrainer", "distill_pipeline"),
    "training.flow_config": ("FlowConfig",),
    "training.flow_trainer": ("FlowTrainer", "pretrain"),
    "inference.step_lora": ("InferenceConfig", "StepLora", "generate"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = [
    "__version__",
    "Batch",
    "CopiedModels",
    "DistillConfig",
    "DistillModels",
    "DistillTrainer",
    "EMA",
    "FastSlow",
    "FlowConfig",
    "FlowTrainer",
    "InferenceConfig",
    "Jumps",
    "LoraModels",
    "LoraScales",
    "PipelineSource",
    "SCFMConfig",
    "ScaledLoraModels",
    "ScaledNetwork",
    "StepLora",
    "StepScale",
    "UNetFlow",
    "check_family",
    "consistency_target",
    "distill",
    "distill_pipeline",
    "draw_jumps",
    "draw_step_jumps",
    "generate",
    "interpolate",
    "load_pipeline",
    "pretrain",
    "register",
    "sample",
    "scfm_loss",
    "shift_time",
    "step_scale_loss",
    "time_grid",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'scfm' has no attribute {name!r}")
    return getattr(import_module(f"scfm.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
