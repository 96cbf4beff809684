"""What `measure` adds to the rows of an evaluation, with a metric that sees colours."""

import pytest
import torch
from PIL import Image

from scfm.evaluation.feature_distances import floor_of, kernel_distance, manifold
from scfm.evaluation.image_metrics import Measured
from scfm.evaluation.image_store import image_path
from scfm.evaluation.measure import measure
from scfm.evaluation.table import columns_of, sets_of
from scfm.method.metrics import frechet_distance


class Colours:
    """The mean of each channel, under the name that Inception has."""

    name, distance = "Inception", "FID"

    def measure(self, batches):
        return Measured(torch.cat([images.double().mean((2, 3)) for images, _ in batches]), {})


def save_colours(paths, seed):
    """Images of one random colour each; returns the colours (n, 3)."""
    colours = torch.randint(0, 256, (len(paths), 3), generator=torch.Generator().manual_seed(seed))
    for path, colour in zip(paths, colours.tolist(), strict=True):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), tuple(colour)).save(path)
    return colours.double()


@pytest.fixture
def measured(tmp_path):
    rows = [
        {"name": name, "label": name, "steps": 2, "evaluations": 2, "endpoint_distance": None, "seconds": 1.0}
        for name in ("teacher", "student")
    ]
    places = {row["name"]: [image_path(tmp_path / row["name"], i) for i in range(7)] for row in rows}
    places["reference"] = [image_path(tmp_path / "reference", i) for i in range(14)]
    colours = {name: save_colours(paths, seed) for seed, (name, paths) in enumerate(places.items())}
    floors = measure(rows, tmp_path, ["a"] * 7, [Colours()], places["reference"], (4, 4), progress=False)
    return {"rows": rows, "floors": floors}, colours


def test_a_row_has_its_distances_to_the_teacher_and_to_the_reference(measured):
    record, colours = measured
    teacher, student = record["rows"]
    found = student["sets"]["Inception"]
    kid = kernel_distance(colours["student"], colours["teacher"], paired=True)
    assert (found["teacher"]["kid"], found["teacher"]["kid_error"]) == pytest.approx(kid, rel=1e-6)
    kid = kernel_distance(colours["student"], colours["reference"])
    assert (found["reference"]["kid"], found["reference"]["kid_error"]) == pytest.approx(kid, rel=1e-6)
    shares = manifold(colours["student"], colours["reference"])._asdict()
    assert {key: found["reference"][key] for key in shares} == pytest.approx(shares)
    want = frechet_distance(colours["student"], colours["teacher"])
    assert student["distances"]["FID"]["teacher"] == pytest.approx(want, rel=1e-6)
    assert teacher["sets"]["Inception"]["teacher"] is None and teacher["distances"]["FID"]["reference"] > 0
    floor, want = record["floors"]["Inception"], floor_of(colours["reference"])
    assert floor.pop("counts") == want.pop("counts") == [7, 7] and floor == pytest.approx(want)


def test_the_tables_call_it_fid_to_the_teacher(measured):
    headings = [column.heading for column in columns_of(measured[0])]
    assert headings[:3] == ["FID to the teacher", "FID to the reference", "|dFID|"]
    (first, lines), (second, more) = sets_of(measured[0])
    assert first == "Inception, to the teacher's images" and [line[0] for line in lines] == ["", "student"]
    assert "its own halves, 7 and 7 images" in second
    assert [line[0] for line in more] == ["", "its own halves", "teacher", "student"]
