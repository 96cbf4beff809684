"""The rules of the house: what imports what, what must stay small and quick, and that scfm/*.py is what nbs/
exports."""

import ast
import configparser
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from safetensors import safe_open

import scfm
from scfm.data.prepare import DataConfig
from scfm.evaluation.evaluate import EvaluateConfig
from scfm.inference.export import ExportConfig
from scfm.inference.step_lora import InferenceConfig
from scfm.method.distill import SCFMConfig
from scfm.training.config import DistillConfig
from scfm.training.flow_config import FlowConfig

ROOT = Path(__file__).parents[1]
ORDER = [
    "threads",
    "types",
    "streams",
    "files",
    "method",
    "models",
    "data",
    "training",
    "inference",
    "evaluation",
    "app",
    "commands",
    "cli",
]
FIRST_CHAPTERS = [
    f"method.{p.stem}" for p in sorted((ROOT / "scfm" / "method").glob("[a-z]*.py"))
]  # torch alone (and tqdm)
HEAVY = ["diffusers", "transformers", "peft", "accelerate", "torchvision", "matplotlib"]
TOOLS = re.compile(
    r"nbdev|execnb|ghapi|nbconvert|nbclient|ipykernel|notebook|jupyter.*"
)  # of development only
EXTRAS = {
    "data": ("data_requirements", "video_requirements"),
    "evaluation": ("evaluate_requirements",),
    "app": ("app_requirements",),
}  # who may ask for what `pip install scfm[...]` brings
MODULES = sorted(p for p in (ROOT / "scfm").rglob("*.py") if p.name not in ("_modidx.py", "__init__.py"))
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
SETTINGS = SETTINGS["DEFAULT"]

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def chapter(path):
    """The package of scfm that a file belongs to: "models" for scfm/models/flux.py, "cli" for scfm/cli.py."""
    return path.relative_to(ROOT / "scfm").with_suffix("").parts[0]


def imports(path):
    """Every module that a file imports, anywhere in it, by its full name."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *(node.module.split(".") if node.module else [])])
            yield from ([f"{source}.{alias.name}" for alias in node.names] if source == "scfm" else [source])


# What imports what


@each_module
def test_a_module_imports_only_from_earlier_ones(path):
    mine = chapter(path)
    assert mine in ORDER, f"scfm.{mine} has no place in the order yet: give it one in {Path(__file__).name}"
    for name in imports(path):
        if name.startswith("scfm."):
            other = name.split(".")[1]
            assert other in ORDER, f"{path.name} imports {name}, which has no place in the order"
            within = mine == other
            assert within or ORDER.index(other) < ORDER.index(mine), (
                f"{mine} comes before {other}, but imports it"
            )


@each_module
def test_scfm_does_not_import_toy(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "toy"]
    if path.name != "demo.py":  # it names toy.demo, and imports it when somebody asks for the demo
        strings = [
            n.value
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        assert not [s for s in strings if re.fullmatch(r"toy(\.\w+)+(:\w+)?", s)]


@each_module
def test_a_module_needs_only_what_is_installed_with_it(path):
    allowed = (
        {"torch", "tqdm"}
        if chapter(path) in ("threads", "types", "streams", "method")
        else {r.name for r in requirements(SETTINGS["requirements"])}
    )
    allowed |= {own for name, own in (("pillow", "PIL"), ("pyyaml", "yaml")) if name in allowed}
    allowed |= {r.name for extra in EXTRAS.get(chapter(path), ()) for r in requirements(SETTINGS[extra])}
    allowed |= {name.replace("-", "_") for name in allowed}
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"scfm"}
    assert outside <= allowed


def test_the_first_chapters_load_no_heavy_library():
    code = "".join(f"import scfm.{name}\n" for name in FIRST_CHAPTERS)
    code += f"import sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    assert python(code) == ""


@pytest.mark.slow
def test_importing_scfm_takes_no_time_beyond_torch():
    code = "import time, torch\nbegan = time.perf_counter()\n"
    code += "import scfm\nscfm.scfm_loss\nprint(time.perf_counter() - began)"
    assert min(float(python(code)) for _ in range(3)) < 0.3
    assert (
        python(f"import sys, scfm\nprint(*[name for name in {HEAVY} + ['torch'] if name in sys.modules])")
        == ""
    )


def test_what_scfm_offers_is_there():
    assert 20 <= len(scfm.__all__) <= 40 and sorted(dir(scfm)) == sorted(scfm.__all__)
    assert all(getattr(scfm, name) is not None for name in scfm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'scfm_los'"):
        getattr(scfm, "scfm_" + "los")


# What is read


CONFIGS = [SCFMConfig, DistillConfig, FlowConfig, DataConfig, InferenceConfig, ExportConfig, EvaluateConfig]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_setting_is_read_somewhere(config):
    """`config.NAME` or `self.NAME` outside the validators, or in a table of names that are copied."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in MODULES)
    text = re.sub(r"lambda c: .*", "", text)
    unread = [f.name for f in fields(config) if not re.search(rf"\b(config|self)\.{f.name}\b", text)]
    assert not unread, f"{config.__name__}: nothing reads {', '.join(unread)}"


# What is exported


def test_nbdev_export_would_change_nothing(tmp_path):
    copy = tmp_path / "scfm_copy"
    copy.mkdir()
    shutil.copy(ROOT / "settings.ini", copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(ROOT / "scfm", copy / "scfm", ignore=shutil.ignore_patterns("__pycache__"))
    before = sources(copy / "scfm")
    for name, text in before.items():
        if text.lower().startswith(
            "# autogenerated"
        ):  # a module whose notebook is gone would survive otherwise
            (copy / "scfm" / name).unlink()
    tool("nbdev_export", copy)
    after = sources(copy / "scfm")
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"these differ from what the notebooks export: {', '.join(changed)} (run make export)"


def test_nbdev_clean_would_change_nothing(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    nbs = shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    tool("nbdev_clean", tmp_path)
    changed = sorted(
        p.name
        for p in nbs.rglob("*.ipynb")
        if p.read_bytes() != (ROOT / "nbs" / p.relative_to(nbs)).read_bytes()
    )
    assert not changed, f"with metadata that makes noise in diffs: {', '.join(changed)} (run make export)"


@each_module
def test_no_module_is_long(path):
    assert len(code_lines(path)) <= 300


def code_lines(path):
    """The numbers of the lines that hold code: no comment, no docstring, not blank."""
    strings = {
        n.value.lineno: n.value.end_lineno
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
    }
    docs = {line for first, last in strings.items() for line in range(first, last + 1)}
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [i for i, line in lines if i not in docs and line.strip() and not line.strip().startswith("#")]


# What is installed, and what is carried


def test_there_is_one_version():
    assert scfm.__version__ == SETTINGS["version"] == importlib.metadata.version("scfm")


def test_the_installed_library_needs_no_development_tool():
    asked = importlib.metadata.requires("scfm")
    assert {r.name for r in requirements(SETTINGS["requirements"])} == {r.name for r in plain(asked)}
    seen, waiting = set(), ["scfm"]
    while waiting:
        for requirement in plain(installed_requirements(waiting.pop())):
            if requirement.name not in seen:
                seen.add(requirement.name)
                waiting.append(requirement.name)
    assert "torch" in seen and not [name for name in seen if TOOLS.fullmatch(name.lower())]


def test_the_carried_weights_are_small_and_no_pickles():
    files = [p for p in (ROOT / "toy" / "weights").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 62e6
    emoji = [p for p in files if {"emoji", "emoji_lora"} & {*p.parts}]
    assert 0 < sum(p.stat().st_size for p in emoji) <= 30e6
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                assert list(opened.keys()), path
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            assert path.suffix in (".txt", ".md"), f"{path.name}: safetensors, json or text"
            path.read_text(encoding="utf-8")


def test_no_file_names_a_path_of_a_machine():
    places = [
        ROOT / name for name in ("benchmarks", "docs", "examples", "experiments", "scfm", "scripts", "toy")
    ]
    files = [*ROOT.glob("*.md"), *(p for place in places for p in place.rglob("*"))]
    for path in files:
        if path.suffix in (".py", ".md", ".json", ".txt", ".sh"):
            found = re.search(r"(?<![\w.])/(work|home|root|Users)/.*", path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_what_a_fixture_patches_is_undone_after_its_file():
    """A process runs the tests of many folders: one that stands for its life reaches all."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "MonkeyPatch" in ast.unparse(node):
                scopes = [ast.unparse(d) for d in node.decorator_list]
                outlives = re.search("scope='(session|package)'", " ".join(scopes))
                assert not outlives, f"{path.name}: {node.name}"


def python(code):
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def tool(name, folder):
    """Runs one of nbdev's commands in a folder."""
    done = subprocess.run([Path(sys.executable).with_name(name)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def sources(folder):
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in folder.rglob("*.py")}


def requirements(text):
    return [Requirement(part) for part in text.split()]


def installed_requirements(name):
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # meant for another system
        return []


def plain(lines):
    """The requirements of a plain install: those of extras left out."""
    parsed = [Requirement(line) for line in lines]
    return [r for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})]
