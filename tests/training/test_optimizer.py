"""AdamW in 8 bits: refused in one line where it cannot be had, gone on from to the last bit where it can."""

from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

from scfm.cli import main
from scfm.training import optimizer
from scfm.training.checkpoint import latest, load_checkpoint
from scfm.training.optimizer import BYTES, in_8_bits, require_8bit_adam
from toy.pipelines import FLUX, TOKENS


class StandIn(torch.optim.AdamW):
    """In place of bitsandbytes' where that is not installed: what it is given, and that its state is kept."""

    def __init__(self, *args):
        super().__init__(*args)
        self.made.append(self)


@pytest.fixture(params=["bitsandbytes", "stand-in"])
def library(request, monkeypatch):
    if request.param == "bitsandbytes":
        return pytest.importorskip("bitsandbytes")
    module, StandIn.made = ModuleType("bitsandbytes"), []
    module.optim, module.__version__ = SimpleNamespace(AdamW8bit=StandIn), "0.0.0"
    monkeypatch.setattr(optimizer, "import_module", lambda name: module)
    monkeypatch.setattr(optimizer, "find_spec", lambda name: True)
    return module


def test_without_the_library_it_is_one_line_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    monkeypatch.setattr("scfm.training.distill_trainer.load_pipeline", lambda *_: pytest.fail("loaded"))
    assert main(words(tmp_path, tmp_path / "run")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "use_8bit_adam needs bitsandbytes: pip install 'scfm[adam8bit]', or leave --use_8bit_adam out" in said
    )
    assert not (tmp_path / "run").exists()


def test_a_version_without_a_kernel_for_the_device_is_named(library, monkeypatch):
    require_8bit_adam("cpu")

    def no_kernel(*_):
        raise RuntimeError("no kernel\nand a long story")

    monkeypatch.setattr(library.optim.AdamW8bit, "step", no_kernel)
    with pytest.raises(ValueError, match=r"makes no step on a cpu here \(no kernel\): upgrade it, or leave"):
        require_8bit_adam("cpu")


def test_settings_and_rates_are_those_of_the_optimizer_that_it_stands_for(library):
    weights = [torch.nn.Parameter(torch.randn(80, 80)), torch.nn.Parameter(torch.randn(80, 80))]
    groups = [{"params": weights[:1], "lr": 1e-2}, {"params": weights[1:], "lr": 3e-2}]
    plain = torch.optim.AdamW(groups, weight_decay=0.3)
    small, rates = in_8_bits(plain, LambdaLR(plain, lambda step: 1 / (1 + step)))
    for weight in weights:
        weight.grad = torch.randn(weight.shape)
    small.step()
    rates.step()
    assert [group["lr"] for group in small.param_groups] == pytest.approx([5e-3, 1.5e-2])
    for ours, theirs in zip(small.param_groups, plain.param_groups, strict=True):
        assert all(ours[name] == theirs[name] for name in ("betas", "eps", "weight_decay"))


def test_the_moments_take_what_the_plan_counts():
    pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.randn(512, 512))
    plain = torch.optim.AdamW([weight])
    small, _ = in_8_bits(plain, LambdaLR(plain, lambda step: 1.0))
    weight.grad = torch.randn(512, 512)
    small.step()
    state = {name: part for name, part in small.state[weight].items() if isinstance(part, torch.Tensor)}
    kept = sum(p.numel() * p.element_size() for name, p in state.items() if not name.startswith("qmap"))
    assert kept == BYTES * weight.numel()  # the two tables of 256 values are not counted


@pytest.mark.slow
def test_a_run_is_gone_on_from_to_the_last_bit(library, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*words(tmp_path, whole), "--max_train_steps", "3"]) == 0
    for steps in ("1", "3"):
        assert main([*words(tmp_path, broken), "--max_train_steps", steps]) == 0
    states = [load_checkpoint(latest(folder)) for folder in (whole, broken)]
    for name, tensors in states[0]["adapters"].items():
        assert all(torch.equal(tensor, states[1]["adapters"][name][key]) for key, tensor in tensors.items())
    if library.__version__ == "0.0.0":
        assert len(StandIn.made) == 6  # for each run one to try, and one to train
    else:
        assert any(
            part.dtype == torch.uint8
            for part in tree_leaves(states[0]["optimizer"]["state"])
            if isinstance(part, torch.Tensor)
        )


def words(tmp_path, folder):
    (tmp_path / "prompts.txt").write_text("a red star\na small blue ring\na green cross\n")
    settings = {
        "pretrained_model_name_or_path": FLUX,
        "prompts": tmp_path / "prompts.txt",
        "config": "tiny-step-scaled",
        "lr_scheduler": "constant",
        "output_dir": folder,
        "max_sequence_length": TOKENS,
        "teacher_steps": 1,
        "global_batch_size": 2,
        "rank": 64,  # so that some tensors have 4096 numbers
        "num_eval_prompts": 2,
        "eval_num_steps": "2",
        "validation_steps": 0,
        "report_to": "none",
    }
    return ["distill", "--use_8bit_adam", *(w for k, v in settings.items() for w in (f"--{k}", str(v)))]
