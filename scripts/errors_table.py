"""Tries wrong commands and writes docs/errors.md, a table of what was asked and what was answered:  python bench/bad_inputs.py

Each must end with exit code 2 and one line that names the mistake, before any work: no run folder, no image, no half-written
file. A command that breaks this promise stops the script.
"""
import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from scfm.cli import main as scfm

ROOT = Path(__file__).parents[1]
FLUX, LORA = ROOT / "toy/weights/flux", ROOT / "toy/weights/lora"
HEAD = """# What a wrong command says

Every line below was produced by `python bench/bad_inputs.py`, and a test runs it again: one line, exit code 2, and nothing has been
loaded, generated or written. Flags that are right are left out of the first column. Lines that only a GPU, a full disk or a damaged
shard can cause are in the tests of the modules (`tests/test_run.py`, `test_cache.py`, `test_evaluate.py`, `test_export.py`).

| asked | answered |
|---|---|
"""
DISTILL = {"pipeline": "FLUX", "prompts": "captions.txt", "out": "run", "height": 32, "width": 32, "max_sequence_length": 16}
DATA = {"pipeline": "FLUX", "prompts": "captions.txt", "out": "images", "sizes": "32x32", "max_sequence_length": 16}
OWN = {**DISTILL, "prompts": None}
CASES = [
    ("distill", DISTILL, {"pipeline": None}), ("distill", DISTILL, {"pipeline": "nowhere"}),
    ("distill", DISTILL, {"pipeline": "not_flow_matching"}),
    ("distill", DISTILL, {"prompts": None}), ("distill", DISTILL, {"prompts": "nowhere.txt"}),
    ("distill", DISTILL, {"prompts": "empty.txt"}), ("distill", DISTILL, {"prompts": "broken.jsonl"}),
    ("distill", DISTILL, {"images": "own"}), ("distill", OWN, {"images": "no_listing"}),
    ("distill", OWN, {"images": "lost_image"}), ("distill", OWN, {"images": "not_a_image"}), ("distill", OWN, {"images": "no_caption"}),
    ("distill", DISTILL, {"height": 30}), ("distill", DISTILL, {"more_sizes": "24by40"}), ("distill", DISTILL, {"more_sizes": "32x32"}),
    ("distill", DISTILL, {"targets": "to_z"}), ("distill", DISTILL, {"rank": 0}), ("distill", DISTILL, {"lr": -1}),
    ("distill", DISTILL, {"teacher_ratio": 1.5}), ("distill", DISTILL, {"self_grids": "3,5"}), ("distill", DISTILL, {"t_skip": 3}),
    ("distill", DISTILL, {"algorithm": "triple"}), ("distill", DISTILL, {"guidance": "7,0"}),
    ("distill", DISTILL, {"guidance_mode": "distilled"}), ("distill", DISTILL, {"guidance_mode": "distilled", "algorithm": "dual_pure"}),
    ("distill", DISTILL, {"negative_prompt": "ugly"}), ("distill", DISTILL, {"shift": "4,2"}), ("distill", DISTILL, {"precision": "fp8"}),
    ("distill", DISTILL, {"quantize": "int3"}), ("distill", DISTILL, {"loss": "l1"}), ("distill", DISTILL, {"eval_num_steps": "0,3"}),
    ("distill", DISTILL, {"resume": "elsewhere"}), ("distill", DISTILL, {"config": "typo.yaml"}), ("distill", DISTILL, {"config": "nowhere.yaml"}),
    ("distill", DISTILL, {"out": "another_run"}), ("distill", DISTILL, {"tracker": "mlflow"}),
    ("data", DATA, {"sizes": "512"}), ("data", DATA, {"sizes": "32x30"}), ("data", DATA, {"steps": 0}), ("data", DATA, {"out": None}),
    ("plan", {}, {"shape": "flux3"}), ("plan", {"shape": "flux-dev"}, {"gpu": "tpu"}), ("plan", {"shape": "flux-dev"}, {"change": "layers=3"}),
    ("dial", {}, {"lora": "nowhere"}), ("dial", {"lora": "LORA"}, {"steps": "0,3"}), ("dial", {"lora": "LORA"}, {"each": "5"}),
    ("sample", {"lora": "LORA"}, {}), ("sample", {"lora": "LORA", "prompt": "a star"}, {"steps": 0}),
    ("evaluate", {}, {"lora": "nowhere"}), ("evaluate", {"lora": "LORA", "prompts": "captions.txt"}, {"count": 0}),
    ("export", {"lora": "LORA"}, {"out": "another_run"}), ("export", {}, {"lora": "nowhere", "out": "exported"}),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "docs/errors.md"), help="the table (default docs/errors.md)")
    out = Path(parser.parse_args().out).absolute()
    root = Path(tempfile.mkdtemp())
    os.environ["HF_HUB_OFFLINE"] = "1"
    make_inputs(root)
    with contextlib.chdir(root) if hasattr(contextlib, "chdir") else inside(root):
        rows = [attempt(root, *case) for case in CASES]
    new = out.with_suffix(".new")
    new.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    os.replace(new, out)
    shutil.rmtree(root)
    print(f"{len(rows)} wrong commands, each with one line and exit code 2: {out.name}")


@contextlib.contextmanager
def inside(folder):
    """contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make_inputs(root):
    """Files with the mistakes that the commands are to name."""
    (root / "captions.txt").write_text("a red star\na blue ring\n")
    (root / "empty.txt").write_text("\n# nothing\n")
    (root / "broken.jsonl").write_text('{"text": "a red star"}\n{"text": \n')
    (root / "typo.yaml").write_text("rnak: 16\n")
    for name, listing in {"no_listing": None, "lost_image": '{"file_name": "a.png", "text": "a star"}',
                          "not_a_image": '{"file_name": "b.png", "text": "a star"}', "no_caption": '{"file_name": "b.png"}'}.items():
        (root / name).mkdir()
        (root / name / "b.png").write_text("no image")
        if listing:
            (root / name / "metadata.jsonl").write_text(listing + "\n")
    (root / "not_flow_matching").mkdir()
    (root / "not_flow_matching/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (root / "another_run").mkdir()
    (root / "another_run/config.json").write_text(json.dumps({"rank": 3, "lr": 1.0, "pipeline": "elsewhere"}))
    (root / "FLUX").symlink_to(FLUX)
    (root / "LORA").symlink_to(LORA)


def attempt(root, command, right, wrong):
    """One row of the table. SystemExit when the promise is broken."""
    flags = {k: v for k, v in {**right, **wrong}.items() if v is not None}
    before, said = files(root), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = scfm([command, *(word for k, v in flags.items() for word in (f"--{k}", str(v)))])
    lines = said.getvalue().strip().splitlines()
    if code != 2 or len(lines) != 1 or files(root) != before:
        raise SystemExit(f"{command} {wrong}: exit code {code}, {len(lines)} lines, new files {sorted(files(root) - before)}: {lines}")
    asked = " ".join(f"--{k} {v}" if v is not None else f"no --{k}" for k, v in wrong.items()) or "nothing to generate"
    return f"| `{command}` {asked} | {lines[0].replace('|', '/').replace(str(root) + '/', '')} |"


def files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*")}


if __name__ == "__main__":
    sys.exit(main())
