"""`scfm export`: a pipeline with the step LoRA fused in, or one LoRA of step and style."""

import argparse
import sys

from scfm.commands.options import add_options
from scfm.inference.export import ExportConfig, export


def main(argv):
    """`scfm export`: a flag for every field of ExportConfig."""
    parser = argparse.ArgumentParser(
        prog="scfm export",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Writes a pipeline folder with the step LoRA fused in, or, with --style, one LoRA file "
        "of step and style "
        "LoRA. Both are for one number of steps, load in stock diffusers, and are written only "
        "after they generated "
        "the same images as their parts.",
    )
    add_options(parser, ExportConfig)
    config = ExportConfig(**vars(parser.parse_args(argv)))
    try:
        record = export(config)
    except RuntimeError as error:  # it was done, and is not right
        print(f"scfm export: {error}", file=sys.stderr)
        return 1
    gap = record["differences"]
    print(
        f"{config.output_dir}: for {record['steps']} steps, strength {record['scale']:g}; pixels differ "
        f"from the unfused parts by "
        f"{gap['mean']:.1e} in the mean (two captions: {gap['two_captions']:.1e})"
    )
    return 0
