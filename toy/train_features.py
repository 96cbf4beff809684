"""Trains the feature network of `toy/features.py`: python -m toy.train_features FOLDER --work runs/features

FOLDER holds CIFAR-10 as parquet files (default: the environment variable SCFM_CIFAR10). SGD with Nesterov
momentum, label
smoothing, flips and crops, in bfloat16, in two cycles of the learning rate: the first with a cut-out
square, the second without and half as fast. It stops and goes on anywhere: every epoch leaves a checkpoint
in --work, and the same command continues.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from scfm.data.labelled_images import load_labelled_images
from scfm.streams import keyed_generator
from toy.features import WEIGHTS, Features, look

BATCH, PEAK, WARM, WEIGHT_DECAY, SMOOTHING, PAD, HOLE = 256, 0.2, 0.2, 5e-4, 0.1, 4, 8


def augment(pixels, generator, hole=HOLE):
    """Each image flipped or not, moved by up to 4 pixels, with a grey square of `hole`: (B, 3, H, W) uint8 ->
    float in [-1, 1]."""
    x, place = F.pad(pixels.float() / 127.5 - 1, [PAD] * 4, mode="reflect"), torch.arange(pixels.shape[-1])

    def draw(n):
        return torch.randint(n, (len(x),), generator=generator)

    flip = draw(2).bool()
    x[flip] = x[flip].flip(-1)
    top, left = (draw(2 * PAD + 1)[:, None] + place for _ in range(2))  # (B, H), (B, W)
    x = x[torch.arange(len(x))[:, None, None], :, top[:, :, None], left[:, None]].permute(0, 3, 1, 2)
    if hole:
        cut = [(place - draw(len(place))[:, None]).abs() <= hole // 2 for _ in range(2)]  # (B, H), (B, W)
        x = x.masked_fill((cut[0][:, :, None] & cut[1][:, None])[:, None], 0.0)
    return x


def rate(epoch, epochs):
    """The learning rate at a time in epochs: in each cycle straight up over its first fifth, straight down to
    zero after it."""
    first = epoch < epochs[0]
    done = epoch / epochs[0] if first else (epoch - epochs[0]) / epochs[1]
    return (PEAK if first else PEAK / 2) * min(done / WARM, (1 - done) / (1 - WARM))


def epoch_of(network, optimizer, data, epoch, epochs, seed):
    """One pass over the training images; returns the mean loss. epochs: of the two cycles."""
    order = torch.randperm(len(data.labels), generator=keyed_generator(seed, epoch, 1)).split(BATCH)
    network.train()
    total = 0.0
    for i, rows in enumerate(tqdm(order, desc=f"epoch {epoch + 1} of {sum(epochs)}", mininterval=10)):
        update = epoch * len(order) + i
        optimizer.param_groups[0]["lr"] = rate(epoch + i / len(order), epochs)
        x = augment(
            data.pixels[rows], keyed_generator(seed, update, 2), HOLE * (epoch < epochs[0])
        ).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), data.labels[rows], label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item() / len(order)
    return total


def accuracy(network, data):
    """Share of the images whose class is seen, in float32."""
    network.eval()
    return (look(network, data.pixels).logits.argmax(1) == data.labels).float().mean().item()


def save(network, path, recipe):
    """The weights in float16 with the recipe in the header, through a temporary name."""
    tensors = {
        k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in network.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"recipe": json.dumps(recipe)})
    part.replace(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "folder", nargs="?", default=os.environ.get("SCFM_CIFAR10"), help="parquet files of CIFAR-10"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/features"), help="folder of the checkpoint")
    parser.add_argument("--output_dir", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--epochs", type=int, nargs=2, default=(16, 10), help="of the first and of the second cycle"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--copy", default="", help="what is special about this copy of the images; goes into the header"
    )
    args = parser.parse_args(argv)
    if not args.folder:
        parser.error("name the folder of the parquet files, or set SCFM_CIFAR10")
    train, test = (load_labelled_images(args.folder, split) for split in ("train", "test"))
    torch.manual_seed(args.seed)
    network = Features().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=PEAK, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    checkpoint, first, seconds = (
        args.work / f"features-{'-'.join(map(str, args.epochs))}-{args.seed}.pt",
        0,
        0.0,
    )
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["epoch"], state["seconds"]
    for epoch in range(first, sum(args.epochs)):
        began = time.time()
        loss = epoch_of(network, optimizer, train, epoch, args.epochs, args.seed)
        seconds += time.time() - began
        print(
            f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {accuracy(network, test):.4f}, "
            f"{seconds:.0f} s",
            flush=True,
        )
        args.work.mkdir(parents=True, exist_ok=True)
        part = checkpoint.with_suffix(".part")
        torch.save(
            {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
                "seconds": seconds,
            },
            part,
        )
        part.replace(checkpoint)
    recipe = {
        "test_accuracy": round(accuracy(network, test), 4),
        "data": f"CIFAR-10, {len(train.labels)} training images",
        "copy": args.copy,
        "epochs": list(args.epochs),
        "batch": BATCH,
        "peak_lr": PEAK,
        "weight_decay": WEIGHT_DECAY,
        "label_smoothing": SMOOTHING,
        "seed": args.seed,
        "seconds": round(seconds),
    }
    save(network, args.output_dir, recipe)
    print(json.dumps(recipe))
    return 0


if __name__ == "__main__":
    sys.exit(main())
