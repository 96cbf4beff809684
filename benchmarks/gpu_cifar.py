"""CIFAR-10 in full on one GPU, for the time that it is given:  python bench/gpu_cifar.py FOLDER --minutes 300

The `full` network (38 M parameters) five times, at equal network evaluations: plain flow matching, SCFM in pre-training (a quarter of self
rows), a Shortcut Model, and the plain flow at four fifths of its budget distilled by SCFM, with all weights and by a LoRA, raw and dialled. It first times a few
updates, and so finds the budget that fills the minutes; that number is kept in OUT/plan.json, and the same command goes on after a kill
or when the time is up. Writes OUT/cifar.json, cifar.png, cifar_images.png and the averages in half precision, OUT/weights/*.safetensors
(72 MB each); what is needed to go on (checkpoints of 0.6 GB) lies in OUT/cells.

    --inception FILE    the true FID in a column of its own, beside the distance on the features of toy/features.py
    --tiny              on any machine, in a minute or two: everything small, the numbers mean nothing
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from cifar import measure
from cifar_report import report
from cifar_training import DISTILLED, KEPT, LORA, METHODS, RECIPES, Plan, folder_of, safe, train_all
from scfm.models.lora import WEIGHT_NAME
from scfm.data.labelled_images import load_labelled_images
from scfm.training.flow_trainer import FlowConfig, FlowTrainer
from scfm.models.unet import load_flow, save_flow

NAMES = ("plain", "scfm 1/4", "shortcut", DISTILLED, LORA)
TRAINING = .85                                              # of the time; the rest is measuring


def seconds_per_evaluation(plan, images, updates=30, warm=10):
    """Times updates of plain flow matching, which are thrown away."""
    config = FlowConfig(train_data_dir=plan.data, output_dir=str(plan.cells / "timing"), size=plan.size, max_train_steps=10 ** 6, validation_steps=0,
                            **{**RECIPES[plan.size], **METHODS["plain"]})
    run = FlowTrainer(config, progress=False, images=images)
    for update in range(warm + updates):
        if update == warm:
            wait()
            began, before = time.time(), run.evaluations
        run.one()
    wait()
    return (time.time() - began) / (run.evaluations - before)


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_plan(plan, minutes, images, path):
    """The plan with the budget that fills the minutes: found once, kept in a file."""
    if not path.is_file():
        second = seconds_per_evaluation(plan, images)
        budget = math.floor(60 * minutes * TRAINING / (len(NAMES) - 2 * KEPT) / second)      # the last two train for 1 - KEPT of it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"budget": budget, "evaluations a second": 1 / second, "minutes": minutes, "size": plan.size}))
    told = json.loads(path.read_text())
    if told["size"] != plan.size:
        raise ValueError(f"{path} is the plan of a {told['size']} network: take another --out")
    return plan._replace(budget=told["budget"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=os.environ.get("SCFM_CIFAR10"), help="folder of parquet files")
    parser.add_argument("--minutes", type=float, default=300, help="of this machine, from start to tables")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_cifar"))
    parser.add_argument("--size", choices=list(RECIPES), default="full")
    parser.add_argument("--count", type=int, default=10_000, help="images of one measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copy", default="", help="what is special about this copy of CIFAR-10; goes into titles")
    parser.add_argument("--inception", default="", help="weights of Inception, for the true FID")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("name the folder of the parquet files, or set SCFM_CIFAR10")
    if args.tiny:
        args.size, args.count, args.minutes = "tiny", min(args.count, 40), min(args.minutes, .2)
    torch.set_float32_matmul_precision("high")
    images = load_labelled_images(args.data)
    plan = Plan(args.data, args.out / "cells", args.size, 0, args.count, 5000, args.inception)
    plan = make_plan(plan, args.minutes, images, args.out / "plan.json")
    print(f"{plan.budget} network evaluations each", flush=True)
    over = time.time() + 60 * args.minutes
    for name in NAMES:
        if train_all(plan, name, args.seed, images, lambda: args.tiny or time.time() < over) is None:
            print("the time is up: the same command goes on from the newest checkpoint")
            return 143
        weights = args.out / "weights" / f"{safe(name)}.safetensors"
        weights.parent.mkdir(exist_ok=True)
        if name == LORA:
            shutil.copy(folder_of(plan, name, args.seed) / WEIGHT_NAME, weights)
            continue
        save_flow(load_flow(folder_of(plan, name, args.seed) / "flow.safetensors"), weights, torch.float16)
    measure(plan, NAMES, [args.seed], images.names)
    report(plan, [args.seed], args.out / "cifar", args.copy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
