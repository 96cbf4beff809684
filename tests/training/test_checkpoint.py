"""A checkpoint that cannot be written says why, and leaves the one before."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scfm.training.checkpoint import all_checkpoints, save_checkpoint


def test_torchs_word_for_a_full_disk_comes_with_the_space_that_is_left(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"a": torch.zeros(1)})

    def full(state, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr("scfm.training.checkpoint.torch.save", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 2**19))
    with pytest.raises(
        OSError, match="pos 64 vs 0; 2 MiB of the disk are free.; the last good one is .*000001"
    ):
        save_checkpoint(tmp_path, 2, {})
    assert [path.name for path in all_checkpoints(tmp_path)] == ["000001"]
    assert [path.name for path in (Path(tmp_path) / "checkpoints").iterdir()] == ["000001"]
