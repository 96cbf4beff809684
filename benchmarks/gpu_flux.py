"""What a training step costs at the size of FLUX.1-dev and SD3.5-Large:

    python benchmarks/gpu_flux.py [--shape sd35] [--nf4] [--tiny]

Builds the transformer with random weights on the GPU in bf16, attaches the student and both EMAs as rank-64
LoRAs in fp32, and times one step of the method against one plain LoRA step (flow matching, the student alone)
in the same run, with gradient checkpointing, at 512 x 512 pixels. Random weights cost what trained ones do:
nothing is downloaded.

Per batch size: median seconds, peak memory by part, and the share of the bf16 rate that a large matrix
product reaches in this run, by the operations that torch's FlopCounterMode counts (recomputation included).
From these it projects the hours of a run of --steps steps at batch 8. Two ways of computing the LoRA products
are tried: fp32 with TF32 tensor cores, and bf16 autocast on fp32 weights. Needs torch, diffusers and peft;
--tiny runs the same code on a CPU in seconds.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scfm.method.distill import (
    Batch,
    SCFMConfig,
    make_emas,
    make_optimizer,
    optimizer_step,
    sample_batch,
    train_step,
)
from scfm.method.flow import interpolate, velocity
from scfm.models.family import unguided
from scfm.models.lora import ADAPTERS, LoraModels
from scfm.streams import keyed_generator
from scfm.training.plan import SHAPES

RESULTS = Path(__file__).parent / "results"
PUBLISHED = {"flux": "flux-dev", "sd35": "sd35-large"}
TINY = {
    "flux": {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 14, 14),
    },
    "sd35": {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
    },
}
GIB = 2**30
Step = Callable[[int, torch.Tensor, dict], None]  # (number, data, cond)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    deadline = time.time() + 60 * args.minutes
    device = "cpu" if args.tiny else "cuda"
    record = {
        "shape": args.shape,
        "base_in_nf4": args.nf4,
        "guidance": "embedded" if args.shape == "flux" else "off",
        "tiny": args.tiny,
        "pixels": 512,
        "rank": args.rank,
        "machine": machine(device),
        "torch": torch.__version__,
        "checkpointing": True,
        "bf16_peak_tflops": float(f"{matmul_rate(device) / 1e12:.4g}"),
    }
    start = time.time()
    model = Model(args, device)
    record |= {
        "parameters_billion": round(model.base / 1e9, 3),
        "lora_million": round(model.lora / 1e6, 1),
        "tokens": model.tokens,
        "building_seconds": round(time.time() - start, 1),
        "rows": [],
    }
    for batch, math in [(batch, math) for batch in args.batches for math in ("tf32", "autocast")]:
        if time.time() > deadline:
            record["stopped"] = f"after {args.minutes} minutes, before batch {batch}, {math}"
            break
        record["rows"].append(measure(model, batch, math, args, record["bf16_peak_tflops"]))
        print(json.dumps(record["rows"][-1]), flush=True)
        write(args, record)
    write(args, record)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=list(PUBLISHED), default="flux", help="FLUX.1-dev or SD3.5-Large")
    parser.add_argument("--nf4", action="store_true", help="hold the frozen base in NF4 (needs bitsandbytes)")
    parser.add_argument("--tiny", action="store_true", help="the same code on a CPU with a toy of that shape")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4, 8], help="batch sizes (default 1 4 8)"
    )
    parser.add_argument("--rank", type=int, default=64, help="rank of the LoRAs (default 64)")
    parser.add_argument(
        "--rounds", type=int, default=4, help="timed steps, after one of warming up (default 4)"
    )
    parser.add_argument(
        "--steps", type=int, default=10000, help="training steps of the projected run (default 10000)"
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="start no measurement after this many (default 8)"
    )
    parser.add_argument(
        "--out", type=Path, help="path of the JSON (default benchmarks/results/gpu_SHAPE[_nf4].json)"
    )
    return parser.parse_args(argv)


class Model:
    """The transformer in bf16 with its four models, and a batch of made-up examples of any size."""

    def __init__(self, args: argparse.Namespace, device: str):
        family_class, kind, shape = SHAPES[PUBLISHED[args.shape]]
        shape = shape | TINY[args.shape] if args.tiny else shape
        transformer = build(kind, shape, device)
        self.base = sum(p.numel() for p in transformer.parameters())
        if args.nf4:
            load_nf4(transformer, device)
        transformer.enable_gradient_checkpointing()
        transformer.train()
        side, text = (32, 256) if not args.tiny else (4, 8)  # patches on a side, text tokens
        pipe = SimpleNamespace(vae_scale_factor=8, transformer=transformer)
        family = family_class(pipe, 16 * side, 16 * side, text)
        # Guidance at run time would double every evaluation of SD3.5; it is off here, as the record says.
        call = unguided(family.velocity) if family.uses_cfg else family.velocity
        self.device, self.shape, self.latent_shape = device, shape, family.latent_shape
        self.text, self.guided, self.quantized = text + family.extra_text_tokens, family.uses_cfg, args.nf4
        self.tokens = family.tokens + self.text
        self.models = LoraModels(transformer, call, family.lora_targets, args.rank)
        self.lora = sum(p.numel() for p in self.models.parameters("student"))
        self.config = SCFMConfig(learning_rate=2e-5)
        self.optimizer, _ = make_optimizer(self.models, self.config)
        self.emas = make_emas(self.models, self.config)

    def batch(self, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(count, *shape, device=self.device, dtype=torch.bfloat16)

        cond = {
            "tokens": draw(self.text, self.shape["joint_attention_dim"]),
            "pooled": draw(self.shape["pooled_projection_dim"]),
            "guidance": torch.full((count,), 3.5, device=self.device),
        }
        cond |= {f"empty_{name}": cond[name] for name in ("tokens", "pooled") if self.guided}
        return draw(*self.latent_shape).float(), cond

    def scfm(self, step: int, data: torch.Tensor, cond: dict) -> None:
        """One step of the method: the library's own function."""
        noise, jumps = sample_batch(self.config, step, len(data), data.shape[1:])
        train_step(self.models, self.emas, self.optimizer, [Batch(data, noise, jumps, cond)], self.config)

    def plain(self, step: int, data: torch.Tensor, cond: dict) -> None:
        """One step of flow matching with the student alone."""
        generator = keyed_generator(0, step)
        noise = torch.randn(data.shape, generator=generator).to(data.device)
        t = torch.rand(len(data), generator=generator).to(data.device)
        prediction = self.models.student(interpolate(data, noise, t), t, cond)
        (prediction - velocity(data, noise)).square().mean().backward()
        optimizer_step(self.models, SimpleNamespace(update=lambda: None), self.optimizer, self.config)


def build(kind: Callable, shape: dict[str, Any], device: str) -> torch.nn.Module:
    """A transformer in bf16 with random weights, made on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = kind(**shape)
    torch.set_default_dtype(torch.float32)
    return transformer


def load_nf4(transformer: torch.nn.Module, device: str) -> None:
    """Replaces every linear layer by bitsandbytes' NF4 one, in place, and moves the model, which quantizes
    it.
    """
    import bitsandbytes as bnb

    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            four = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="cpu",
            )
            four.load_state_dict({k: v.cpu() for k, v in layer.state_dict().items()})
            parent, _, last = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last, four.to(device))
    transformer.is_loaded_in_4bit = True  # says to PEFT which kind of LoRA layer to put around them


def measure(
    model: Model, batch: int, math: str, args: argparse.Namespace, peak_tflops: float
) -> dict[str, Any]:
    """One row: both kinds of step at one batch size."""
    torch.backends.cuda.matmul.allow_tf32 = True
    row: dict[str, Any] = {"batch": batch, "lora_math": math}
    try:
        for name, step in (("plain", model.plain), ("scfm", model.scfm)):
            row[name] = timed(step, model, batch, math, args.rounds, peak_tflops)
    except torch.OutOfMemoryError as error:
        model.optimizer.zero_grad()
        return row | {"out_of_memory": str(error).splitlines()[0]}
    row["ratio_seconds"] = round(row["scfm"]["seconds"] / row["plain"]["seconds"], 3)
    row["ratio_operations"] = round(row["scfm"]["tflop"] / row["plain"]["tflop"], 3)
    row["memory_gib"] = memory(model, row["scfm"]["peak_gib"])
    if not args.tiny:
        hours = round(args.steps * row["scfm"]["seconds"] / 3600, 2)
        row["projected_hours"] = {"steps": args.steps, "hours": hours}
    return row


def timed(step: Step, model: Model, batch: int, math: str, rounds: int, peak_tflops: float) -> dict[str, Any]:
    """Median seconds, counted operations and peak memory of a step."""
    data, cond = model.batch(batch)
    seconds, cuda = [], model.device == "cuda"
    with torch.autocast(model.device, torch.bfloat16) if math == "autocast" else nullcontext():
        with FlopCounterMode(display=False) as counter:
            step(0, data, cond)  # also warms up
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for i in range(rounds):
            wait(cuda)
            start = time.perf_counter()
            step(i + 1, data, cond)
            wait(cuda)
            seconds.append(time.perf_counter() - start)
    median, flop = statistics.median(seconds), counter.get_total_flops()
    share = round(flop / median / 1e12 / peak_tflops, 4)
    return {
        "seconds": round(median, 4),
        "fastest": round(min(seconds), 4),
        "slowest": round(max(seconds), 4),
        "tflop": float(f"{flop / 1e12:.5g}"),
        "share_of_peak": None if model.quantized else share,  # 4-bit products are not counted
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if cuda else None,
    }


def memory(model: Model, peak: float | None) -> dict[str, float | None]:
    """GiB by part, counted from the tensors; what is left of the measured peak is activations and
    workspace."""
    student, adam = model.models.parameters("student"), model.optimizer.state
    named = model.models.transformer.named_parameters()
    parts = {
        "base": gib(p for name, p in named if "lora_" not in name),
        "adapters": gib(p for name in ADAPTERS for p in model.models.parameters(name)),
        "adam": gib(t for p in student for t in adam[p].values() if t.ndim),
        "gradients": gib(student),
    }
    return {**parts, "rest": None if peak is None else round(peak - sum(parts.values()), 2), "peak": peak}


def gib(tensors: Iterable[torch.Tensor]) -> float:
    return round(sum(t.numel() * t.element_size() for t in tensors) / GIB, 4)


def matmul_rate(device: str, side: int = 8192) -> float:
    """Operations a second of a large bf16 matrix product on this device."""
    cuda = device == "cuda"
    side = side if cuda else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in "ab")
    best = 0.0
    for _ in range(3):
        wait(cuda)
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        wait(cuda)
        best = max(best, 20 * 2 * side**3 / (time.perf_counter() - start))
    return best


def wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def machine(device: str) -> str:
    return (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    )


def write(args: argparse.Namespace, record: dict[str, Any]) -> None:
    path = args.out or RESULTS / f"gpu_{args.shape}{'_nf4' * args.nf4}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)


if __name__ == "__main__":
    main()
