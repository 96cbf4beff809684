"""What a training step costs at the size of FLUX.1-dev and SD3.5-Large:

    python benchmarks/gpu_flux.py [--config flux-dev-24gb] [--quantize int8] [--blocks_to_swap 19] [--tiny]

Builds the transformer with random weights on the GPU in bf16, holds it as a preset says (--config), or as the
flags say: in fewer bits, blocks on the host, recomputed, compiled; attaches the LoRAs of the preset's
algorithm, and times one step of the method against one plain LoRA step (flow matching, the student alone) in
the same run, at 512 x 512 pixels. Random weights cost what trained ones do: nothing is downloaded.

Per batch size: median seconds beside those in which the host hands out the work of forwards and backward
(nearly as many: it is the host that binds), peak memory by part, and the share of the bf16 rate that a large
matrix product reaches in this run, by the operations that torch's FlopCounterMode counts (recomputation
included). From these it projects the hours of a run of --steps steps. `scfm plan` prints what it finds in
benchmarks/results for the same shape and settings. --tiny runs the same code on a CPU in seconds.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scfm.method.distill import (
    STEP_SCALED,
    Batch,
    make_emas,
    make_optimizer,
    optimizer_step,
    sample_batch,
    train_step,
)
from scfm.method.flow import interpolate, velocity
from scfm.models.blocks import compile_blocks, first_blocks, recompute_blocks
from scfm.models.family import unguided
from scfm.models.lora import LoraModels
from scfm.models.quantize import BYTES, quantize_linears
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.models.swap import swap_blocks
from scfm.streams import keyed_generator
from scfm.training.config import DistillConfig, load_settings
from scfm.training.measured import RESULTS, settings_of
from scfm.training.optimizer import in_8_bits, require_8bit_adam
from scfm.training.plan import SHAPES

TINY = {
    "flux-dev": {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 14, 14),
    },
    "sd35-large": {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
    },
}
GIB = 2**30
FLAGS = ("algorithm", "rank", "quantize", "blocks_to_swap", "checkpoint_blocks")  # with a value
SWITCHES = ("gradient_checkpointing", "compile_blocks", "use_8bit_adam")
Step = Callable[[int, torch.Tensor, dict], float]  # (number, data, cond) -> seconds until all was handed out


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    config = settings(args)
    deadline = time.time() + 60 * args.minutes
    device = "cpu" if args.tiny else "cuda"
    record = {
        "shape": args.shape,
        "settings": settings_of(config),
        "one_forward_for_all_models": args.rows == "together",
        "guidance": "embedded" if args.shape == "flux-dev" else "off",
        "tiny": args.tiny,
        "machine": machine(device),
        "torch": torch.__version__,
        "bf16_peak_tflops": float(f"{matmul_rate(device) / 1e12:.4g}"),
    }
    start = time.time()
    model = Model(args, config, device)
    record |= {
        "parameters_billion": float(f"{model.base / 1e9:.4g}"),
        "lora_million": round(model.lora / 1e6, 1),
        "tokens": model.tokens,
        "building_seconds": round(time.time() - start, 1),
        "rows": [],
    }
    for batch in args.batches or [config.micro_batch_size or config.global_batch_size]:
        if time.time() > deadline:
            record["stopped"] = f"after {args.minutes} minutes, before batch {batch}"
            break
        record["rows"].append(measure(model, batch, args, record["bf16_peak_tflops"]))
        print(json.dumps(record["rows"][-1]), flush=True)
        write(args, config, record)
    write(args, config, record)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=list(TINY), default="flux-dev", help="of the transformer")
    parser.add_argument(
        "--config", default="flux-dev-a100", help="preset whose settings are taken (default flux-dev-a100)"
    )
    parser.add_argument("--algorithm", help="dual, step_scaled, ...")
    parser.add_argument("--rank", type=int, help="rank of the LoRAs")
    parser.add_argument("--quantize", choices=list(BYTES), help="hold the frozen base in fewer bits")
    parser.add_argument("--blocks_to_swap", type=int, help="blocks whose weights are on the host")
    parser.add_argument("--checkpoint_blocks", type=int, help="recompute so many blocks; 0 means all")
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help="as in scfm distill")
    parser.add_argument(
        "--rows",
        choices=("together", "apart"),
        default="together",
        help="teacher and EMA in one forward, or in one for each (step_scaled: together)",
    )
    parser.add_argument("--tiny", action="store_true", help="the same code on a CPU with a toy of that shape")
    parser.add_argument("--batches", type=int, nargs="+", help="examples of a forward (default the preset's)")
    parser.add_argument(
        "--rounds", type=int, default=4, help="timed steps, after two of warming up (default 4)"
    )
    parser.add_argument("--steps", type=int, default=10000, help="steps of the projected run (default 10000)")
    parser.add_argument(
        "--minutes", type=float, default=8, help="start no measurement after this many (default 8)"
    )
    parser.add_argument("--out", type=Path, help="path of the JSON (default by shape and settings)")
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> DistillConfig:
    """The preset's, and over them what flags say."""
    given = {name: getattr(args, name) for name in (*FLAGS, *SWITCHES) if getattr(args, name) is not None}
    return DistillConfig(**{**load_settings(args.config), **given})


class Model:
    """The transformer with its models, held as the settings say, and a batch of made-up examples of any
    size."""

    def __init__(self, args: argparse.Namespace, config: DistillConfig, device: str):
        family_class, kind, shape = SHAPES[args.shape]
        shape = shape | TINY[args.shape] if args.tiny else shape
        transformer = build(kind, shape, device)
        self.base = sum(p.numel() for p in transformer.parameters())
        hold(transformer, config, device)
        side, text = (
            (32, config.max_sequence_length) if not args.tiny else (4, 8)
        )  # patches on a side, tokens
        pipe = SimpleNamespace(vae_scale_factor=8, transformer=transformer)
        family = family_class(pipe, 16 * side, 16 * side, text)
        # Guidance at run time would double every evaluation of SD3.5; it is off here, as the record says.
        call = unguided(family.velocity) if family.uses_cfg else family.velocity
        self.device, self.shape, self.latent_shape = device, shape, family.latent_shape
        self.text, self.guided = text + family.extra_text_tokens, family.uses_cfg
        self.tokens, self.config = family.tokens + self.text, config
        make: Any = ScaledLoraModels if config.algorithm == STEP_SCALED else LoraModels
        rows = {"together": lambda cond: None, "apart": None}[args.rows]  # no example has two rows here
        order = (config.scale_order,) if config.algorithm == STEP_SCALED else ()
        self.models = make(
            transformer, call, family.lora_targets, config.rank, None, *order, forward_rows=rows
        )
        self.lora = sum(p.numel() for p in self.models.parameters("student"))
        if config.compile_blocks:
            compile_blocks(transformer)
        self.optimizer, scheduler = make_optimizer(self.models, config)
        if config.use_8bit_adam:
            require_8bit_adam(device)
            self.optimizer, _ = in_8_bits(self.optimizer, scheduler)
        self.emas = make_emas(self.models, config)

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

    def scfm(self, step: int, data: torch.Tensor, cond: dict) -> float:
        """One step of the method: the library's own function."""
        start, handed_out = time.perf_counter(), [0.0]

        def backward(loss: torch.Tensor) -> None:
            loss.backward()
            handed_out[0] = time.perf_counter() - start  # the optimizer then waits for the gradient's norm

        noise, jumps = sample_batch(self.config, step, len(data), data.shape[1:])
        batch = Batch(data, noise, jumps, cond)
        train_step(self.models, self.emas, self.optimizer, [batch], self.config, backward)
        return handed_out[0]

    def plain(self, step: int, data: torch.Tensor, cond: dict) -> float:
        """One step of flow matching with the student alone."""
        start, generator = time.perf_counter(), keyed_generator(0, step)
        noise = torch.randn(data.shape, generator=generator).to(data.device)
        t = torch.rand(len(data), generator=generator).to(data.device)
        x = interpolate(data, noise, t)
        if self.config.algorithm == STEP_SCALED:
            prediction = self.models.scaled_velocity("student", torch.ones(len(data)), x, t, cond)
        else:
            prediction = self.models.student(x, t, cond)
        (prediction - velocity(data, noise)).square().mean().backward()
        handed_out = time.perf_counter() - start
        optimizer_step(self.models, SimpleNamespace(update=lambda: None), self.optimizer, self.config)
        return handed_out


def build(kind: Callable, shape: dict[str, Any], device: str) -> torch.nn.Module:
    """A transformer in bf16 with random weights, made on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = kind(**shape)
    torch.set_default_dtype(torch.float32)
    return transformer.requires_grad_(False)


def hold(transformer: torch.nn.Module, config: DistillConfig, device: str) -> None:
    """In fewer bits, on the host, and recomputed, as the settings say."""
    count = config.blocks_to_swap
    if config.quantize:
        quantize_linears(transformer, config.quantize, device)
    if count:
        count = min(count, len(first_blocks(transformer, 0)))  # a toy has fewer
        swap_blocks(transformer, count, device)
    if config.gradient_checkpointing:
        recompute_blocks(transformer, min(config.checkpoint_blocks, len(first_blocks(transformer, 0))))


def measure(model: Model, batch: int, args: argparse.Namespace, peak_tflops: float) -> dict[str, Any]:
    """One row: both kinds of step at one batch size."""
    torch.backends.cuda.matmul.allow_tf32 = True
    row: dict[str, Any] = {"batch": batch}
    try:
        for name, step in (("plain", model.plain), ("scfm", model.scfm)):
            row[name] = timed(step, model, batch, args.rounds, peak_tflops)
    except torch.OutOfMemoryError as error:
        model.optimizer.zero_grad()
        return {"batch": batch, "out_of_memory": str(error).splitlines()[0]}
    row["ratio_seconds"] = round(row["scfm"]["seconds"] / row["plain"]["seconds"], 3)
    row["ratio_operations"] = round(row["scfm"]["tflop"] / row["plain"]["tflop"], 3)
    row["memory_gib"] = memory(model, row["scfm"]["peak_gib"])
    if not args.tiny:
        forwards = -(-model.config.global_batch_size // batch)
        hours = round(args.steps * forwards * row["scfm"]["seconds"] / 3600, 2)
        row["projected_hours"] = {"steps": args.steps, "forwards_a_step": forwards, "hours": hours}
    return row


def timed(step: Step, model: Model, batch: int, rounds: int, peak_tflops: float) -> dict[str, Any]:
    """Median seconds, those of the host, counted operations and peak memory of a step."""
    data, cond = model.batch(batch)
    seconds, handed_out, cuda = [], [], model.device == "cuda"
    with FlopCounterMode(display=False) as counter:
        step(0, data, cond)
    step(1, data, cond)  # warms up what the counter has kept from being compiled
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for i in range(rounds):
        wait(cuda)
        start = time.perf_counter()
        handed_out.append(step(i + 2, data, cond))
        wait(cuda)
        seconds.append(time.perf_counter() - start)
    median, flop = statistics.median(seconds), counter.get_total_flops()
    return {
        "seconds": round(median, 4),
        "host_seconds": round(statistics.median(handed_out), 4),
        "fastest": round(min(seconds), 4),
        "slowest": round(max(seconds), 4),
        "tflop": float(f"{flop / 1e12:.5g}"),
        "share_of_peak": round(flop / median / 1e12 / peak_tflops, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if cuda else None,
    }


def memory(model: Model, peak: float | None) -> dict[str, float | None]:
    """GiB by part, counted from the tensors' storages as they are between steps; what is left of the measured
    peak is activations and workspace."""
    student, adam = model.models.parameters("student"), model.optimizer.state
    transformer = model.models.transformer
    named = [*transformer.named_parameters(), *transformer.named_buffers()]
    parts = {
        "base": gib(p for name, p in named if "lora_" not in name),
        "adapters": gib(p for name, p in named if "lora_" in name),
        "adam": gib(t for p in student for t in adam[p].values() if isinstance(t, torch.Tensor) and t.ndim),
        "gradients": gib(student),
    }
    return {**parts, "rest": None if peak is None else round(peak - sum(parts.values()), 2), "peak": peak}


def gib(tensors: Iterable[torch.Tensor]) -> float:
    return round(sum(t.untyped_storage().nbytes() for t in tensors) / GIB, 5)


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


def write(args: argparse.Namespace, config: DistillConfig, record: dict[str, Any]) -> None:
    """The record, under a name that says the shape and how its base is held."""
    how = [args.config, config.quantize, f"swap{config.blocks_to_swap}" * bool(config.blocks_to_swap)]
    how += ["compiled" * config.compile_blocks, "apart" * (args.rows == "apart")]
    path = args.out or RESULTS / f"gpu_{'_'.join(filter(None, [args.shape, *how]))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)


if __name__ == "__main__":
    main()
