"""`scfm plan`: memory and hours of a run, before anything is downloaded."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from scfm.commands.options import add_options, make_parser, use_settings_file
from scfm.training.config import DistillConfig
from scfm.training.measured import Measured, find_measured
from scfm.training.plan import GIB, GPUS, HOST_LINK, SHAPES, make_plan


def main(argv: Sequence[str]) -> int:
    """`scfm plan`: the flags of `scfm distill`, a shape, a GPU."""
    parser = make_parser(
        "scfm plan",
        "Counts what a run of `scfm distill` with the same settings would "
        "need, on a model without "
        "weights: nothing is downloaded or computed. Hours and activations are first "
        "guesses, the rest is "
        "counted.",
        "scfm plan --config flux-dev-a100\nscfm plan --config flux-dev-24gb --gpu rtx4090",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings of the run: a YAML or JSON file, or a preset's name; flags override it",
    )
    parser.add_argument(
        "--shape",
        default="",
        help="a published shape instead of "
        "--pretrained_model_name_or_path: "
        f"{', '.join(SHAPES)}; without both, what the preset's name begins with",
    )
    parser.add_argument(
        "--change",
        default="",
        metavar="NAME=N,...",
        help="other settings of the shape, as num_layers=48,num_single_layers=96",
    )
    parser.add_argument("--gpu", default="a100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument(
        "--efficiency", type=float, default=0.4, help="share of the GPU's stated bf16 rate that is reached"
    )
    parser.add_argument(
        "--num_images", type=int, default=2000, help="images that the teacher generates first"
    )
    add_options(parser, DistillConfig)
    use_settings_file(parser, argv)
    args = vars(parser.parse_args(argv))
    config = DistillConfig(**{f.name: args[f.name] for f in fields(DistillConfig)})
    if not 0 < args["efficiency"] <= 1:
        raise ValueError(f"efficiency is {args['efficiency']}: give a share, in (0, 1]")
    name = config.pretrained_model_name_or_path
    shape = args["shape"] or ("" if name else shape_of_preset(str(args["config"])))
    if not shape and not name:
        raise ValueError(
            f"no model: say --shape {' or '.join(SHAPES)}, or --pretrained_model_name_or_path FOLDER"
        )
    plan = make_plan(
        config, shape, changes(args["change"]), args["gpu"], args["efficiency"], args["num_images"]
    )
    print_plan(plan, shape or name, config)
    return 0


def shape_of_preset(name: str) -> str:
    """The published shape that a preset's name begins with, or has the first letters of; "" for none."""
    whole = [shape for shape in SHAPES if name.startswith(shape)]
    return next((shape for shape in [*whole, *SHAPES] if name.startswith(shape[:4])), "")


def changes(text: str) -> dict[str, int]:
    """{"num_layers": 48} of "num_layers=48"."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    wrong = [name for name, _, value in pairs if not value.isdigit()]
    if wrong:
        raise ValueError(f"change {wrong[0]!r}: write NAME=NUMBER, as num_layers=48")
    return {name.strip(): int(value) for name, _, value in pairs}


def print_plan(plan: dict[str, Any], name: str, config: DistillConfig) -> None:
    """The plan in words."""
    print(
        f"{name}, {config.height} x {config.width} px, batch size {config.global_batch_size}, LoRA of "
        f"rank {config.rank}"
    )
    print(
        f"  transformer {plan['transformer, parameters'] / 1e9:.4g} B parameters, "
        f"LoRA {plan['LoRA, parameters'] / 1e6:.4g} M"
    )
    for part, size in plan["GiB"].items():
        print(f"  {part:24}{size:8.2f} GiB")
    fits = "fits" if plan["GiB in all"] < 0.95 * plan["GiB of the GPU"] else "DOES NOT FIT"
    print(
        f"  {'in all':24}{plan['GiB in all']:8.2f} GiB: {fits} in the {plan['GiB of the GPU']} GB of one "
        f"{plan['gpu']}"
    )
    print(
        f"  {plan['operations of a step'] / 1e12:.4g} T operations a step; at {plan['efficiency']:.0%} "
        f"of the "
        f"{plan['gpu']}'s bf16 rate {plan['seconds a step']:.2g} s"
    )
    if plan["processes"] > 1:
        received = plan["GiB received a step"]
        rate = received * GIB / 1e9 / plan["seconds a step"]
        print(f"  shared by {plan['processes']} GPUs: memory and seconds are each one's")
        print(f"  it receives {received:.4g} GiB of the base a step, as long as that at {rate:.3g} GB/s")
    if config.blocks_to_swap:
        fetched = plan["GiB fetched a step"]
        print(
            f"  {config.blocks_to_swap} blocks live on the host, {plan['GiB on the host']:.2f} GiB; "
            f"{fetched:.4g} GiB are fetched a step, {fetched * GIB / HOST_LINK:.2g} of the seconds at "
            f"{HOST_LINK / 1e9:.0f} GB/s"
        )
    print(
        f"  {plan['hours of training']:.1f} h for {plan['steps']} steps, and "
        f"{plan['hours of generating']:.1f} h for the "
        f"teacher's {plan['images']} images, if that rate holds"
    )
    print_measured(find_measured(name, config, plan["examples of a forward"]))


def print_measured(found: Sequence[Measured]) -> None:
    """What was measured of the same settings, and on which device; or that nothing was."""
    if not found:
        print("  all of it counted, not measured")
    for one in found:
        peak = f", {one.peak_gib:.2f} GiB at its peak" if one.peak_gib else ""
        print(
            f"  measured on {one.machine}: {one.seconds:.3g} s for a step of {one.examples} examples in one "
            f"forward{peak} ({one.file.name})"
        )
