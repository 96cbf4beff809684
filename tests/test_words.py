"""The words that were given up for the field's own (teacher, image, LoRA scale, ...) come back nowhere."""

import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("scfm", "experiments", "benchmarks", "examples", "toy", "nbs", "docs", "scripts")
# Names of code: variables, functions, classes, settings.
NAMES = set(
    """told said asked speakers speaker speak FullSpeakers LoraSpeakers FlowSpeakers CAST RULES follow option
    one_update draw_update apply_gradient Run Pretraining RunConfig PretrainConfig UseConfig begin_folder
    told_before MAY_CHANGE
    surroundings Dial read_dial write_dial find_dial keep_dial StepScales by_step in_turn vertex Eye Towers
    Cut Peer peers
    own_samplers find_eyes own_eye paint painted picture pictures stock_pictures encode_pictures gallery
    judged_captions ship
    write_whole look_at fault_of rows_of_update CachedRows PictureFlow ClassNames NoVAE LabelAndLevel
    own_shift clip_tokens
    true_guidance teacher_share flow_share own_share fast_decay slow_decay speaker_scale micro_batch
    checkpoint_every
    preview_every student_steps judge_scales sample_shift max_tokens stock_shift_of tuned""".split()
)
# Words of prose and of output. ("a picture of" begins captions that the toy models were trained on.)
PROSE = re.compile(r"\b(?!picture of\b)([Pp]ictures?|[Pp]aint(s|ed|er|ing)?|[Ss]peakers?)\b")
FLAGS = re.compile(
    r"--(pipeline|pictures|out|lr|updates|clip(?= [0-9.])|precision|keep|resume|tracker"
    r"|targets|alpha|negative|max_tokens)\b"
)

# A paragraph of prose holds three decimals at most: more belong into a table, or stay with the output.
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+")
NO_PROSE = re.compile(  # code, formulas, tables
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|^(?:\||    )[^\n]*$", flags=re.S | re.M
)
PARAGRAPH = re.compile(r"\n\s*\n|\n(?=(?:[-*>]|\d+\.) )")  # an item of a list is one of its own

SCRIPTS = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")) if p.name != "_modidx.py"]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
TEXTS = [
    *ROOT.glob("*.md"),
    *(
        p
        for folder in FOLDERS
        for kind in ("*.md", "*.yaml", "*.sh")
        for p in sorted((ROOT / folder).rglob(kind))
    ),
]


def names_in(code):
    """The names in some Python, and its other text."""
    names, rest = set(), []
    code = re.sub(r"^\s*[%!].*$", "", code, flags=re.M)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NAME:
            names.add(token.string)
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            rest.append(token.string)
    return names, "\n".join(rest)


def check(place, names, text):
    assert not names & NAMES, f"{place}: {', '.join(sorted(names & NAMES))}"
    ours = place.startswith(("experiments", "benchmarks", "scripts"))  # whose own scripts have an --out
    for pattern in (PROSE,) if ours else (PROSE, FLAGS):
        hit = pattern.search(text)
        assert not hit, f"{place}: ...{text[max(0, hit.start() - 60) : hit.end() + 40]}..."


def short(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SCRIPTS, ids=short)
def test_no_given_up_word_in_code(path):
    check(short(path), *names_in(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=short)
def test_no_given_up_word_in_a_notebook(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        names, text = names_in(source) if cell["cell_type"] == "code" else (set(), source)
        printed = [
            "".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell.get("outputs", [])
        ]
        check(f"{short(path)}, cell {cell['id']}", names, "\n".join([text, *printed]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=short)
def test_a_paragraph_holds_at_most_three_decimals(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for text in PARAGRAPH.split(NO_PROSE.sub("", "".join(cell["source"]))):
                decimals = DECIMAL.findall(text)
                assert len(decimals) <= 3, f"cell {cell['id']}: {text.strip()[:60]}... {decimals}"


@pytest.mark.parametrize("path", TEXTS, ids=short)
def test_no_given_up_word_in_prose(path):
    check(short(path), set(), path.read_text(encoding="utf-8"))
