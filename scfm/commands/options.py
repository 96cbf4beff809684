"""What the commands share: a parser, flags from dataclasses, settings files."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_args

from scfm.data.prompts import is_text
from scfm.training.config import load_settings

Config = TypeVar("Config")


class Listed(tuple):
    """A tuple that help shows as it is typed: 3,4."""

    def __str__(self) -> str:
        return ",".join(map(str, self)) or "none"


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that shows defaults and takes flags in full only: an abbreviated one could swallow another's
    value."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def add_options(parser: argparse.ArgumentParser, config_class: Any) -> None:
    """A flag for each field of a dataclass; its help sentence and default come from the field."""
    for f in fields(config_class):
        default, help = f.default, f.metadata["help"]
        default = Listed(default) if isinstance(default, tuple) else default
        if isinstance(default, bool):
            parser.add_argument(
                f"--{f.name}", action=argparse.BooleanOptionalAction, default=default, help=help
            )
        else:
            kind = caption_word if f.name == "negative_prompt" else flag_type(default, f.type)
            parser.add_argument(
                f"--{f.name}",
                type=kind,
                default=default,
                help=help,
                metavar=f.name.upper(),
            )


def flag_type(default: Any, annotation: Any) -> Callable[[str], Any]:
    """The parser of a flag's value, by its default; of a list's values, by the field's annotation."""
    if isinstance(default, tuple):
        return numbers(next(iter(get_args(annotation)), type(default[0]) if default else str))
    return type(default)


def caption_word(word: str) -> str:
    """A caption of the command line, read as UTF-8 also where the locale knows ASCII alone (LC_ALL=C).

    Paths stay as they are: with such a locale their files are found by these very words.
    """
    try:
        return word if is_text(word) else os.fsencode(word).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{word!r} is not UTF-8: put it into a file of captions") from None


def numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
    """A parser of lists such as 3,4 or 2.5,4.5."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(",") if part)

    parse.__name__ = f"list of {getattr(kind, '__name__', 'values')}"
    return parse


def use_settings_file(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Makes the settings of the --config file the parser's defaults. ValueError for settings that do not
    exist."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path:
        settings = load_settings(path)
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"{path} has settings that do not exist: {', '.join(unknown)} (see --help)")
        for action in parser._actions:
            if action.dest in settings:
                check_type(path, action.dest, settings[action.dest], action.default)
        parser.set_defaults(**settings)


def check_type(path: str, name: str, value: Any, default: Any) -> None:
    """ValueError when a value in a settings file is not of the kind that the setting's default is.

    Numbers may stand in quotes (YAML reads 2e-5 as a word); the flag's own parser sees to them.
    """
    place = f"{path}: {name} is {value!r}"
    if value is None:
        raise ValueError(f"{place}: leave the line out to take the default")
    if isinstance(default, bool) != isinstance(value, bool):
        raise ValueError(
            f"{place}: write true or false without quotes"
            if isinstance(default, bool)
            else f"{place}: no yes or no"
        )
    if isinstance(default, tuple) != isinstance(value, tuple):
        raise ValueError(
            f"{place}: write a list, as [1, 2]"
            if isinstance(default, tuple)
            else f"{place}: one value, no list"
        )
    if isinstance(default, str) and not isinstance(value, str):
        raise ValueError(f'{place}: write it in quotes, "{value}"')


def parse_config(
    parser: argparse.ArgumentParser, argv: Sequence[str], config_class: Callable[..., Config], help: str
) -> Config:
    """The config of a command line that may name a settings file; flags override it."""
    parser.add_argument("--config", metavar="FILE", help=help)
    add_options(parser, config_class)
    use_settings_file(parser, argv)
    settings = vars(parser.parse_args(argv))
    settings.pop("config")
    return config_class(**settings)
