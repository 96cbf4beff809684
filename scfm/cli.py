"""The command line: `scfm COMMAND --help` explains each command. Heavy imports happen only in the command that runs."""
import argparse
import importlib
import json
import signal
import sys
from dataclasses import fields
from pathlib import Path

COMMANDS = {
    "demo": ("toy.demo:main", "distil the tiny Flux that the repository carries, and compare (5 minutes on 2 cores)"),
    "distill": ("scfm.cli:distill", "turn a pre-trained pipeline into a few-step one: writes a LoRA"),
}


def main(argv=None):
    """Entry point of `scfm`. Exit codes: 0 done, 1 failed, 2 a mistake in what was asked, 130 interrupted, 143 ended."""
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
    from scfm.run import RunConfig, distill_pipeline, latest
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
        print(f"  {name:8}" + "".join(f"  {n} steps {d:.4f}" for n, d in distance.items()))
    print(f"the {record['ships']} adapter ships: {config.out}/pytorch_lora_weights.safetensors")
    return 0


def from_file(parser, argv):
    """The parser with the settings of --config as its defaults. Unknown settings raise ValueError."""
    path = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    path.add_argument("--config")
    path = path.parse_known_args(argv)[0].config
    if path:
        told = read_settings(path)
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(told) - known)
        if unknown:
            raise ValueError(f"{path} has settings that do not exist: {', '.join(unknown)} (see --help)")
        parser.set_defaults(**told)
    return parser


def read_settings(path):
    """A JSON object of settings, lists as tuples. FileNotFoundError or ValueError when it cannot be read."""
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    return {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}


def add_options(parser, settings):
    """A flag for each field of a dataclass; its help sentence and default come from the field."""
    for f in fields(settings):
        default, help = f.default, f.metadata["help"]
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
