"""docs/families.md says what the families do on their tiny pipelines."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scfm.cli import main
from toy.pipelines import build_wan

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_of_families_is_what_they_do(tmp_path):
    words = [sys.executable, "scripts/families_table.py", "--out", str(tmp_path / "families.md")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "families.md").read_text()
    assert made == (ROOT / "docs/families.md").read_text() and made.count("\n| `") == 9


# What makes the walk one of seconds: the tiny pipeline, small numbers behind the same flags, and more flags.
SMALL = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
    "480x832": "32x32",
    "81": "5",
    "bf16": "fp32",
    "32": "2",
}
SETTINGS = "--max_sequence_length 16 --teacher_steps 2"
FURTHER = {
    "plan": "",
    "data": SETTINGS,
    "distill": f"{SETTINGS} --height 32 --width 32 --num_frames 5 --rank 2 --max_train_steps 2 "
    "--num_eval_prompts 2 --global_batch_size 2 --weight_dtype fp32 --report_to none --eval_num_steps 2",
    "sample": "",
    "evaluate": "--teacher_steps 4 --inception none --clip none --imagenet none --latency_repeats 1",
    "export": "",
}


@pytest.mark.slow
def test_the_walk_of_the_page_runs_on_the_tiny_pipeline(tmp_path, monkeypatch):
    build_wan().save_pretrained(tmp_path / "wan")
    monkeypatch.chdir(tmp_path)
    for name in ("captions.txt", "held_out.txt"):
        Path(name).write_text("a large red cross\na small blue ring on the left\n")
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8").replace("\\\n", "")
    walk = page.split("```")[1].strip().splitlines()
    assert [line.split()[1] for line in walk] == list(FURTHER)
    for line in walk:
        program, command, *words = shlex.split(line)
        assert program == "scfm"
        words = [SMALL.get(word, word) for word in words] + FURTHER[command].split()
        assert main([command, *words]) == 0, line
    with Image.open("cat.png") as strip, Image.open("cat.gif") as moving:
        assert strip.size == (5 * 32, 32) and moving.n_frames == 5
    assert "sigma_min" in Path("runs/wan/README.md").read_text(encoding="utf-8")
    assert Path("wan-in-four-steps/model_index.json").is_file()
    assert "videos of 5 frames" in Path("runs/wan/evaluation/report.html").read_text(encoding="utf-8")
