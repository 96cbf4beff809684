"""What `benchmarks/gpu_flux.py` has measured, for a plan of the same shape and settings."""

import json
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # of a checkout; a wheel has none
# what a step's seconds and memory depend on, beside the shape and the examples of a forward
DEPENDS_ON = (
    "algorithm",
    "scale_order",
    "rank",
    "height",
    "width",
    "max_sequence_length",
    "weight_dtype",
    "quantize",
    "blocks_to_swap",
    "gradient_checkpointing",
    "checkpoint_blocks",
    "compile_blocks",
    "use_8bit_adam",
)


class Measured(NamedTuple):
    """One measurement. machine: the GPU's name; seconds: of a step; peak_gib: None where it was not measured;
    examples: of the step, in one forward; file: where it stands."""

    machine: str
    seconds: float
    peak_gib: float | None
    examples: int
    file: Path


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a config that a measurement depends on."""
    return {name: getattr(config, name) for name in DEPENDS_ON}


def find_measured(shape: str, config: Any, examples: int, folder: Path | None = None) -> list[Measured]:
    """All measurements of a published shape by these settings, with so many examples in a forward."""
    found = []
    for path in sorted((RESULTS if folder is None else folder).glob("gpu_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        same = record.get("shape") == shape and record.get("settings") == settings_of(config)
        if not same or record["tiny"] or not record["one_forward_for_all_models"]:
            continue
        for row in record["rows"]:
            if row["batch"] == examples and "scfm" in row:
                step = row["scfm"]
                found.append(Measured(record["machine"], step["seconds"], step["peak_gib"], examples, path))
    return found
