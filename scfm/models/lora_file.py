"""What the header of a LoRA file says of its scales. Other loaders skip it."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scfm.files import atomic_write
from scfm.method.lora_scale import LoraScales

KEY = "scfm_lora_scales"  # one entry of a safetensors header


def write_lora_scales(path: str | Path, scales: LoraScales) -> None:
    """Stores the scales in the header of the LoRA file `path` (safetensors); tensors and the rest of the
    header stay."""
    path = Path(path)
    with safe_open(str(path), framework="pt") as opened:
        header = dict(opened.metadata() or {})
    header[KEY] = json.dumps(scales._asdict())
    tensors = load_file(str(path))
    atomic_write(path, lambda new: save_file(tensors, str(new), metadata=header))


def require_alone(path: str | Path) -> None:
    """ValueError for a file that is one of several LoRAs which count together, where one alone is used."""
    scales = read_lora_scales(path)
    if scales is not None and len(scales.powers) > 1:
        raise ValueError(
            f"{path} is one LoRA of {len(scales.powers)} that belong together: alone it is not what was "
            "trained; give its folder as --lora, or the pipeline of scfm export, which holds them all"
        )


def read_lora_scales(path: str | Path) -> LoraScales | None:
    """The scales in the header of a LoRA file, or None when it has none."""
    with safe_open(str(path), framework="pt") as opened:
        text = (opened.metadata() or {}).get(KEY)
    if text is None:
        return None
    saved = json.loads(text)
    schedules = tuple(map(tuple, saved.get("schedules", ())))
    usual = LoraScales._field_defaults
    rest = {name: saved.get(name, usual[name]) for name in ("exponent", "order", "lowest", "guidance")}
    return LoraScales(tuple(saved["steps"]), tuple(saved["scales"]), saved["shift"], schedules, **rest)
