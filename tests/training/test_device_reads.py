"""How often a training step waits for the device: counted on a CPU, by following what would be on a GPU."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from scfm.training.config import DistillConfig
from scfm.training.distill_trainer import init_trainer
from toy.pipelines import FLUX, TOKENS

READS = ("cpu", "item", "tolist", "numpy", "__float__", "__bool__", "__int__", "nonzero", "equal")


class DeviceReads(TorchFunctionMode):
    """Counts calls that would bring numbers of a device to the host.

    On the device are the tensors that are handed to `follow`, those that are sent there (`to`), and all that
    is computed of them.
    """

    def __init__(self):
        super().__init__()
        self.counts, self.there = Counter(), WeakIdKeyDictionary()

    def follow(self, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self.there[tensor] = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t in self.there]
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        masks = [t for t in inputs if t.dtype == torch.bool] if name in ("__getitem__", "__setitem__") else []
        if inputs and name in READS:
            self.counts[name] += 1
            return result.clone() if name == "cpu" else result  # another tensor, as of a GPU
        if any(t is not args[0] for t in masks):  # how many places a mask has is not known to the host
            self.counts[name] += 1
        sent = name == "to" and any(
            isinstance(part, torch.device) for part in (*args, *(kwargs or {}).values())
        )
        if inputs or sent:
            self.follow(result)
            if name.endswith("_") or name == "__setitem__":
                self.follow(args[0])
        return result


def test_a_read_is_seen_through_what_is_computed_changed_and_indexed():
    reads, weight, own = DeviceReads(), torch.ones(3), torch.zeros(3)
    reads.follow(weight)
    with reads:
        assert float(own.sum()) == 0 and not reads.counts  # the host's own
        own[torch.tensor([0, 1])] = (weight * 2)[:2]
        assert float(own.sum()) == 4 and reads.counts == {"__float__": 1}
        own.cpu().sum().item()
        assert reads.counts == {"__float__": 1, "cpu": 1}
        weight[weight > 0]
        weight[torch.tensor([True, False, True])]  # a mask of the host's
        torch.ones(2).to(torch.device("cpu")).tolist()
    assert reads.counts == {"__float__": 1, "cpu": 1, "__getitem__": 1, "tolist": 1}


@pytest.mark.parametrize("algorithm", ["step_scaled", "dual"])
def test_a_step_waits_at_its_end_alone_for_the_losses_and_for_the_norm(algorithm, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\na small blue ring\na green cross\na cross\n")
    config = DistillConfig(
        pretrained_model_name_or_path=str(FLUX),
        prompts=str(tmp_path / "prompts.txt"),
        output_dir=str(tmp_path / "run"),
        algorithm=algorithm,
        height=32,
        width=32,
        max_sequence_length=TOKENS,
        teacher_steps=1,
        global_batch_size=4,
        micro_batch_size=2,
        rank=2,
        report_to="none",
    )
    trainer = init_trainer(config, progress=False)
    reads = DeviceReads()
    reads.follow(list(trainer.pipe.transformer.parameters()))
    backward, handed_out = trainer.accelerator.backward, []
    trainer.accelerator = SimpleNamespace(
        **{name: getattr(trainer.accelerator, name) for name in ("device", "process_index", "num_processes")},
        backward=lambda loss: (backward(loss), handed_out.append(dict(reads.counts))),
        is_main_process=True,
    )
    with reads:
        trainer.train_step(0)
    assert handed_out == [{}, {}]  # both parts of the batch, before anything is waited for
    assert reads.counts == {"cpu": 1, "__float__": 1}
    trainer.close()
