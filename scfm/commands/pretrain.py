"""`scfm pretrain`: few-step flows on images, from nothing or from a finished flow."""
import argparse
import signal

from scfm.commands import add_options, from_file
from scfm.training.checkpoint import latest
from scfm.training.flow_trainer import FlowConfig, pretrain


def main(argv):
    """`scfm pretrain`: a flag for every field of FlowConfig."""
    parser = argparse.ArgumentParser(
        prog="scfm pretrain", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a flow on images that samples in few steps: rows of plain flow matching and self rows through one "
                    "loss (--non_shortcut_ratio 1: plain flow matching). Or distil a finished flow: --teacher FILE --non_shortcut_ratio 0 "
                    "--teacher_ratio .4 --algorithm dual. Run the same command again to resume after a kill.")
    parser.add_argument("--config", metavar="FILE", help="file of the settings below, such as the config.json that every "
                        "run writes; flags override it")
    add_options(parser, FlowConfig)
    settings = vars(from_file(parser, argv).parse_args(argv))
    config = FlowConfig(**{k: v for k, v in settings.items() if k != "config"})
    config.check()
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))  # finish the update, save, leave
    run = pretrain(config, keep_going=lambda: not stopped)
    if run is None:
        print(f"stopped after saving {latest(config.output_dir)}: the same command goes on from there")
        return 128 + signal.SIGTERM
    print(f"{run.update} updates, {run.evaluations} network evaluations: {config.output_dir}/flow.safetensors")
    if config.method == "scfm":
        print(f"as a pipeline for scfm distill, dial, sample, evaluate: {config.output_dir}/pipeline")
    return 0
