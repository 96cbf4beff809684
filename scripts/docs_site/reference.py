"""The pages of the reference: one for each module, which mkdocstrings fills, and one that lists them."""

import ast
from pathlib import Path
from typing import Any

PACKAGES = {  # each imports only from those above it
    "": "interfaces, random streams, files, threads",
    "method": "the algorithm, on torch alone",
    "models": "pipelines, families, LoRA",
    "data": "captions, images, the cache",
    "training": "settings and trainers",
    "inference": "a step LoRA in use",
    "evaluation": "metrics and reports",
    "commands": "the command line",
}


def write(package: Path, folder: Path) -> list[Any]:
    """Writes the pages below `folder`. Their navigation."""
    folder.mkdir(parents=True)
    text, nav = f"# Reference\n\n{offered(package / '__init__.py')}", []
    for name, about in PACKAGES.items():
        title = f"scfm.{name}" if name else "scfm"
        modules = sorted(p for p in (package / name).glob("*.py") if not p.name.startswith("_"))
        text += f"\n## {title}: {about}\n\n"
        entries = []
        for path in modules:
            dotted = f"{title}.{path.stem}"
            place = f"{dotted}.md"
            (folder / place).write_text(f"# {dotted}\n\n::: {dotted}\n", encoding="utf-8")
            text += f"- [`{dotted}`]({place})  \n  {first_line(path)}\n"
            entries.append({dotted.removeprefix("scfm."): f"api/{place}"})
        nav.append({title: entries})
    (folder / "index.md").write_text(text, encoding="utf-8")
    return ["api/index.md", *nav]


def first_line(path: Path) -> str:
    """What a module's docstring says first."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).replace("*", r"\*").replace("<", "&lt;")


def offered(path: Path) -> str:
    """The names that `import scfm` offers, each a link."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    table = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME"
    )
    links = [f"[`{name}`][scfm.{module}.{name}]" for module, names in table.items() for name in names]
    return f"`import scfm` offers {', '.join(sorted(links))}.\n"
