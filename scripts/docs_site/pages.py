"""Pages of the site from Markdown files, notebooks and code, where they lie in the repository."""

import base64
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import formulas

LINK = re.compile(r"(?P<image>!?)\[(?P<label>(?:[^\[\]`]|`[^`]*`)*)\]\((?P<target>[^()\s]+)\)")
COMMENT = re.compile(r"^<!--.*?-->\n?", flags=re.M | re.S)
DIRECTIVE = re.compile(r"^#\|[ \t]*(\w+)[ \t]*(.*)\n?", flags=re.M)  # of nbdev
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".toml": "toml"}
MOST_LINES = 60  # of an output
SLIDER = '<div class="slider">'  # of toy.plots.slider: the only HTML of a notebook that comes along


class Writer:
    """Writes pages below `source`, as they lie below `root`, and notes formulas and linked files."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.source = root, source
        self.formulas: list[formulas.Formula] = []
        self.titles: dict[str, tuple[str, str]] = {}  # of a page: its title, and a line on it
        self.files: set[str] = set()

    def write(self, place: str, text: str) -> str:
        """Writes a page."""
        path = self.source / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return place

    def page(self, name: str, place: str) -> str:
        """A Markdown file of the repository."""
        text = (self.root / name).read_text(encoding="utf-8")
        head = "---\nhide: [navigation]\n---\n\n" if place == "index.md" else ""
        return self.write(place, head + self.prose(COMMENT.sub("", text), name, place))

    def notebook(self, name: str) -> str:
        """A notebook with its outputs; nbdev's hidden cells, or their code, are left out."""
        place = str(Path(name).with_suffix(".md"))
        cells = json.loads((self.root / name).read_text(encoding="utf-8"))["cells"]
        module = next(
            (m[2] for c in cells for m in DIRECTIVE.finditer("".join(c["source"])) if m[1] == "default_exp"),
            "",
        )
        parts = []
        for number, cell in enumerate(cells):
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(self.prose(text, name, place))
            else:
                parts += self.code_cell(text, cell.get("outputs", []), module, place, number)
        note = (
            f"*This page is the notebook `{name}`.*"
            + f" *It exports `scfm/{module.replace('.', '/')}.py`.*" * bool(module)
        )
        lines = parts[0].splitlines()
        summary = next((line.lstrip("> ") for line in lines[1:] if line.startswith(">")), "")
        self.titles[place] = lines[0].lstrip("# "), summary
        return self.write(place, "\n\n".join([*parts, "---", note]) + "\n")

    def code_cell(self, text: str, outputs: list[Any], module: str, place: str, number: int) -> list[str]:
        """Markdown of a code cell and of what it gave."""
        directives = {match[1] for match in DIRECTIVE.finditer(text)}
        if "hide" in directives or not DIRECTIVE.sub("", text).strip():
            return []
        exported = f' title="scfm/{module.replace(".", "/")}.py"' if "export" in directives and module else ""
        parts = [] if "hide_input" in directives else [fenced(DIRECTIVE.sub("", text), f"python{exported}")]
        printed = ""
        for part, output in enumerate(outputs):
            data = output.get("data", {})
            kind = next((kind for kind in ("image/png", "image/jpeg") if kind in data), "")
            if kind:
                image = f"{Path(place).stem}_{number}_{part}.{kind.split('/')[1]}"
                content = base64.b64decode("".join(data[kind]))
                (self.source / place).parent.mkdir(parents=True, exist_ok=True)
                (self.source / place).with_name(image).write_bytes(content)
                width = output.get("metadata", {}).get(kind, {}).get("width")  # it has more pixels
                wide = f" width={width}" if width else ""
                parts.append(f"![output of the code above]({image}){{ .output{wide} }}")
            elif SLIDER in (html := "".join(data.get("text/html", ""))):
                parts.append(html)
            else:
                printed += "".join(output.get("text", data.get("text/plain", "")))
                if output["output_type"] == "execute_result":
                    printed += "\n"
        if printed.strip():
            lines = ANSI.sub("", printed).rstrip().splitlines()
            more = [f"... ({len(lines) - MOST_LINES} more lines)"] * (len(lines) > MOST_LINES)
            parts.append(fenced("\n".join(lines[:MOST_LINES] + more), "{ .text .output }"))
        return parts

    def code(self, name: str) -> str:
        """A page that shows a file of code."""
        place, text = f"{name}.md", (self.root / name).read_text(encoding="utf-8")
        docstring = re.match(r'"""(.+?)(\n\n|""")', text, flags=re.S)
        self.titles[place] = f"`{name}`", " ".join(docstring[1].split()) if docstring else ""
        language = LANGUAGES.get(Path(name).suffix, "text")
        return self.write(place, f"# {Path(name).name}\n\n`{name}`\n\n{fenced(text, language)}\n")

    def index(self, title: str, folder: str, places: list[str]) -> str:
        """A page that lists others of a folder."""
        rows = "".join(
            f"- [{self.titles[place][0]}]({Path(place).name})  \n  {self.titles[place][1]}\n"
            for place in places
        )
        return self.write(f"{folder}/index.md", f"# {title}\n\n{rows}")

    def prose(self, text: str, name: str, place: str) -> str:
        """Markdown of the file `name` as the page `place` has it: formulas taken out, links to pages."""
        text = LINK.sub(lambda match: self.link(match, name, place), text)
        text = text.replace("<details>", '<details markdown="1">')  # what is folded is Markdown, too
        return formulas.take_out(text, place, self.formulas)

    def link(self, match: re.Match[str], name: str, place: str) -> str:
        """A link as the site has it: to a page, to a file that comes along, or no link but its words."""
        target, _, anchor = match["target"].partition("#")
        if not target or ":" in target:
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(name), target))
        full = self.root / path
        if path == "README.md":
            there = "index.md"
        elif path.endswith(".ipynb") and full.is_file():
            there = str(Path(path).with_suffix(".md"))
        elif path.endswith(".md") and full.is_file():
            there = path
        elif full.is_dir() and path in ("nbs/learn", "nbs/guides", "nbs/studies", "examples"):
            there = f"{path}/index.md"
        elif full.is_file():
            self.files.add(path)
            there = f"{path}.md" if full.suffix in LANGUAGES else path
        elif full.is_dir():
            return match["label"]
        else:
            there = path  # mkdocs says that it is dead
        there = os.path.relpath(there, os.path.dirname(place) or ".")
        return f"{match['image']}[{match['label']}]({there}{'#' * bool(anchor)}{anchor})"

    def linked_files(self) -> None:
        """Writes what pages link to beside pages."""
        for name in sorted(self.files):
            if Path(name).suffix in LANGUAGES:
                if not (self.source / f"{name}.md").is_file():
                    self.code(name)
            else:
                (self.source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / name, self.source / name)


def fenced(text: str, head: str) -> str:
    """A block of code, whatever fences stand in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`{3,}", text)), default=0))
    return f"{fence}{' ' * head.startswith('{')}{head}\n{text.strip(chr(10))}\n{fence}"
