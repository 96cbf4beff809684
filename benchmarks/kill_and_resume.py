"""Kills a real `scfm distill` by SIGKILL at random moments, resumes it, and compares with an unbroken run bit
by bit.

    python benchmarks/kill_and_resume.py [--times 20] [--processes 2]

The run is on the tiny Flux of the repository, writes a checkpoint after every step (so that many kills fall
into a save), and takes its images and its cache from the unbroken run. A kill falls at a time drawn evenly
from 0 to 1.3 times the seconds that pass from the start of the training to its end; the next start resumes.
All processes of a run are killed at once. When the run is through, each tensor of the three adapters must be
equal to the last bit. Repeats until --times kills have happened, and writes
benchmarks/results/kill_and_resume_N.json. CPU only: a GPU's sums are not the same from run to run.
"""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FLUX, PROMPTS = ROOT / "toy/weights/flux", ROOT / "toy/weights/prompts.txt"
ADAPTERS = ("student", "ema_fast", "ema_slow")
PARTIAL = ".new-*"  # names of checkpoints that are being written


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    rng, root = random.Random(args.seed), Path(tempfile.mkdtemp())
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS.read_text().splitlines()[:12]) + "\n")
    whole = root / "whole"
    print("an unbroken run", flush=True)
    seconds = run_through(args, prompts, whole)
    record: dict[str, Any] = {
        "processes": args.processes,
        "seed": args.seed,
        "max_train_steps": args.steps,
        "kills": [],
        "runs": 0,
        "equal": True,
    }
    while len(record["kills"]) < args.times and record["equal"]:
        broken = root / f"broken{record['runs']}"
        # generated and encoded already: kills fall into training
        shutil.copytree(whole / "images", broken / "images")
        kill_again_and_again(args, prompts, broken, record, rng, seconds)
        run_through(args, prompts, broken)
        record["runs"] += 1
        record["equal"] = equal_adapters(whole, broken)
    record["in_a_save"] = sum(kill["half_written"] for kill in record["kills"])
    write(Path(__file__).parent / f"results/kill_and_resume_{args.processes}.json", record)
    print(
        f"{len(record['kills'])} kills in {record['runs']} runs, {record['in_a_save']} in the middle of a "
        f"save; equal to the last bit: {record['equal']}"
    )
    shutil.rmtree(root)
    return 0 if record["equal"] else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--times", type=int, default=20, help="kills in all (default 20)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run (default 1)")
    parser.add_argument("--steps", type=int, default=24, help="training steps of the run (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    return parser.parse_args(argv)


def command(args: argparse.Namespace, prompts: Path, output_dir: Path) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": FLUX,
        "prompts": prompts,
        "output_dir": output_dir,
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
        "rank": 8,
        "learning_rate": 1e-3,
        "max_train_steps": args.steps,
        "global_batch_size": 4,
        "teacher_steps": 4,
        "num_eval_prompts": 2,
        "eval_lora_scales": "1",
        "eval_num_steps": "2",
        "checkpointing_steps": 1,
        "validation_steps": 0,
        "report_to": "none",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "scfm.cli", "distill", *words]


def start(words: list[str], count: int) -> list[subprocess.Popen]:
    """The processes of one run. We are the launcher: torchrun's own would put each worker out of our
    reach."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    places = [
        {"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for i in range(count)
    ]
    environments = [
        {**base, **{k: str(v) for k, v in place.items()}} if count > 1 else base for place in places
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [subprocess.Popen(words, cwd=ROOT, env=environment, **quiet) for environment in environments]


def run_through(args: argparse.Namespace, prompts: Path, output_dir: Path) -> float:
    """Runs the command to its end; returns the seconds from its first new checkpoint to its end."""
    processes = start(command(args, prompts, output_dir), args.processes)
    begun = first_checkpoint(processes, output_dir)
    if any(process.wait() for process in processes):
        raise SystemExit("the run failed")
    return time.time() - begun


def first_checkpoint(processes: list[subprocess.Popen], output_dir: Path) -> float:
    """Waits until the run has begun to write checkpoints, or has ended; returns the time."""
    folder = output_dir / "checkpoints"
    before = set(folder.glob("*"))
    while processes[0].poll() is None and set(folder.glob("*")) == before:
        time.sleep(0.002)
    return time.time()


def kill_again_and_again(
    args: argparse.Namespace,
    prompts: Path,
    output_dir: Path,
    record: dict[str, Any],
    rng: random.Random,
    seconds: float,
) -> None:
    """Until there are enough kills, or the run has ended before the next one."""
    while len(record["kills"]) < args.times:
        kill = start_and_kill(args, prompts, output_dir, rng.uniform(0, 1.3) * seconds)
        if kill is None:
            return
        record["kills"].append(kill)
        print(len(record["kills"]), kill, flush=True)


def start_and_kill(
    args: argparse.Namespace, prompts: Path, output_dir: Path, after: float
) -> dict[str, Any] | None:
    """Starts or resumes the run and kills it `after` seconds into its training. What it left behind; None
    when it had ended.
    """
    folder = output_dir / "checkpoints"
    partial = set(folder.glob(PARTIAL))
    processes = start(command(args, prompts, output_dir), args.processes)
    first_checkpoint(processes, output_dir)
    time.sleep(after)
    ended = processes[0].poll() is not None
    for process in processes if not ended else ():
        process.kill()
    for process in processes:
        process.wait()
    if ended:
        return None
    left = [path.name for path in folder.glob("[0-9]*")]
    return {
        "seconds": round(after, 2),
        "last_checkpoint": max(left, default=None),
        "half_written": bool(set(folder.glob(PARTIAL)) - partial),
    }


def equal_adapters(a: Path, b: Path) -> bool:
    """Whether the three adapters of two runs are equal to the last bit."""
    for name in ADAPTERS:
        x, y = (load_file(folder / name / "pytorch_lora_weights.safetensors") for folder in (a, b))
        if x.keys() != y.keys() or not all((x[k] == y[k]).all() for k in x):
            return False
    return True


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)


if __name__ == "__main__":
    sys.exit(main())
