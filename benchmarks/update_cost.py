"""What a training step of SCFM costs against one of a plain LoRA:  python benchmarks/update_cost.py [--device
cuda]

Four ways of doing one step, in one run, in turn so that a busy machine disturbs all alike:

    plain   flow matching with one LoRA: forward and backward of the student, nothing else
    scfm    ours: one base with three adapters, one forward a velocity, a LoRA scale for each example
    peft    the same by PEFT's own means: set_adapter in every layer, a forward for each model
    swap    as others do it: one adapter, the tensors of both EMAs copied in and out of it

beside the ratio of floating-point operations that torch's FlopCounterMode counts on the same model, the limit
that a ratio of seconds can be compared with. Writes benchmarks/results/update_cost.json and .png.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from scfm.method.consistency import Jumps, consistency_target, scfm_loss
from scfm.method.distill import SCFMConfig, make_emas, make_optimizer, sample_batch
from scfm.method.flow import interpolate, velocity
from scfm.models.flux import Flux
from scfm.models.lora import LoraModels, adapter_parameters, add_adapters

RESULTS = Path(__file__).parent / "results"
TEXT, SIDE = 16, 8  # text tokens; image tokens on a side
WARM_UP = 2  # rounds
EMAS = ("ema_fast", "ema_slow")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    bench = Bench(args)
    torch.manual_seed(0)
    ways = {"plain": bench.plain, "scfm": bench.scfm, "peft": bench.peft, "swap": bench.swap}
    flops = {name: count_flops(way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory = {name: 0 for name in ways}
    for round in range(args.rounds + WARM_UP):
        for name, way in ways.items():
            reset_peak(args.device)
            start = time.perf_counter()
            way(round)
            synchronise(args.device)
            if round >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
                memory[name] = max(memory[name], peak_memory(args.device))
    report(args, bench, flops, seconds, memory)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--width", type=int, default=128, help="hidden width, a multiple of 32 (default 128)")
    parser.add_argument("--blocks", type=int, default=4, help="single blocks, beside two double (default 4)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA (default 16)")
    parser.add_argument("--batch", type=int, default=32, help="examples of a step (default 32)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "update_cost", help="path of the result, no ending"
    )
    return parser.parse_args(argv)


def make_transformer(args: argparse.Namespace) -> FluxTransformer2DModel:
    """Of Flux's shape, the same weights at each call."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=args.blocks,
        attention_head_dim=32,
        num_attention_heads=args.width // 32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    ).to(args.device)


class Bench:
    """Two transformers of Flux's shape with three adapters, one batch, and the ways of a training step."""

    def __init__(self, args: argparse.Namespace):
        model = make_transformer(args)
        self.device = args.device
        self.config = SCFMConfig(global_batch_size=args.batch, learning_rate=1e-4, shift=(2.5, 4.5))
        self.models = LoraModels(model, call, Flux.lora_targets, args.rank)
        self.emas = make_emas(self.models, self.config)
        self.optimizer, _ = make_optimizer(self.models, self.config)
        self.by_peft = PeftModels(make_transformer(args), args.rank)
        self.peft_emas = make_emas(self.by_peft, self.config)
        self.peft_optimizer, _ = make_optimizer(self.by_peft, self.config)
        student = self.models.parameters("student")
        self.swapped = {name: [p.detach().clone() for p in student] for name in EMAS}
        self.parameters = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
        self.data = self._draw(SIDE * SIDE, 16)
        self.cond = {"tokens": self._draw(TEXT, 64), "pooled": self._draw(64), "guidance": self._draw().abs()}

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.config.global_batch_size, *shape, device=self.device)

    def batch(self, step: int) -> tuple[torch.Tensor, Jumps]:
        noise, jumps = sample_batch(self.config, step, len(self.data), tuple(self.data.shape[1:]))
        return noise.to(self.device), jumps

    def optimize(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.models.parameters("student"), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def regress(self, noise: torch.Tensor, t: torch.Tensor, target: torch.Tensor) -> None:
        t = t.to(self.device)
        prediction = self.models.student(interpolate(self.data, noise, t), t, self.cond)
        self.optimize((prediction - target).square().mean())

    def plain(self, step: int = 0) -> None:
        noise, jumps = self.batch(step)
        self.regress(noise, jumps.t1, velocity(self.data, noise))

    def scfm(self, step: int = 0) -> None:
        noise, jumps = self.batch(step)
        self.optimize(scfm_loss(self.data, noise, jumps, self.models, self.cond).mean())
        self.emas.update()

    def peft(self, step: int = 0) -> None:
        noise, jumps = self.batch(step)
        scfm_loss(self.data, noise, jumps, self.by_peft, self.cond).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.by_peft.parameters("student"), self.config.max_grad_norm)
        self.peft_optimizer.step()
        self.peft_optimizer.zero_grad()
        self.peft_emas.update()

    def swap(self, step: int = 0) -> None:
        noise, jumps = self.batch(step)
        x = interpolate(self.data, noise, jumps.t1.to(self.device))
        fields = {"student": self.models.student, "teacher": self.models.teacher}
        fields |= {name: self.swapped_field(name) for name in EMAS}
        self.regress(noise, jumps.t1, consistency_target(x, jumps, type("Swapped", (), fields), self.cond))
        student = [p.detach() for p in self.models.parameters("student")]
        for name, decay in zip(EMAS, (self.config.ema_decay_fast, self.config.ema_decay_slow), strict=True):
            torch._foreach_lerp_(self.swapped[name], student, 1 - decay)

    def swapped_field(self, name: str) -> Callable:
        """A field that copies an EMA's tensors into the active adapter, and the student's back after its
        forward.
        """

        @torch.no_grad()
        def field(x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
            active = [p.data for p in self.models.parameters("student")]
            own = [p.clone() for p in active]
            torch._foreach_copy_(active, self.swapped[name])
            v = call(self.models.transformer, x, t, cond)
            torch._foreach_copy_(active, own)
            return v

        return field


class PeftModels:
    """The four models by `set_adapter`, which visits every layer, and PEFT's own forward."""

    ema_target_scale = 1.0

    def __init__(self, transformer: Any, rank: int):
        add_adapters(transformer, Flux.lora_targets, rank)
        self.transformer = transformer

    def parameters(self, name: str) -> list[torch.Tensor]:
        return adapter_parameters(self.transformer, name)

    def student(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return call(self.transformer, x, t, cond)

    def teacher(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        self.transformer.disable_adapters()
        with torch.no_grad():
            v = call(self.transformer, x, t, cond)
        self.transformer.enable_adapters()
        self.transformer.set_adapter("student")
        return v

    def ema_fast(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return self._adapter("ema_fast", x, t, cond)

    def ema_slow(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return self._adapter("ema_slow", x, t, cond)

    def _adapter(self, name: str, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        self.transformer.set_adapter(name)
        with torch.no_grad():
            v = call(self.transformer, x, t, cond)
        self.transformer.set_adapter("student")
        return v


def call(transformer: Any, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = torch.zeros(SIDE, SIDE, 3, device=x.device)
    ids[..., 1] += torch.arange(SIDE, device=x.device)[:, None]
    ids[..., 2] += torch.arange(SIDE, device=x.device)
    return transformer(
        hidden_states=x,
        timestep=t,
        guidance=cond["guidance"],
        pooled_projections=cond["pooled"],
        encoder_hidden_states=cond["tokens"],
        txt_ids=torch.zeros(TEXT, 3, device=x.device),
        img_ids=ids.reshape(-1, 3),
        return_dict=False,
    )[0]


def count_flops(way: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set starts anew


def peak_memory(device: str) -> int:
    """MiB: of the GPU's allocator, or of the process's resident set (0 where the system does not know)."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((round(int(line.split()[1]) / 1024) for line in lines if line.startswith("VmHWM")), 0)


def report(args: argparse.Namespace, bench: Bench, flops: dict, seconds: dict, memory: dict) -> None:
    """Writes the JSON and the figure."""
    cpu = f"{platform.machine()}, {os.cpu_count()} CPUs"
    ways = {
        name: {
            "gflops": round(flops[name] / 1e9, 2),
            "median_seconds": round(statistics.median(taken), 4),
            "peak_mib": memory[name],
            "flop_ratio": round(flops[name] / flops["plain"], 3),
            "time_ratio": round(time_ratio(taken, seconds["plain"]), 3),
        }
        for name, taken in seconds.items()
    }
    record = {
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        "torch": torch.__version__,
        "parameters": bench.parameters,
        "width": args.width,
        "blocks": args.blocks,
        "rank": args.rank,
        "batch": args.batch,
        "rounds": args.rounds,
        "ways": ways,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    plot(record, args.out.with_suffix(".png"))


def time_ratio(taken: Sequence[float], plain: Sequence[float]) -> float:
    """Within each round: what slows the machine for a second slows both sides."""
    return statistics.median(a / b for a, b in zip(taken, plain, strict=True))


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways, figure = record["ways"], plt.figure(figsize=(5, 3))
    ax = figure.gca()
    for offset, key, label in (
        (-0.2, "flop_ratio", "operations counted"),
        (0.2, "time_ratio", "seconds measured"),
    ):
        places = [i + offset for i in range(len(ways))]
        ax.bar_label(
            ax.bar(places, [way[key] for way in ways.values()], 0.38, label=label), fmt="%.2f", fontsize=8
        )
    ax.set_xticks(range(len(ways)), ways)
    ax.set_ylabel("against a plain LoRA step")
    ax.set_title(
        f"One training step: {record['machine']}, batch {record['batch']}, rank {record['rank']}", fontsize=9
    )
    ax.legend(fontsize=8, loc="upper left")
    ax.set_ylim(0, 2.8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
