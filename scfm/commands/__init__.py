"""One file a command, each with `main(argv)` -> exit code; here is what they share: flags from dataclasses, settings files."""
import argparse
from dataclasses import fields

from scfm.training.config import read_settings


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


def add_options(parser, settings):
    """A flag for each field of a dataclass; its help sentence and default come from the field."""
    for f in fields(settings):
        default, help = f.default, f.metadata["help"]
        if isinstance(default, bool):
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=default, help=help)
        else:
            kind = numbers(type(default[0]) if default else str) if isinstance(default, tuple) else type(default)
            parser.add_argument(f"--{f.name}", type=kind, default=default, help=help, metavar=f.name.upper())


def numbers(kind):
    """A parser of lists such as 3,4 or 2.5,4.5."""
    def parse(text):
        return tuple(kind(part) for part in text.split(",") if part)
    parse.__name__ = f"list of {kind.__name__}"
    return parse
