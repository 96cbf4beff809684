"""SCFM for Flux in one file: a folder of captioned images in, a LoRA that samples in a few steps out.

A flow-matching model V(x_t, t) takes x_t = (1 - t) data + t noise from t = 1 to 0 in 30 to 50 Euler steps.
SCFM (arXiv 2510.17858, Algorithm 2) trains a LoRA so that ONE step lands where TWO land. Four models share a
frozen transformer, none has a step-size input:

    teacher   the transformer as it is               student   teacher + the LoRA that is trained
    ema_fast  teacher + a fast EMA of that LoRA      ema_slow  teacher + a slow EMA of that LoRA

The folder holds images and a metadata.jsonl of {"file_name": ..., "text": ...} lines (imagefolder layout), or
a .txt file with the caption beside each image. FLUX.1-dev on one 80 GB GPU:

    python plain_scfm_flux.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --train_data_dir images --output_dir scfm-lora --max_sequence_length 256 --gradient_checkpointing

The tiny Flux of this repository, on images drawn for it, a minute on one CPU core (OMP_NUM_THREADS=1):

    mkdir -p runs/circles && python -c '
    from PIL import Image, ImageDraw
    for c in ("red", "yellow", "green", "blue"):
        ImageDraw.Draw(image := Image.new("RGB", (32, 32), "gray")).ellipse((7, 7, 24, 24), fill=c)
        image.save(f"runs/circles/{c}.png"); open(f"runs/circles/{c}.txt", "w").write(f"a {c} circle")'
    python examples/plain_scfm_flux.py --pretrained_model_name_or_path toy/weights/flux \\
        --train_data_dir runs/circles --output_dir runs/plain --resolution 32 --max_sequence_length 16 \\
        --weight_dtype fp32 --max_train_steps 100 --train_batch_size 16 --learning_rate 5e-4 --rank 16 \\
        --guidance_scale_range 1 4 --ema_decay_fast 0.9 --ema_decay_slow 0.99
"""
import argparse
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.utils.logging import tqdm
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from torch import Tensor

TEACHER_RATIO = 0.4         # k/N: with no teacher examples the student would drift away from the data
TEACHER_GRID = 32           # the times of a teacher example are those of two of 32 Euler steps,
SELF_GRIDS = 2, 4, 8, 16    # of a self-consistency example two of 2, 4, 8 or 16,
SHIFT_RANGE = 2.5, 4.5      # shifted toward the noise
IMAGE_SUFFIXES = ".png", ".jpg", ".jpeg", ".webp"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Cond = tuple[Tensor, Tensor, Tensor]        # T5 (B, L, D), CLIP (B, P), guidance scale (B,)

# 1. The data: each image and each caption is encoded once, before the transformer is loaded
def read_dataset(folder: Path) -> list[tuple[Path, str]]:
    """(image file, caption) pairs, from metadata.jsonl or from .txt files."""
    pairs, table = [], folder / "metadata.jsonl"
    if table.is_file():
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                pairs.append((folder / row["file_name"], row["text"].strip()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise SystemExit(f"error: {table}, line {number}: file_name and text are expected") from None
    else:
        for file in sorted(f for f in folder.glob("*") if f.suffix.lower() in IMAGE_SUFFIXES):
            text = file.with_suffix(".txt")
            pairs.append((file, text.read_text(encoding="utf-8").strip() if text.is_file() else ""))
    for file, caption in pairs:
        read_image(file, 8)                             # a broken file is named now, not in an hour
        if not caption:
            raise SystemExit(f"error: {file} has no caption in {file.stem}.txt beside it, or in {table.name}")
    if not pairs:
        raise SystemExit(f"error: --train_data_dir {folder}: no such folder, or no images in it")
    return pairs

def read_image(file: Path, resolution: int) -> Image.Image:
    """RGB, upright, scaled and cropped to a square."""
    try:
        with Image.open(file) as image:
            return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (resolution, resolution))
    except (OSError, SyntaxError, ValueError) as error:         # Pillow raises all three for broken files
        raise SystemExit(f"error: {file} cannot be read as an image: {error}") from None

@torch.no_grad()
def encode_dataset(args: argparse.Namespace, pairs: list[tuple[Path, str]], device: str) -> list[Tensor]:
    """Latents (n, N, C), T5 embeddings (n, L, D), CLIP embeddings (n, P), on the CPU: 3 MB an image."""
    dtype, encoded = DTYPES[args.weight_dtype], []
    pipe = FluxPipeline.from_pretrained(args.pipeline, transformer=None, dtype=dtype).to(device)
    for file, caption in tqdm(pairs, desc="encoding"):
        image = pipe.image_processor.preprocess(read_image(file, args.resolution))  # (1, 3, H, W) in [-1, 1]
        z = pipe.vae.encode(image.to(device, dtype)).latent_dist.mean.float()       # (1, C/4, h, w)
        z = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        latents = pipe._pack_latents(z, *z.shape)       # 2 x 2 latent pixels are a token: (1, h/2 w/2, C)
        tokens, pooled, _ = pipe.encode_prompt(caption, None, max_sequence_length=args.max_sequence_length)
        encoded.append((latents.cpu(), tokens.cpu(), pooled.cpu()))
    return [torch.cat(column) for column in zip(*encoded, strict=True)]

# 2. The models: three LoRA adapters on one frozen base
class LoraModels:
    """teacher, student, ema_fast, ema_slow. img_ids: (N, 3), the positions of the image tokens."""

    def __init__(self, transformer: FluxTransformer2DModel, rank: int, img_ids: Tensor) -> None:
        self.transformer, self.img_ids = transformer.requires_grad_(False), img_ids
        linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # three are the point here
        for name in ("student", "ema_fast", "ema_slow"):        # W + B A with B = 0: all start as the teacher
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=linear)
            transformer.add_adapter(config, adapter_name=name)
            for p, start in zip(self.parameters(name), self.parameters("student"), strict=True):
                p.data = start.detach().float().clone()         # fp32: bf16 loses the small steps of an EMA
        transformer.set_adapter("student")                      # add_adapter leaves the last one active

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        return [p for key, p in self.transformer.named_parameters() if key.endswith(f".{name}.weight")]

    def velocity(self, name: str, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """V_name(x_t, t), which approximates noise - data. x: (B, N, C) and t: (B,) in fp32 -> (B, N, C)."""
        if name == "teacher":
            self.transformer.disable_adapters()
        else:
            self.transformer.enable_adapters()
            self.transformer.set_adapter(name)                  # PEFT makes it the trainable one as well
        prompt_embeds, pooled, guidance = cond                  # in the dtype of the frozen weights
        return self.transformer(
            hidden_states=x.to(pooled.dtype), timestep=t.to(pooled.dtype), guidance=guidance,
            encoder_hidden_states=prompt_embeds, pooled_projections=pooled, img_ids=self.img_ids,
            txt_ids=self.img_ids.new_zeros(prompt_embeds.shape[1], 3), return_dict=False)[0].to(x.dtype)

# 3. The method: Algorithm 2 of arXiv 2510.17858
def sample_jumps(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Times (n, 3), t1 > t2 > t3 for each example, and whether it is a teacher example (n,)."""
    # k of n are teacher examples, k rounded up or down at random: a batch of 1 must not lose them all
    is_teacher = torch.randperm(n) < int(TEACHER_RATIO * n + torch.rand(()))
    self_grid = torch.tensor(SELF_GRIDS)[torch.randint(len(SELF_GRIDS), (n,))]
    steps = torch.where(is_teacher, TEACHER_GRID, self_grid)[:, None]                   # (n, 1)
    i = 2 * (torch.rand(n, 1) * (steps // 2)).long()    # (n, 1), even: the first of two neighboring steps
    times = 1 - (i + torch.arange(3)) / steps           # (n, 3)
    s = torch.empty(n, 1).uniform_(*SHIFT_RANGE)        # time shift: t <- s t / (1 + (s - 1) t)
    times = (s * times / (1 + (s - 1) * times)).clamp(max=1 - 1e-5)
    # rounded as Flux casts t; near t = 1 these grids have steps of at least 1/144, bf16 has steps of 1/256
    return times.to(dtype).float(), is_teacher

@torch.no_grad()
def consistency_target(models: LoraModels, x1: Tensor, times: Tensor, is_teacher: Tensor,
                       cond: Cond) -> Tensor:
    """The velocity (B, N, C) with which one Euler step from t1 to t3 lands where two land."""
    t1, t2, t3 = times.T
    d12, d23, d13 = (d[:, None, None] for d in (t1 - t2, t2 - t3, t1 - t3))
    v1 = torch.empty_like(x1)                           # v1 = V_teacher(x1, t1), or V_ema_fast(x1, t1)
    for name, mask in (("teacher", is_teacher), ("ema_fast", ~is_teacher)):
        if mask.any():
            v1[mask] = models.velocity(name, x1[mask], t1[mask], tuple(c[mask] for c in cond))
    x2 = x1 - d12 * v1                                  # x2 = x1 - (t1 - t2) v1
    v2 = models.velocity("ema_slow", x2, t2, cond)      # v2 = V_ema_slow(x2, t2)
    return (d12 * v1 + d23 * v2) / d13                  # ((t1 - t2) v1 + (t2 - t3) v2) / (t1 - t3)

def train_step(models: LoraModels, optimizer: torch.optim.Optimizer, data: Tensor, noise: Tensor,
               times: Tensor, is_teacher: Tensor, cond: Cond, decays: tuple[float, float]) -> float:
    """One step of the student and of both EMAs; returns the loss. data, noise: (B, N, C)."""
    t1 = times[:, 0]
    x1 = (1 - t1)[:, None, None] * data + t1[:, None, None] * noise     # x1 = (1 - t1) data + t1 noise
    target = consistency_target(models, x1, times, is_teacher, cond)
    # No other model until backward() is over: gradient checkpointing repeats the forward with what is active.
    pred = models.velocity("student", x1, t1, cond)                     # is shown t1, but not t2 and t3
    return optimize(models, optimizer, pred, target, dict(zip(("ema_fast", "ema_slow"), decays, strict=True)))

def optimize(models: Any, optimizer: Any, pred: Tensor, target: Tensor, decays: dict[str, float]) -> float:
    loss = (pred - target).square().mean()                              # mean |V_student(x1, t1) - target|^2
    loss.backward()
    student = models.parameters("student")
    if not torch.nn.utils.clip_grad_norm_(student, 10.0).isfinite():
        raise SystemExit("error: the gradient is not finite: lower --learning_rate, or --weight_dtype fp32")
    optimizer.step()
    optimizer.zero_grad()
    for name, decay in decays.items():                              # ema <- decay ema + (1 - decay) student
        torch._foreach_lerp_([p.data for p in models.parameters(name)], [p.data for p in student], 1 - decay)
    return loss.item()

# 4. The program
def save_lora(transformer: Any, folder: Path, name: str = "student", end: str = "") -> None:
    """Writes an adapter for pipe.load_lora_weights(folder). The file gets its name when it is whole."""
    config = transformer.peft_config[name].to_dict()
    config["target_modules"] = sorted(config["target_modules"])         # JSON has no sets
    FluxPipeline.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=name),
        transformer_lora_adapter_metadata=config, weight_name="unfinished.safetensors")
    (folder / "unfinished.safetensors").replace(folder / f"pytorch_lora_weights{end}.safetensors")

def how_to_sample(folder: str) -> str:
    return f"""# to sample with any FluxPipeline: these two lines, then pipe(prompt, num_inference_steps=4)
pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, shift=3, use_dynamic_shifting=False)
pipe.load_lora_weights({folder!r}, adapter_name="scfm"); pipe.set_adapters("scfm", 1)"""

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The settings; one that cannot work, for this pipeline or at all, ends the program with one line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("--pretrained_model_name_or_path", required=True, dest="pipeline")
    parser.add_argument("--train_data_dir", required=True, type=Path)
    parser.add_argument("--output_dir", required=True, type=Path)
    positive = {"resolution": 512, "max_sequence_length": 512, "rank": 64, "learning_rate": 2e-5,
                "train_batch_size": 8, "max_train_steps": 5000, "checkpointing_steps": 500,
                "ema_decay_fast": 0.99, "ema_decay_slow": 0.999}
    for name, default in positive.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="above 0")
    parser.add_argument("--guidance_scale_range", type=float, nargs=2, default=(0.0, 7.5), help="low high")
    parser.add_argument("--weight_dtype", choices=DTYPES, default="bf16", help="of the frozen weights")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more compute")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    args = parser.parse_args(argv)
    for name in (n for n in positive if not 0 < getattr(args, n) < (1 if "decay" in n else math.inf)):
        parser.error(f"--{name} {getattr(args, name)}: must be above 0 (a decay: below 1, too)")
    if not 0 <= args.guidance_scale_range[0] <= args.guidance_scale_range[1] < math.inf:
        parser.error("--guidance_scale_range: 0 <= low <= high is needed")
    try:
        flux = FluxTransformer2DModel.load_config(args.pipeline, subfolder="transformer")
        vae = AutoencoderKL.load_config(args.pipeline, subfolder="vae")
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as problem:
        parser.error(str(problem).strip().splitlines()[0])
    if not flux.get("guidance_embeds"):
        parser.error(f"{args.pipeline} has no guidance embedding as FLUX.1-dev has; schnell is fast already")
    if args.resolution % (patch := 2 ** len(vae["block_out_channels"])):
        parser.error(f"--resolution {args.resolution}: must be a multiple of {patch}")
    return args

def main(argv: list[str] | None = None, method: Any = None) -> None:
    method = method or SimpleNamespace(**globals())     # plain_step_scale_flux.py has functions of its own
    args, device = parse_args(argv), "cuda" if torch.cuda.is_available() else "cpu"
    pairs, n, dtype = read_dataset(args.train_data_dir), args.train_batch_size, DTYPES[args.weight_dtype]
    torch.manual_seed(args.seed)
    latents, prompt_embeds, pooled = encode_dataset(args, pairs, device)
    transformer = FluxTransformer2DModel.from_pretrained(args.pipeline, subfolder="transformer", dtype=dtype)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    side = math.isqrt(latents.shape[1])                 # tokens down and across
    img_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, dtype)
    models = method.LoraModels(transformer.to(device), args.rank, img_ids)
    optimizer = torch.optim.AdamW(models.parameters("student"), lr=args.learning_rate, weight_decay=1e-4)
    for step in (bar := tqdm(range(1, args.max_train_steps + 1), desc="training")):
        i = torch.randint(len(pairs), (n,))
        noise, guidance = torch.randn_like(latents[i]), torch.empty(n).uniform_(*args.guidance_scale_range)
        batch = [b.to(device) for b in (latents[i], noise, *method.sample_jumps(n, dtype))]
        cond = tuple(c.to(device, dtype) for c in (prompt_embeds[i], pooled[i], guidance))
        loss = method.train_step(models, optimizer, *batch, cond, (args.ema_decay_fast, args.ema_decay_slow))
        bar.set_postfix(loss=f"{loss:.4f}")
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            method.save_lora(transformer, args.output_dir)
    print(method.how_to_sample(args.output_dir.as_posix()))

if __name__ == "__main__":
    main()
