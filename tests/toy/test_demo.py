"""The demo, at a size of seconds, and the scores that the repository carries for it."""

import json

import pytest
import torch
from PIL import Image

from scfm.cli import main
from toy import demo
from toy.emoji import compare
from toy.judge import COLUMNS, STEPS, STOCK, Judge, at_stock, best_of
from toy.shapes import draw_captions

pytestmark = pytest.mark.slow


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The words of a demo of seconds: fewer shifts, step counts, timed steps and emoji."""
    monkeypatch.setattr(demo, "SHIFTS", (STOCK, 4.5))
    monkeypatch.setattr(demo, "STUDENT_STEPS", (1, 3))
    monkeypatch.setattr(demo, "TIMED", 1)
    monkeypatch.setattr(compare, "CAPTIONS", compare.CAPTIONS[:2])
    monkeypatch.setattr(compare, "TEACHER", (4, 1))
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(draw_captions(4, torch.Generator().manual_seed(0)).text))
    told = {"output_dir": tmp_path / "demo", "max_train_steps": 2, "captions": 4, "prompts": path}
    return ["demo", *(word for name, value in told.items() for word in (f"--{name}", str(value)))]


def test_the_demo_writes_images_table_and_results(small, tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "demo", demo.compare
    monkeypatch.setattr(demo, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.main(small[1:])
    assert (out / "live/selection.json").is_file() and not (out / "results.json").exists()
    for folder in ("images", "cache", "timed", "live"):
        (out / folder / "of_the_first").write_text("")

    monkeypatch.setattr(demo, "compare", real)
    assert main(small) == 0  # a second demo starts from nothing and does not stumble over the first
    assert len(list((out / "images").glob("*.png"))) == 4 and not list(out.rglob("of_the_first"))
    printed = capsys.readouterr().out
    assert (
        "prompt acc." in printed
        and "carried LoRA" in printed
        and "EMA decays" in printed
        and "a step costs" in printed
    )
    record = json.loads((out / "results.json").read_text())
    assert Image.open(out / "comparison.png").width > 400 and Image.open(out / "emoji.png").height > 300
    assert record["captions"] == 4 and len(record["entries"]) == 5 and record["live"]["steps"] == 2
    for name, rows in record["entries"].items():
        for steps in demo.STUDENT_STEPS if name.startswith("live") else STEPS:
            assert {*COLUMNS, "seconds"} <= at_stock(rows, steps).keys()
    teacher = record["entries"]["teacher"]
    assert at_stock(teacher, 32)["endpoint"] == 0
    assert best_of(teacher, 3)["endpoint"] <= at_stock(teacher, 3)["endpoint"]


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "cost, steps, batch_size",
    [
        ({32: 0.2, 16: 0.1, 8: 0.05}, 300, 32),  # quick: all steps
        ({32: 0.5, 16: 0.3, 8: 0.2}, 170, 32),  # as many as fit
        ({32: 3.0, 16: 0.6, 8: 0.4}, 141, 16),  # dear: fewer examples a step
        ({32: 9.0, 16: 6.0, 8: 3.0}, 100, 8),
    ],
)  # never a student that has hardly learned
def test_the_run_is_as_long_as_a_step_allows(monkeypatch, cost, steps, batch_size):
    monkeypatch.setattr(demo, "seconds_of_step", lambda folder, batch: cost[batch])
    plan = demo.plan_run(demo.Path("nowhere"), demo.parse([]))
    assert plan == (steps, batch_size, cost[batch_size])
    assert ("is the machine busy" in plan.in_words(85)) == (cost[8] == 3.0)


def test_the_carried_scores_are_what_is_measured():
    goal, entries = demo.read_stored()
    carried = demo.carried_lora()
    judge = Judge(carried.family, demo.CAPTIONS, progress=False)
    judge.goal = goal
    for name, steps, scale in (
        ("teacher", 2, 0.0),
        ("carried LoRA, its scales", 3, carried.lora_scales.scale(3)),
    ):
        row, stored = judge.measure(carried.at_scale(scale), steps, 3.0), at_stock(entries[name], steps)
        for column in COLUMNS:
            assert row[column] == pytest.approx(stored[column], rel=2e-3), (name, column)


def test_the_demo_refuses_nonsense(capsys):
    assert main(["demo", "--captions", "0"]) == 2
    assert "--captions" in capsys.readouterr().err
