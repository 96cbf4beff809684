"""What the cache of latents and embeddings pays:  python bench/cache.py

Measured on the tiny Flux, in one thread, in one run and in turn, so that a busy machine disturbs both alike; seconds of
the processor, which other programs do not lengthen by their turns, and seconds of the clock:

    anew     an update that reads its images, encodes them with the VAE and their captions with the text encoders
    cached   the same update, with latents and embeddings read from the cache

Counted for FLUX.1-dev at 512 x 512 pixels, by torch's FlopCounterMode on tensors without storage: the operations of T5-XXL,
CLIP and the VAE's encoder for one image, against those of one row of an update (two evaluations for the target, the
student forward and backward with its activations recomputed); and the bytes of the encoders in bf16. Nothing of that is
measured: seconds need a GPU. Writes bench/results/cache.json.
"""
import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from scfm.data.cache import CachePlan, batch_indices
from scfm.method.consistency import keyed_generator
from scfm.method.distill import SCFMConfig, sample_batch, make_emas, make_optimizer, train_step
from scfm.models.flux import Flux
from scfm.models.lora import LoraModels, add_adapters
from scfm.data.images import read_folder, read_image
from scfm.data.teacher_images import generate_images
from toy.pipelines import FLUX, TOKENS, load_flux
from toy.shapes import draw_captions

SIDE, TEXT = 512, 512       # FLUX.1-dev: pixels on a side, text tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="rows of an update (default 8)")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds (default 40)")
    parser.add_argument("--out", default="bench/results/cache.json", help="path of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.device("meta"):
        counted = count()
    record = {"machine": f"{platform.machine()}, 1 of {os.cpu_count()} CPUs", "torch": torch.__version__,
              "tiny": measure(args.batch, args.rounds), "flux_dev": counted}
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def measure(batch, rounds):
    """Median seconds of an update either way, of the processor and of the clock, after two rounds of warming up."""
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(Path(folder), batch)
        taken = {"anew": [], "cached": []}                      # (rounds, 2)
        for round in range(rounds + 2):
            for name in taken:
                start = time.process_time(), time.perf_counter()
                ways.update(round, getattr(ways, name))
                taken[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
        cpu, clock = ({name: [row[i] for row in rows[2:]] for name, rows in taken.items()} for i in range(2))
        return {"batch": batch, "rounds": rounds, "encoding_everything_once_seconds": round_to(ways.encoding),
                **{name: {"median_cpu_seconds": round_to(statistics.median(cpu[name])),
                          "median_seconds": round_to(statistics.median(clock[name]))} for name in taken},
                "speedup": round_to(statistics.median(a / b for a, b in zip(cpu["anew"], cpu["cached"])))}    # within a round


class Ways:
    """The tiny Flux with its LoRAs, 96 images of the teacher, their cache, and two sources of an update's rows."""

    def __init__(self, folder, batch):
        self.family = Flux(load_flux(), 32, 32, TOKENS)
        self.config = SCFMConfig(global_batch_size=batch, learning_rate=1e-4)
        generate_images(self.family, draw_captions(96, torch.Generator().manual_seed(0)).text, folder / "images", 4, progress=False)
        self.pairs = read_folder(folder / "images")
        start = time.perf_counter()
        plan = CachePlan(FLUX, folder / "images", folder / "cache", [(32, 32)], TOKENS, torch.float32)
        plan.encode({(32, 32): self.family}, progress=False)
        self.rows = plan.open()
        self.encoding = time.perf_counter() - start
        self.models = LoraModels(self.family.pipe.transformer, self.family.velocity, Flux.lora_targets, 16)
        self.optimizer, _ = make_optimizer(self.models, self.config)
        self.emas = make_emas(self.models, self.config)

    def anew(self, indices):
        pairs = [self.pairs[i] for i in indices.tolist()]
        images = torch.stack([read_image(path, 32, 32) for path, _ in pairs])
        return self.family.encode_images(images), self.family.encode_text([caption for _, caption in pairs])

    def cached(self, indices):
        return self.rows.latents(indices), self.rows.text(indices)

    def update(self, number, source):
        data, cond = source(batch_indices(number, self.config.global_batch_size, self.rows.size_of, 0))
        cond["guidance"] = 7.5 * torch.rand(len(data), generator=keyed_generator(0, number, stream=2))
        noise, jumps = sample_batch(self.config, number, self.config.global_batch_size, tuple(data.shape[1:]))
        train_step(self.models, self.emas, self.optimizer, data, noise, jumps, self.config, cond)


def count():
    """FLUX.1-dev, from its published configuration, on tensors without storage."""
    t5 = T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                 feed_forward_proj="gated-gelu"))
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768,
                                        num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77))
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2,
                        block_out_channels=[128, 256, 512, 512], latent_channels=16, norm_num_groups=32,
                        use_quant_conv=False, use_post_quant_conv=False)
    ids = lambda length: torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad():
        work = {"T5-XXL": tflop(lambda: t5(ids(TEXT))), "CLIP": tflop(lambda: clip(ids(77))),
                "VAE encoder": tflop(lambda: vae.encode(torch.zeros(1, 3, SIDE, SIDE)))}
    update = tflop_of_a_row()
    parts = (t5, clip, vae.encoder)
    return {"tflop_a_image": {"update": round_to(update), **{name: round_to(value) for name, value in work.items()}},
            "encoders_share": round_to(sum(work.values()) / (update + sum(work.values()))),
            "encoder_gib": round_to(sum(2 * p.numel() for part in parts for p in part.parameters()) / 2 ** 30),
            "embedding_mib": round_to(2 * (TEXT * 4096 + 768) / 2 ** 20),
            "latents_mib": round_to(2 * (SIDE // 16) ** 2 * 64 / 2 ** 20)}


def tflop_of_a_row():
    """One row of an update: two evaluations for the target, then the student with recomputed activations."""
    net = FluxTransformer2DModel(patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
                                 num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
                                 guidance_embeds=True, axes_dims_rope=(16, 56, 56))
    add_adapters(net, Flux.lora_targets, 64)
    net.enable_gradient_checkpointing()
    net.train()
    tokens = (SIDE // 16) ** 2
    call = lambda: net(hidden_states=torch.zeros(1, tokens, 64), timestep=torch.zeros(1), guidance=torch.zeros(1),
                       pooled_projections=torch.zeros(1, 768), encoder_hidden_states=torch.zeros(1, TEXT, 4096),
                       txt_ids=torch.zeros(TEXT, 3), img_ids=torch.zeros(tokens, 3), return_dict=False)[0]
    with torch.no_grad():
        target = 2 * tflop(call)
    return target + tflop(lambda: call().sum().backward())


def tflop(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def round_to(value):
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
