"""The LoRA scale as the step size, for Flux: what differs from plain_scfm_flux.py, which lies beside it.

Two LoRAs D1, D2 are trained so that the transformer at scale s, with the weights W + s D1 + s^2 D2, is right
for steps of one length: n steps are sampled at s(n) = n^-0.85, and s = 0 is the teacher itself. One example
is a step of a grid of n, cut into two halves. Where the halves land, at THEIR scale s(2n), one step at s(n)
must land. So there is one student for every number of steps, one EMA, and nothing to search for. The files,
the flags and the data are those of plain_scfm_flux.py; of its EMAs the fast one is used:

    python plain_step_scale_flux.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --train_data_dir images --output_dir step-lora --max_sequence_length 256 --gradient_checkpointing
"""
import warnings
from pathlib import Path
from types import SimpleNamespace

import plain_scfm_flux as plain
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from plain_scfm_flux import Cond
from torch import Tensor

STEP_COUNTS = 1, 2, 3, 4, 6, 8, 12, 16
FINEST = 16                 # halves of more than so many steps a path are the teacher's
EXPONENT = 0.85
SHIFT = 3.0                 # of sampling; training strays from it by a tenth
ADAPTERS = {"student": ("student", "student_2"), "ema": ("ema", "ema_2")}

class ExampleScale:
    """Stands where PEFT has one scale for all examples: here each has its own."""

    def __init__(self) -> None:
        self.values = torch.ones(1)

    def __rmul__(self, hidden: Tensor) -> Tensor:
        return hidden * self.values.view(-1, *[1] * (hidden.ndim - 1)).to(hidden)

class LoraModels(plain.LoraModels):
    """The student and its EMA, two LoRAs each, on one frozen base; at scale 0 both are the teacher."""

    def __init__(self, transformer: FluxTransformer2DModel, rank: int, img_ids: Tensor) -> None:
        self.transformer, self.img_ids = transformer.requires_grad_(False), img_ids
        linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # four are the point here
        for name in (*ADAPTERS["student"], *ADAPTERS["ema"]):   # W + B A with B = 0: all start as the teacher
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=linear)
            transformer.add_adapter(config, adapter_name=name)
        for p, start in zip(self.parameters("ema"), self.parameters("student"), strict=True):
            start.data = start.detach().float()                 # fp32: bf16 loses the small steps of an EMA
            p.data = start.detach().clone()
        self.scales = {name: ExampleScale() for names in ADAPTERS.values() for name in names}
        for layer in (m for m in transformer.modules() if isinstance(m, LoraLayer)):
            layer.scaling.update(self.scales)
        transformer.set_adapter(list(ADAPTERS["student"]))

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        return [p for adapter in ADAPTERS[name] for p in super(LoraModels, self).parameters(adapter)]

    def scaled_velocity(self, name: str, scale: Tensor, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """V at a scale (B,) for each example. It stands until the next call: checkpointing needs it again."""
        for power, adapter in enumerate(ADAPTERS[name], 1):
            self.scales[adapter].values = scale ** power
        return self.velocity(list(ADAPTERS[name]), x, t, cond)

def sample_jumps(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Times (n, 3) of a step and of its middle, and the steps (n,) that a path of such halves has."""
    steps = 2 * torch.tensor(STEP_COUNTS)[torch.randint(len(STEP_COUNTS), (n,))][:, None]     # (n, 1)
    i = 2 * (torch.rand(n, 1) * (steps // 2)).long()
    times = 1 - (i + torch.arange(3)) / steps
    s = torch.empty(n, 1).uniform_(0.9 * SHIFT, 1.1 * SHIFT)
    times = (s * times / (1 + (s - 1) * times)).clamp(max=1 - 1e-5)
    return times.to(dtype).float(), steps[:, 0]

@torch.no_grad()
def consistency_target(models: LoraModels, x1: Tensor, times: Tensor, steps: Tensor, cond: Cond) -> Tensor:
    """The velocity (B, N, C) with which one step lands where the EMA's two halves land."""
    t1, t2, t3 = times.T
    d12, d23, d13 = (d[:, None, None] for d in (t1 - t2, t2 - t3, t1 - t3))
    scale = torch.where(steps > FINEST, 0.0, steps.float() ** -EXPONENT)     # s(2n), or the teacher
    v1 = models.scaled_velocity("ema", scale, x1, t1, cond)
    v2 = models.scaled_velocity("ema", scale, x1 - d12 * v1, t2, cond)
    return (d12 * v1 + d23 * v2) / d13

def train_step(models: LoraModels, optimizer: torch.optim.Optimizer, data: Tensor, noise: Tensor,
               times: Tensor, steps: Tensor, cond: Cond, decays: tuple[float, float]) -> float:
    """One step of the student and of its EMA; returns the loss. data, noise: (B, N, C)."""
    t1 = times[:, 0]
    x1 = (1 - t1)[:, None, None] * data + t1[:, None, None] * noise
    target = consistency_target(models, x1, times, steps, cond)
    pred = models.scaled_velocity("student", (steps / 2) ** -EXPONENT, x1, t1, cond)    # s(n)
    return plain.optimize(models, optimizer, pred, target, {"ema": decays[0]})

def save_lora(transformer: FluxTransformer2DModel, folder: Path) -> None:
    """Writes D1 and D2 as files that pipe.load_lora_weights(folder, weight_name=...) reads."""
    for adapter, end in zip(ADAPTERS["student"], ("", "_2"), strict=True):
        plain.save_lora(transformer, folder, adapter, end)

def how_to_sample(folder: str) -> str:
    return f"""# n steps with any FluxPipeline, of whatever n from 1 to 16
n, s = 4, 4 ** -{EXPONENT}
config = pipe.scheduler.config
pipe.scheduler = pipe.scheduler.from_config(config, shift={SHIFT:g}, use_dynamic_shifting=False)
pipe.load_lora_weights({folder!r}, weight_name="pytorch_lora_weights.safetensors", adapter_name="step")
pipe.load_lora_weights({folder!r}, weight_name="pytorch_lora_weights_2.safetensors", adapter_name="step_2")
pipe.set_adapters(["step", "step_2"], [s, s ** 2])      # then pipe(prompt, num_inference_steps=n)"""

if __name__ == "__main__":
    plain.main(method=SimpleNamespace(**globals()))
