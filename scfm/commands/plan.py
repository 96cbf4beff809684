"""`scfm plan`: memory and hours of a run, before anything is downloaded."""
import argparse
from dataclasses import fields

from scfm.commands import add_options, from_file
from scfm.training.config import DistillConfig
from scfm.training.estimate import GPUS, SHAPES, make_plan


def main(argv):
    """`scfm plan`: the flags of `scfm distill`, a shape, a GPU."""
    parser = argparse.ArgumentParser(
        prog="scfm plan", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Counts what a run of `scfm distill` with the same settings would need, on a model without weights: nothing is "
                    "downloaded or computed. Hours and activations are first guesses, the rest is counted.")
    parser.add_argument("--config", metavar="FILE", help="settings of the run: a YAML or JSON file, or a preset's name; flags override it")
    parser.add_argument("--shape", default="", help=f"a published shape instead of --pretrained_model_name_or_path: {', '.join(SHAPES)}; without both, "
                        "what the preset's name begins with")
    parser.add_argument("--change", default="", metavar="NAME=N,...", help="other settings of the shape, as num_layers=48,num_single_layers=96")
    parser.add_argument("--gpu", default="a100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--efficiency", type=float, default=.4, help="share of the GPU's stated bf16 rate that is reached")
    parser.add_argument("--count", type=int, default=2000, help="images that the teacher generates first")
    add_options(parser, DistillConfig)
    args = vars(from_file(parser, argv).parse_args(argv))
    config = DistillConfig(**{f.name: args[f.name] for f in fields(DistillConfig)})
    if not 0 < args["efficiency"] <= 1:
        raise ValueError(f"efficiency is {args['efficiency']}: give a share, in (0, 1]")
    shape = args["shape"] or (not config.pretrained_model_name_or_path and next((s for s in SHAPES if str(args["config"]).startswith(s[:4])), ""))
    if not shape and not config.pretrained_model_name_or_path:
        raise ValueError(f"no model: say --shape {' or '.join(SHAPES)}, or --pretrained_model_name_or_path FOLDER")
    tell(make_plan(config, shape, changes(args["change"]), args["gpu"], args["efficiency"], args["count"]), shape or config.pretrained_model_name_or_path, config)
    return 0


def changes(text):
    """{"num_layers": 48} of "num_layers=48"."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    wrong = [name for name, _, value in pairs if not value.isdigit()]
    if wrong:
        raise ValueError(f"change {wrong[0]!r}: write NAME=NUMBER, as num_layers=48")
    return {name.strip(): int(value) for name, _, value in pairs}


def tell(plan, name, config):
    print(f"{name}, {config.height} x {config.width} px, batch {config.global_batch_size}, LoRA of rank {config.rank}")
    print(f"  transformer {plan['transformer, parameters'] / 1e9:.4g} B parameters, LoRA {plan['LoRA, parameters'] / 1e6:.4g} M")
    for part, size in plan["GiB"].items():
        print(f"  {part:24}{size:8.2f} GiB")
    fits = "fits" if plan["GiB in all"] < .95 * plan["GiB of the GPU"] else "DOES NOT FIT"
    print(f"  {'in all':24}{plan['GiB in all']:8.2f} GiB: {fits} in the {plan['GiB of the GPU']} GB of one {plan['gpu']}")
    print(f"  {plan['operations of an update'] / 1e12:.4g} T operations an update; at {plan['efficiency']:.0%} of the {plan['gpu']}'s bf16 rate "
          f"{plan['seconds an update']:.2g} s")
    print(f"  {plan['hours of training']:.1f} h for {plan['updates']} updates, and {plan['hours of generating']:.1f} h for the teacher's "
          f"{plan['images']} images: first guesses, not measured")
