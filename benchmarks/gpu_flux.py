"""What an update costs at the size of FLUX.1-dev and SD3.5-Large:  python bench/gpu_flux.py [--shape sd35] [--nf4] [--tiny]

Builds the transformer with random weights on the GPU in bf16, attaches teacher, student, fast and slow as rank-64 LoRAs in
fp32, and times one update of the method against one plain LoRA update (flow matching, the student alone) in the same
run, with gradient checkpointing, at 512 x 512 pixels. Random weights cost what trained ones do: nothing is downloaded.

Per batch size: median seconds, peak memory by part, and the share of the bf16 rate that a large matrix product reaches in
this run, by the operations that torch's FlopCounterMode counts (recomputation included). From these it projects the hours
of a run of --updates updates at batch 8. Two ways of computing the LoRA products are tried: fp32 with TF32 tensor cores, and
bf16 autocast on fp32 weights. Needs torch, diffusers and peft; --tiny runs the same code on a CPU in seconds.
"""
import argparse
import gc
import json
import os
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from scfm.method.consistency import keyed_generator
from scfm.method.distill import SCFMConfig, sample_batch, make_emas, make_optimizer, train_step
from scfm.models.family import unguided
from scfm.method.flow import interpolate, velocity
from scfm.models.lora import LoraModels
from scfm.training.estimate import SHAPES

FLUX, SD35 = SHAPES["flux-dev"][2], SHAPES["sd35-large"][2]
TINY = {"flux": dict(FLUX, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
                     joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 14, 14)),
        "sd35": dict(SD35, num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32,
                     caption_projection_dim=64, pooled_projection_dim=32)}
GIB = 2 ** 30


def main():
    args = parse()
    deadline = time.time() + 60 * args.minutes
    device = "cpu" if args.tiny else "cuda"
    record = {"shape": args.shape, "base_in_nf4": args.nf4, "guidance": "embedded" if args.shape == "flux" else "off", "tiny": args.tiny, "pixels": 512, "rank": args.rank, "machine": machine(device),
              "torch": torch.__version__, "checkpointing": True, "bf16_peak_tflops": float(f"{matmul_rate(device) / 1e12:.4g}")}
    start = time.time()
    model = Model(args, device)
    record |= {"parameters_billion": round(model.base / 1e9, 3), "lora_million": round(model.lora / 1e6, 1),
               "tokens": model.tokens, "building_seconds": round(time.time() - start, 1), "rows": []}
    for batch in args.batches:
        for math in ("tf32", "autocast"):
            if time.time() > deadline:
                record["stopped"] = f"after {args.minutes} minutes, before batch {batch}, {math}"
                return finish(args, record)
            record["rows"].append(measure(model, batch, math, args, record["bf16_peak_tflops"]))
            print(json.dumps(record["rows"][-1]), flush=True)
            finish(args, record)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]
    parser.add_argument("--shape", choices=["flux", "sd35"], default="flux", help="FLUX.1-dev or SD3.5-Large")
    parser.add_argument("--nf4", action="store_true", help="hold the frozen base in NF4 (needs bitsandbytes)")
    parser.add_argument("--tiny", action="store_true", help="the same code on a CPU with a toy of that shape")
    parser.add_argument("--batches", type=numbers, default=[1, 4, 8], help="batch sizes (default 1,4,8)")
    parser.add_argument("--rank", type=int, default=64, help="rank of the LoRAs (default 64)")
    parser.add_argument("--rounds", type=int, default=4, help="timed updates, after one of warming up (default 4)")
    parser.add_argument("--updates", type=int, default=10000, help="updates that the projected run makes (default 10000)")
    parser.add_argument("--minutes", type=float, default=8, help="start no measurement after this many (default 8)")
    parser.add_argument("--out", default="", help="path of the JSON (default bench/results/gpu_SHAPE[_nf4].json)")
    return parser.parse_args()


class Model:
    """The transformer in bf16 with its four models, and a batch of made-up rows for any batch size."""

    def __init__(self, args, device):
        family_class, kind, shape = SHAPES["flux-dev" if args.shape == "flux" else "sd35-large"]
        shape = TINY[args.shape] if args.tiny else shape
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            transformer = kind(**shape)
        torch.set_default_dtype(torch.float32)
        self.base = sum(p.numel() for p in transformer.parameters())
        if args.nf4:
            load_nf4(transformer, device)
        transformer.enable_gradient_checkpointing()
        transformer.train()
        side, text = (32, 256) if not args.tiny else (4, 8)              # patches on a side, text tokens
        family = family_class(SimpleNamespace(vae_scale_factor=8, transformer=transformer), 16 * side, 16 * side, text)
        # Guidance at run time would double every evaluation of SD3.5; it is off here, and said in the record.
        call = unguided(family.velocity) if family.uses_cfg else family.velocity
        self.device, self.shape, self.row, self.text = device, shape, family.latent_shape, text + family.extra_text_tokens
        self.quantized = args.nf4
        self.tokens, self.guided = family.tokens + self.text, family.uses_cfg
        self.models = LoraModels(transformer, call, family.lora_targets, args.rank)
        self.lora = sum(p.numel() for p in self.models.parameters("student"))
        self.config = SCFMConfig(learning_rate=2e-5)
        self.optimizer, _ = make_optimizer(self.models, self.config)
        self.emas = make_emas(self.models, self.config)

    def batch(self, rows):
        draw = lambda *shape: torch.randn(rows, *shape, device=self.device, dtype=torch.bfloat16)
        cond = {"tokens": draw(self.text, self.shape["joint_attention_dim"]),
                "pooled": draw(self.shape["pooled_projection_dim"]), "guidance": torch.full((rows,), 3.5, device=self.device)}
        cond |= {f"empty_{name}": cond[name] for name in ("tokens", "pooled") if self.guided}
        return draw(*self.row).float(), cond

    def scfm(self, update, data, cond):
        """One update of the method: the library's own function."""
        noise, jumps = sample_batch(self.config, update, len(data), data.shape[1:])
        train_step(self.models, self.emas, self.optimizer, data, noise, jumps, self.config, cond)

    def plain(self, update, data, cond):
        """One update of flow matching with the student alone."""
        generator = keyed_generator(0, update)
        noise = torch.randn(data.shape, generator=generator).to(data.device)
        t = torch.rand(len(data), generator=generator).to(data.device)
        said = self.models.student(interpolate(data, noise, t), t, cond)
        (said - velocity(data, noise)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.models.parameters("student"), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def load_nf4(transformer, device):
    """Replaces every linear layer by bitsandbytes' NF4 one, in place, and moves the model, which quantizes it."""
    import bitsandbytes as bnb
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            four = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.bfloat16,
                                     quant_type="nf4", device="cpu")
            four.load_state_dict({k: v.cpu() for k, v in layer.state_dict().items()})
            parent, _, last = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last, four.to(device))
    transformer.is_loaded_in_4bit = True               # tells PEFT which kind of LoRA layer to put around them


def measure(model, batch, math, args, peak_tflops):
    """One row: both kinds of update at one batch size."""
    torch.backends.cuda.matmul.allow_tf32 = True
    row = {"batch": batch, "lora_math": math}
    try:
        for name in ("plain", "scfm"):
            row[name] = timed(getattr(model, name), model, batch, math, args.rounds, peak_tflops)
    except torch.OutOfMemoryError as error:
        model.optimizer.zero_grad()
        return row | {"out_of_memory": str(error).splitlines()[0]}
    row["ratio_seconds"] = round(row["scfm"]["seconds"] / row["plain"]["seconds"], 3)
    row["ratio_operations"] = round(row["scfm"]["tflop"] / row["plain"]["tflop"], 3)
    row["memory_gib"] = memory(model, row["scfm"]["peak_gib"])
    if not args.tiny:
        row["projected_hours"] = {"updates": args.updates, "hours": round(args.updates * row["scfm"]["seconds"] / 3600, 2)}
    return row


def timed(update, model, batch, math, rounds, peak_tflops):
    """Median seconds, counted operations and peak memory of `update`."""
    data, cond = model.batch(batch)
    way = torch.autocast(model.device, torch.bfloat16) if math == "autocast" else nullcontext()
    seconds, cuda = [], model.device == "cuda"
    with way:
        with FlopCounterMode(display=False) as counter:
            update(0, data, cond)                                      # also warms up
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for i in range(rounds):
            wait(cuda)
            start = time.perf_counter()
            update(i + 1, data, cond)
            wait(cuda)
            seconds.append(time.perf_counter() - start)
    median, flop = statistics.median(seconds), counter.get_total_flops()
    return {"seconds": round(median, 4), "fastest": round(min(seconds), 4), "slowest": round(max(seconds), 4),
            "tflop": float(f"{flop / 1e12:.5g}"),
            "share_of_peak": None if model.quantized else round(flop / median / 1e12 / peak_tflops, 4),   # 4-bit products are not counted
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if cuda else None}


def memory(model, peak):
    """GiB by part, counted from the tensors; what is left of the measured peak is activations and workspace."""
    size = lambda tensors: round(sum(t.numel() * t.element_size() for t in tensors) / GIB, 4)
    student, adam = model.models.parameters("student"), model.optimizer.state
    parts = {"base": size(p for n, p in model.models.transformer.named_parameters() if "lora_" not in n),
             "adapters": size(p for n in ("student", "ema_fast", "ema_slow") for p in model.models.parameters(n)),
             "adam": size(t for p in student for t in adam[p].values() if t.ndim), "gradients": size(student)}
    return {**parts, "rest": None if peak is None else round(peak - sum(parts.values()), 2), "peak": peak}


def matmul_rate(device, side=8192):
    """Operations a second of a large bf16 matrix product on this device."""
    side = side if device == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in "ab")
    best = 0.
    for _ in range(3):
        wait(device == "cuda")
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        wait(device == "cuda")
        best = max(best, 20 * 2 * side ** 3 / (time.perf_counter() - start))
    return best


def wait(cuda):
    if cuda:
        torch.cuda.synchronize()


def machine(device):
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"


def finish(args, record):
    path = Path(args.out or f"bench/results/gpu_{args.shape}{'_nf4' * args.nf4}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)


if __name__ == "__main__":
    main()
