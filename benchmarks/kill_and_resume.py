"""Kills a real `scfm distill` by SIGKILL at random moments, resumes it, and compares with an unbroken run bit by bit.

    python bench/kill_and_resume.py [--times 20] [--processes 2]

The run is on the tiny Flux of the repository, writes a checkpoint after every update (so that many kills fall into a save), and
takes its images and its cache from the unbroken run. A kill falls at a time drawn evenly from 0 to 1.3 times the seconds that
pass from the start of the training to its end; the next start resumes. All processes of a run are killed at once. When the
run is through, each tensor of the three adapters must be equal to the last bit. Repeats until --times kills have happened, and
writes bench/results/kill_and_resume_N.json. CPU only: a GPU's sums are not the same from run to run.
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
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FLUX, PROMPTS = ROOT / "toy/weights/flux", ROOT / "toy/weights/prompts.txt"
ADAPTERS = ("student", "ema_fast", "ema_slow")


def main():
    args = parse()
    rng, root = random.Random(args.seed), Path(tempfile.mkdtemp())
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS.read_text().splitlines()[:12]) + "\n")
    whole = root / "whole"
    print("an unbroken run", flush=True)
    seconds = run_through(args, prompts, whole)
    record = {"processes": args.processes, "seed": args.seed, "updates": args.updates, "kills": [], "runs": 0}
    while len(record["kills"]) < args.times:
        broken = root / f"broken{record['runs']}"
        shutil.copytree(whole / "images", broken / "images")       # generated and encoded already: the kills fall into training
        while len(record["kills"]) < args.times and (found := start_and_kill(args, prompts, broken, rng.uniform(0, 1.3) * seconds)):
            record["kills"].append(found)
            print(len(record["kills"]), found, flush=True)
        run_through(args, prompts, broken)
        record["runs"] += 1
        record["equal"] = compare(whole, broken)
        if not record["equal"]:
            break
    record["in_a_save"] = sum(kill["half_written"] for kill in record["kills"])
    write(ROOT / f"bench/results/kill_and_resume_{args.processes}.json", record)
    print(f"{len(record['kills'])} kills in {record['runs']} runs, {record['in_a_save']} in the middle of a save; "
          f"equal to the last bit: {record['equal']}")
    shutil.rmtree(root)
    return 0 if record["equal"] else 1


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills in all (default 20)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run (default 1)")
    parser.add_argument("--updates", type=int, default=24, help="updates of the run (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    return parser.parse_args()


def command(args, prompts, out):
    settings = {"pipeline": FLUX, "prompts": prompts, "out": out, "height": 32, "width": 32, "max_sequence_length": 16, "rank": 8, "lr": 1e-3,
                "updates": args.updates, "batch": 4, "teacher_steps": 4, "judge": 2, "eval_lora_scales": "1", "checkpointing_steps": 1,
                "validation_steps": 0, "tracker": "none", "eval_num_steps": "2"}
    return [sys.executable, "-m", "scfm.cli", "distill", *(word for k, v in settings.items() for word in (f"--{k}", str(v)))]


def start(words, count):
    """The processes of one run. We are the launcher: torchrun's own would put each worker out of our reach."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for i in range(count)]
    environments = [{**base, **{k: str(v) for k, v in rank.items()}} if count > 1 else base for rank in ranks]
    return [subprocess.Popen(words, cwd=ROOT, env=e, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for e in environments]


def run_through(args, prompts, out):
    """Runs the command to its end; returns the seconds from its first new checkpoint to its end."""
    processes = start(command(args, prompts, out), args.processes)
    begun = first_checkpoint(processes, out)
    if any(process.wait() for process in processes):
        raise SystemExit("the run failed")
    return time.time() - begun


def first_checkpoint(processes, out):
    """Waits until the run has begun to write checkpoints, or has ended; returns the time."""
    folder = out / "checkpoints"
    before = set(folder.glob("*"))
    while processes[0].poll() is None and set(folder.glob("*")) == before:
        time.sleep(.002)
    return time.time()


def start_and_kill(args, prompts, out, after):
    """Starts or resumes the run and kills it `after` seconds into its training. What it left behind; None when it had ended."""
    processes = start(command(args, prompts, out), args.processes)
    first_checkpoint(processes, out)
    time.sleep(after)
    if processes[0].poll() is not None:
        [process.wait() for process in processes]
        return None
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    left = [p.name for p in (out / "checkpoints").glob("[0-9]*")]
    return {"seconds": round(after, 2), "last_checkpoint": max(left, default=None), "half_written": (out / "checkpoints/new").exists()}


def compare(a, b):
    """Whether the three adapters of two runs are equal to the last bit."""
    for name in ADAPTERS:
        x, y = (load_file(out / name / "pytorch_lora_weights.safetensors") for out in (a, b))
        if x.keys() != y.keys() or not all((x[k] == y[k]).all() for k in x):
            return False
    return True


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)


if __name__ == "__main__":
    sys.exit(main())
