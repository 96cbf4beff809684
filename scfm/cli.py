"""The command line: `scfm COMMAND --help` explains each command. Heavy imports happen only in the command
that runs."""

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from scfm.threads import bound_spinning

COMMANDS = {
    "demo": (
        "scfm.commands.demo:main",
        "distil the tiny Flux that the repository carries, and compare (5 minutes on 2 cores)",
    ),
    "plan": (
        "scfm.commands.plan:main",
        "memory and hours of a run on a GPU, counted before anything is downloaded",
    ),
    "data": (
        "scfm.commands.data:main",
        "let a pipeline generate images of captions, and encode images and captions once for training",
    ),
    "distill": (
        "scfm.commands.distill:main",
        "turn a pre-trained pipeline into a few-step one: writes a LoRA",
    ),
    "pretrain": (
        "scfm.commands.pretrain:main",
        "train a flow on images that samples in few steps, or distil a finished one",
    ),
    "dial": (
        "scfm.commands.dial:main",
        "find the LoRA scale for each step count, and store it with the LoRA",
    ),
    "sample": (
        "scfm.commands.sample:main",
        "generate images of prompts with a LoRA, at the scale that it was found best at",
    ),
    "app": (
        "scfm.commands.app:main",
        "a page in the browser: student and teacher side by side, with sliders",
    ),
    "evaluate": (
        "scfm.commands.evaluate:main",
        "student, teacher and rivals by one protocol: numbers, images, a report",
    ),
    "export": (
        "scfm.commands.export:main",
        "a fused pipeline, one LoRA of step and style, or the LoRA for ComfyUI",
    ),
    "push": (
        "scfm.commands.push:main",
        "upload a LoRA with its card to the Hugging Face hub",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `scfm`. Exit codes: 0 done, 1 failed, 2 a mistake in what was asked, 130 interrupted,
    143 ended."""
    bound_spinning()
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a caption that the terminal cannot show must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="scfm",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Few-step sampling from pre-trained flow-matching models (SCFM, arXiv 2510.17858).",
        epilog="commands:\n" + "\n".join(f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    name = parser.parse_args(argv[:1]).command
    module, function = COMMANDS[name][0].split(":")
    try:
        return getattr(importlib.import_module(module), function)(argv[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"scfm {name}: {error}", file=sys.stderr)
        return 2
    # a loss that is not finite, a full disk: the line says what is safe
    except (FloatingPointError, OSError) as error:
        print(f"scfm {name}: {error}", file=sys.stderr)
        return 1
    except SafetensorError as error:  # is no OSError, whatever went wrong with the disk
        print(f"scfm {name}: a file of weights could not be read or written ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
