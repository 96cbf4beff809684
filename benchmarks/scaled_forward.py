"""What examples with scales of their own cost in a full network:  python benchmarks/scaled_forward.py

One step of pre-training (a quarter of the examples are self-consistency, each at its own scale), in three
ways, in turn so that a busy machine disturbs all alike:

    plain       flow matching alone, for as many examples
    together    all scales in one forward, layer by layer (`ScaledLayers`)
    apart       a forward for each scale that occurs, with its weights summed

on the network of the plane and on two of CIFAR-10, beside the ratio of network evaluations, which any way
pays: an example's forward is 1, its backward 2, and the two halves of a target are 2 forwards. Writes
benchmarks/results/scaled_forward.json and .png.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scfm.method.distill import make_emas, make_optimizer, sample_batch
from scfm.method.step_scale import ScaledNetwork, step_scale_loss
from scfm.models.unet import UNetFlow
from scfm.training.flow_config import FlowConfig
from toy.plane import MLP

RESULTS = Path(__file__).parent / "results"
WARM_UP = 1  # rounds
WAYS = ("plain", "together", "apart")
SHARE = 0.25  # of the examples
EVALUATIONS = (3 * (1 - SHARE) + 5 * SHARE) / 3  # of a step, against a plain one


class Bench:
    """A network with differences, one batch, and a training step in each way."""

    def __init__(self, network: Any, shape: tuple[int, ...], batch: int, bf16: bool) -> None:
        settings: dict[str, Any] = {"global_batch_size": batch, "learning_rate": 1e-4}
        self.config = FlowConfig(algorithm="step_scaled", non_shortcut_ratio=1 - SHARE, **settings)
        self.plain = FlowConfig(algorithm="step_scaled", non_shortcut_ratio=1.0, **settings)
        network.bf16 = bf16
        self.models = ScaledNetwork(network.train(), train_base=True)
        self.optimizer, _ = make_optimizer(self.models, self.config)
        self.emas = make_emas(self.models, self.config)
        self.data = torch.randn(batch, *shape)
        self.labels = torch.zeros(batch, dtype=torch.long) if len(shape) == 3 else None

    def step(self, way: str, number: int) -> None:
        config = self.plain if way == "plain" else self.config
        self.models.linear = way == "together"
        noise, jumps = sample_batch(config, number, len(self.data), tuple(self.data.shape[1:]))
        rule = config.step_scale
        step_scale_loss(self.data, noise, jumps, self.models, rule, self.labels).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.emas.update()


def measure(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """{way: median of the seconds, and of their ratio to the plain step's of the same round}."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + WARM_UP):
        for way in WAYS:
            start = time.perf_counter()
            bench.step(way, number)
            if number >= WARM_UP:
                seconds[way].append(time.perf_counter() - start)
    return {
        way: {
            "median_seconds": round(statistics.median(taken), 4),
            "time_ratio": round(
                statistics.median(a / b for a, b in zip(taken, seconds["plain"], strict=True)), 2
            ),
        }
        for way, taken in seconds.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(0)
    images = (3, 32, 32)
    benches = {
        "plane, batch 128": Bench(MLP(), (2,), 128, False),
        "nano, batch 32, bf16": Bench(UNetFlow("nano"), images, 32, True),
        "mini, batch 32, bf16": Bench(UNetFlow("mini"), images, 32, True),
        "nano, batch 32, fp32": Bench(UNetFlow("nano"), images, 32, False),
    }
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "rounds": args.rounds,
        "evaluations_ratio": round(EVALUATIONS, 3),
        "networks": {name: measure(bench, args.rounds) for name, bench in benches.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    plot(record, args.out.with_suffix(".png"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "scaled_forward", help="path of the result, no ending"
    )
    return parser.parse_args(argv)


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks, figure = record["networks"], plt.figure(figsize=(6.4, 3))
    ax = figure.gca()
    for offset, way, color in ((-0.2, "together", "#c62828"), (0.2, "apart", "#777777")):
        places = [i + offset for i in range(len(networks))]
        heights = [ways[way]["time_ratio"] for ways in networks.values()]
        ax.bar_label(ax.bar(places, heights, 0.38, label=way, color=color), fmt="%.1f", fontsize=9)
    ax.axhline(record["evaluations_ratio"], color="black", lw=0.8, ls=":")
    ax.set_xticks(range(len(networks)), [name.replace(", ", "\n", 1) for name in networks])
    ax.set_ylabel("seconds, against a plain step")
    ax.set_title("A pre-training step with the scale (dotted: its evaluations)", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=144)
    plt.close(figure)


if __name__ == "__main__":
    main()
