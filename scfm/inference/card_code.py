"""The lines of a model card that load the LoRAs of a step LoRA and set their scales in stock diffusers."""

import json

from scfm.method.lora_scale import LoraScales
from scfm.models.lora import WEIGHT_NAME
from scfm.models.scaled_lora import names_of, power_file

LOAD_ONE = 'pipe.load_lora_weights("{folder}", adapter_name="step")'
LOAD_SEVERAL = 'pipe.load_lora_weights("{folder}", weight_name="{file}", adapter_name="{name}")'
SET_ADAPTERS = "pipe.set_adapters({names}, [{scales}])"


def set_adapters(scale: float, lora_scales: LoraScales | None) -> str:
    """The line that sets a LoRA scale, the second of a pair to its square."""
    scales = ", ".join(f"{strength:.4g}" for strength in strengths(scale, lora_scales))
    return SET_ADAPTERS.format(names=adapter_list(lora_scales), scales=scales)


def strengths(scale: float, lora_scales: LoraScales | None) -> tuple[float, ...]:
    """What each LoRA is multiplied by at a scale."""
    return lora_scales.strengths(scale) if lora_scales else (scale,)


def adapter_list(lora_scales: LoraScales | None) -> str:
    """The adapters of the card's code, as a list there."""
    return json.dumps(names_of("step", lora_scales.powers if lora_scales else (1,)))


def loading_code(lora_scales: LoraScales | None, folder: str) -> str:
    """The lines that load the LoRA, or those that belong together, from a folder."""
    powers = lora_scales.powers if lora_scales else (1,)
    if powers == (1,):
        return LOAD_ONE.format(folder=folder)
    pairs = zip(names_of("step", powers), [power_file(WEIGHT_NAME, k).name for k in powers], strict=True)
    # "step" first: after "step_0" PEFT would miss that one's tensors in its file, aloud
    return "\n".join(LOAD_SEVERAL.format(folder=folder, file=file, name=name) for name, file in sorted(pairs))
