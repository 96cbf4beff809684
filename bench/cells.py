"""What the benches of measured cells share: their command line, the work spread over processes, and the record.

A measurement is a job (a tuple with `part` and `family`); `work(job)` returns (job, value or None, {cell: (seconds, CPU seconds)}, cells made).
"""
import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import time
from pathlib import Path

import torch
from tqdm import tqdm

BEGAN = time.perf_counter()


def parser_of(doc, out, parts):
    """The command line. out: where the result goes by default; parts: what --only knows."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="runs/plane", help="folder of the cells (default runs/plane)")
    parser.add_argument("--out", default=f"bench/results/{out}", help="path of the result without its ending")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="compute these parts alone")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default 1)")
    parser.add_argument("--smoke", action="store_true", help="a size of seconds, in a cache of its own; the numbers mean nothing")
    parser.add_argument("--report", action="store_true", help="compute nothing, only write the result")
    return parser


def run_all(work, todo, workers):
    """The results of all jobs, in their order, with a bar."""
    done = {}
    with tqdm(total=len(todo), desc="measurements") as bar:
        for result in spread_out(work, todo, workers):
            done[str(result[0])] = result
            bar.set_postfix_str(" ".join(map(str, result[0][1:5])))
            bar.update()
    return [done[str(job)] for job in todo]


def spread_out(work, todo, workers):
    """The results as they come; with several workers the teachers come first, so that no two train the same one."""
    if workers == 1:
        yield from map(work, todo)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for wave in (True, False):
            yield from pool.imap_unordered(work, [job for job in todo if (job.family == "teacher") == wave])


def about(done):
    """What the record says of its making: cost, what is missing, the machine."""
    cells = {name: cost for _, _, used, _ in done for name, cost in used.items()}
    wall, cpu = (sum(cost[i] for cost in cells.values()) for i in (0, 1))
    return {"missing": [" ".join(map(str, job[1:])) for job, value, _, _ in done if value is None],
            "cost": {"cells": len(cells), "seconds": wall, "cpu_seconds": cpu,
                     "this_run": {"cells_made": sum(made for *_, made in done), "seconds": time.perf_counter() - BEGAN}},
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread a worker", "torch": torch.__version__}


def short(text):
    """Indented JSON with a line for each object that holds no more than one level of others."""
    return re.sub(r"\{(?:[^{}]|\{[^{}]*\})*\}", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)


def write(record, out):
    """The record as JSON. SystemExit where a fuller one would be lost, as by --report when the cells are gone."""
    path = Path(out).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = len(json.loads(path.read_text())["missing"]) if path.is_file() else math.inf
    if len(record["missing"]) > before:
        raise SystemExit(f"{len(record['missing'])} measurements are missing, {before} in {path}: it stays as it is; name another --out")
    part = path.with_suffix(".part")
    part.write_text(short(json.dumps(record, indent=1)) + "\n")
    part.replace(path)
