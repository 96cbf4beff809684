"""The first lines of every notebook after its title: how long it takes, what comes before and after it.

    python scripts/chapter_links.py           # write them
    python scripts/chapter_links.py --check   # say which are not up to date, and end with 1

Reading is counted at 160 words a minute and ten seconds a figure; running is what tests/budgets.json has.
Names of notebooks between backticks become links.
"""

import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
COURSE = (  # in the order of reading; the last sums it up on one page
    "00_flow",
    "00_solvers",
    "01_consistency",
    "02_ema",
    "02_fixed_point",
    "03_distill",
    "06_step_scale",
    "40_comparison",
    "plain_scfm",
)
BOOKS = {
    "the course": "learn",
    "how the library is built": "learn",
    "the manual": "guides",
    "the studies": "studies",
}
CELL = "nav"
MENTION = re.compile(r"(?<!\[)`(\d\d_[a-z0-9_]+)`(?!\])")


def chapters() -> dict[str, list[Path]]:
    """{book: its notebooks in order}; what is in `learn` and not in the course tells of the library."""
    found = {book: sorted((NBS / folder).glob("*.ipynb")) for book, folder in BOOKS.items()}
    course, *library = BOOKS
    found[course] = [NBS / "learn" / f"{name}.ipynb" for name in COURSE]
    found[library[0]] = [path for path in found[library[0]] if path not in found[course]]
    return found


def title_of(cells: list[dict[str, Any]]) -> str:
    """The first heading of a notebook."""
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return next(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))


def minutes_to_read(cells: list[dict[str, Any]]) -> int:
    """Of prose and figures; code that is not hidden counts a third."""
    words = figures = 0.0
    for cell in cells:
        source = re.sub(r"\]\([^)]*\)", "]", "".join(cell["source"]))  # where links lead is not read
        count = len(re.findall(r"[A-Za-z][\w'-]*", source))
        if cell["cell_type"] == "markdown":
            words += count
        elif "#| hide" not in source:
            words += count / 3
            figures += sum("image/png" in output.get("data", {}) for output in cell["outputs"])
    return max(1, round(words / 160 + figures / 6))


def link(path: Path, start: Path, cells: list[dict[str, Any]]) -> str:
    return f"[{title_of(cells)}]({os.path.relpath(path, start.parent)})"


def nav_line(book: str, path: Path, notebooks: dict[Path, list[dict[str, Any]]], around: Any) -> str:
    """A line such as: The course · reads in 9 min, runs in 15 s · before: ... · next: ..."""
    seconds = json.loads((ROOT / "tests" / "budgets.json").read_text(encoding="utf-8"))[path.stem]
    cells = notebooks[path]
    place = f", {COURSE.index(path.stem) + 1} of {len(COURSE) - 1}" if path.stem in COURSE[:-1] else ""
    cost = f"reads in {minutes_to_read(cells)} min, runs in {seconds} s on two CPU cores"
    parts = [f"*{book.capitalize()}{place}* · {cost}"]
    for word, other in zip(("before", "next"), around, strict=True):
        if other is not None:
            parts.append(f"{word}: {link(other, path, notebooks[other])}")
    return " · ".join(parts)


def with_links(source: str, path: Path, known: dict[str, Path]) -> str:
    """Mentions of other notebooks as links; code between fences stays as it is."""

    def linked(match: re.Match[str]) -> str:
        other = known.get(match[1])
        if other is None or other == path:
            return match[0]
        return f"[{match[1]}]({os.path.relpath(other, path.parent)})"

    parts = re.split(r"(```.*?```)", source, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else MENTION.sub(linked, part) for part in parts)


def updated(path: Path, line: str, known: dict[str, Path]) -> str:
    """The text of a notebook with its line and its links."""
    book = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell.get("id") != CELL]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]), path, known).splitlines(keepends=True)
    first = next(i for i, cell in enumerate(cells) if "".join(cell["source"]).startswith("# "))
    cells.insert(first + 1, {"cell_type": "markdown", "id": CELL, "metadata": {}, "source": [line]})
    return json.dumps(book | {"cells": cells}, indent=1, ensure_ascii=False, sort_keys=False) + "\n"


def all_updated() -> dict[Path, str]:
    """{notebook: its text as it should be}."""
    books = chapters()
    known = {path.stem: path for paths in books.values() for path in paths}
    notebooks = {
        path: [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c.get("id") != CELL]
        for path in known.values()
    }
    found = {}
    for book, paths in books.items():
        before = {b: a for a, b in pairwise(paths)}
        after = dict(pairwise(paths))
        for path in paths:
            line = nav_line(book, path, notebooks, (before.get(path), after.get(path)))
            found[path] = updated(path, line, known)
    return found


def main(argv: list[str]) -> int:
    stale = {path: text for path, text in all_updated().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        print(path.relative_to(ROOT))
        if "--check" not in argv:
            path.write_text(text, encoding="utf-8")
    return int(bool(stale) and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
