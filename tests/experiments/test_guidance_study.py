"""The study `guidance` at a size of seconds, and what it counts."""

import pytest
from PIL import Image

from experiments.studies.guidance import (
    COARSER,
    INSIDE,
    KEPT,
    OF_TEACHER,
    PAPERS,
    RANKS,
    Sizes,
    config_of,
    evaluations,
    make_models,
)

pytestmark = pytest.mark.experiment
STUDY = "guidance"


def test_a_small_run_measures_all_by_evaluations_an_image(study):
    record, printed = study.first
    assert not record["missing"] and INSIDE in printed
    curves = record["curves"]["CIFAR-10"]
    for label, each in {OF_TEACHER: 2, KEPT: 2, INSIDE: 1, COARSER: 1, PAPERS: 1}.items():
        assert list(curves[f"{label} endpoint"]) == [str(each * n) for n in (1, 2)], label
    for label in (INSIDE, COARSER):
        assert [e["mean"] for e in curves[f"{label} scale"].values()] == pytest.approx([1, 2**-0.85])
    assert len({str(curves[f"{label} endpoint"].values()) for label in RANKS}) == len(RANKS)
    assert Image.open(study.folder / "guidance.png").width > 400


def test_a_lost_training_is_made_again_to_the_last_bit(study):
    lost = study.lose("guidance_lora")
    assert study.run("--report", out="without").record["missing"]
    again = study.run(out="again").record
    assert lost.is_file() and again["curves"] == study.first.record["curves"]


def test_the_budget_is_what_is_counted():
    """By hand: forward and backward, two halves; twice where guided, of the teacher's share alone."""
    counts = {KEPT: 2 * 4, INSIDE: 2 + 2 * 1.25, COARSER: 2 + 2 * 1.5, PAPERS: 2 + 2 * 1.4}
    for label, count in counts.items():
        config = config_of(label, 0, Sizes())
        assert evaluations(label, config) == pytest.approx(count)
        assert config.max_train_steps * 32 * count == pytest.approx(Sizes().budget, rel=0.01)


def test_all_students_have_as_many_parameters():
    counts = {
        label: sum(p.numel() for p in make_models(label, 0)[1].parameters("student")) for label in RANKS
    }
    assert len(set(counts.values())) == 1, counts
