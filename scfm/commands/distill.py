"""`scfm distill`: from a pipeline's folder to a LoRA."""
import argparse
import signal

from scfm.commands import add_options, from_file
from scfm.run import RunConfig, distill_pipeline, latest


def main(argv):
    """`scfm distill`: a flag for every field of RunConfig."""
    parser = argparse.ArgumentParser(
        prog="scfm distill", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Self-distil a pre-trained flow-matching pipeline into a 3 to 8 step one. The defaults are the "
                    "published recipe for FLUX.1-dev; the result, OUT/pytorch_lora_weights.safetensors, loads in a "
                    "stock pipeline with load_lora_weights. Run the same command again to resume after a kill.")
    parser.add_argument("--config", metavar="FILE", help="JSON file of the settings below, such as the config.json "
                        "that every run writes; flags override it")
    add_options(parser, RunConfig)
    settings = vars(from_file(parser, argv).parse_args(argv))
    config = RunConfig(**{k: v for k, v in settings.items() if k != "config"})
    config.check()
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))  # finish the update, save, leave
    record = distill_pipeline(config, keep_going=lambda: not stopped)
    if record is None:
        print(f"stopped after saving {latest(config.out)}: the same command goes on from there")
        return 128 + signal.SIGTERM
    print(f"{record['updates']} updates; distance to the teacher's {record['teacher_steps']}-step endpoints:")
    for name, distance in record["endpoint_distance"].items():
        strength = lambda n: f" (strength {record['dial'][name][n]:g})" if name in record["dial"] else ""
        print(f"  {name:8}" + "".join(f"  {n} steps {d:.4f}{strength(n)}" for n, d in distance.items()))
    print(f"the {record['ships']} adapter ships: {config.out}/pytorch_lora_weights.safetensors")
    return 0
