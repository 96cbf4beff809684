"""What one image costs: seconds, and evaluations of the network."""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scfm.evaluation.image_store import generate_images, write_json
from scfm.evaluation.samplers import Sampler
from scfm.types import Family


def measure_latency(
    sampler: Sampler,
    family: Family,
    captions: Sequence[str],
    seed: int,
    repeats: int,
    device: str | torch.device,
) -> dict[str, Any]:
    """What one image costs, prompt to pixels at batch size 1.

    returns: seconds (the median after a warm-up), seconds inside the network, its evaluations, the device
    """
    seconds, inside = [], []
    with watched(sampler.network, device) as watch:
        for k in range(repeats + 1):
            watch.evaluations, watch.seconds = 0, 0.0
            start = synchronized_time(device)
            generate_images(sampler, family, captions, [k % len(captions)], seed)
            seconds.append(synchronized_time(device) - start)
            inside.append(watch.seconds)
    return {
        "seconds": round(statistics.median(seconds[1:]), 5),
        "network_seconds": round(statistics.median(inside[1:]), 5),
        "evaluations": watch.evaluations,
        "latency_repeats": repeats,
        "device": device_name(device),
    }


@dataclass
class Watch:
    """Forward hooks of a network that count its evaluations and seconds."""

    device: str | torch.device
    evaluations: int = 0
    seconds: float = 0.0
    start: float = 0.0

    def before(self, *_: Any) -> None:
        """The network is called."""
        self.start = synchronized_time(self.device)

    def after(self, *call: Any) -> None:
        """The network has answered."""
        self.seconds += synchronized_time(self.device) - self.start
        self.evaluations += len(call[-1][0])  # a forward gives a tuple, or an output with a `sample`


@contextmanager
def watched(network: torch.nn.Module, device: str | torch.device) -> Iterator[Watch]:
    """Counts the examples that a network evaluates within the block; guided by a second one, an image counts
    2."""
    watch = Watch(device)
    hooks = [
        network.register_forward_pre_hook(watch.before, with_kwargs=True),
        network.register_forward_hook(watch.after, with_kwargs=True),
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def synchronized_time(device: str | torch.device) -> float:
    """Seconds on a clock, once all that the device was given is done."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name(device: str | torch.device) -> str:
    """The name of a GPU, or the number of the CPU's threads."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'s' * (count > 1)}"


def stored_latency(
    sampler: Sampler,
    family: Family,
    captions: Sequence[str],
    folder: Path,
    seed: int,
    repeats: int,
    device: str | torch.device,
) -> dict[str, Any]:
    """The latency in the folder's latency.json, if it was taken on this device in as many repeats; else a
    fresh one, which is written there."""
    path = folder / "latency.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (record.get("device"), record.get("latency_repeats")) != (device_name(device), repeats):
        record = measure_latency(sampler, family, captions, seed, repeats, device)
        write_json(path, record)
    return record
