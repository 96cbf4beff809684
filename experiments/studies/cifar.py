"""CIFAR-10 from scratch and shortcut afterwards, at equal network evaluations:  python bench/cifar.py FOLDER

FOLDER holds the parquet files (default: the environment variable SCFM_CIFAR10). Ways to spend one budget:

    plain            plain flow matching
    scfm 1/8 1/4 1/2 flow matching and that share of self rows (the method inside pre-training)
    shortcut         a Shortcut Model (arXiv 2410.12557): the network is told the step size, a quarter of bootstrap rows
    plain, distilled plain flow matching for four fifths of the budget, then SCFM with a teacher for the rest; raw and dialled
    plain, LoRA      the same by `scfm distill`: a LoRA of rank 16 on the frozen flow, a thousand images; raw and dialled

A row's forward counts 1 evaluation, its backward 2. Every sampler gets the same noises and labels. The Frechet distance is taken on the
features of `toy/features.py` and is not FID; with --inception FILE the same rows get the true FID in a column of its own.
Trainings and measurements are files under --cells, so a killed bench goes on; several may run at once with --only.
Writes bench/results/cifar.json, cifar.png and cifar_images.png.

    python bench/cifar.py FOLDER --only plain shortcut     trains and measures these
    python bench/cifar.py FOLDER --train                   trains, measures nothing
    python bench/cifar.py FOLDER --report                  computes nothing, writes what the cells that are there give
    python bench/cifar.py FOLDER --smoke --cells /tmp/c --out /tmp/cifar     seconds; the numbers mean nothing
"""
import argparse
import os
import sys
from pathlib import Path

from cifar_cells import Judge, Painter, dialled, floor, lora_painter, generate_all, sampler, score_all
from cifar_report import report
from cifar_training import DISTILLED, LORA, METHODS, NFE, RECIPES, Plan, folder_of, train_all
from scfm.data.labelled_images import load_labelled_images
from scfm.models.unet import load_flow

ALL = ("plain", "scfm 1/4", "shortcut", DISTILLED, LORA, "scfm 1/8", "scfm 1/2")


def generate(plan, name, seed, painter, names):
    """The images of one method and seed, by Euler; of plain flow matching and SCFM by midpoint too. [(files, notes)]."""
    if name == LORA:
        raw, turned, dial = lora_painter(plan, seed, names, painter.device)
        return [(generate_all(plan, f"{LORA} {seed}", raw, painter), {}),
                (generate_all(few(plan), f"{LORA}, dialled {seed}", turned, painter), {"dial": dial._asdict()})]
    network = load_flow(folder_of(plan, name, seed) / "flow.safetensors").to(painter.device)
    sets = [(generate_all(plan, f"{name} {seed}", sampler(network), painter), {})]
    if name in ("plain", "scfm 1/4"):
        sets.append((generate_all(few(plan), f"{name} {seed}", sampler(network), painter, ("midpoint",)), {}))
    if name == DISTILLED:
        turned, dial = dialled(plan, seed, painter.device)
        sets.append((generate_all(few(plan), f"{DISTILLED}, dialled {seed}", turned, painter), {"dial": dial._asdict()}))
    return sets


def few(plan):
    """The same without the large counts: there a dial stands near 0, and midpoint has arrived."""
    return plan._replace(nfe=tuple(n for n in plan.nfe if n <= 16))


def measure(plan, names, seeds, classes):
    """Generates everything, then judges everything. classes: the names of the labels."""
    painter = Painter(plan)
    sets = [told for seed in seeds for name in names for told in generate(plan, name, seed, painter, classes)]
    judge = Judge(plan)
    floor(plan, judge)
    for files, notes in sets:
        score_all(plan, files, judge, notes)


def main(argv=None, keep_going=lambda: True):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=os.environ.get("SCFM_CIFAR10"), help="folder of parquet files")
    parser.add_argument("--cells", type=Path, default=Path("runs/cifar/cells"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cifar", help="path without suffix")
    parser.add_argument("--size", default="nano", choices=list(RECIPES))
    parser.add_argument("--evaluations", type=int, default=600_000, help="network evaluations of one training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--count", type=int, default=2000, help="images of one measurement")
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="network evaluations of an image at which to measure")
    parser.add_argument("--only", nargs="+", default=ALL, choices=[*METHODS, DISTILLED, LORA])
    parser.add_argument("--copy", default="JPEG quality 75 copy", help="what is special about this copy of CIFAR-10")
    parser.add_argument("--note", nargs="*", default=(), help="what else a reader of the record must know")
    parser.add_argument("--inception", default="", help="weights of Inception, for the true FID")
    parser.add_argument("--train", action="store_true", help="train only")
    parser.add_argument("--report", action="store_true", help="compute nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny everything")
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("name the folder of the parquet files, or set SCFM_CIFAR10")
    plan = Plan(args.data, args.cells, args.size, args.evaluations, args.count, inception=args.inception, nfe=tuple(args.nfe))
    if args.smoke:
        plan = plan._replace(size="tiny", budget=400, count=40, previews=0)
    images = None if args.report else load_labelled_images(args.data)
    for seed in args.seeds:
        for name in args.only:
            if not args.report and train_all(plan, name, seed, images, keep_going) is None:
                return 143
    if not (args.train or args.report):
        measure(plan, args.only, args.seeds, images.names)
    if not args.train:
        report(plan, args.seeds, args.out, args.copy, args.note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
