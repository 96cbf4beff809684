"""A run's folder: whose it is, what it is of, and what a checkpoint brings along. A handful of steps on the
tiny Flux."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scfm.cli import main
from scfm.files import LOCK, lock_folder, unlock_folder
from scfm.training.checkpoint import all_checkpoints
from toy.pipelines import FLUX, TOKENS

pytestmark = pytest.mark.slow

SMALL = {
    "height": 32,
    "width": 32,
    "max_sequence_length": TOKENS,
    "rank": 2,
    "algorithm": "dual",
    "global_batch_size": 2,
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "validation_steps": 0,
    "num_eval_prompts": 2,
    "eval_lora_scales": "1",
    "eval_num_steps": "2",
    "teacher_steps": 2,
    "report_to": "none",
    "learning_rate": 1e-4,
}


@pytest.fixture
def own(tmp_path):
    """Somebody's own two images."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(folder / f"{name}.png")
    rows = [json.dumps({"file_name": f"{name}.png", "text": f"a {name} square"}) for name in ("red", "blue")]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def distill(own, out, **more):
    settings = {
        "pretrained_model_name_or_path": FLUX,
        "train_data_dir": own,
        "output_dir": out,
        **SMALL,
        **more,
    }
    return main(
        ["distill", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]
    )


def state(path):
    return torch.load(path / "state.pt", weights_only=True)


# What a checkpoint brings along


def test_a_run_from_anothers_checkpoint_has_its_own_learning_rate(own, tmp_path, capsys, caplog):
    assert distill(own, tmp_path / "old", checkpoints_total_limit=9) == 0
    start = tmp_path / "old/checkpoints/000002"
    assert (
        distill(
            own,
            tmp_path / "new",
            max_train_steps=3,
            learning_rate=1e-6,
            adam_weight_decay=0.5,
            resume_from_checkpoint=start,
        )
        == 0
    )
    (optimizer,) = state(tmp_path / "new/checkpoints/000003")["optimizer"]["param_groups"]
    assert (optimizer["lr"], optimizer["initial_lr"], optimizer["weight_decay"]) == (1e-6, 1e-6, 0.5)
    assert "learning_rate 0.0001 before, 1e-06 from here" in caplog.text
    moved = [
        (a - b).abs().max()
        for a, b in zip(
            *(state(p)["adapters"]["student"].values() for p in (start, tmp_path / "new/checkpoints/000003")),
            strict=True,
        )
    ]
    assert max(moved) < 1e-5  # a step of 1e-6, none of 1e-4


def test_a_run_that_goes_back_does_not_go_on_from_what_it_left(own, tmp_path):
    out = tmp_path / "run"
    assert distill(own, out, checkpoints_total_limit=9, max_train_steps=3) == 0
    old = state(out / "checkpoints/000003")
    (out / "selection.json").unlink()
    assert (
        distill(
            own,
            out,
            checkpoints_total_limit=9,
            max_train_steps=3,
            resume_from_checkpoint=out / "checkpoints/000001",
        )
        == 0
    )
    assert [path.name for path in all_checkpoints(out)] == ["000001", "000002", "000003"]
    aside = sorted(path.name[:16] for path in (out / "checkpoints").glob("set-aside-*"))
    assert aside == ["set-aside-000002", "set-aside-000003"]  # nothing is lost either
    new = state(out / "checkpoints/000003")
    assert all(
        torch.equal(a, b)
        for a, b in zip(old["adapters"]["student"].values(), new["adapters"]["student"].values(), strict=True)
    )


def test_fewer_steps_than_were_made_are_refused(own, tmp_path, capsys):
    assert distill(own, tmp_path / "run") == 0
    before = (tmp_path / "run/config.json").read_text()
    assert distill(own, tmp_path / "run", max_train_steps=1) == 2
    assert "max_train_steps=1: the checkpoint is at 2 already" in capsys.readouterr().err
    assert (tmp_path / "run/config.json").read_text() == before  # what was refused leaves no trace


# What a run is of


def changed_transformer(folder):
    path = next((folder / "transformer").glob("*.safetensors"))
    weights = load_file(path)
    weights["proj_out.bias"] = weights["proj_out.bias"] + 0.5
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("what", ["transformer", "image", "caption"])
def test_a_run_goes_on_only_with_what_it_began_with(own, tmp_path, capsys, what):
    flux = shutil.copytree(FLUX, tmp_path / "flux")
    assert distill(own, tmp_path / "run", pretrained_model_name_or_path=flux) == 0
    if what == "transformer":
        changed_transformer(flux)
    elif what == "image":
        Image.new("RGB", (32, 32), "green").save(own / "red.png")
    else:
        listing = own / "metadata.jsonl"
        listing.write_text(listing.read_text().replace("a red square", "a green square"))
    assert distill(own, tmp_path / "run", pretrained_model_name_or_path=flux, max_train_steps=3) == 2
    kind = "transformer" if what == "transformer" else "data"
    assert f"of a run with another {kind}: what the settings name was changed" in capsys.readouterr().err


def test_the_same_folder_may_be_spelled_otherwise_and_moved(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert distill("own", "run") == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["train_data_dir"] == str(own)
    assert distill("./own/", f"{tmp_path}/run", max_train_steps=3) == 0
    shutil.move(own, tmp_path / "elsewhere")
    assert distill(tmp_path / "elsewhere", "run", max_train_steps=4) == 0
    assert distill(tmp_path / "elsewhere", "run", max_train_steps=5, rank=3) == 2
    assert "another rank (rank 2 before, 3 now)" in capsys.readouterr().err


def test_a_run_is_found_from_another_folder(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FLUX, tmp_path / "flux")
    assert distill("own", "run", pretrained_model_name_or_path="flux") == 0
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert main(["sample", "--lora", "../run", "--prompt", "a red square", "--steps", "1"]) == 0


# Whose a folder is


def test_a_folder_that_holds_something_else_is_refused(own, tmp_path, capsys):
    out = tmp_path / "project"
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert distill(own, out) == 2
    assert "holds README.md, but no config.json of a run" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["README.md"] and (
        out / "README.md"
    ).read_text() == "mine"


def test_a_home_folder_is_that_of_the_shell(own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("output_dir: ~/runs/mine\ntrain_data_dir: ~/own\n")
    shutil.copytree(own, tmp_path / "home" / "own")
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    assert (
        main(["distill", "--config", "mine.yaml", "--pretrained_model_name_or_path", str(FLUX), *words]) == 0
    )
    assert (tmp_path / "home/runs/mine/selection.json").is_file() and not (tmp_path / "~").exists()


def test_one_process_at_a_time(own, tmp_path, capsys):
    out = tmp_path / "run"
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        out.mkdir()
        lock_folder(out)
        holder = json.loads((out / LOCK).read_text())
        assert holder["pid"] == os.getpid()
        lock_folder(out)  # its own process may come again
        (out / LOCK).write_text(json.dumps({**holder, "pid": sleeper.pid}))
        assert distill(own, out) == 2
        assert f"in use by process {sleeper.pid}" in capsys.readouterr().err
        unlock_folder(out)
        assert (out / LOCK).is_file()  # another's lock is not ours to take
    finally:
        sleeper.kill()
        sleeper.wait()
    assert distill(own, out) == 0  # its process is gone: the lock is stale
    assert not (out / LOCK).exists()


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_made(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    import scfm.training.distill_trainer as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert distill(own, tmp_path / "run", report_to="wandb") == 2
    assert "report_to wandb needs it installed" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_somebodys_accelerate_settings_change_no_gradient(own, tmp_path, monkeypatch):
    assert distill(own, tmp_path / "plain") == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert distill(own, tmp_path / "odd") == 0
    one, other = (
        state(tmp_path / name / "checkpoints/000002")["adapters"]["student"] for name in ("plain", "odd")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
