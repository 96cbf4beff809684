"""The flows that the repository carries, from the trainings of bench/cifar.py:  python bench/carry_flows.py
--cells runs/cifar/cells

Of each method below, one seed: the average of the weights in half precision, with the notes of its training.
Chapters 09_unet, 10_pretrain and 21_pixels generate with them.
"""
import argparse
import json
from pathlib import Path

import torch

from cifar_training import Plan, folder_of
from scfm.models.unet import header_of, load_flow, save_flow

CARRIED = {"plain": "plain", "scfm 1/4": "scfm", "shortcut": "shortcut"}
OUT = Path(__file__).parents[1] / "toy" / "weights" / "cifar"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("runs/cifar/cells"), help="folder that bench/cifar.py trained in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the flows (default {OUT.relative_to(OUT.parents[2])})")
    args = parser.parse_args(argv)
    paths = {name: folder_of(Plan("", args.cells), method, args.seed) / "flow.safetensors" for method, name in CARRIED.items()}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        parser.error(f"no {missing[0]}: train it with bench/cifar.py --cells {args.cells} --only {' '.join(map(repr, CARRIED))} --train")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        notes = json.loads(header_of(path)["notes"])
        save_flow(load_flow(path), args.out / f"{name}.safetensors", torch.float16, notes)
        print(f"{args.out / name}.safetensors: {notes['updates']} updates")


if __name__ == "__main__":
    main()
