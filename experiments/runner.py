"""Runs the measurements of a study: jobs, the cells that hold what was computed, the command line and the
record.

A study lists its `Job`s and says how one is measured: measure(cache, job) -> plain numbers. Whatever takes
time is a cell, a file that is known by what determines it, so a killed run goes on where it was.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from experiments.stored import from_stored, to_stored
from scfm.files import atomic_write

STARTED = time.perf_counter()
RESULTS = Path(__file__).parent / "results"


class Job(NamedTuple):
    """One measurement of a study.

    part: of the study, as --only names it; family: the method or setting that is measured; label: its name in
    the record; data: the set that it is measured on; seed: of the teacher and of what judges; change: of the
    recipe, by the names of `SCFMConfig` and of the testbed; budget: network evaluations, 0 where nothing is
    trained to a budget.
    """

    part: str
    family: str
    label: str
    data: str
    seed: int
    change: dict = {}
    budget: int = 0


class Result(NamedTuple):
    """cells: {name: (seconds, CPU seconds)} of what the value rests on; made: how many were made for it."""

    job: Job
    value: Any
    cells: dict[str, tuple[float, float]]
    made: int


class MissingCell(LookupError):
    """A cell that is not there, where nothing is to be computed."""


class CellCache:
    """Values by what determines them, a file each, written whole or not at all. frozen: computes nothing."""

    def __init__(self, folder: str | Path, frozen: bool = False):
        self.folder, self.frozen = Path(folder), frozen
        self.used: dict[str, tuple[float, float]] = {}
        self.made = 0

    def __call__(self, kind: str, spec: dict, make: Callable[[], Any]) -> Any:
        """The value of the cell of this kind and spec: read, or made by make() and stored. MissingCell where
        frozen.
        """
        name, text = cell_name(kind, spec)
        path = self.folder / name
        if not path.is_file():
            if self.frozen:
                raise MissingCell(path)
            self._store(path, text, make)
        cell = torch.load(path)
        self.used[name] = cell["seconds"], cell["cpu_seconds"]
        return from_stored(cell["value"])

    def _store(self, path: Path, text: str, make: Callable[[], Any]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        cell = {"spec": text, "value": to_stored(make())}
        cell |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        atomic_write(path, partial(torch.save, cell))
        self.made += 1


def cell_name(kind: str, spec: dict) -> tuple[str, str]:
    """(name of the cell's file, its spec as text)."""
    text = json.dumps(to_stored(spec), sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt", text


def non_defaults(config: Any) -> dict[str, Any]:
    """The fields of a config that are not at their defaults: a cell knows it by these, so that a field that
    is added later, with a default that changes nothing, leaves the cells valid.
    """
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}


def make_parser(doc: str | None, study: str, parts: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of a study. parts: what --only knows."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="runs/plane", help="folder of the cells (default runs/plane)")
    parser.add_argument("--out", default=str(RESULTS / study), help="path of the result without its ending")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="compute these parts alone")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default 1)")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a size of seconds, in a cache of its own; the numbers mean nothing",
    )
    parser.add_argument("--report", action="store_true", help="compute nothing, only write the result")
    return parser


Measure = Callable[[CellCache, Job], Any]


def run_jobs(jobs: Sequence[Job], measure: Measure, args: argparse.Namespace) -> list[Result]:
    """The results of all jobs, in their order, with a bar. measure: can be sent to another process."""
    parts = [] if args.report else args.only
    work = partial(run_job, measure=measure, folder=args.cache, parts=parts)
    results: dict[str, Result] = {}
    with tqdm(total=len(jobs), desc="measurements") as bar:
        for result in _results(work, jobs, args.workers):
            results[str(result.job)] = result
            bar.set_postfix_str(" ".join(map(str, result.job[1:5])))
            bar.update()
    return [results[str(job)] for job in jobs]


def run_job(job: Job, measure: Measure, folder: str | Path, parts: Sequence[str]) -> Result:
    """One measurement. Jobs of other parts than `parts` compute nothing: no value where one of their cells is
    missing, and where a training ran away or its samples are no numbers.
    """
    torch.set_num_threads(1)  # the networks are small: processes, not threads
    cache = CellCache(folder, frozen=job.part not in parts)
    try:
        value = measure(cache, job)
    except (MissingCell, FloatingPointError, torch.linalg.LinAlgError):
        value = None
    return Result(job, value, cache.used, cache.made)


def _results(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """The results as they come; with several workers the teachers come first, so that no two train the same
    one.
    """
    if workers == 1:
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for of_teachers in (True, False):
            wave = [job for job in jobs if (job.family == "teacher") == of_teachers]
            yield from pool.imap_unordered(work, wave)


def run_info(results: Sequence[Result]) -> dict[str, Any]:
    """What the record says of its making: what is missing, the cost, the machine."""
    cells = {name: cost for result in results for name, cost in result.cells.items()}
    wall, cpu = (sum(cost[i] for cost in cells.values()) for i in (0, 1))
    made = sum(result.made for result in results)
    this_run = {"cells_made": made, "seconds": time.perf_counter() - STARTED}
    return {
        "missing": [words_of(result.job) for result in results if result.value is None],
        "cost": {"cells": len(cells), "seconds": wall, "cpu_seconds": cpu, "this_run": this_run},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread a worker",
        "torch": torch.__version__,
    }


def words_of(job: Job) -> str:
    """A job as records name it."""
    return " ".join(map(str, job[1:]))


def write_record(record: dict[str, Any], out: str | Path) -> None:
    """The record as JSON. SystemExit where a fuller one would be lost, as by --report when the cells are
    gone.
    """
    path, missing = Path(out).with_suffix(".json"), len(record["missing"])
    before = len(json.loads(path.read_text())["missing"]) if path.is_file() else math.inf
    if missing > before:
        raise SystemExit(
            f"{missing} measurements are missing, {before} in {path}: it stays as it is; name another --out"
        )
    write_json(compact(json.dumps(record, indent=1)), path)


def write_json(text: str, path: Path) -> None:
    """Text into a file that is whole or not there."""
    atomic_write(path, lambda new: new.write_text(text + "\n", encoding="utf-8"))


def compact(text: str) -> str:
    """Indented JSON with a line for each object that holds no more than one level of others."""
    return re.sub(r"\{(?:[^{}]|\{[^{}]*\})*\}", lambda part: re.sub(r"\s*\n\s*", " ", part[0]), text)
