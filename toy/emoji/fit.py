"""One training loop for all stages, and its state in few bytes.

The state in full would be 16 bytes a parameter (weights, their average, two moments of Adam). Here it is 6:
weights and average in float16, the moments in 8 bits. To resume exactly all the same, the run itself goes on
from the rounded numbers after each checkpoint, as a resumed one must: both then compute the same bits.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from scfm.files import atomic_write

LEVELS = 127  # of 8 bits, to either side of zero
OCTAVES = 40  # powers of two between the largest and the smallest second moment of a tensor


class Settings(NamedTuple):
    """Of one stage."""

    updates: int
    lr: float
    ema: float = 0.999  # decay per update of the average of the weights
    decay: float = 0.25  # share of the updates, at the end, over which the learning rate falls to zero
    minutes: float = 10.0  # between checkpoints
    every: int = 0  # updates between checkpoints, in place of minutes
    stop: int = 0  # stop after this many updates, as if killed (0: never)
    moments: bool = True  # keep Adam's moments; without them, Adam starts anew after every checkpoint


class State(NamedTuple):
    """All that training goes on from; lists in the order of the names."""

    names: list[str]
    weights: list[nn.Parameter]
    average: list[torch.Tensor]
    adam: torch.optim.Optimizer
    moments: bool


def fit(
    model: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    path: Path,
    settings: Settings,
    average_path: Path | None = None,
    label: str = "",
) -> float:
    """AdamW with warm-up, a constant rate and a linear fall; afterwards the model holds its average weights.

    loss_of: draws the batch of an update, by its number, and returns the loss
    path: the state's file; a second one beside it, or `average_path`, holds the average under the names of
        the model's weights, so that diffusers can read it as a model's file
    label: of the progress bar

    Returns the seconds spent, over all runs; the state's file stays until `forget`.
    """
    state = new_state(model, settings)
    average_path = average_path or path.with_name(f"{path.stem}_average.safetensors")
    first, spent = restore(state, path, average_path)
    began = saved = time.time()
    last = settings.stop or settings.updates
    bar = tqdm(
        range(first, last), initial=first, total=settings.updates, desc=label or path.stem, mininterval=10
    )
    smooth = None
    for update in bar:
        for group in state.adam.param_groups:
            group["lr"] = settings.lr * rate(update, settings)
        loss = loss_of(update)
        state.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(state.weights, 1.0)
        state.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                state.average, state.weights, 1 - min(settings.ema, (update + 1) / (update + 10))
            )
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if due(update + 1, saved, settings):
            keep(state, path, average_path, update + 1, spent + time.time() - began, smooth)
            saved = time.time()
    with torch.no_grad():
        torch._foreach_copy_([p.data for p in state.weights], state.average)
    return spent + time.time() - began


def rate(update: int, settings: Settings) -> float:
    """The learning rate's share of its peak."""
    fall = (settings.updates - update) / max(1, settings.decay * settings.updates)
    return min(1, (update + 1) / 100, max(1e-3, fall))


def due(done: int, saved: float, settings: Settings) -> bool:
    if done == settings.updates:
        return True
    return done % settings.every == 0 if settings.every else time.time() - saved >= 60 * settings.minutes


def new_state(model: nn.Module, settings: Settings) -> State:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [p for _, p in named]
    adam = torch.optim.AdamW(weights, lr=settings.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    return State(
        [n for n, _ in named], weights, [p.detach().clone() for p in weights], adam, settings.moments
    )


@torch.no_grad()
def keep(state: State, path: Path, average_path: Path, update: int, spent: float, loss: float) -> None:
    """Writes the state, then takes it from the file: what goes on is what a resumed run would go on from.

    Between the two renames a kill leaves an average that is one checkpoint ahead of the weights: no harm.
    """
    packed = {}
    for name, p in zip(state.names, state.weights, strict=True):
        packed[f"{name}.w"] = p.detach().half().cpu()
        if not state.moments:
            continue
        moments = state.adam.state[p]
        packed |= {f"{name}.m{k}": v.cpu() for k, v in pack_first(moments["exp_avg"]).items()}
        packed |= {f"{name}.v{k}": v.cpu() for k, v in pack_second(moments["exp_avg_sq"]).items()}
    average = {name: a.half().cpu() for name, a in zip(state.names, state.average, strict=True)}
    report = {"update": update, "seconds": round(spent), "loss": round(loss, 5)}
    for target, tensors, note in (
        (average_path, average, {"format": "pt"}),
        (path, packed, {"report": json.dumps(report)}),
    ):
        whole = {k: v.contiguous() for k, v in tensors.items()}
        atomic_write(target, lambda new, whole=whole, note=note: save_file(whole, str(new), metadata=note))
    restore(state, path, average_path)


@torch.no_grad()
def restore(state: State, path: Path, average_path: Path) -> tuple[int, float]:
    """Takes the state from its files, where they are: (updates done, seconds spent)."""
    if not path.is_file():
        return 0, 0.0
    report, packed, average = read_report(path), load_file(str(path)), load_file(str(average_path))
    for name, p, a in zip(state.names, state.weights, state.average, strict=True):
        p.copy_(packed[f"{name}.w"])
        a.copy_(average[name])
        state.adam.state.pop(p, None)
        if not state.moments:
            continue
        first, second = ({k: packed[f"{name}.{c}{k}"] for k in ("", "_scale")} for c in "mv")
        state.adam.state[p] = {
            "step": torch.tensor(float(report["update"]), device=p.device),
            "exp_avg": unpack_first(first).to(p),
            "exp_avg_sq": unpack_second(second).to(p),
        }
    return report["update"], report["seconds"]


def read_report(path: Path) -> dict:
    """What a state's file says of itself: update, seconds, loss."""
    with safe_open(str(path), framework="pt") as opened:
        return json.loads(opened.metadata()["report"])


def forget(path: Path) -> None:
    """Removes the files of a stage that is over and done with."""
    for file in (path, path.with_name(f"{path.stem}_average.safetensors")):
        file.unlink(missing_ok=True)


def pack_first(m: torch.Tensor) -> dict[str, torch.Tensor]:
    """8 bits a number: the sign and the root of its share of the largest."""
    scale = m.abs().max().clamp(min=1e-30)
    roots = (m.abs() / scale).sqrt() * LEVELS
    return {"": (roots.round() * m.sign()).to(torch.int8), "_scale": scale}


def unpack_first(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    roots = packed[""].float() / LEVELS
    return roots * roots.abs() * packed["_scale"]


def pack_second(v: torch.Tensor) -> dict[str, torch.Tensor]:
    """8 bits a number: the logarithm of its share of the largest, in 255 steps over `OCTAVES` octaves."""
    scale = v.max().clamp(min=1e-30)
    share = (v / scale).clamp(min=2.0**-OCTAVES)
    return {"": (-share.log2() * (255 / OCTAVES)).round().to(torch.uint8), "_scale": scale}


def unpack_second(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    return packed["_scale"] * torch.exp2(-packed[""].float() * (OCTAVES / 255))


@contextlib.contextmanager
def half_precision(device: torch.device, on: bool) -> Iterator[None]:
    """bf16 for what is large; weights, losses and sums stay in float32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=on):
        yield
