"""`scfm demo`: distils the tiny Flux of the repository, and compares it with its teacher."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec


def main(argv: Sequence[str]) -> int:
    """`scfm demo`: what toy/demo.py of a checkout does. ValueError where there is none."""
    if find_spec("toy") is None:
        raise ValueError(
            "the demo needs the repository, whose folder toy/ holds a tiny pipeline: clone "
            "it, then `make demo`"
        )
    return import_module("toy.demo").main(argv)
