"""The flows that the repository carries, from the trainings of the study `cifar`:

    python -m experiments.carry_flows --cells runs/cifar/cells

Of each method below, one seed: the average of the weights in half precision, with the notes of its training.
Chapters 09_unet, 10_pretrain and 21_pixels generate with them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.testbeds.cifar import Cifar10, Plan, flow_notes, job_of
from scfm.models.unet import load_flow, save_flow
from toy.pipelines import WEIGHTS

CARRIED = {"plain": "plain", "scfm 1/4": "scfm", "shortcut": "shortcut"}  # method -> name of the file


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--cells", type=Path, default=Path("runs/cifar/cells"), help="folder of the trainings"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS / "cifar", help="folder of the flows")
    args = parser.parse_args(argv)
    bed = Cifar10(Plan("", args.cells))
    flows = {name: bed.flow_file(job_of(method, args.seed)) for method, name in CARRIED.items()}
    missing = [path for path in flows.values() if not path.is_file()]
    if missing:
        methods = " ".join(map(repr, CARRIED))
        parser.error(
            f"no {missing[0]}: train it with python -m experiments.studies.cifar "
            f"--cells {args.cells} --only {methods} --train"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    for name, path in flows.items():
        notes = flow_notes(path)
        save_flow(load_flow(path), args.out / f"{name}.safetensors", torch.float16, notes)
        print(f"{args.out / name}.safetensors: {notes['train_steps']} training steps")


if __name__ == "__main__":
    main()
