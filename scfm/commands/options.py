"""What the commands share: a parser, flags from dataclasses, settings files."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from inspect import get_annotations
from textwrap import fill, indent
from typing import Any, NoReturn, TypeVar, get_args

from scfm.data.prompts import is_text
from scfm.training.config import load_settings

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line, with the option that was probably meant, not with a page
    of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}{self.guess(message)} ({self.prog} --help lists all)\n")

    def guess(self, message: str) -> str:
        """What was probably meant, where a word of a message is near a flag; else nothing."""
        known = [flag for action in self._actions for flag in action.option_strings]
        wrong = [word.split("=")[0].strip(":") for word in message.split() if word.startswith("--")]
        near = [found for word in wrong if word not in known for found in get_close_matches(word, known, 1)]
        return f": did you mean {', '.join(dict.fromkeys(near))}?" if near else ""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there is one, and the lines of an example as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default in ("", None, False)
        return action.help if empty else super()._get_help_string(action)


class Listed(tuple):
    """A tuple that help shows as it is typed: 3,4."""

    def __str__(self) -> str:
        return ",".join(map(str, self)) or "none"


def make_parser(prog: str, description: str, example: str = "") -> argparse.ArgumentParser:
    """A parser that shows defaults and takes flags in full only: an abbreviated one could swallow another's
    value.

    example: lines to type, shown at the end of the help
    """
    return Parser(
        prog=prog,
        usage=f"{prog} [--option VALUE ...]",
        description=fill(description, 80),
        epilog=f"example:\n{indent(example, '  ')}" if example else None,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def add_options(parser: argparse.ArgumentParser, config_class: Any) -> None:
    """A flag for each field of a dataclass; its help sentence and default come from the field.

    Where a dataclass inherits, the help shows the fields of each class under the first line of its docstring.
    """
    owners = {f.name: owner_of(config_class, f.name) for f in fields(config_class)}
    groups: dict[Any, Any] = {cls: parser for cls in owners.values()}
    if len(groups) > 1:
        groups = {
            cls: parser.add_argument_group(str(cls.__doc__).splitlines()[0].rstrip(".")) for cls in groups
        }
    for f in fields(config_class):
        group = groups[owners[f.name]]
        default, help = f.default, f.metadata["help"]
        default = Listed(default) if isinstance(default, tuple) else default
        if isinstance(default, bool):
            group.add_argument(
                f"--{f.name}", action=argparse.BooleanOptionalAction, default=default, help=help
            )
        else:
            kind = caption_word if f.name == "negative_prompt" else flag_type(default, f.type)
            group.add_argument(
                f"--{f.name}",
                type=kind,
                default=default,
                help=help,
                metavar=f.name.upper(),
            )


def owner_of(config_class: Any, name: str) -> Any:
    """The class that a dataclass has a field from."""
    return next(cls for cls in reversed(config_class.__mro__) if name in get_annotations(cls))


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
