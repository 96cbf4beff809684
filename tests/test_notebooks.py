"""Every notebook runs from top to bottom in a fresh kernel and in its time, and is committed with what it
then shows."""

import base64
import io
import json
import multiprocessing
import re
import shutil
import time
import warnings
from pathlib import Path

import nbformat
import pytest
from kernels import ForkedKernels
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError
from PIL import Image

pytestmark = pytest.mark.notebook
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*/*.ipynb"))
BUDGETS = json.loads(
    (ROOT / "tests" / "budgets.json").read_text()
)  # seconds, on a laptop with nothing else to do
PATIENCE = 4  # a slow or busy machine may take so many times the budget
LARGEST = 900_000  # bytes; 41_ablations has 23 figures at 144 dots an inch
COLUMN = 760  # dots of a page's column, where nothing else is said
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|home|root|Users)/")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    assert path.stem in BUDGETS, f"{path.name} has no budget: write its seconds into tests/budgets.json"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a notebook needs nothing from the network
    folder = shutil.copytree(
        path.parent, tmp_path / "nbs" / path.parent.name, ignore=shutil.ignore_patterns(".*", "_*")
    )
    for name in (
        "benchmarks",
        "docs",
        "examples",
        "experiments",
        "scfm",
        "toy",
    ):  # a notebook may look at its neighbours
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(folder / path.name, as_version=4)
    committed = [shown(cell) for cell in code_cells(notebook)]
    began = None

    def seconds_left(cell):
        nonlocal began
        began = began or time.monotonic()  # at the first cell: starting a kernel is not the notebook's work
        return max(1, int(began + PATIENCE * BUDGETS[path.stem] - time.monotonic()))

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=ForkedKernels,
        startup_timeout=120,
        timeout_func=seconds_left,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute()
    except CellTimeoutError as error:
        pytest.fail(f"{path.name} takes more than {PATIENCE} x its budget of {BUDGETS[path.stem]} s: {error}")
    assert not multiprocessing.active_children(), "its kernel lives on"
    took = time.monotonic() - began
    if took > BUDGETS[path.stem]:
        warnings.warn(f"{path.name} took {took:.0f} s, its budget is {BUDGETS[path.stem]} s", stacklevel=1)
    stale = [
        cell.source
        for cell, before in zip(code_cells(notebook), committed, strict=False)
        if shown(cell) != before
    ]
    assert not stale, (
        f"committed without the output that it has when run, or with one that it has not:\n{stale[0]}"
    )


@each_notebook
def test_it_is_committed_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= LARGEST, (
        f"{path.name} has {path.stat().st_size} bytes: smaller or fewer figures"
    )
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs, f"{path.name} is committed without outputs: run it, then save it"
    assert not [o for o in outputs if o.output_type == "error"], f"{path.name} is committed with an error"
    noise = [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    assert not noise, f"warnings or progress bars in {path.name}:\n{noise[0]}"
    counts = [cell.execution_count for cell in cells if cell.execution_count is not None]
    assert counts == sorted(set(counts)), f"the cells of {path.name} were run out of order: {counts}"


@each_notebook
def test_its_figures_are_sharp(path):
    """A file has half as many dots again as it takes on the page."""
    outputs = [o for cell in code_cells(nbformat.read(path, as_version=4)) for o in cell.outputs]
    figures = [o for o in outputs if "Figure" in o.get("data", {}).get("text/plain", "")]
    for output in figures:
        image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        shown = output.metadata.get("image/png", {}).get("width", COLUMN)
        assert image.width >= 1.5 * shown - 2, f"{image.width} dots for {shown}"


@each_notebook
def test_it_names_no_path_of_a_machine(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for text in [cell.source, *(t for output in cell.get("outputs", []) for t in texts(output))]:
            found = MACHINE_PATH.search(text)
            assert not found, f"{path.name}: {text[max(0, found.start() - 40) : found.end() + 40]!r}"


def test_each_budget_has_its_notebook():
    assert sorted(BUDGETS) == sorted(path.stem for path in NOTEBOOKS)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """Whether the cell shows anything besides warnings."""
    return any(o.output_type != "stream" or o.name == "stdout" for o in cell.outputs)


def texts(output):
    """What an output says in words: its stream, its traceback and the text of its results, not its images."""
    yield output.get("text", "")
    yield from output.get("traceback", [])
    for kind, data in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield data
