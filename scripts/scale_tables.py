"""Writes the tables of docs/scale.md that `scfm plan` counts:

python scripts/scale_tables.py
"""

import re
from pathlib import Path
from typing import Any

from scfm.training.config import DistillConfig, load_settings
from scfm.training.plan import make_plan

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
THREE_TIMES = {"num_layers": 24, "num_single_layers": 144}
LARGE = [  # (what the line is called, preset, shape, other settings, other settings of the shape)
    ("FLUX.1-dev, 11.9 B", "flux-dev-step-scaled", "flux-dev", {}, None),
    ("", "flux-dev-step-scaled", "flux-dev", {"shard": 4}, None),
    ("Qwen-Image, 20.4 B", "qwen-image-step-scaled", "qwen-image", {"micro_batch_size": 0}, None),
    ("", "qwen-image-step-scaled", "qwen-image", {"micro_batch_size": 0, "shard": 4}, None),
    ("FLUX.2-dev, 32.2 B", "flux2-dev-step-scaled", "flux2-dev", {}, None),
    ("", "flux2-dev-step-scaled", "flux2-dev", {"shard": 4}, None),
    ("", "flux2-dev-step-scaled", "flux2-dev", {"shard": 8}, None),
    ("three times its blocks, 95.0 B", "flux2-dev-step-scaled", "flux2-dev", {}, THREE_TIMES),
    ("", "flux2-dev-step-scaled", "flux2-dev", {"shard": 8}, THREE_TIMES),
]
SMALL = [("flux-dev-48gb", "l40s"), ("flux-dev-24gb", "rtx4090"), ("flux-dev-16gb", "rtx4090")]
SMALL += [("flux-dev-12gb", "rtx4070"), ("flux-dev-8gb", "rtx4060")]


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(page: str) -> str:
    """The page with its tables counted again. ValueError when it has no place for one."""
    for name, table in (("large", large_table()), ("small", small_table())):
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", flags=re.DOTALL)
        if not place.search(page):
            raise ValueError(f"{PAGE.name} has no <!-- {name} -->")
        page = place.sub(lambda match, table=table: match[1] + table + match[2], page)
    return page


def large_table() -> str:
    """Large transformers, on one H100 and on several that share the base."""
    head = [
        "transformer",
        "GPUs",
        "base",
        "in all, each GPU",
        "a step",
        "10,000 steps",
        "base received a step",
    ]
    lines = [head, ["---"] * len(head)]
    for name, preset, shape, more, change in LARGE:
        config = DistillConfig(**{**load_settings(preset), **more})
        plan = make_plan(config, shape, change, "h100")
        fits = plan["GiB in all"] < 0.95 * plan["GiB of the GPU"]
        parts = (
            f", in parts of {config.micro_batch_size}" if config.micro_batch_size and not config.shard else ""
        )
        lines.append(
            [
                name,
                f"{config.shard} H100, `--shard {config.shard}`" if config.shard else "1 H100",
                gib(plan["GiB"]["base"]),
                gib(plan["GiB in all"]) + (parts if fits else ": does not fit"),
                f"{plan['seconds a step']:.2g} s" if fits else "",
                f"{plan['hours of training']:.1f} h" if fits else "",
                gib(plan["GiB received a step"]) if config.shard else "",
            ]
        )
    return as_table(lines)


def small_table() -> str:
    """The presets of FLUX.1-dev for small cards."""
    head = ["preset", "base", "rank", "examples of a forward", "in all", "on the host", "fetched a step"]
    head += ["a step", "10,000 steps"]
    lines = [head, ["---"] * len(head)]
    for preset, gpu in SMALL:
        config = DistillConfig(**load_settings(preset))
        plan = make_plan(config, "flux-dev", None, gpu)
        lines.append(
            [
                f"`{preset}`",
                config.quantize or config.weight_dtype,
                f"2 x {config.rank}",
                f"{plan['examples of a forward']}",
                gib(plan["GiB in all"]),
                f"{gib(plan['GiB on the host'])}, {config.blocks_to_swap} blocks"
                if config.blocks_to_swap
                else "",
                gib(plan["GiB fetched a step"]) if config.blocks_to_swap else "",
                f"{plan['seconds a step']:.2g} s of one {gpu}",
                f"{plan['hours of training']:.0f} h",
            ]
        )
    return as_table(lines)


def gib(number: float) -> str:
    """With three digits."""
    return f"{number:.1f} GiB" if number < 100 else f"{number:.0f} GiB"


def as_table(lines: list[list[Any]]) -> str:
    """Rows of cells as Markdown."""
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
