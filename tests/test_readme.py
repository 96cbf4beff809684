"""What the README promises runs, its numbers are those that were measured, its links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
import torch

from toy.emoji import table
from toy.plane import MLP, checkerboard, train_flow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_it_is_one_that_people_read_to_the_end():
    prose = re.sub(r"```.*?```", " ", README, flags=re.DOTALL)
    words = re.findall(r"[A-Za-z][\w'-]*", LINK.sub("]", prose))
    assert len(words) <= 900
    assert README.index("![") < 400  # an image on the first screen


def test_its_python_trains_a_few_step_student():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    torch.manual_seed(0)
    network = train_flow(MLP(32, 2), checkerboard, updates=300, batch=256, seed=0)
    names = {"network": network, "data": checkerboard}
    assert "max_train_steps=2000" in code
    exec(code.replace("max_train_steps=2000", "max_train_steps=60"), names)
    images, models = names["images"], names["models"]
    assert images.shape == (64, 2) and images.isfinite().all()
    x, t = torch.randn(64, 2), torch.full((64,), 0.9)
    assert not torch.equal(models.field("ema")(x, t), models.field("ema", 0.0)(x, t))


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_its_links_lead_somewhere(page):
    file = ROOT / page
    for target in LINK.findall(file.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto")):
            assert (file.parent / target).exists(), f"{page}: {target}"


def test_its_tables_are_what_was_measured():
    record = json.loads(table.RECORD.read_text(encoding="utf-8"))
    assert table.short_table(record) in README
    assert table.long_table(record) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_its_words_about_the_emoji_hold():
    """One step of the student before two of the teacher by each measure; level at eight."""
    record = json.loads(table.RECORD.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["rows"]}
    one, two = rows["student-1"], rows["teacher-2"]
    assert one["endpoint_distance"] < two["endpoint_distance"] and table.kid(one)[0] < table.kid(two)[0]
    assert table.kid(one, "reference")[0] < table.kid(two, "reference")[0]
    (ours, own), (theirs, other) = (
        table.kid(rows[f"{who}-8"], "reference") for who in ("student", "teacher")
    )
    assert abs(ours - theirs) < own + other
