"""How long OpenMP's threads should spin before they sleep: the tiny Flux, with every setting, idle and busy.

    python benchmarks/openmp_policy.py            # about 10 minutes on 2 cores that do nothing else

PyTorch's Linux wheels split work among threads by GNU's OpenMP runtime, libgomp. A thread that reaches the
end of a parallel region waits for the others by spinning for a while, then by sleeping. Spinning is the
faster of the two when every thread has a core. When other processes want the cores too, a spinning thread
burns the time slice that the thread it waits for needs, and each of the thousands of regions of an update
can cost a slice of the scheduler.

What is timed: forward and backward of the transformer of toy/weights/flux, batch 32, fp32. libgomp reads its
variables once, when it is loaded, so each setting has a process of its own, which sleeps until its turn
comes, for some rounds. "Busy" is the same beside two processes that count in a loop; an even share of the
cores would double the time of two threads. A turn during which other programs used the cores (/proc/stat
tells) is repeated. Writes OUT.json (every median, and the setting that was chosen) and OUT.png.
"""
from __future__ import annotations

import argparse
import json
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
SETTINGS: dict[str, dict[str, str]] = {        # name -> environment; two threads unless it says otherwise
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
    seconds: dict[str, dict[str, list[float]]] = {c: {n: [] for n in SETTINGS} for c in ("idle", "busy")}
    told: dict[str, Any] = {}
    disturbed: list[float] = []
    workers = {name: start_worker(name, args) for name in SETTINGS}
    try:
        for round in range(args.rounds):
            for condition, times in seconds.items():
                for name, worker in workers.items():
                    told = turn(worker, args.busy if condition == "busy" else 0, args)
                    times[name] += told["seconds"]
                    disturbed.append(told["others"])
                    print(f"round {round + 1}/{args.rounds}  {condition}  {name:12} "
                          f"{statistics.median(told['seconds']):7.3f} s", flush=True)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    record = summary(seconds, args.bearable) | {
        "repetitions": args.rounds * args.repetitions, "rounds": args.rounds, "batch": args.batch,
        "busy_processes": args.busy, "largest_share_of_the_cores_used_by_others": max(disturbed),
        "torch": told["torch"], "openmp_runtime": told["openmp_runtime"],
        "parallel_info": told["parallel_info"],
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system(),
                    "python": platform.python_version()}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(record, args.out.with_suffix(".png"))
    print(f"chosen: {record['chosen']['setting']} ({record['chosen']['why']})")
    print(f"{args.out.with_suffix('.json')} and .png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each setting, idle and busy (10)")
    parser.add_argument("--repetitions", type=int, default=6,
                        help="timed passes in a turn, after 2 untimed (6)")
    parser.add_argument("--batch", type=int, default=32, help="rows in a pass (32)")
    parser.add_argument("--busy", type=int, default=2,
                        help="processes that want the cores in the busy half (2)")
    parser.add_argument("--bearable", type=float, default=1.1,
                        help="the chosen setting's idle time is at most this many times the default's (1.1)")
    parser.add_argument("--quiet", type=float, default=.05,
                        help="share of the cores that other programs may use during a turn (.05)")
    parser.add_argument("--patience", type=float, default=600,
                        help="seconds to wait for such quiet, each time (600)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "openmp_policy",
                        help="where the .json and the .png go, without the ending")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(repetitions: int, batch: int) -> None:
    """In a process of its own: for a line of input, which names the busy processes, the seconds of passes."""
    import torch
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    config = dict(model.config)
    side, words, width = 8, 16, config["joint_attention_dim"]         # 32 x 32 pixels are 8 x 8 tokens
    image_ids = torch.stack([torch.zeros(side, side), *torch.meshgrid(torch.arange(side), torch.arange(side),
                                                                      indexing="ij")], -1).reshape(-1, 3)
    inputs = {"hidden_states": torch.randn(batch, side * side, config["in_channels"]),
              "encoder_hidden_states": torch.randn(batch, words, width),
              "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
              "timestep": torch.rand(batch), "guidance": torch.full((batch,), 2.5),
              "img_ids": image_ids, "txt_ids": torch.zeros(words, 3)}
    info = [line.strip() for line in torch.__config__.parallel_info().splitlines() if "OpenMP" in line]
    for line in sys.stdin:
        seconds = []
        for repetition in range(2 + repetitions):
            if repetition == 2:
                used = Used([os.getpid(), *map(int, line.split())])
            start = time.perf_counter()
            model(**inputs, return_dict=False)[0].square().mean().backward()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds[2:], "others": used.by_others(), "torch": torch.__version__,
                          "openmp_runtime": openmp_runtimes(), "parallel_info": info}), flush=True)


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
    return subprocess.Popen([sys.executable, __file__, "--worker", *sizes], env=environment, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def turn(worker: subprocess.Popen[str], busy: int, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker measures. Repeated while other programs disturb it; RuntimeError when they never stop."""
    assert worker.stdin and worker.stdout
    end = time.monotonic() + args.patience
    while time.monotonic() < end:
        before = Used([])
        time.sleep(.5)
        if before.by_others() > args.quiet:
            continue
        with busy_processes(busy) as beside:
            print(*beside, file=worker.stdin, flush=True)
            told = json.loads(worker.stdout.readline())
        if told["others"] <= args.quiet:
            return told
    raise RuntimeError(f"for {args.patience:g} s others used more than {args.quiet:.0%} of the cores: "
                       "stop them, or allow more with --quiet or --patience")


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


def summary(seconds: dict[str, dict[str, list[float]]], bearable: float) -> dict[str, Any]:
    """Medians, ratios to the idle default, and the choice: the fastest when busy of those bearable idle."""
    base = statistics.median(seconds["idle"]["default"])
    table = {}
    for name, environment in SETTINGS.items():
        row: dict[str, Any] = {"environment": {"OMP_NUM_THREADS": "2"} | environment}
        for condition, times in seconds.items():
            low, middle, high = statistics.quantiles(times[name], n=4)
            row[condition] = {"median_seconds": round(middle, 4),
                              "quartiles": [round(low, 4), round(high, 4)],
                              "ratio_to_idle_default": round(middle / base, 3)}
        table[name] = row

    def ratio(name: str, condition: str) -> float:
        return table[name][condition]["ratio_to_idle_default"]

    choices = [name for name in SETTINGS if ratio(name, "idle") <= bearable]
    best = min(choices, key=lambda name: ratio(name, "busy"))
    why = (f"of the settings that cost at most {bearable - 1:.0%} on an idle machine (this one: "
           f"{ratio(best, 'idle') - 1:+.1%}) it is the fastest beside busy processes: "
           f"{ratio(best, 'busy'):.2f} times the idle default, which itself takes "
           f"{ratio('default', 'busy'):.2f} there")
    return {"chosen": {"setting": best, "environment": SETTINGS[best], "why": why}, "settings": table}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(record["settings"])
    fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for i, (condition, colour) in enumerate((("idle", "tab:blue"), ("busy", "tab:orange"))):
        rows = [record["settings"][name][condition] for name in names]
        middle = [row["median_seconds"] for row in rows]
        spread = [[m - row["quartiles"][0] for m, row in zip(middle, rows, strict=True)],
                  [row["quartiles"][1] - m for m, row in zip(middle, rows, strict=True)]]
        places = [k + (i - .5) * .38 for k in range(len(names))]
        label = condition if condition == "idle" else f"beside {record['busy_processes']} busy processes"
        ax.bar(places, middle, .36, yerr=spread, color=colour, label=label, error_kw={"lw": 1})
        for place, row in zip(places, rows, strict=True):
            ax.annotate(f"{row['ratio_to_idle_default']:.2g}x", (place, row["quartiles"][1]), (0, 2),
                        textcoords="offset points", ha="center", fontsize=7)
    chosen = record["chosen"]["setting"]
    ax.set_xticks(range(len(names)), [f"{n}\n(chosen)" if n == chosen else n for n in names], fontsize=8)
    ax.set_yscale("log")
    ax.set_ylabel("seconds, forward and backward")
    ax.set_title(f"Tiny Flux, batch {record['batch']}, fp32, torch {record['torch']}, "
                 f"{record['machine']['cores']} cores: median and quartiles", fontsize=9)
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
