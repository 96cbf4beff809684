"""The command line: `scfm COMMAND --help` explains each command. Heavy imports happen only in the command that runs."""
import argparse
import importlib
import sys

COMMANDS = {
    "demo": ("toy.demo:main", "distil the tiny Flux that the repository carries, and compare (5 minutes on 2 cores)"),
    "distill": ("scfm.commands.distill:main", "turn a pre-trained pipeline into a few-step one: writes a LoRA"),
    "dial": ("scfm.commands.dial:main", "find the LoRA's strength for each step count, and store it with the LoRA"),
    "sample": ("scfm.commands.sample:main", "paint prompts with a LoRA, at the strength that its dial says"),
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


if __name__ == "__main__":
    sys.exit(main())
