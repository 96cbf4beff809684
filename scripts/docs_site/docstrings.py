"""Docstrings as Markdown, for mkdocstrings: lines such as `steps: numbers of steps` become a list."""

import re
from typing import Any

import griffe

ITEM = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)")
CODE = re.compile(r"(`[^`]*`)")


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by griffe."""
        rewrite(pkg)


def rewrite(owner: Any) -> None:
    """The docstrings of an object and of all that it holds."""
    if owner.docstring:
        owner.docstring.value = to_markdown(owner.docstring.value)
    for member in owner.members.values():
        if not member.is_alias:
            rewrite(member)


def to_markdown(text: str) -> str:
    """Markdown of a docstring: its items a list, signs that Markdown would read as marks kept as they are."""
    lines: list[str] = []
    in_item = False
    for line in text.splitlines():
        match = ITEM.fullmatch(line)
        if match:
            lines += [""] * (not in_item) + [f"- **`{match[1]}`**: {escaped(match[2])}"]
            in_item = True
        elif in_item and line.strip() and (line.startswith(" ") or line[0].islower() or line[0] in "`(["):
            lines.append(f"    {escaped(line.strip())}")
        elif line.startswith("    "):
            lines.append(line)  # code
        else:
            lines += [""] * in_item + [escaped(line)]
            in_item = False
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text whose stars, brackets and the like stay what they are, outside of code."""
    parts = CODE.split(text)
    return "".join(part if k % 2 else re.sub(r"([*_<>\[\]])", r"\\\1", part) for k, part in enumerate(parts))
