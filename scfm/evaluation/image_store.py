"""Generated images and what they depend on, kept so that an evaluation resumes."""
import json
import math
import statistics
import time
from contextlib import contextmanager

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from scfm.data.images import read_image
from scfm.files import atomic_write
from scfm.models.sampling import start_noise


def begin(folder, told, what):
    """Writes `told` into folder/settings.json, or checks that it is what the folder was begun with. ValueError otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    path, told = folder / "settings.json", json.loads(json.dumps(told))
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(k for k in {*told, *old} if told.get(k) != old.get(k))
        if other:
            raise ValueError(f"{folder} holds {what} of another {', '.join(other)}: take another --output_dir, or delete it")
    write_json(path, told)


def write_json(path, told):
    atomic_write(path, lambda new: new.write_text(json.dumps(told, indent=1), encoding="utf-8"))


def generate_set(sampler, family, captions, folder, seed, batch=8, goal=None, done=lambda count: None):
    """Generates what is missing of a sampler's images: folder/00000.png and so on, one for each caption.

    The noise is keyed by seed and number, so any part can be made again. An image carries the mean squared distance of its
    latents to the teacher's, read from the folder `goal`; the teacher's own latents (goal None) are kept beside its images.
    """
    begin(folder, sampler.settings, "images")
    missing = [i for i in range(len(captions)) if not (folder / f"{i:05d}.png").is_file()]
    for chunk in (missing[k:k + batch] for k in range(0, len(missing), batch)):
        latents, images = make(sampler, family, captions, chunk, seed)
        for k, i in enumerate(chunk):
            told, path = {}, folder / f"{i:05d}.png"
            if latents is not None and goal is None:
                kept = {"latents": latents[k].float().cpu().contiguous()}
                atomic_write(path.with_suffix(".safetensors"), lambda new: save_file(kept, str(new)))
            elif latents is not None:
                theirs = load_file(goal / f"{i:05d}.safetensors")["latents"]
                told = {"distance": repr((latents[k].float().cpu() - theirs).double().square().mean().item())}
            save_image(images[k], path, told)
        done(len(chunk))
    return folder


@torch.no_grad()
def make(sampler, family, captions, numbers, seed):
    """(latents (n, ...) or None, images (n, 3, H, W) in [-1, 1]) of the captions of these numbers."""
    texts = [captions[i] for i in numbers]
    if sampler.latents is None:
        return None, sampler.images(texts, numbers)
    latents = sampler.latents(texts, start_noise(family, numbers, seed))
    return latents, family.decode(latents)


def save_image(image, path, told):
    """A PNG file, whole or not at all, with a dict of words in it."""
    words = PngImagePlugin.PngInfo()
    for key, value in told.items():
        words.add_text(key, value)
    pixels = to_pil_image((image.float().cpu() + 1) / 2)
    atomic_write(path, lambda new: pixels.save(new, format="png", pnginfo=words))


def batches(paths, captions=None, size=None, batch=32):
    """(images (b, 3, H, W) uint8, captions or None) of image files; size (H, W): scaled to cover it and cut."""
    for k in range(0, len(paths), batch):
        if size:
            images = torch.stack([((read_image(p, *size) + 1) * 127.5).round().byte() for p in paths[k:k + batch]])
        else:
            images = torch.stack([pil_to_tensor(Image.open(p).convert("RGB")) for p in paths[k:k + batch]])
        yield images, captions[k:k + batch] if captions else None


def distance_in(folder, count):
    """Root mean square, over all images, of the distances that the images carry; None where they carry none."""
    told = [Image.open(folder / f"{i:05d}.png").text.get("distance") for i in range(count)]
    return None if None in told else math.sqrt(statistics.fmean(map(float, told)))


def latency(sampler, family, captions, seed, repeats, device):
    """What one image costs, prompt to pixels at batch 1: dict of seconds (median after a warm-up), seconds inside the network,
    evaluations of the network, and the device."""
    seconds, inside = [], []
    with watched(sampler.network, device) as seen:
        for k in range(repeats + 1):
            seen.update(evaluations=0, seconds=0.)
            began = now(device)
            make(sampler, family, captions, [k % len(captions)], seed)
            seconds.append(now(device) - began)
            inside.append(seen["seconds"])
    return {"seconds": round(statistics.median(seconds[1:]), 5), "network_seconds": round(statistics.median(inside[1:]), 5),
            "evaluations": seen["evaluations"], "repeats": repeats, "device": name_of(device)}


@contextmanager
def watched(network, device):
    """Counts the rows that the network is asked about, and the seconds it takes; guided by a second row, an image counts 2."""
    seen = {"evaluations": 0, "seconds": 0., "began": 0.}

    def before(module, args, kwargs):
        seen["began"] = now(device)

    def after(module, args, kwargs, out):
        seen["seconds"] += now(device) - seen["began"]
        seen["evaluations"] += len(out[0])
    hooks = [network.register_forward_pre_hook(before, with_kwargs=True), network.register_forward_hook(after, with_kwargs=True)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def now(device):
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def name_of(device):
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'s' * (count > 1)}"


def known_latency(sampler, family, captions, folder, seed, repeats, device):
    """The latency noted in the folder if it was taken on this device in as many repeats, else a fresh one."""
    path = folder / "latency.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (told.get("device"), told.get("repeats")) != (name_of(device), repeats):
        told = latency(sampler, family, captions, seed, repeats, device)
        write_json(path, told)
    return told
