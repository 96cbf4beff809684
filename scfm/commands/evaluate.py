"""`scfm evaluate`: the student, its teacher and their rivals by one protocol."""

import argparse
from pathlib import Path

from scfm.commands.dial import captions_of_run
from scfm.commands.options import add_options
from scfm.data.prompts import read_prompts
from scfm.evaluation.evaluate import EvaluateConfig, evaluate
from scfm.evaluation.report import text_table, write_report
from scfm.evaluation.samplers import parse_external_model


def main(argv):
    """`scfm evaluate`: a flag for every field of EvaluateConfig, and the external_models."""
    parser = argparse.ArgumentParser(
        prog="scfm evaluate",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Generates the same captions from the same noises with the teacher at its steps, and "
        "with the student and its "
        "rivals at each step count; measures endpoint distance, FID, CLIP score and latency; "
        "writes a report "
        "that opens from disk. Run it again to resume, or to add step counts, external_models "
        "and weights.",
    )
    add_options(parser, EvaluateConfig)
    parser.add_argument(
        "--external_model",
        action="append",
        default=[],
        metavar="NAME=PATH,...",
        help="another step LoRA for the same base or "
        "another pipeline, with its scale=, steps= (as 4+8), guidance=, shift=; may be "
        "given several times",
    )
    args = vars(parser.parse_args(argv))
    external_models = [parse_external_model(text) for text in args.pop("external_model")]
    twice = sorted({p.name for p in external_models if [q.name for q in external_models].count(p.name) > 1})
    if twice:
        raise ValueError(f"two external models are called {', '.join(twice)}: give each its own name")
    config = EvaluateConfig(**args)
    config.check()
    captions = read_prompts(config.prompts) if config.prompts else captions_of_run(config.lora)
    captions = (captions * -(-config.num_images // len(captions)))[: config.num_images]
    record = evaluate(config, captions, external_models)
    page = write_report(record, config.output_dir, captions)
    print("\n" + text_table(record) + "\n")
    for name, why in record["missing"].items():
        print(f"missing: {name}: {why}")
    for text in record["warnings"]:
        print(f"note: {text}")
    print(f"{page}, with grid.png and report.json in {Path(config.output_dir)}")
    return 0
