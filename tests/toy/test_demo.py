"""The demo, at a size of seconds, and the scores that the repository carries for it."""

import json

import pytest
import torch
from PIL import Image

from scfm.cli import main
from toy import demo
from toy.judge import COLUMNS, STEPS, Judge, at_stock, best_of
from toy.shapes import draw_captions

pytestmark = pytest.mark.slow


def test_the_demo_writes_image_table_and_results(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(draw_captions(4, torch.Generator().manual_seed(0)).text))
    out = tmp_path / "demo"
    for _ in range(2):  # a second demo starts from nothing and must not stumble over the first
        assert (
            main(
                [
                    "demo",
                    "--output_dir",
                    str(out),
                    "--max_train_steps",
                    "2",
                    "--captions",
                    "4",
                    "--prompts",
                    str(tmp_path / "prompts.txt"),
                ]
            )
            == 0
        )
    printed = capsys.readouterr().out
    assert (
        "prompt acc." in printed
        and "carried LoRA" in printed
        and "EMA decays" in printed
        and "a step costs" in printed
    )
    record = json.loads((out / "results.json").read_text())
    assert Image.open(out / "comparison.png").width > 400 and Image.open(out / "emoji.png").width > 600
    assert record["captions"] == 4 and len(record["entries"]) == 5 and record["live"]["steps"] == 2
    for name, rows in record["entries"].items():
        for steps in demo.STUDENT_STEPS if name.startswith("live") else STEPS:
            assert {*COLUMNS, "seconds"} <= at_stock(rows, steps).keys()
    teacher = record["entries"]["teacher"]
    assert at_stock(teacher, 32)["endpoint"] == 0
    assert best_of(teacher, 3)["endpoint"] <= at_stock(teacher, 3)["endpoint"]


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
