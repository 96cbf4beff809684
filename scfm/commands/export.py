"""`scfm export`: a pipeline with the step LoRA fused in, or one LoRA of step and style."""

import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from scfm.commands.options import add_options, make_parser
from scfm.files import check_writable
from scfm.inference.export import ExportConfig, export


def main(argv: Sequence[str]) -> int:
    """`scfm export`: a flag for every field of ExportConfig."""
    parser = make_parser(
        "scfm export",
        "Writes a pipeline folder with the step LoRA fused in, or, with --style_lora, one LoRA file of step "
        "and style LoRA. Both are for one number of steps, load in stock diffusers, and are written only "
        "after they generated the same images as their parts. With --format comfyui: the step LoRA as "
        "ComfyUI loads it, with the strengths of every number of steps.",
        "scfm export --lora runs/mine --steps 4 --output_dir four-steps\n"
        "scfm export --lora runs/mine --steps 4 --style_lora style.safetensors --output_dir both\n"
        "scfm export --lora runs/mine --format comfyui --output_dir comfyui",
    )
    add_options(parser, ExportConfig)
    config = ExportConfig(**vars(parser.parse_args(argv))).resolved()
    config.check()
    check_writable(config.output_dir, "take another --output_dir")
    try:
        record = export(config)
    except SafetensorError as error:  # what was read before has a whole header: it is the disk of the result
        raise OSError(f"{config.output_dir} could not be written ({error})") from None
    except RuntimeError as error:  # it was done, and is not right
        print(f"scfm export: {error}", file=sys.stderr)
        return 1
    if "strengths" in record:
        print(f"{config.output_dir}: for ComfyUI; strengths by the number of steps stand in its README.md")
        return 0
    gap = record["differences"]
    print(
        f"{config.output_dir}: for {record['steps']} steps, LoRA scale {record['lora_scale']:g}; pixels "
        f"differ from those of the separate parts by {gap['mean']:.1e} in the mean (two captions: "
        f"{gap['two_captions']:.1e})"
    )
    return 0
