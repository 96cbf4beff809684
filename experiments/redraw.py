"""Draws the figures of the committed records again, from the records alone:  python -m experiments.redraw

For a change of how figures look: no cell is needed, and no number changes. `NAMES` at the end choose some.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.runner import RESULTS
from experiments.studies import (
    ablations_report,
    cifar_report,
    compare_report,
    few_shot_figures,
    guidance,
    plane_report,
    rates_report,
    step_scale_report,
    tiny_flux,
    variants_report,
)

Draw = Callable[[dict[str, Any], Path], None]
# study -> ending of the image -> what draws it
FIGURES: dict[str, dict[str, Draw]] = {
    "ablations": {
        "": ablations_report.plot_families,
        "_grids": ablations_report.plot_grids,
        "_flux": ablations_report.plot_flux,
    },
    "cifar": {"": cifar_report.plot},
    "compare": {"": compare_report.plot, "_summary": compare_report.plot_summary},
    "step_scale": {"": step_scale_report.plot},
    "plane": {"": plane_report.plot, "_ablations": plane_report.plot_ablations},
    "few_shot": {
        "_plane": lambda record, path: few_shot_figures.plot(record, "plane", path),
        "_flux": lambda record, path: few_shot_figures.plot(record, "flux", path),
        "_summary": few_shot_figures.plot_summary,
    },
    "guidance": {"": guidance.plot},
    "rates": {"": rates_report.plot},
    "tiny_flux": {"": tiny_flux.plot},
    "variants": {"": variants_report.plot},
}
# whose figures count steps by numbers; JSON has only text
BY_STEPS = ("compare", "step_scale", "plane", "guidance")


def numbered(part: Any) -> Any:
    """A record whose keys that are whole numbers are so again."""
    if isinstance(part, list):
        return [numbered(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {int(key) if key.isdigit() else key: numbered(value) for key, value in part.items()}


def redraw(study: str, folder: Path = RESULTS, results: Path = RESULTS) -> list[Path]:
    """The images of a study, drawn from its record in `results` into `folder`."""
    record = json.loads((results / f"{study}.json").read_text(encoding="utf-8"))
    record = numbered(record) if study in BY_STEPS else record
    paths = []
    for ending, draw in FIGURES[study].items():
        paths.append(folder / f"{study}{ending}.png")
        draw(record, paths[-1])
    return paths


def main(names: Sequence[str]) -> None:
    for study in names or FIGURES:
        print(*redraw(study), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
