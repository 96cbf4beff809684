"""The runner: cells by what determines them, under the names that they have always had, and records that lose
nothing.
"""

import json
from functools import partial

import pytest
import torch

from experiments import testbeds
from experiments.recipes import BUDGETS
from experiments.runner import CellCache, Job, MissingCell, cell_name, compact, run_job, write_record
from experiments.stored import STORED_WORDS, from_stored, to_stored
from experiments.studies import ablations, compare, few_shot, plane, variants
from experiments.testbeds.cifar import Cifar10, Plan
from experiments.testbeds.plane import BUDGETED_SIZES, Plane
from experiments.testbeds.taught_flux import TaughtFlux
from experiments.testbeds.tiny_flux import FluxSizes, TinyFlux
from scfm.method.lora_scale import STEPS
from toy.plane import DATA, MLP

pytestmark = pytest.mark.experiment


class NamesOnly(CellCache):
    """Computes nothing and stores nothing: notes the names of the cells that a measurement asks for."""

    def __init__(self):
        super().__init__("nowhere")
        self.names = []

    def __call__(self, kind, spec, make):
        self.names.append(cell_name(kind, spec)[0])
        network = MLP(step_input=spec.get("method") in ("shortcut", "meanflow")).state_dict()
        stubs = {
            "teacher": network,
            "student": dict.fromkeys(("student", "ema_fast", "ema_slow"), network),
            "few_step": dict.fromkeys(spec.get("stages", ["ema_slow"]), network),
            "student_sw2": {"scales": dict.fromkeys(STEPS, 0.5)},
            "goal": torch.zeros(512, 2),
            "few_pictures": torch.zeros(256, 1),
            "few_dial": dict.fromkeys((3, 4, 8, 32), 0.5),
            "ablation_goals": (torch.zeros(1), torch.zeros(1)),
        }
        return stubs.get(kind, {})


FLUX_SIZES = FluxSizes()
# study -> (all its jobs at full size, how one is measured)
STUDIES = {
    "plane": (plane.jobs(plane.Sizes()), partial(plane.measure, sizes=plane.Sizes())),
    "compare": (
        compare.jobs(compare.FULL, BUDGETS, tuple(DATA)),
        partial(compare.measure, sizes=compare.FULL, flux_sizes=FLUX_SIZES),
    ),
    "variants": (
        variants.jobs(BUDGETED_SIZES, FLUX_SIZES, BUDGETS["medium"], tuple(DATA), list(variants.VARIANTS)),
        partial(variants.measure, sizes=BUDGETED_SIZES, flux_sizes=FLUX_SIZES, table=variants.Table()),
    ),
    "ablations": (
        ablations.jobs(ablations.FULL, smoke=False),
        partial(ablations.measure, sizes=ablations.FULL),
    ),
    "few_shot": (few_shot.jobs(few_shot.Sizes()), partial(few_shot.measure, sizes=few_shot.Sizes())),
}
# (study, which job, the cells that it rests on), as they were named when they were first measured: a name
# that changes
# orphans what has been computed
NAMED = [
    (
        "plane",
        {"label": "damped, k/N .2", "data": "checkerboard", "seed": 2},
        "student-d27e2c7cedcacefb student_sw2-069811aed707ea5f teacher-e70a228938d531a4",
    ),
    (
        "plane",
        {"label": "dual + restart"},
        "student-f19c48ec77c782cb student_sw2-029b5d421d4df0b6 teacher-05c077d8d525b889",
    ),
    (
        "plane",
        {"family": "read-out", "label": "ema_fast"},
        "student-4c105d43d49b5d84 student_sw2-4d24b40b6bb321bf teacher-05c077d8d525b889",
    ),
    (
        "plane",
        {"family": "choosers", "data": "moons", "seed": 1},
        "choosers-fd1b9d9c49be8fed student-2a78bbb39197d2e3 teacher-011046def8948023",
    ),
    (
        "compare",
        {"label": "SCFM, tuned", "data": "moons", "seed": 1, "budget": BUDGETS["large"][0]},
        "coupling-151668dc45a0a0db goal-dab35dc9bfe058f9 stepwise-6d10c668ff88a5d9 student-59a54ce0c001bc43 "
        "student_sw2-fa90e4371d2b950d teacher-011046def8948023",
    ),
    (
        "compare",
        {"label": "progressive", "data": "moons", "seed": 0},
        "few_step-70266e9a6731dd98 few_step_sw2-c729c9e1abf4888f goal-4dad34e12fd7de2a "
        "teacher-24300b1771e305a7",
    ),
    (
        "compare",
        {"label": "Reflow", "data": "tiny Flux"},
        "flux-18d96a5ac9b473f3 flux_scores-def11d3a291f73f2",
    ),
    (
        "compare",
        {"label": "SCFM, tuned", "data": "tiny Flux"},
        "flux-2e2203514b305b38 flux_scores-58e5c2036a9b9450",
    ),
    (
        "variants",
        {"label": "k/N .4 to 0", "data": "tiny Flux"},
        "flux-00e37decba338461 flux_variant-1eb90287a5453d75",
    ),
    (
        "variants",
        {"label": "fast EMA read out", "data": "moons"},
        "goal-4dad34e12fd7de2a student-340a2c64a8275662 teacher-24300b1771e305a7 variant-707a78d93e0dcf0f",
    ),
    (
        "ablations",
        {"family": "rank", "label": "16", "data": "checkerboard"},
        "ablation-317e390ad4a62d51 teacher-05c077d8d525b889",
    ),
    (
        "ablations",
        {"label": "dual, when stalled", "data": "moons"},
        "ablation-3a718607e7200032 teacher-24300b1771e305a7",
    ),
    (
        "ablations",
        {"part": "flux", "family": "rank", "label": "16"},
        "ablation_flux-bdde437b5b89cd26 ablation_goals-1366ce1ccbe8b23e few_pictures-88491aec2c619e54",
    ),
    (
        "few_shot",
        {"part": "plane", "family": "tuned", "data": "moons"},
        "few_sw2-c1d8d8a287fbdc80 goal-7fc99551ea177ee9 student-16ddaba8cb9a662b teacher-24300b1771e305a7",
    ),
    (
        "few_shot",
        {"part": "flux", "family": "tuned"},
        "few_flux-f961dba8e8b85508 few_lora-804c4ca746f8a5ef few_pictures-88491aec2c619e54",
    ),
]


@pytest.mark.parametrize("study, which, names", NAMED)
def test_cells_have_the_names_that_they_have_always_had(study, which, names):
    jobs, measure = STUDIES[study]
    job = next(job for job in jobs if all(getattr(job, field) == value for field, value in which.items()))
    cache = NamesOnly()
    measure(cache, job)
    assert {name.removesuffix(".pt") for name in cache.names} == set(names.split())


def test_a_cell_is_made_once_and_found_by_what_determines_it(tmp_path):
    cache, made = CellCache(tmp_path), []

    def make():
        made.append(1)
        return {"ema_slow": torch.ones(2), 3: (0.5, None)}

    for _ in range(2):
        value = cache("kind", {"max_train_steps": 3, "shift": (1.0, 2.0)}, make)
        assert value["ema_slow"].tolist() == [1, 1] and value[3] == (0.5, None)
    assert cache.made == len(made) == 1 and len(cache.used) == 1
    cache("kind", {"max_train_steps": 4, "shift": (1.0, 2.0)}, make)
    assert len(made) == 2
    with pytest.raises(MissingCell):
        CellCache(tmp_path, frozen=True)("kind", {"max_train_steps": 5}, make)


def test_a_cell_is_stored_in_the_words_of_the_first_ones(tmp_path):
    CellCache(tmp_path)(
        "kind", {"config": {"max_train_steps": 3}, "read_out": "ema_slow"}, lambda: {"ema_fast": 1}
    )
    (path,) = tmp_path.glob("kind-*.pt")
    cell = torch.load(path)
    assert json.loads(cell["spec"]) == {"config": {"updates": 3}, "read_out": "slow"}
    assert cell["value"] == {"fast": 1}


def test_every_word_has_one_name_and_comes_back():
    assert len(set(STORED_WORDS.values())) == len(STORED_WORDS)
    spec = {"of": [{name: (name, 1)} for name in STORED_WORDS], "other": "pairs"}
    assert from_stored(to_stored(spec)) == spec and to_stored(spec) != spec


def test_a_measurement_that_fails_is_missing_and_no_crash(tmp_path):
    def run_away(cache, job):
        raise FloatingPointError("nan")

    def lost(cache, job):
        return cache("kind", {}, lambda: 1)

    job = Job("part", "family", "label", "data", 0)
    assert run_job(job, run_away, tmp_path, ["part"]).value is None
    assert run_job(job, lost, tmp_path, ["another"]).value is None
    result = run_job(job, lost, tmp_path, ["part"])
    assert result.value == 1 and result.made == 1


def test_a_fuller_record_is_not_overwritten(tmp_path):
    write_record({"missing": [], "a": 1}, tmp_path / "record")
    with pytest.raises(SystemExit, match="name another --out"):
        write_record({"missing": ["x"], "a": 2}, tmp_path / "record")
    assert json.loads((tmp_path / "record.json").read_text())["a"] == 1


def test_the_record_is_written_short_and_whole():
    record = {"a": {"b": {"0": 0.5, "1": [1, 2]}}, "c": [{"d": "x  y"}]}
    indented = json.dumps(record, indent=1)
    text = compact(indented)
    assert json.loads(text) == record and len(text.splitlines()) < len(indented.splitlines()) / 2


def test_all_testbeds_have_the_one_interface(tmp_path):
    cache = CellCache(tmp_path)
    beds = [
        Plane(cache, plane.Sizes()),
        TinyFlux(cache, FluxSizes()),
        TaughtFlux(cache, few_shot.Sizes().flux),
        Cifar10(Plan("", tmp_path)),
    ]
    assert all(isinstance(bed, testbeds.Testbed) for bed in beds)
