"""The command line: `scfm COMMAND --help` explains each command. Heavy imports happen only in the command that runs."""
import argparse
import importlib
import signal
import sys
from dataclasses import MISSING, fields

COMMANDS = {
    "demo": ("toy.demo:main", "distil the tiny Flux that the repository carries, and compare (5 minutes on 2 cores)"),
    "distill": ("scfm.cli:distill", "turn a pre-trained pipeline into a few-step one: writes a LoRA"),
}


def main(argv=None):
    """Entry point of `scfm`. Exit codes: 0 done, 1 failed, 2 a mistake in what was asked, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="scfm", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Few-step sampling from pre-trained flow-matching models (SCFM, arXiv 2510.17858).",
        epilog="commands:\n" + "\n".join(f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()))
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    name = parser.parse_args(argv[:1]).command
    module, function = COMMANDS[name][0].split(":")
    try:
        return getattr(importlib.import_module(module), function)(argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"scfm {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def distill(argv):
    """`scfm distill`: a flag for every field of RunConfig."""
    from scfm.run import RunConfig, distill_pipeline
    parser = argparse.ArgumentParser(
        prog="scfm distill", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Self-distil a pre-trained flow-matching pipeline into a 3 to 8 step one. The defaults are the "
                    "published recipe for FLUX.1-dev; the result, OUT/pytorch_lora_weights.safetensors, loads in a "
                    "stock pipeline with load_lora_weights. Run the same command again to resume after a kill.")
    add_options(parser, RunConfig)
    config = RunConfig(**vars(parser.parse_args(argv)))
    config.check()
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))  # finish the update, save, leave
    record = distill_pipeline(config, keep_going=lambda: not stopped)
    print(f"{record['updates']} updates; distance to the teacher's {record['teacher_steps']}-step endpoints:")
    for name, distance in record["endpoint_distance"].items():
        print(f"  {name:8}" + "".join(f"  {n} steps {d:.4f}" for n, d in distance.items()))
    print(f"the {record['ships']} adapter ships: {config.out}/pytorch_lora_weights.safetensors")
    return 0


def add_options(parser, settings):
    """A flag for each field of a dataclass; its help sentence and default come from the field."""
    for f in fields(settings):
        default = None if f.default is MISSING else f.default
        help = f.metadata.get("help", "")
        if isinstance(default, bool):
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=default, help=help)
        else:
            kind = numbers(type(default[0])) if isinstance(default, tuple) else type(default)
            parser.add_argument(f"--{f.name}", type=kind, default=default, help=help, metavar=f.name.upper())


def numbers(kind):
    """A parser of lists such as 3,4 or 2.5,4.5."""
    def parse(text):
        return tuple(kind(part) for part in text.split(","))
    parse.__name__ = f"list of {kind.__name__}"
    return parse


if __name__ == "__main__":
    sys.exit(main())
