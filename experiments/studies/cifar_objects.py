"""CIFAR-10 where objects can be seen: a flow trained for long, and the same with its scale trained in.

    python -m experiments.studies.cifar_objects FOLDER --plain runs/cifar/mini/flow.safetensors \\
        --few runs/cifar/mini-step/flow.safetensors

FOLDER holds the parquet files (default: the environment variable SCFM_CIFAR10). Both flows come from `scfm
pretrain`; these two from

    scfm pretrain --size mini --non_shortcut_ratio 1 --global_batch_size 32 --learning_rate 1e-3 \\
        --lr_warmup_steps 400 --ema_decay_slow .9995 --weight_dtype bf16 --max_train_steps 60000 \\
        --train_data_dir FOLDER --output_dir runs/cifar/mini              (stopped by Ctrl-C at step 39,272)
    scfm pretrain --size mini --teacher runs/cifar/mini/flow.safetensors --algorithm step_scaled \\
        --non_shortcut_ratio 0 --global_batch_size 32 --learning_rate 2.5e-4 --lr_warmup_steps 50 \\
        --ema_decay .902 --weight_dtype bf16 --max_train_steps 800 --validation_steps 0 \\
        --train_data_dir FOLDER --output_dir runs/cifar/mini-step

The same noises and labels for both, Euler's steps, guidance scale 1. The Frechet distance is taken on the
features of `toy/features.py` and is not FID. Images and measurements are files under --cells, so a killed run
goes on. Writes experiments/results/cifar_objects.json and cifar_objects.png.
"""

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file

from experiments.runner import RESULTS, write_json
from experiments.studies.cifar import flow_sampler
from experiments.testbeds.cifar import flow_notes, safe
from experiments.testbeds.cifar_judge import Judge, Samples
from scfm.data.labelled_images import load_labelled_images
from scfm.models.unet import header_of, load_flow

PLAIN, SCALED = "plain flow", "scale trained in"
STEPS = {PLAIN: (1, 2, 4, 8, 64), SCALED: (1, 2, 4, 8)}
SHOWN = ((PLAIN, 64), (SCALED, 4), (SCALED, 1), (PLAIN, 4), (PLAIN, 1))
NOISES = 5  # of each class on the sheet


def sampler_of(
    path: Path, labels: torch.Tensor, noise: torch.Tensor, steps: int, solver: str
) -> torch.Tensor:
    """Images of the flow in a file, at the scale for so many steps where it has one."""
    return flow_sampler(load_flow(path, steps))(labels, noise, steps, solver)


def has_scale(path: Path) -> bool:
    """Whether the flow in a file has its scale trained in."""
    return "step_scale" in header_of(path)


def sheet(files: dict[tuple[str, int], Path], names: Sequence[str], path: Path) -> None:
    """Classes in rows, a panel for each flow and step count, the same noises in all."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(2.3 * len(SHOWN) + 0.9, 5.1))
    figure.subplots_adjust(0.08, 0.01, 0.995, 0.91, wspace=0.05)
    for ax, key in zip(axes, SHOWN, strict=True):
        pixels = load_file(files[key])["pixels"][: 10 * NOISES].view(NOISES, 10, 3, 32, 32)
        ax.imshow(pixels.permute(1, 3, 0, 4, 2).reshape(320, 32 * NOISES, 3).numpy())
        ax.set_title(f"{key[0]}\n{key[1]} step{'s' * (key[1] > 1)}", fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    axes[0].set_yticks([32 * i + 16 for i in range(10)], names, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record; makes the sheet on the way."""
    samples = Samples(args.cells, args.count, "cpu")
    judge = Judge(args.data, args.cells, args.count, "cpu")
    flows = {PLAIN: args.plain, SCALED: args.few}
    files = {
        (name, n): samples.generate(safe(name), partial(sampler_of, flows[name]), n, "euler")
        for name, counts in STEPS.items()
        for n in counts
    }
    sheet(files, load_labelled_images(args.data).names, args.out.with_suffix(".png"))
    rows: dict[str, list] = {name: [] for name in flows}
    for (name, n), path in files.items():
        rows[name].append(judge.score_file(path, {"solver": "euler", "nfe": n}, {}))
    return {
        "notes": [
            f"Frechet distance on features of our own (not FID), {args.count} images, Euler's steps, "
            "guidance scale 1, one seed.",
            *args.note,
        ],
        "trained": {name: flow_notes(path) for name, path in flows.items()},
        "rows": rows,
        "floor": judge.floor(),
        "torch": torch.__version__,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    data = os.environ.get("SCFM_CIFAR10")
    parser.add_argument("data", nargs="?", default=data, help="folder of parquet files")
    parser.add_argument("--plain", type=Path, required=True, help="the flow")
    parser.add_argument("--few", type=Path, required=True, help="the flow with its scale trained in")
    parser.add_argument("--cells", type=Path, default=Path("runs/cifar/objects"))
    parser.add_argument("--count", type=int, default=1000, help="images of one measurement, at least 30")
    parser.add_argument("--note", nargs="*", default=(), help="what else a reader of the record must know")
    parser.add_argument("--out", type=Path, default=RESULTS / "cifar_objects", help="path without suffix")
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("name the folder of the parquet files, or set SCFM_CIFAR10")
    if args.count < 10 * NOISES:
        parser.error(f"--count {args.count}: the sheet shows {10 * NOISES} images")
    if not has_scale(args.few):
        parser.error(f"--few {args.few}: its scale is not trained in: take one of --algorithm step_scaled")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    record = measure(args)
    write_json(json.dumps(record, indent=1), args.out.with_suffix(".json"))
    for name, rows in record["rows"].items():
        print(f"{name:18}", *(f"{row['nfe']}: {row['frechet_test']:.2f}" for row in rows), sep="   ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
