"""Tries wrong commands and writes docs/errors.md, a table of what was said and what was answered:

    python scripts/errors_table.py

Each must end with exit code 2 and one line that names the mistake, before any work: no run folder, no image,
no half-written file. A command that breaks this promise stops the script.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scfm.cli import main as scfm
from scfm.files import LOCK

ROOT = Path(__file__).parents[1]
FLUX, LORA = ROOT / "toy/weights/flux", ROOT / "toy/weights/lora"
HEAD = """# What a wrong command says

Every line below was produced by `python scripts/errors_table.py`, and a test runs it again: one line, exit
code 2, and nothing has been loaded, generated or written. Flags that are right are left out of the first
column. Lines that only a GPU, a full disk or a damaged shard can cause are in the tests of the modules.

| command | answer |
|---|---|
"""
CAPTIONED = {"pretrained_model_name_or_path": "FLUX", "prompts": "captions.txt", "max_sequence_length": 16}
DISTILL = {**CAPTIONED, "output_dir": "run", "height": 32, "width": 32}
DATA = {**CAPTIONED, "output_dir": "images", "sizes": "32x32"}
OWN_IMAGES = {**DISTILL, "prompts": None}
Flags = dict[str, Any]
# (command, what is right, what is wrong); None: the flag is left out
CASES: list[tuple[str, Flags, Flags]] = [
    *(
        ("distill", DISTILL, wrong)
        for wrong in (
            {"pretrained_model_name_or_path": None},
            {"pretrained_model_name_or_path": "nowhere"},
            {"pretrained_model_name_or_path": "not_flow_matching"},
            {"pretrained_model_name_or_path": "flux1-dev.safetensors"},
            {"pretrained_model_name_or_path": "no_weights"},
            {"pretrained_model_name_or_path": "nobody/flux"},
            {"prompts": None},
            {"prompts": "nowhere.txt"},
            {"prompts": "empty.txt"},
            {"prompts": "broken.jsonl"},
            {"train_data_dir": "own"},
        )
    ),
    *(
        ("distill", OWN_IMAGES, {"train_data_dir": folder})
        for folder in ("no_listing", "lost_image", "not_an_image", "no_caption")
    ),
    *(
        ("distill", DISTILL, wrong)
        for wrong in (
            {"height": 30},
            {"num_frames": 5},
            {"more_sizes": "24by40"},
            {"more_sizes": "32x32"},
            {"lora_layers": "to_z"},
            {"rank": 0},
            {"learning_rate": -1},
            {"teacher_ratio": 1.5},
            {"self_grids": "3,5"},
            {"t_skip": 3},
            {"algorithm": "triple"},
            {"guidance_scale_range": "7,0"},
            {"guidance_mode": "distilled"},
            {"guidance_mode": "distilled", "algorithm": "dual"},
            {"negative_prompt": "ugly"},
            {"shift": "4,2"},
            {"weight_dtype": "fp8"},
            {"quantize": "int3"},
            {"shard": 1},
            {"shard": 8},
            {"shard": 8, "quantize": "int8"},
            {"loss": "l1"},
            {"eval_num_steps": "0,3"},
            {"resume_from_checkpoint": "elsewhere"},
            {"config": "typo.yaml"},
            {"config": "nowhere.yaml"},
            {"output_dir": "another_run"},
            {"report_to": "mlflow"},
        )
    ),
    *(
        ("data", DATA, wrong)
        for wrong in ({"sizes": "512"}, {"sizes": "32x30"}, {"teacher_steps": 0}, {"output_dir": None})
    ),
    ("plan", {}, {"shape": "flux3"}),
    ("plan", {"shape": "flux-dev"}, {"gpu": "tpu"}),
    ("plan", {"shape": "flux-dev"}, {"change": "layers=3"}),
    ("dial", {}, {"lora": "nowhere"}),
    ("dial", {"lora": "LORA"}, {"steps": "0,3"}),
    ("dial", {"lora": "LORA"}, {"per_step": "5"}),
    ("sample", {"lora": "LORA"}, {}),
    ("sample", {"lora": "LORA", "prompt": "a star"}, {"steps": 0}),
    ("sample", {"lora": "LORA", "prompt": "a star"}, {"output": "another_run"}),
    ("app", {}, {"lora": "nowhere"}),
    ("app", {"lora": "LORA"}, {"steps": 64}),
    ("evaluate", {}, {"lora": "nowhere"}),
    ("evaluate", {"lora": "LORA", "prompts": "captions.txt"}, {"num_images": 0}),
    ("evaluate", {"lora": "LORA", "prompts": "captions.txt"}, {"imagenet": "yes"}),
    ("evaluate", {"lora": "LORA", "prompts": "captions.txt"}, {"output_dir": "captions.txt/evaluation"}),
    ("export", {"lora": "LORA"}, {"output_dir": "another_run"}),
    ("export", {}, {"lora": "nowhere", "output_dir": "exported"}),
]


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs/errors.md", help="the table (default docs/errors.md)"
    )
    out = parser.parse_args(argv).out.absolute()
    root = Path(tempfile.mkdtemp())
    os.environ["HF_HUB_OFFLINE"] = "1"
    make_inputs(root)
    with inside(root):
        rows = [attempt(root, *case) for case in CASES]
    new = out.with_suffix(".new")
    new.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    os.replace(new, out)
    shutil.rmtree(root)
    print(f"{len(rows)} wrong commands, each with one line and exit code 2: {out.name}")


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make_inputs(root: Path) -> None:
    """Files with the mistakes that the commands are to name."""
    (root / "captions.txt").write_text("a red star\na blue ring\n")
    (root / "empty.txt").write_text("\n\n")
    (root / "broken.jsonl").write_text('{"text": "a red star"}\n{"text": \n')
    (root / "typo.yaml").write_text("rnak: 16\n")
    listings = {
        "no_listing": None,
        "lost_image": '{"file_name": "a.png", "text": "a star"}',
        "not_an_image": '{"file_name": "b.png", "text": "a star"}',
        "no_caption": '{"file_name": "b.png"}',
    }
    for name, listing in listings.items():
        (root / name).mkdir()
        (root / name / "b.png").write_text("no image")
        if listing:
            (root / name / "metadata.jsonl").write_text(listing + "\n")
    (root / "not_flow_matching").mkdir()
    index = {"_class_name": "StableDiffusionPipeline"}
    (root / "not_flow_matching/model_index.json").write_text(json.dumps(index))
    (root / "flux1-dev.safetensors").write_text("a checkpoint")
    shutil.copytree(FLUX, root / "no_weights", ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    (root / "another_run").mkdir()
    settings = {"rank": 3, "learning_rate": 1.0, "pretrained_model_name_or_path": "elsewhere"}
    (root / "another_run/config.json").write_text(json.dumps(settings))
    (root / "FLUX").symlink_to(FLUX)
    (root / "LORA").symlink_to(LORA)


def attempt(root: Path, command: str, right: Flags, wrong: Flags) -> str:
    """One row of the table. SystemExit when the promise is broken."""
    flags = {name: value for name, value in {**right, **wrong}.items() if value is not None}
    before, answer = files(root), io.StringIO()
    with contextlib.redirect_stderr(answer), contextlib.redirect_stdout(io.StringIO()):
        code = exit_code([command, *(w for name, value in flags.items() for w in (f"--{name}", str(value)))])
    lines = answer.getvalue().strip().splitlines()
    if code != 2 or len(lines) != 1 or files(root) != before:
        raise SystemExit(
            f"{command} {wrong}: exit code {code}, {len(lines)} lines, "
            f"new files {sorted(files(root) - before)}: {lines}"
        )
    line = lines[0].replace("|", "/").replace(f"{root}/", "")
    return f"| `{command}` {flags_text(wrong) or 'nothing to generate'} | {line} |"


def exit_code(words: list[str]) -> int | str | None:
    """Of `scfm` with these words; the parser exits by itself where a flag is unknown."""
    try:
        return scfm(words)
    except SystemExit as error:
        return error.code


def flags_text(wrong: Flags) -> str:
    return " ".join(
        f"--{name} {value}" if value is not None else f"no --{name}" for name, value in wrong.items()
    )


def files(root: Path) -> set[str]:
    """The paths below root, without the lock of a run, which goes when the process does."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.name != LOCK}


if __name__ == "__main__":
    sys.exit(main())
