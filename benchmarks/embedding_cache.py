"""What the cache of latents and embeddings pays:  python benchmarks/embedding_cache.py

Measured on the tiny Flux, in one thread, in one run and in turn, so that a busy machine disturbs both alike;
seconds of the processor, which other programs do not lengthen by their turns, and seconds of the clock:

    anew     a training step that reads its images, encodes them with the VAE and their captions with the
             text encoders
    cached   the same step, with latents and embeddings read from the cache

Counted for FLUX.1-dev at 512 x 512 pixels, by torch's FlopCounterMode on tensors without storage: the
operations of T5-XXL, CLIP and the VAE's encoder for one image, against those of one example of a step (two
evaluations for the target, the student forward and backward with its activations recomputed); and the bytes
of the encoders in bf16. Nothing of that is measured: seconds need a GPU. Writes
benchmarks/results/embedding_cache.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from scfm.data.cache import CachePlan, batch_indices
from scfm.data.images import list_images, read_image
from scfm.data.teacher_images import generate_images
from scfm.method.distill import Batch, SCFMConfig, make_emas, make_optimizer, sample_batch, train_step
from scfm.models.flux import Flux
from scfm.models.loading import DTYPES
from scfm.models.lora import LoraModels, add_adapters
from scfm.models.source import PipelineSource
from scfm.streams import Stream, keyed_generator
from scfm.training.config import DistillConfig
from scfm.training.plan import count_example, shape_of
from toy.pipelines import FLUX, TOKENS, load_flux
from toy.shapes import draw_captions

RESULTS = Path(__file__).parent / "results"
SIDE, TEXT = 512, 512  # FLUX.1-dev: pixels on a side, text tokens
WARM_UP = 2  # rounds
IMAGES = 96
WAYS = ("anew", "cached")
Data = tuple[torch.Tensor, dict[str, torch.Tensor]]  # latents, and what their captions are encoded to


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--batch", type=int, default=8, help="examples of a step (default 8)")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds (default 40)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "embedding_cache.json", help="path of the result"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with torch.device("meta"):
        counted = count_flux_dev()
    record = {
        "machine": f"{platform.machine()}, 1 of {os.cpu_count()} CPUs",
        "torch": torch.__version__,
        "tiny": measure(args.batch, args.rounds),
        "flux_dev": counted,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def measure(batch: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a step either way, of the processor and of the clock, after two rounds of
    warming up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = TwoSources(Path(folder), batch)
        cpu, clock = ({name: [] for name in WAYS} for _ in range(2))
        for round in range(rounds + WARM_UP):
            for name in WAYS:
                start = time.process_time(), time.perf_counter()
                trainer.step(round, getattr(trainer, name))
                if round >= WARM_UP:
                    cpu[name].append(time.process_time() - start[0])
                    clock[name].append(time.perf_counter() - start[1])
    medians = {
        name: {
            "median_cpu_seconds": four_digits(statistics.median(cpu[name])),
            "median_seconds": four_digits(statistics.median(clock[name])),
        }
        for name in WAYS
    }
    # within a round
    speedup = statistics.median(a / b for a, b in zip(cpu["anew"], cpu["cached"], strict=True))
    return {
        "batch": batch,
        "rounds": rounds,
        "encoding_everything_once_seconds": four_digits(trainer.encoding),
        **medians,
        "speedup": four_digits(speedup),
    }


class TwoSources:
    """The tiny Flux with its LoRAs, images of the teacher, their cache, and two sources of a step's
    examples."""

    def __init__(self, folder: Path, batch: int):
        self.family = Flux(load_flux(), 32, 32, TOKENS)
        self.config = SCFMConfig(global_batch_size=batch, learning_rate=1e-4)
        captions = draw_captions(IMAGES, torch.Generator().manual_seed(0)).text
        generate_images(self.family, captions, folder / "images", 4, progress=False)
        self.images = list_images(folder / "images")
        start = time.perf_counter()
        plan = CachePlan(
            PipelineSource(FLUX), self.images, folder / "cache", [(32, 32)], TOKENS, torch.float32
        )
        plan.encode({(32, 32): self.family}, progress=False)
        self.dataset = plan.open()
        self.encoding = time.perf_counter() - start
        self.models = LoraModels(self.family.pipe.transformer, self.family.velocity, Flux.lora_targets, 16)
        self.optimizer, _ = make_optimizer(self.models, self.config)
        self.emas = make_emas(self.models, self.config)

    def anew(self, indices: torch.Tensor) -> Data:
        listed = [self.images[i] for i in indices.tolist()]
        pixels = torch.stack([read_image(image.path, 32, 32) for image in listed])
        text = self.family.encode_text([image.caption for image in listed])
        return self.family.encode_images(pixels), text

    def cached(self, indices: torch.Tensor) -> Data:
        return self.dataset.latents(indices), self.dataset.text(indices)

    def step(self, number: int, source: Callable[[torch.Tensor], Data]) -> None:
        batch = self.config.global_batch_size
        data, cond = source(batch_indices(number, batch, self.dataset.size_of, 0))
        cond["guidance"] = 7.5 * torch.rand(batch, generator=keyed_generator(0, number, Stream.GUIDANCE))
        noise, jumps = sample_batch(self.config, number, batch, tuple(data.shape[1:]))
        train_step(self.models, self.emas, self.optimizer, [Batch(data, noise, jumps, cond)], self.config)


def count_flux_dev() -> dict[str, Any]:
    """FLUX.1-dev, from its published configuration, on tensors without storage."""
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            projection_dim=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
        )
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        block_out_channels=[128, 256, 512, 512],
        latent_channels=16,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        work = {
            "T5-XXL": tflop(lambda: t5(token_ids(TEXT))),
            "CLIP": tflop(lambda: clip(token_ids(77))),
            "VAE encoder": tflop(lambda: vae.encode(torch.zeros(1, 3, SIDE, SIDE))),
        }
    step, encoders = tflop_of_an_example(), sum(work.values())
    weights = [p for part in (t5, clip, vae.encoder) for p in part.parameters()]
    return {
        "tflop_per_image": {"step": four_digits(step), **{name: four_digits(n) for name, n in work.items()}},
        "encoders_share": four_digits(encoders / (step + encoders)),
        "encoder_gib": four_digits(sum(2 * p.numel() for p in weights) / 2**30),
        "embedding_mib": four_digits(2 * (TEXT * 4096 + 768) / 2**20),
        "latents_mib": four_digits(2 * (SIDE // 16) ** 2 * 64 / 2**20),
    }


def token_ids(length: int) -> torch.Tensor:
    return torch.zeros(1, length, dtype=torch.long)


def tflop_of_an_example() -> float:
    """One example of a step: two evaluations for the target, then the student with recomputed activations."""
    config = DistillConfig(height=SIDE, width=SIDE, max_sequence_length=TEXT)
    family, net = shape_of(config, "flux-dev")
    add_adapters(net, Flux.lora_targets, 64)
    net.enable_gradient_checkpointing()
    net.train()
    one = count_example(family, net, 1.0, DTYPES[config.weight_dtype])
    return (2 * one.forward + one.student) / 1e12


def tflop(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def four_digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
