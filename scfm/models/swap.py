"""Frozen weights of some blocks that live in the host's memory and are on the device only while their block
computes."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from scfm.models.blocks import first_blocks


class HostWeights:
    """The tensors that a block has now, with their numbers on the host, page-locked for a GPU.

    The tensors stay what they are, and so does their storage, which is emptied and filled again: what
    autograd has saved of it, such as a transposed view, is empty and filled with it. Replacing `data` would
    leave such views the old memory, and all blocks on the device until backward.

    block: on the host, or anywhere. Layers that it gets afterwards, such as LoRAs, are not touched.
    """

    def __init__(self, block: torch.nn.Module, device: torch.device) -> None:
        tensors = {id(t): t for t in (*block.parameters(), *block.buffers())}
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in tensors.values():
            host = tensor.data.cpu().contiguous()
            tensor.data = torch.empty_like(host, device=device)
            tensor.data.untyped_storage().resize_(0)
            self.pairs.append((tensor, host.pin_memory() if device.type == "cuda" else host))

    def load(self) -> None:
        """Fills the tensors, in line with what the device has been given to do."""
        for tensor, host in self.pairs:
            tensor.untyped_storage().resize_(host.numel() * host.element_size())
            tensor.data.copy_(host, non_blocking=True)  # by `data`: to autograd nothing has changed

    def release(self) -> None:
        """Empties them."""
        for tensor, _ in self.pairs:
            tensor.untyped_storage().resize_(0)

    @property
    def device_bytes(self) -> int:
        """What they take on the device now."""
        return sum(tensor.untyped_storage().nbytes() for tensor, _ in self.pairs)


class BlockSwap:
    """Keeps at most one of the swapped blocks on the device: the one that computes, or did last.

    A block is loaded when its forward begins, and again when the gradient of its output is there: then the
    backward of all later blocks is done, as autograd works off what was computed last first. What goes, goes
    only for another to come. A hook after the forward would take the weights away when gradient checkpointing
    recomputes the block in backward; one at the end of its backward comes too early for a block whose inputs
    need no gradient.

    Attributes: `blocks`, their `HostWeights`; `loads`, how often one was loaded.
    """

    def __init__(self, blocks: list[torch.nn.Module], device: torch.device) -> None:
        self.blocks = [HostWeights(block, device) for block in blocks]
        self.on_device: HostWeights | None = None
        self.loads = 0
        for block, weights in zip(blocks, self.blocks, strict=True):
            block.register_forward_pre_hook(lambda *_, w=weights: self.need(w))
            block.register_forward_hook(lambda *args, w=weights: self.need_in_backward(w, args[-1]))

    def need(self, weights: HostWeights) -> None:
        """Loads a block's weights in place of another's, if they are not there."""
        if self.on_device is not weights:
            if self.on_device is not None:
                self.on_device.release()
            weights.load()
            self.on_device, self.loads = weights, self.loads + 1

    def need_in_backward(self, weights: HostWeights, outputs: Any) -> None:
        """Loads them when a gradient of one of the block's outputs is there."""
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.need(weights))


def swap_blocks(transformer: torch.nn.Module, count: int, device: str | torch.device) -> BlockSwap:
    """Moves a transformer without adapters to the device, all but the weights of its first `count` blocks.

    What computes is what computed before, to the last bit; a block's weights travel to the device for each
    forward and each backward, and never back. ValueError for more blocks than there are.
    """
    swap = BlockSwap(first_blocks(transformer, count, "blocks_to_swap"), torch.device(device))
    torch.nn.Module.to(transformer, device)  # diffusers' own warns; what is there already, empty, stays
    return swap


def refuse_group_offload(transformer: torch.nn.Module) -> None:
    """ValueError where diffusers' group offload is on: it would train wrong without a word. With a stream it
    puts all tensors back to the copies that it made at first, adapters too, so no step of theirs stays."""
    for module in transformer.modules():
        hooks: Any = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if any("group_offloading" in name for name in hooks):
            raise ValueError(
                "group offload is on, which puts adapters back to what they were before a step: load the "
                "transformer without it, and swap_blocks (--blocks_to_swap) in its place"
            )
