"""`scfm evaluate`: the student, its teacher and other few-step models by one protocol."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from scfm.commands.options import add_options, make_parser
from scfm.evaluation.evaluate import EvaluateConfig, evaluate
from scfm.evaluation.external_models import ExternalModel, parse_external_model
from scfm.evaluation.report import write_report
from scfm.evaluation.table import text_table
from scfm.inference.config import load_captions


def main(argv: Sequence[str]) -> int:
    """`scfm evaluate`: a flag for every field of EvaluateConfig, and the external models."""
    args = evaluate_parser().parse_args(argv)
    external_models = parse_external_models(args.external_model)
    config = EvaluateConfig(**{f.name: getattr(args, f.name) for f in fields(EvaluateConfig)}).resolved()
    config.check()
    captions = load_captions(config.prompts, config.lora, config.num_images)
    record = evaluate(config, captions, external_models)
    page = write_report(record, config.output_dir, captions)
    print("\n" + text_table(record) + "\n")
    for name, reason in record["missing"].items():
        print(f"missing: {name}: {reason}")
    for text in record["warnings"]:
        print(f"note: {text}")
    print(f"{page}, with grid.png and report.json in {Path(config.output_dir)}")
    return 0


def evaluate_parser() -> ArgumentParser:
    """The flags of `scfm evaluate`."""
    parser = make_parser(
        "scfm evaluate",
        "Generates the same captions from the same noises with the teacher at its steps, and with the "
        "student and what it is compared with at each step count; measures endpoint distance, Frechet and "
        "kernel distances, precision, recall, CLIP score and latency; writes a report that opens from disk. "
        "Run it again to resume, or to add step counts, external models and metrics.",
        "scfm evaluate --lora runs/mine --prompts held_out.txt --steps 1,2,4,8",
    )
    add_options(parser, EvaluateConfig)
    parser.add_argument(
        "--external_model",
        action="append",
        default=[],
        metavar="NAME=PATH,...",
        help="another step LoRA for the same base, or another pipeline, with its lora_scale=, steps= (as "
        "4+8), guidance_scale=, inference_shift=; may be given several times",
    )
    return parser


def parse_external_models(words: Sequence[str]) -> list[ExternalModel]:
    """The external models of a command line. ValueError also when two have one name."""
    models = [parse_external_model(text) for text in words]
    names = [model.name for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two external models are called {', '.join(twice)}: give each its own name")
    return models
