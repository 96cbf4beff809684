"""`scfm pretrain`: few-step flows on images, from scratch or from a finished flow."""

from collections.abc import Sequence

from scfm.commands.options import make_parser, parse_config
from scfm.commands.signals import exit_code, signals_noted
from scfm.method.distill import STEP_SCALED
from scfm.training.checkpoint import latest
from scfm.training.flow_config import FlowConfig
from scfm.training.flow_trainer import pretrain


def main(argv: Sequence[str]) -> int:
    """`scfm pretrain`: a flag for every field of FlowConfig."""
    parser = make_parser(
        "scfm pretrain",
        "Train a flow on images that samples in few steps: flow-matching and self-consistency examples "
        "through one loss (--non_shortcut_ratio 1: plain flow matching). With --algorithm step_scaled the "
        "plain flow stays what it is, and few steps are taught to differences from it at the scale of the "
        "step. Or distil a finished flow: --teacher FILE --non_shortcut_ratio 0 --teacher_ratio .4 "
        "--algorithm dual, or with --algorithm step_scaled. Run the same command again to "
        "resume after a kill.",
        "scfm pretrain --train_data_dir CIFAR10 --size nano --output_dir runs/nano",
    )
    config = parse_config(
        parser,
        argv,
        FlowConfig,
        "file of the settings below, such as the config.json that every run writes; flags override it",
    )
    config.check()
    with signals_noted() as stopped:
        trainer = pretrain(config, should_stop=lambda: bool(stopped))
    if trainer is None:
        print(f"stopped after saving {latest(config.output_dir)}: the same command goes on from there")
        return exit_code(stopped)
    print(
        f"{trainer.global_step} steps, {trainer.evaluations} network evaluations: "
        f"{config.output_dir}/flow.safetensors"
    )
    if config.algorithm == STEP_SCALED:
        print(
            "the network for 4 steps: "
            f"scfm.models.unet.load_flow('{config.output_dir}/flow.safetensors', steps=4)"
        )
    if config.method == "scfm":
        print(f"as a pipeline for scfm distill, dial, sample, evaluate: {config.output_dir}/pipeline")
    return 0
