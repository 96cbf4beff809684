"""How long OpenMP's threads should spin before they sleep: the tiny Flux, with every setting, idle and busy.

    python benchmarks/openmp_policy.py            # about 10 minutes on 2 cores that do nothing else

PyTorch's Linux wheels split work among threads by GNU's OpenMP runtime, libgomp. A thread that reaches the
end of a parallel region waits for the others by spinning for a while, then by sleeping. Spinning is the
faster of the two when every thread has a core. When other processes want the cores too, a spinning thread
burns the time slice that the thread it waits for needs, and each of the thousands of regions of an update
can cost a slice of the scheduler.

What is timed: forward and backward of the transformer of toy/weights/flux, batch 32, fp32. libgomp reads its
variables once, when it is loaded, so each setting has a process of its own, which sleeps until its turn
comes, for some rounds. Then the same beside processes that count in a loop: with even shares of two cores,
two of them double the time of two threads. A turn during which other programs used the cores (/proc/stat
tells) is repeated. Writes OUT.json (every median, and the setting that was chosen) and OUT.png. Conditions
that OUT.json has and that --beside does not name stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

WEIGHTS = Path(__file__).parents[1] / "toy" / "weights" / "flux" / "transformer"
CLEARED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")
SETTINGS: dict[str, dict[str, str]] = {  # name -> environment; two threads unless it says otherwise
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 0": {"GOMP_SPINCOUNT": "0"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 5000": {"GOMP_SPINCOUNT": "5000"},
    "spin 20000": {"GOMP_SPINCOUNT": "20000"},
    "spin 200000": {"GOMP_SPINCOUNT": "200000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    args = parse()
    if args.worker:
        work(args.repetitions, args.batch)
        return
    path = args.out.with_suffix(".json")
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"conditions": {}}
    workers = {name: start_worker(name, args) for name in SETTINGS} if args.beside else {}
    try:
        for beside in args.beside:
            record["conditions"][str(beside)] = measure(workers, beside, args)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    record["machine"] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    record |= {"batch": args.batch, "environments": SETTINGS} | choose(record["conditions"], args.bearable)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(record, args.out.with_suffix(".png"))
    print(f"chosen: {record['chosen']['setting']} ({record['chosen']['why']})")
    print(f"{path} and .png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="turns of each setting, idle and busy (10)")
    parser.add_argument(
        "--repetitions", type=int, default=6, help="timed passes in a turn, after 2 untimed (6)"
    )
    parser.add_argument("--batch", type=int, default=32, help="rows in a pass (32)")
    parser.add_argument(
        "--beside",
        type=int,
        nargs="*",
        default=[0, 2],
        help="numbers of busy processes to measure beside, 0 for an idle machine (0 2); without a number: "
        "choose and draw again from what OUT.json has",
    )
    parser.add_argument(
        "--bearable",
        type=float,
        default=1.1,
        help="the chosen setting's idle time is at most this many times the default's (1.1)",
    )
    parser.add_argument(
        "--quiet",
        type=float,
        default=0.05,
        help="share of the cores that other programs may use during a turn (.05)",
    )
    parser.add_argument(
        "--patience", type=float, default=600, help="seconds to wait for such quiet, each time (600)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "openmp_policy",
        help="where the .json and the .png go, without the ending",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(
    workers: dict[str, subprocess.Popen[str]], beside: int, args: argparse.Namespace
) -> dict[str, Any]:
    """All settings beside so many busy processes: for each the median and the quartiles, and what was run."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    reply: dict[str, Any] = {}
    disturbed = []
    for visit in range(args.rounds):
        for name, worker in workers.items():
            reply = turn(worker, beside, args)
            seconds[name] += reply["seconds"]
            disturbed.append(reply["others"])
            print(
                f"beside {beside}  round {visit + 1}/{args.rounds}  {name:12} "
                f"{statistics.median(reply['seconds']):7.3f} s",
                flush=True,
            )
    rows = {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        rows[name] = {"median_seconds": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}
    return {
        "settings": rows,
        "rounds": args.rounds,
        "repetitions": args.rounds * args.repetitions,
        "largest_share_of_the_cores_used_by_others": max(disturbed),
        "torch": reply["torch"],
        "openmp_runtime": reply["openmp_runtime"],
    }


def work(repetitions: int, batch: int) -> None:
    """In a process of its own: for a line of input, which names the busy processes, the seconds of passes."""
    import torch
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    config = dict(model.config)
    side, words, width = 8, 16, config["joint_attention_dim"]  # 32 x 32 pixels are 8 x 8 tokens
    image_ids = torch.stack(
        [torch.zeros(side, side), *torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")], -1
    ).reshape(-1, 3)
    inputs = {
        "hidden_states": torch.randn(batch, side * side, config["in_channels"]),
        "encoder_hidden_states": torch.randn(batch, words, width),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 2.5),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(words, 3),
    }
    for line in sys.stdin:
        seconds = []
        for repetition in range(2 + repetitions):
            if repetition == 2:
                used = Used([os.getpid(), *map(int, line.split())])
            start = time.perf_counter()
            model(**inputs, return_dict=False)[0].square().mean().backward()
            seconds.append(time.perf_counter() - start)
        print(
            json.dumps(
                {
                    "seconds": seconds[2:],
                    "others": used.by_others(),
                    "torch": torch.__version__,
                    "openmp_runtime": openmp_runtimes(),
                }
            ),
            flush=True,
        )


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries that this process has loaded, from its folder of packages on."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    ours = [path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))]
    return sorted(path.split("site-packages/")[-1] for path in ours)


def start_worker(name: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in CLEARED}
    environment |= {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"} | SETTINGS[name]
    sizes = ["--repetitions", str(args.repetitions), "--batch", str(args.batch)]
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", *sizes],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def turn(worker: subprocess.Popen[str], busy: int, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker measures. Repeated while other programs disturb it; RuntimeError when they never stop."""
    assert worker.stdin and worker.stdout
    end = time.monotonic() + args.patience
    while time.monotonic() < end:
        before = Used([])
        time.sleep(0.5)
        if busy == 0 and before.by_others() > args.quiet:  # busy processes leave others less than this
            continue
        with busy_processes(busy) as beside:
            print(*beside, file=worker.stdin, flush=True)
            reply = json.loads(worker.stdout.readline())
        if reply["others"] <= args.quiet:
            return reply
    raise RuntimeError(
        f"for {args.patience:g} s others used more than {args.quiet:.0%} of the cores: "
        "stop them, or allow more with --quiet or --patience"
    )


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """Within the block, this many processes count in a loop; their ids. They end with it whatever happens."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Used:
    """From its making on: the share of the cores' time that other processes used. Linux only, 0 elsewhere."""

    def __init__(self, known: list[int]) -> None:
        self.known = known
        self.before = self.read()

    def by_others(self) -> float:
        busy, all, known = (now - then for now, then in zip(self.read(), self.before, strict=True))
        return round(max(busy - known, 0) / max(all, 1), 3)

    def read(self) -> tuple[int, int, int]:
        """Ticks since the start of the machine: not idle, all, of the known processes."""
        if not Path("/proc/stat").is_file():
            return 0, 0, 0
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        own = [Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[11:13] for p in self.known]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks), sum(int(n) for pair in own for n in pair)


def choose(conditions: dict[str, Any], bearable: float) -> dict[str, Any]:
    """Medians as ratios to the idle default, and the choice: the fastest beside others, if bearable idle."""
    base = conditions["0"]["settings"]["default"]["median_seconds"]
    ratios = {
        name: {
            beside: round(reply["settings"][name]["median_seconds"] / base, 3)
            for beside, reply in conditions.items()
        }
        for name in SETTINGS
    }
    loaded = [beside for beside in conditions if beside != "0"]
    candidates = [name for name in SETTINGS if ratios[name]["0"] <= bearable]
    best = min(candidates, key=lambda name: math.prod(ratios[name][beside] for beside in loaded))
    reply = "; ".join(
        f"{ratios[best][n]:.2f} beside {n}, where the default has {ratios['default'][n]:.2f}" for n in loaded
    )
    why = (
        f"of the settings that cost at most {bearable - 1:.0%} on an idle machine (this one: "
        f"{ratios[best]['0'] - 1:+.1%}) the fastest beside busy processes, by the product of the ratios to "
        f"the idle default: {reply}"
    )
    return {
        "ratios_to_idle_default": ratios,
        "chosen": {"setting": best, "environment": SETTINGS[best], "why": why},
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, conditions = list(SETTINGS), record["conditions"]
    fig, ax = plt.subplots(figsize=(9, 3.8), layout="constrained")
    width = 0.8 / len(conditions)
    for i, (beside, reply) in enumerate(sorted(conditions.items(), key=lambda item: int(item[0]))):
        rows = [reply["settings"][name] for name in names]
        middle = [row["median_seconds"] for row in rows]
        spread = [
            [row["median_seconds"] - row["quartiles"][0] for row in rows],
            [row["quartiles"][1] - row["median_seconds"] for row in rows],
        ]
        places = [k + (i - (len(conditions) - 1) / 2) * width for k in range(len(names))]
        label = "idle machine" if beside == "0" else f"beside {beside} busy processes"
        ax.bar(places, middle, 0.95 * width, yerr=spread, label=label, error_kw={"lw": 1})
        for name, place, row in zip(names, places, rows, strict=True):
            ax.annotate(
                f"{record['ratios_to_idle_default'][name][beside]:.2g}",
                (place, row["quartiles"][1]),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    chosen = record["chosen"]["setting"]
    ax.set_xticks(range(len(names)), [f"{n}\n(chosen)" if n == chosen else n for n in names], fontsize=8)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_ylabel("seconds, forward and backward")
    ax.set_title(
        f"Tiny Flux, batch {record['batch']}, {record['machine']['cores']} cores: median, quartiles, and "
        "the ratio to the idle default",
        fontsize=9,
    )
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    main()
