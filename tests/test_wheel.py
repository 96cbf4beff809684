"""What a user gets who installs a release instead of this checkout: sdist and wheel, built, opened, run."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Paths: the copied tree, the sdist, the wheel built from the sdist, the wheel built from the tree."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "scfm", ":(glob)*"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of the files that belong to the project")
    tree = tmp_path_factory.mktemp("tree")
    for name in run(*listing, cwd=ROOT).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    for folder in ("toy", "tests"):  # must not get into anything
        (tree / folder).mkdir()
        (tree / folder / "__init__.py").touch()
        (tree / folder / "test_none.py").touch()
    build = [sys.executable, "-m", "build", "--no-isolation"]
    both, alone = tmp_path_factory.mktemp("both"), tmp_path_factory.mktemp("alone")
    run(*build, "--outdir", both, cwd=tree)  # the sdist, and a wheel from what it holds
    run(*build, "--wheel", "--outdir", alone, cwd=tree)
    return tree, *both.glob("*.tar.gz"), *both.glob("*.whl"), *alone.glob("*.whl")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The bin/ of an environment with the wheel, which finds the packages of this one, but not its scfm."""
    commands = tmp_path_factory.mktemp("home") / "venv" / "bin"
    python = commands / "python"
    run(sys.executable, "-m", "venv", "--without-pip", commands.parent)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[2])
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    # Python does not follow the .pth files of a folder that a .pth file names: no editable scfm comes with it
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(packages) / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(ours)))
    return commands


def test_the_sdist_holds_what_a_build_reads_and_no_more(built):
    tree, sdist, *_ = built
    with tarfile.open(sdist) as archive:
        files = [PurePosixPath(member.name) for member in archive.getmembers() if member.isfile()]
    names = {str(PurePosixPath(*path.parts[1:])) for path in files}
    assert {"settings.ini", "README.md", "LICENSE", "setup.py", "pyproject.toml"} <= names
    assert package_files(tree) <= names
    assert not [name for name in names if name.startswith(("toy/", "tests/"))]


def test_the_wheel_holds_the_package_and_nothing_else(built):
    tree, _, wheel, from_tree = built
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names == set(zipfile.ZipFile(from_tree).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package_files(tree)
    assert {"scfm/py.typed", "scfm/presets/flux-dev-a100.yaml", "scfm/commands/plan.py"} <= names


def test_the_installed_wheel_is_what_python_imports(installed, tmp_path):
    code = "import scfm, importlib.util as u; print(scfm.__file__); print(u.find_spec('toy'))"
    path, toy = run(installed / "python", "-c", code, cwd=tmp_path).stdout.split("\n")[:2]
    assert Path(path).is_relative_to(installed.parent) and toy == "None"


def test_a_preset_is_found_without_the_checkout(installed, tmp_path):
    said = run(installed / "scfm", "plan", "--config", "flux-dev-a100", cwd=tmp_path).stdout
    assert "GiB" in said
    assert not list(tmp_path.iterdir())


def test_the_demo_says_that_it_needs_the_repository(installed, tmp_path):
    done = run(installed / "scfm", "demo", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert "needs the repository" in done.stderr and "Traceback" not in done.stderr


def package_files(tree):
    """The files of the library in a tree, as paths in it: sources, presets, style, the note on types."""
    kinds = ("scfm/**/*.py", "scfm/presets/*.yaml", "scfm/app.css", "scfm/py.typed")
    return {path.relative_to(tree).as_posix() for kind in kinds for path in tree.glob(kind)}


def run(*words, cwd=None, check=True):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done
