"""Builds the documentation as a site:  python scripts/docs_site/make_site.py

The course, the guides, the studies and the reference of the code, of the same notebooks, Markdown files and
docstrings that the repository holds, into _docs/site: open its index.html, no server is needed and nothing is
fetched when it is read. Formulas become HTML here, by KaTeX, which npm fetches once into .venv. The build is
strict: a dead link, a formula that KaTeX cannot read or a warning of any part stops it.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ["NO_MKDOCS_2_WARNING"] = "1"  # of the theme, about a version that is not asked for

import chapter_links  # noqa: E402
import formulas  # noqa: E402
import npm  # noqa: E402
import pages  # noqa: E402
import reference  # noqa: E402

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
OUT = ROOT / "_docs"
NO_INDEX = "how the library is built"  # shares its folder with the course, whose index that folder has
FIRST = ("results.md", "deviations.md")  # of docs; the rest by name


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir", type=Path, default=OUT, help="gets site/, and src/ that it is made of"
    )
    args = parser.parse_args(argv)
    print(build(args.output_dir.absolute()) / "index.html")
    return 0


def build(out: Path) -> Path:
    """The folder of the site. SystemExit when a part complains."""
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    source = out / "src"
    shutil.rmtree(source, ignore_errors=True)
    nav, gathered = write_sources(source)
    katex, worker = (npm.fetch(package, ROOT / ".venv" / "npm") for package in npm.SHA256)
    formulas.render(gathered, katex, out / "formulas.json")
    shutil.copytree(katex / "dist" / "fonts", source / "assets" / "fonts", ignore=woff2_alone)
    shutil.copy(katex / "dist" / "katex.min.css", source / "assets" / "katex.min.css")
    shutil.copy(worker / "shim" / "index.js", source / "assets" / "iframe-worker.js")
    shutil.copy(HERE / "site.css", source / "assets" / "site.css")
    config = {"docs_dir": str(source), "site_dir": str(out / "site"), "nav": nav}
    config["hooks"] = [str(HERE / "hooks.py")]
    config["extra"] = {"formulas": str(out / "formulas.json"), "generator": False}
    settings: dict[str, Any] = yaml.safe_load((HERE / "mkdocs.yaml").read_text(encoding="utf-8"))
    handler = settings["plugins"][-1]["mkdocstrings"]["handlers"]["python"]
    handler["paths"] = [str(ROOT)]
    handler["options"]["extensions"] = [str(HERE / "docstrings.py")]
    path = out / "mkdocs.yml"
    path.write_text(yaml.safe_dump({**settings, **config}, sort_keys=False), encoding="utf-8")
    warnings = Complaints()
    logging.getLogger("mkdocs").addHandler(warnings)
    build_site(load_config(str(path)))
    if warnings.lines:
        raise SystemExit("the site has faults:\n" + "\n".join(warnings.lines))
    return out / "site"


class Complaints(logging.Handler):
    """Collects what mkdocs and its parts warn of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def write_sources(source: Path) -> tuple[list[Any], list[formulas.Formula]]:
    """Writes the Markdown of every page. The navigation, and the formulas that the pages hold."""
    writer = pages.Writer(ROOT, source)
    nav: list[Any] = [{"Start": "index.md"}]
    writer.page("README.md", "index.md")
    for book, paths in chapter_links.chapters().items():
        places = [writer.notebook(str(path.relative_to(ROOT))) for path in paths]
        if book != NO_INDEX:
            folder = f"nbs/{chapter_links.BOOKS[book]}"
            writer.index(book.capitalize(), folder, places)
            places.insert(0, f"{folder}/index.md")
        nav.append({book.capitalize(): places})
    documents = sorted(
        (path.name for path in (ROOT / "docs").glob("*.md")), key=lambda n: (n not in FIRST, n)
    )
    for name in documents:
        writer.page(f"docs/{name}", f"docs/{name}")
    examples = [writer.code(str(path.relative_to(ROOT))) for path in sorted((ROOT / "examples").glob("*.py"))]
    writer.index("Examples", "examples", examples)
    nav.append({"Facts": [f"docs/{name}" for name in documents]})
    nav.append({"Examples": ["examples/index.md", *examples]})
    nav.append({"Reference": reference.write(ROOT / "scfm", source / "api")})
    nav.append({"Project": [writer.page(name, name) for name in ("CONTRIBUTING.md", "CHANGELOG.md")]})
    writer.linked_files()
    return nav, writer.formulas


def woff2_alone(_: str, names: list[str]) -> list[str]:
    """Of KaTeX's fonts, those that browsers of today do not take."""
    return [name for name in names if not name.endswith(".woff2")]


if __name__ == "__main__":
    sys.exit(main())
