"""How the emoji pipeline is trained:  python -m toy.emoji.train --data FILE --output_dir toy/weights/emoji

The data set is not carried: a parquet file of PNG images of 64 x 64 pixels with the columns image, name and
source, from Noto Emoji and Fluent Emoji. Five stages, each resumed by the same command after a kill, on
another machine too, from the files in --output_dir; a stage that is done is not done again:

    vae     reconstruction: L1 of pixels and of edges at four sizes
    text    CLIP and T5 learn to find the image of a caption, against an image tower that is thrown away
    flow    flow matching at guidance scale 1, one caption in ten left empty: nearly all of the time
    guide   guidance distillation: the embedded guidance scale g learns V0 + g (V - V0)
    decoder the VAE's decoder learns on; its encoder, and so all that went before, stays as it is

From the first checkpoint of `flow` on, --output_dir is a FluxPipeline that diffusers loads, with the average
of the weights; `python -m toy.emoji.sheet` shows what it makes. The state of the training lies in its folder
`training` (4 bytes a parameter of the transformer) until everything is done. With a GPU the same command
uses it, in bf16.

The carried VAE had 1,700 updates, and 700 more in a second run that began from the first one's weights
(--vae_from). Latents of 8 channels at factor 4 were taken instead of 16 at factor 8, whose transformer would
cost a third: after the same 40 seconds of one core the loss of reconstruction was 0.9
instead of 1.5 (trial sizes, one batch each: a hint, no measurement).

Two hundred combinations (an object in one style, an object in one skin tone) are in no batch of any stage:
their names are in held_out.json.
"""

import argparse
import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn

from scfm.files import atomic_write
from scfm.models.loading import no_loading_bars
from toy.emoji.data import Emojis, all_words, draw_weights, load_emoji, split
from toy.emoji.fit import Settings, fit, forget, half_precision, read_report
from toy.emoji.flow import PlainAttention, World, build_transformer, flow_loss, guide_loss, pack, positions
from toy.emoji.text import (
    DualEncoder,
    Text,
    build_text,
    contrastive_loss,
    retrieval,
    text_batch,
    tie_capitals,
)
from toy.emoji.vae import build_vae, decoder_loss, encode, psnr, scale_latents, to_floats, vae_loss

UPDATES = {"vae": 1700, "text": 1200, "flow": 32000, "guide": 1200, "decoder": 6000}
BATCH = {"vae": 8, "text": 128, "flow": 32, "guide": 32, "decoder": 8}
RATES = {"vae": 2e-3, "text": 2e-3, "flow": 1e-3, "guide": 2e-4, "decoder": 1e-3}
SHIFT = 2.0  # of the scheduler


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    out = Path(args.output_dir)
    data = load_emoji(args.data)
    train, held_out = split(data, out)
    wanted = [args.only] if args.only else list(UPDATES)
    todo = [stage for stage in wanted if stage not in read_done(out)]
    if "vae" in todo:
        train_vae(train, held_out, out, args)
    if "text" in todo:
        train_text(train, data, held_out, out, args)
    if {"flow", "guide"} & {*todo}:
        world = make_world(train, out)
        if "flow" in todo:
            train_flow(world, out, args)
        if "guide" in todo and "flow" in read_done(out):
            train_guide(world, out, args)
    if "decoder" in todo:
        train_decoder(train, held_out, out, args)
    print(json.dumps(read_done(out), indent=1))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    file = os.environ.get("EMOJI_DATA")
    parser.add_argument(
        "--data", default=file, required=not file, help="the parquet file (default: $EMOJI_DATA)"
    )
    parser.add_argument("--output_dir", default="runs/emoji", help="folder of the states and of the pipeline")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--minutes", type=float, default=10, help="between checkpoints")
    parser.add_argument(
        "--every", type=int, default=0, help="updates between checkpoints, in place of minutes"
    )
    parser.add_argument(
        "--stop", type=int, default=0, help="stop a stage after so many updates, as if killed"
    )
    parser.add_argument("--only", choices=list(UPDATES), help="one stage, and no other")
    parser.add_argument(
        "--vae_from", metavar="FOLDER", help="a pipeline: the stage `vae` starts from its VAE"
    )
    parser.add_argument("--fp32", action="store_true", help="no bf16 anywhere")
    parser.add_argument("--tiny", action="store_true", help="a transformer and a VAE for tests")
    for stage, updates in UPDATES.items():
        parser.add_argument(
            f"--{stage}", type=int, default=updates, help=f"updates of {stage} (default {updates})"
        )
    for stage, rows in BATCH.items():
        parser.add_argument(
            f"--{stage}_batch", type=int, default=rows, help=f"rows of {stage} (default {rows})"
        )
    return parser.parse_args(argv)


def settings_of(stage: str, args: argparse.Namespace, **more: Any) -> Settings:
    common = {"minutes": args.minutes, "every": args.every, "stop": args.stop}
    return Settings(getattr(args, stage), RATES[stage], **common, **more)


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def state_path(out: Path, stage: str) -> Path:
    return out / "training" / f"{stage}.safetensors"


def read_done(out: Path) -> dict[str, Any]:
    """The stages that are over, with what was measured after each."""
    path = out / "stages.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def note_done(out: Path, stage: str, **found: Any) -> None:
    found = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    text = json.dumps({**read_done(out), stage: found}, indent=1) + "\n"
    atomic_write(out / "stages.json", lambda new: new.write_text(text, encoding="utf-8"))
    forget(state_path(out, stage))
    print(stage, found, flush=True)


def save_half(part: nn.Module, folder: Path) -> None:
    """A model's folder, in float16; the one in memory stays as it is."""
    copy.deepcopy(part).half().save_pretrained(folder)


def train_vae(train: Emojis, held_out: Emojis, out: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = device_of()
    vae = build_vae((8, 16, 16) if args.tiny else (32, 64, 64))
    if args.vae_from:
        vae.load_state_dict(load_vae(Path(args.vae_from)).state_dict())
    vae.to(device, memory_format=torch.channels_last)
    latent = (args.vae_batch, vae.config.latent_channels, 16, 16)

    def loss(update: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(update)
        pick = torch.randint(len(train.pixels), (args.vae_batch,), generator=generator)
        noise = torch.randn(latent, generator=generator).to(device)
        with half_precision(device, not args.fp32):
            return vae_loss(vae, to_floats(train.pixels[pick].to(device)), noise)

    settings = settings_of("vae", args, ema=0.99, decay=0.5)
    seconds = fit(vae, loss, state_path(out, "vae"), settings)
    if args.stop:
        return
    scale_latents(vae, encode(vae, train.pixels))
    save_half(vae, out / "vae")
    note_done(out, "vae", updates=args.vae, seconds=round(seconds), psnr_held_out=psnr(vae, held_out.pixels))


def train_decoder(train: Emojis, held_out: Emojis, out: Path, args: argparse.Namespace) -> None:
    """The VAE's decoder alone, from where `vae` left it: its latents stay what they are."""
    device = device_of()
    vae = load_vae(out)
    vae.encoder.requires_grad_(False)

    def loss(update: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(update)
        pick = torch.randint(len(train.pixels), (args.decoder_batch,), generator=generator)
        with half_precision(device, not args.fp32):
            return decoder_loss(vae, to_floats(train.pixels[pick].to(device)), generator)

    settings = settings_of("decoder", args, ema=0.995, decay=0.7)
    seconds = fit(vae, loss, state_path(out, "decoder"), settings)
    if not args.stop:
        save_half(vae, out / "vae")
        found = {"psnr_held_out": psnr(vae, held_out.pixels)}
        note_done(out, "decoder", updates=args.decoder, seconds=round(seconds), **found)


def load_vae(out: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(out / "vae").float()
    return vae.to(device_of(), memory_format=torch.channels_last)


def train_text(train: Emojis, data: Emojis, held_out: Emojis, out: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(1)
    text = build_text(all_words(data.rows))
    model = DualEncoder(text).to(device_of())
    weights = draw_weights(train.rows)

    def loss(update: int) -> torch.Tensor:
        generator, draw = torch.Generator().manual_seed(update), random.Random(update)
        return contrastive_loss(model, *text_batch(train, weights, args.text_batch, generator, draw))

    seconds = fit(model, loss, state_path(out, "text"), settings_of("text", args, ema=0.99, decay=0.5))
    if args.stop:
        return
    tie_capitals(text.t5, text.tokenizer_2)
    held = {row.name for row in held_out.rows}
    queries = [i for i, row in enumerate(data.rows) if row.name in held]
    seen = random.Random(0).sample(range(len(train.rows)), min(500, len(train.rows)))
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    for name, part in zip(names, text, strict=True):
        part.save_pretrained(out / name)
    found = {"train": retrieval(model, train, seen), "held_out": retrieval(model, data, queries)}
    found = {k: {name: round(v, 3) for name, v in part.items()} for k, part in found.items()}
    note_done(out, "text", updates=args.text, seconds=round(seconds), retrieval=found)


def load_text(out: Path) -> Text:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    classes = {
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "text_encoder_2": T5EncoderModel,
        "tokenizer_2": T5TokenizerFast,
    }
    with no_loading_bars():
        text = Text(*(c.from_pretrained(out / name) for name, c in classes.items()))
    for part in (text.clip, text.t5):
        part.to(device_of()).requires_grad_(False)
    return text


def make_world(train: Emojis, out: Path) -> World:
    """The latents of the training images, and the text encoders, from what the first stages saved."""
    vae = load_vae(out)
    latents = (encode(vae, train.pixels) - vae.config.shift_factor) * vae.config.scaling_factor
    packed = pack(latents)
    ids = positions(int(packed.shape[1] ** 0.5)).to(device_of())
    return World(packed, train.rows, draw_weights(train.rows), load_text(out), ids)


def new_transformer(world: World, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(2)
    size = {"width": 32, "heads": 2, "double": 1, "single": 1} if args.tiny else {}
    transformer = build_transformer(world.latents.shape[-1], **size).to(device_of())
    if device_of().type == "cpu":
        transformer.set_attn_processor(PlainAttention())
    return transformer


def train_flow(world: World, out: Path, args: argparse.Namespace) -> None:
    transformer = new_transformer(world, args)
    weights = out / "transformer" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        save_half(transformer, out / "transformer")
        save_rest(out, transformer, world.text)
    plain = flow_loss(transformer, world, args.flow_batch)

    def loss(update: int) -> torch.Tensor:
        with half_precision(device_of(), not args.fp32):
            return plain(update)

    path = state_path(out, "flow")
    seconds = fit(transformer, loss, path, settings_of("flow", args, ema=0.9995), average_path=weights)
    if not args.stop:
        last = read_report(path)["loss"]
        note_done(out, "flow", updates=args.flow, rows=args.flow_batch, seconds=round(seconds), loss=last)


def train_guide(world: World, out: Path, args: argparse.Namespace) -> None:
    """From the average of `flow`, which stays as it is in the folder `transformer` until this is over."""
    transformer = new_transformer(world, args)
    saved = type(transformer).from_pretrained(out / "transformer").float()
    transformer.load_state_dict(saved.state_dict())
    teacher = copy.deepcopy(transformer).requires_grad_(False)
    plain = guide_loss(transformer, teacher, world, args.guide_batch)

    def loss(update: int) -> torch.Tensor:
        with half_precision(device_of(), not args.fp32):
            return plain(update)

    # three sets of weights lie in the folder: Adam's moments would be too much beside them
    settings = settings_of("guide", args, ema=0.99, decay=0.5, moments=False)
    path = state_path(out, "guide")
    seconds = fit(transformer, loss, path, settings)
    if not args.stop:
        last = read_report(path)["loss"]
        save_half(transformer, out / "transformer")
        note_done(out, "guide", updates=args.guide, rows=args.guide_batch, seconds=round(seconds), loss=last)


def save_rest(out: Path, transformer: nn.Module, text: Text) -> None:
    """What makes a FluxPipeline of the folder's parts: its index, and the scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)
    scheduler.save_pretrained(out / "scheduler")
    pipe = FluxPipeline(
        scheduler=scheduler,
        vae=build_vae((8, 8, 8)),
        text_encoder=text.clip,
        tokenizer=text.tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.tokenizer_2,
        transformer=transformer,
    )
    pipe.save_config(out)


if __name__ == "__main__":
    raise SystemExit(main())
