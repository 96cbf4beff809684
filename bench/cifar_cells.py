"""The cells of bench/cifar.py: one training or one measurement each, kept as files, so that a killed bench goes on where it was."""
import json
import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from scfm.dial import choose, endpoint_curve
from scfm.distill import FullSpeakers
from scfm.ema import shorten
from scfm.flow import EVALUATIONS, sample, time_grid
from scfm.metrics import frechet_distance
from scfm.pictures import load_pictures
from scfm.pretrain import SHORTCUT, PretrainConfig, pretrain
from scfm.unet import generate, header_of, load_flow
from toy.features import load_features, look

NFE = (1, 2, 4, 8, 16, 32, 64)
METHODS = {"plain": {"flow_share": 1.}, "scfm 1/8": {"flow_share": .875}, "scfm 1/4": {"flow_share": .75},
           "scfm 1/2": {"flow_share": .5}, "shortcut": SHORTCUT}
DISTILLED = "plain, distilled"
KEPT = .8                                                   # of the budget goes to the teacher of `DISTILLED`, the rest to distilling
SCALES = (0., .25, .5, .75, 1., 1.25, 1.5, 2.)              # of its dial
RECIPES = {"tiny": {"batch": 8, "lr": 1e-3, "warmup": 2, "slow_decay": .9},
           "nano": {"batch": 32, "lr": 6e-4, "warmup": 400, "slow_decay": .998, "precision": "bf16", "checkpoint_every": 250},
           "small": {"batch": 64, "lr": 6e-4, "warmup": 300, "slow_decay": .999, "precision": "bf16", "checkpoint_every": 100},
           "full": {"batch": 256, "lr": 2e-4, "warmup": 1000, "slow_decay": .999, "precision": "bf16", "checkpoint_every": 500}}


class Plan(NamedTuple):
    """What the cells of one bench share. budget: network evaluations of a training; count: pictures of a measurement."""
    data: str
    cells: Path
    size: str = "nano"
    budget: int = 800_000
    count: int = 2000
    previews: int = 2000
    inception: str = ""


def safe(name):
    """A name as part of a file's name."""
    return name.replace(", ", "-").replace(" ", "-").replace("/", "_")


def folder_of(plan, name, seed):
    return plan.cells / f"{safe(name)}-{seed}"


def updates_for(budget, recipe, told):
    """Updates that cost `budget` network evaluations: a row costs 3, one that is asked by jumps 5. ValueError when it buys none."""
    updates = math.floor(budget / recipe["batch"] / (3 + 2 * (1 - told["flow_share"])))
    if updates < 1:
        raise ValueError(f"{budget:g} network evaluations buy no update at batch {recipe['batch']}: give more")
    return updates


# Training


def train(plan, name, seed, pictures, share=1., keep_going=lambda: True):
    """Trains up to a share of the budget; returns the file of the result, or None when keep_going said no."""
    recipe, told = RECIPES[plan.size], METHODS[name]
    out = folder_of(plan, name, seed)
    config = PretrainConfig(data=plan.data, out=str(out), size=plan.size, seed=seed, updates=updates_for(plan.budget * share, recipe, told),
                            preview_every=plan.previews, **{**recipe, **told})
    if done(out) >= config.updates:
        return out / "flow.safetensors"
    return pretrain(config, keep_going, pictures=pictures) and out / "flow.safetensors"


def done(out):
    """Updates of the result in a folder; 0 without one."""
    path = out / "flow.safetensors"
    return json.loads(header_of(path)["notes"])["updates"] if path.is_file() else 0


def train_all(plan, name, seed, pictures, keep_going=lambda: True):
    """One method to the end of its budget; plain flow matching leaves a copy at `KEPT` of it, and that is distilled."""
    if name != DISTILLED:
        kept = folder_of(plan, "plain", seed) / "kept.safetensors"
        if name == "plain" and not kept.is_file():
            flow = train(plan, name, seed, pictures, KEPT, keep_going)
            if flow is None:
                return None
            shutil.copy(flow, kept)
        return train(plan, name, seed, pictures, keep_going=keep_going)
    kept, out = folder_of(plan, "plain", seed) / "kept.safetensors", folder_of(plan, name, seed)
    recipe, told = RECIPES[plan.size], {"flow_share": 0., "teacher_share": .4, "algorithm": "dual"}
    updates = updates_for(plan.budget * (1 - KEPT), recipe, told)
    config = PretrainConfig(**{**recipe, **told, "data": plan.data, "out": str(out), "size": plan.size, "seed": seed, "updates": updates,
                               "teacher": str(kept), "lr": recipe["lr"] / 4, "warmup": min(50, updates // 4), "preview_every": 0,
                               "fast_decay": shorten(.99, updates), "slow_decay": shorten(.999, updates)})
    if done(out) < updates and pretrain(config, keep_going, pictures=pictures) is None:
        return None
    return out / "flow.safetensors"


# Measuring


class Painter:
    """The same noises and labels for every sampler."""

    def __init__(self, plan, seed=1):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.labels = torch.arange(plan.count) % 10
        self.noise = torch.randn(plan.count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    def pixels(self, paint, steps, solver):
        """(pixels (count, 3, 32, 32) uint8, seconds). paint(labels, noise, steps, solver) -> pictures in [-1, 1]."""
        began = time.time()
        pictures = paint(self.labels.to(self.device), self.noise.to(self.device), steps, solver).cpu()
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte(), time.time() - began

class Judge:
    """The same references for every set of pictures. The features are those of `toy.features`."""

    def __init__(self, plan, seed=1):
        self.plan, self.device, g = plan, "cuda" if torch.cuda.is_available() else "cpu", torch.Generator().manual_seed(seed)
        self.labels = torch.arange(plan.count) % 10
        self.eyes = {"frechet": self.own_eye(), **({"FID": self.inception_eye()} if plan.inception else {})}
        train, test = load_pictures(plan.data), load_pictures(plan.data, "test")
        order = torch.randperm(len(train.pixels), generator=g)
        half = min(10_000, len(order) // 2)
        self.reference = {"train": self.seen("train", train.pixels[order[:half]]), "test": self.seen("test", test.pixels)}
        self.fresh = self.see(train.pixels[order[half:half + plan.count]])                # real pictures outside the reference

    def own_eye(self):
        network = load_features().to(self.device)
        return lambda pictures: look(network, pictures)

    def inception_eye(self):
        from scfm.eyes import inception
        eye = inception(self.plan.inception, self.device)
        return lambda pictures: eye.look((chunk, None) for chunk in pictures.split(100))

    def see(self, pixels):
        """{eye: features (N, D)} of pictures (N, 3, 32, 32) uint8, and what the classifier takes them for, "logits"."""
        seen = {name: eye(pixels) for name, eye in self.eyes.items()}
        return {**{name: s[0].float() for name, s in seen.items()}, "logits": seen["frechet"][1]}

    def seen(self, name, pixels):
        """The same, kept as a file."""
        path = self.plan.cells / f"reference-{name}-{len(pixels)}-{'-'.join(self.eyes)}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.see(pixels), f"{path}.part")
            Path(f"{path}.part").replace(path)
        return load_file(path)

    def scores(self, seen, labels=None):
        """Distances of every eye to both references, precision and recall, what the classifier says about labels and balance."""
        row = {f"{eye}_{name}": round(frechet_distance(seen[eye], ref[eye]), 4) for eye in self.eyes for name, ref in self.reference.items()}
        near, far = precision_recall(self.reference["test"]["frechet"][:len(seen["frechet"])], seen["frechet"])
        counts = seen["logits"].argmax(1).bincount(minlength=10).double() / len(seen["logits"])
        row |= {"precision": round(near, 4), "recall": round(far, 4), "balance": round(torch.special.entr(counts).sum().exp().item(), 3)}
        if labels is not None:
            row["label_accuracy"] = round((seen["logits"].argmax(1) == labels).float().mean().item(), 4)
        return row


def precision_recall(real, made, k=3):
    """Share of `made` (m, D) within the k-nearest-neighbour balls of `real` (n, D), and the reverse. arXiv 1904.06991."""
    within = lambda points, centres: (torch.cdist(points, centres) <= torch.cdist(centres, centres).kthvalue(k + 1, 1).values).any(1)
    return within(made, real).float().mean().item(), within(real, made).float().mean().item()


def sampler(network):
    """paint(labels, noise, steps, solver) of a network."""
    network.bf16 = network.told["size"] != "tiny"
    return lambda labels, noise, steps, solver: generate(network, labels, noise, steps, solver)


def dialled(plan, seed, device, noises=32, goal_steps=64):
    """paint(...) of the distilled network at the scale of its dial, and the `Dial`, chosen on noises of its own."""
    speakers = FullSpeakers(load_flow(folder_of(plan, "plain", seed) / "kept.safetensors").to(device))
    speakers.networks["student"].load_state_dict(load_flow(folder_of(plan, DISTILLED, seed) / "flow.safetensors").state_dict())
    for network in speakers.networks.values():
        network.eval().bf16 = plan.size != "tiny"
    g = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(noises, 3, 32, 32, generator=g).to(device)
    labels = (torch.arange(noises) % 10).to(device)
    walk = lambda field, n: sample(field, noise, time_grid(n), labels)
    curve = endpoint_curve(lambda n, a: walk(speakers.field("student", a), n), walk(speakers.field("teacher"), goal_steps), NFE[:-1], SCALES)
    dial = choose(curve)

    def paint(labels, noise, steps, solver):
        field = speakers.field("student", dial.scale(steps))
        return torch.cat([sample(field, z, time_grid(steps), y, solver) for z, y in zip(noise.split(500), labels.split(500))])
    return paint, dial


def paint_all(plan, name, paint, painter, solvers=("euler",), nfe=NFE):
    """The pictures of one sampler for every solver and NFE, each set kept as a file; returns {(solver, nfe): file}."""
    files, folder = {}, plan.cells / "painted"
    folder.mkdir(parents=True, exist_ok=True)
    for solver, n in ((solver, n) for solver in solvers for n in nfe if n % EVALUATIONS[solver] == 0):
        path = files[solver, n] = folder / f"{safe(name)}-{plan.count}-{solver}-{n}.safetensors"
        if not path.is_file():
            pixels, seconds = painter.pixels(paint, n // EVALUATIONS[solver], solver)
            save_file({"pixels": pixels}, f"{path}.part", metadata={"seconds": f"{seconds:.1f}"})
            Path(f"{path}.part").replace(path)
            print(f"painted {name}, {solver}, NFE {n}: {seconds:.1f} s", flush=True)
    return files


def score_all(plan, files, judge, about=None):
    """One row of the record for each painted set; each is kept as a file."""
    for (solver, n), path in files.items():
        row = plan.cells / "measured" / f"{path.stem}-{'-'.join(judge.eyes)}.json"
        if not row.is_file():
            row.parent.mkdir(parents=True, exist_ok=True)
            told = {"solver": solver, "nfe": n, **judge.scores(judge.see(load_file(path)["pixels"]), judge.labels),
                    "seconds": float(header_of(path)["seconds"]), **(about or {})}
            row.with_suffix(".part").write_text(json.dumps(told))
            row.with_suffix(".part").replace(row)
            print(path.stem, told, flush=True)


def floor(plan, judge):
    """What as many real training pictures score that are in neither reference; kept as a file."""
    path = plan.cells / "measured" / f"floor-{plan.count}-{'-'.join(judge.eyes)}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(judge.scores(judge.fresh)))
        path.with_suffix(".part").replace(path)
    return json.loads(path.read_text())
