"""CIFAR-10 in full on one GPU, for the time that it is given:  python benchmarks/gpu_cifar.py FOLDER
--minutes 300

The `full` network (38 M parameters) five times, at equal network evaluations: plain flow matching, SCFM in
pre-training (a quarter of self-consistency examples), a Shortcut Model, and the plain flow at four fifths of
its budget distilled by SCFM, with all weights and by a LoRA, raw and dialled. It first times a few training
steps, and so finds the budget that fills the minutes; that number is stored in OUT/plan.json, and the same
command goes on after a kill or when the time is up. Writes OUT/cifar.json, cifar.png, cifar_images.png and
the averages in half precision, OUT/weights/*.safetensors (72 MB each); what is needed to go on (checkpoints
of 0.6 GB) is in OUT/cells.

    --inception FILE    the true FID in a column of its own, beside the distance on toy/features.py
    --tiny              on any machine, in a minute or two: everything small, the numbers mean nothing
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.runner import Job
from experiments.studies.cifar import measure
from experiments.studies.cifar_report import report
from experiments.testbeds.cifar import (
    DISTILLED,
    LORA,
    METHODS,
    RECIPES,
    TEACHERS_SHARE,
    Cifar10,
    Plan,
    job_of,
    safe,
)
from scfm.data.labelled_images import LabelledImages
from scfm.models.lora import WEIGHT_NAME
from scfm.models.unet import load_flow, save_flow
from scfm.training.flow_config import FlowConfig
from scfm.training.flow_trainer import FlowTrainer

NAMES = ("plain", "scfm 1/4", "shortcut", DISTILLED, LORA)
TRAINING = 0.85  # of the time; the rest is measuring


def seconds_per_evaluation(plan: Plan, images: LabelledImages, steps: int = 30, warm_up: int = 10) -> float:
    """Times training steps of plain flow matching, which are thrown away."""
    config = FlowConfig(
        train_data_dir=plan.data,
        output_dir=str(plan.cells / "timing"),
        size=plan.size,
        max_train_steps=10**6,
        validation_steps=0,
        **{**plan.recipe, **METHODS["plain"]},
    )
    trainer = FlowTrainer(config, progress=False, images=images)
    for step in range(warm_up + steps):
        if step == warm_up:
            wait()
            began, before = time.time(), trainer.evaluations
        trainer.train_step(step)
    wait()
    return (time.time() - began) / (trainer.evaluations - before)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_plan(plan: Plan, minutes: float, images: LabelledImages, path: Path) -> Plan:
    """The plan with the budget that fills the minutes: found once, stored in a file."""
    if not path.is_file():
        second = seconds_per_evaluation(plan, images)
        trainings = len(NAMES) - 2 * TEACHERS_SHARE  # the last two train for what the teacher leaves
        budget = math.floor(60 * minutes * TRAINING / trainings / second)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                {"budget": budget, "evaluations a second": 1 / second, "minutes": minutes, "size": plan.size}
            )
        )
    saved = json.loads(path.read_text())
    if saved["size"] != plan.size:
        raise ValueError(f"{path} is the plan of a {saved['size']} network: take another --out")
    return plan._replace(budget=saved["budget"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "data", nargs="?", default=os.environ.get("SCFM_CIFAR10"), help="folder of parquet files"
    )
    parser.add_argument("--minutes", type=float, default=300, help="of this machine, from start to tables")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_cifar"))
    parser.add_argument("--size", choices=list(RECIPES), default="full")
    parser.add_argument("--count", type=int, default=10_000, help="images of one measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--copy", default="", help="what is special about this copy of CIFAR-10; goes into titles"
    )
    parser.add_argument("--inception", default="", help="weights of Inception, for the true FID")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("name the folder of the parquet files, or set SCFM_CIFAR10")
    if args.tiny:
        args.size, args.count, args.minutes = "tiny", min(args.count, 40), min(args.minutes, 0.2)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_float32_matmul_precision("high")
    plan = Plan(args.data, args.out / "cells", args.size, 0, args.count, 5000, args.inception)
    plan = make_plan(plan, args.minutes, Cifar10(plan).images, args.out / "plan.json")
    print(f"{plan.budget} network evaluations each", flush=True)
    over = time.time() + 60 * args.minutes
    bed = Cifar10(plan, lambda: not args.tiny and time.time() > over)
    jobs = [job_of(name, args.seed) for name in NAMES]
    for job in jobs:
        if bed.train(job) is None:
            print("the time is up: the same command goes on from the newest checkpoint")
            return 143
        carry(bed, job, args.out / "weights")
    bed.eyes.floor()
    for job in jobs:
        measure(bed, job)
    report(plan, [args.seed], args.out / "cifar", args.copy)
    return 0


def carry(bed: Cifar10, job: Job, folder: Path) -> None:
    """The result of a training in half precision; a LoRA as it is."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{safe(job.family)}.safetensors"
    if job.family == LORA:
        shutil.copy(bed.folder(job) / WEIGHT_NAME, path)
    else:
        save_flow(load_flow(bed.flow_file(job)), path, torch.float16)


if __name__ == "__main__":
    sys.exit(main())
