"""What one SCFM update costs against a plain LoRA update:  python bench/update_cost.py [--device cuda]

Three ways of doing one update, on one model, in one run, in turn so that a busy machine disturbs all alike:

    plain   flow matching with one LoRA: forward and backward of the student, nothing else
    scfm    ours: one base with three adapters, models switched by the active adapter
    swap    the external_models' way: one adapter, the tensors of fast and slow EMA copied in and out of it

beside the ratio of floating-point operations that torch's FlopCounterMode counts on the same model, the limit that a
ratio of seconds can be compared with. Writes bench/results/update_cost.json and .png.
"""
import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from scfm.method.consistency import consistency_target, scfm_loss
from scfm.method.distill import SCFMConfig, sample_batch, make_emas, make_optimizer
from scfm.models.flux import Flux
from scfm.method.flow import interpolate, velocity
from scfm.models.lora import LoraModels

TEXT, SIDE = 16, 8  # text tokens; image tokens on a side


def main():
    args = parse()
    torch.manual_seed(0)
    bench = Bench(args)
    ways = {"plain": bench.plain, "scfm": bench.scfm, "swap": bench.swap}
    flops = {name: count(way) for name, way in ways.items()}
    seconds = {name: [] for name in ways}
    memory = {name: 0 for name in ways}
    for round in range(args.rounds + 2):
        for name, way in ways.items():
            reset_peak(args.device)
            start = time.perf_counter()
            way(round)
            synchronise(args.device)
            if round >= 2:  # two rounds of warming up
                seconds[name].append(time.perf_counter() - start)
                memory[name] = max(memory[name], peak(args.device))
    report(args, bench, flops, seconds, memory)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--width", type=int, default=128, help="hidden width, a multiple of 32 (default 128)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default 16)")
    parser.add_argument("--batch", type=int, default=32, help="rows of an update (default 32)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--out", default="bench/results/update_cost", help="path of the result without its ending")
    return parser.parse_args()


class Bench:
    """One transformer of Flux's shape with three adapters, one batch, and the three ways of updating."""

    def __init__(self, args):
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=32,
            num_attention_heads=args.width // 32, joint_attention_dim=64, pooled_projection_dim=64,
            guidance_embeds=True, axes_dims_rope=(4, 14, 14)).to(args.device)
        self.config = SCFMConfig(global_batch_size=args.batch, learning_rate=1e-4, shift=(2.5, 4.5))
        self.models = LoraModels(model, call, Flux.lora_targets, args.rank)
        self.emas = make_emas(self.models, self.config)
        self.optimizer, _ = make_optimizer(self.models, self.config)
        self.swapped = {n: [p.detach().clone() for p in self.models.parameters("student")] for n in ("ema_fast", "ema_slow")}
        self.parameters = sum(p.numel() for n, p in model.named_parameters() if "lora" not in n)
        draw = lambda *shape: torch.randn(args.batch, *shape, device=args.device)
        self.data = draw(SIDE * SIDE, 16)
        self.cond = {"tokens": draw(TEXT, 64), "pooled": draw(64), "guidance": draw().abs()}
        self.device = args.device

    def drawn(self, update):
        noise, jumps = sample_batch(self.config, update, self.config.global_batch_size, tuple(self.data.shape[1:]))
        return noise.to(self.device), jumps.to(self.device)

    def step(self, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.models.parameters("student"), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def plain(self, update=0):
        noise, jumps = self.drawn(update)
        x = interpolate(self.data, noise, jumps.t1)
        self.step((self.models.student(x, jumps.t1, self.cond) - velocity(self.data, noise)).square().mean())

    def scfm(self, update=0):
        noise, jumps = self.drawn(update)
        self.step(scfm_loss(self.data, noise, jumps, self.models, self.cond).mean())
        self.emas.update()

    @torch.no_grad()
    def say(self, name):
        """A field that copies a speaker's tensors into the active adapter, speaks, and copies the student's back."""
        def field(x, t, cond=None):
            active = self.models.parameters("student")
            kept = [p.detach().clone() for p in active]
            torch._foreach_copy_([p.data for p in active], self.swapped[name])
            with torch.no_grad():
                v = call(self.models.transformer, x, t, cond)
            torch._foreach_copy_([p.data for p in active], kept)
            return v
        return field

    def swap(self, update=0):
        noise, jumps = self.drawn(update)
        x = interpolate(self.data, noise, jumps.t1)
        models = type("Swapped", (), {"student": self.models.student, "teacher": self.models.teacher,
                                        "ema_fast": self.say("ema_fast"), "ema_slow": self.say("ema_slow")})
        target = consistency_target(x, jumps, models, self.cond)
        self.step((self.models.student(x, jumps.t1, self.cond) - target).square().mean())
        for name, decay in (("ema_fast", self.config.ema_decay_fast), ("ema_slow", self.config.ema_decay_slow)):
            torch._foreach_lerp_(self.swapped[name], [p.detach() for p in self.models.parameters("student")], 1 - decay)


def call(transformer, x, t, cond):
    ids = torch.zeros(SIDE, SIDE, 3, device=x.device)
    ids[..., 1] += torch.arange(SIDE, device=x.device)[:, None]
    ids[..., 2] += torch.arange(SIDE, device=x.device)
    return transformer(hidden_states=x, timestep=t, guidance=cond["guidance"], pooled_projections=cond["pooled"],
                       encoder_hidden_states=cond["tokens"], txt_ids=torch.zeros(TEXT, 3, device=x.device),
                       img_ids=ids.reshape(-1, 3), return_dict=False)[0]


def count(way):
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set starts anew


def peak(device):
    """MiB: of the GPU's allocator, or of the process's resident set (0 where the system does not tell)."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    status = Path("/proc/self/status")
    line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM")), None) if status.exists() else None
    return round(int(line.split()[1]) / 1024) if line else 0


def report(args, bench, flops, seconds, memory):
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    median = {n: statistics.median(s) for n, s in seconds.items()}
    # a ratio within each round: what slows the machine for a second slows both sides
    ratio = lambda name: statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"]))
    record = {"machine": machine, "torch": torch.__version__, "parameters": bench.parameters, "width": args.width,
              "rank": args.rank, "batch": args.batch, "rounds": args.rounds,
              "ways": {n: {"gflops": round(flops[n] / 1e9, 2), "median_seconds": round(median[n], 4),
                           "peak_mib": memory[n], "flop_ratio": round(flops[n] / flops["plain"], 3),
                           "time_ratio": round(ratio(n), 3)} for n in seconds}}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    plot(record, out.with_suffix(".png"))


def plot(record, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ways, figure = record["ways"], plt.figure(figsize=(5, 3))
    ax = figure.gca()
    for offset, key, label in ((-.2, "flop_ratio", "operations counted"), (.2, "time_ratio", "seconds measured")):
        bars = ax.bar([i + offset for i in range(len(ways))], [w[key] for w in ways.values()], .38, label=label)
        ax.bar_label(bars, fmt="%.2f", fontsize=8)
    ax.set_xticks(range(len(ways)), ways)
    ax.set_ylabel("against a plain LoRA update")
    ax.set_title(f"One update: {record['machine']}, batch {record['batch']}, rank {record['rank']}", fontsize=9)
    ax.legend(fontsize=8, loc="upper left")
    ax.set_ylim(0, 2.8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
