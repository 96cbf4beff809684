"""The measurements of bench/cifar.py: one cell each, kept as files, so that a killed bench goes on where it was."""
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cifar_training import DISTILLED, LORA, NFE, folder_of, safe
from scfm.method.lora_scale import choose_lora_scales, endpoint_curve
from scfm.method.distill import CopiedModels
from scfm.method.flow import EVALUATIONS, sample, time_grid
from scfm.method.metrics import frechet_distance
from scfm.data.labelled_images import load_labelled_images
from scfm.inference.step_lora import StepLora, InferenceConfig, search_lora_scales
from scfm.models.unet import generate, header_of, load_flow
from toy.features import load_features, look, mark

SCALES = (0., .25, .5, .75, 1., 1.25, 1.5, 2.)              # of its dial


class Painter:
    """The same noises and labels for every sampler."""

    def __init__(self, plan, seed=1):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.labels = torch.arange(plan.count) % 10
        self.noise = torch.randn(plan.count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    def pixels(self, generate, steps, solver):
        """(pixels (count, 3, 32, 32) uint8, seconds). generate(labels, noise, steps, solver) -> images in [-1, 1]."""
        began = time.time()
        images = generate(self.labels.to(self.device), self.noise.to(self.device), steps, solver).cpu()
        return ((images.clamp(-1, 1) + 1) * 127.5).round().byte(), time.time() - began

class Judge:
    """The same references for every set of images. The features are those of `toy.features`."""

    def __init__(self, plan, seed=1):
        self.plan, self.device, g = plan, "cuda" if torch.cuda.is_available() else "cpu", torch.Generator().manual_seed(seed)
        self.labels = torch.arange(plan.count) % 10
        self.eyes = {"frechet": self.custom_metric(), **({"FID": self.inception_eye()} if plan.inception else {})}
        self.name = "-".join((*self.eyes, mark()))
        train, test = load_labelled_images(plan.data), load_labelled_images(plan.data, "test")
        order = torch.randperm(len(train.pixels), generator=g)
        half = min(10_000, len(order) // 2)
        self.reference = {"train": self.seen("train", train.pixels[order[:half]]), "test": self.seen("test", test.pixels)}
        self.fresh = self.see(train.pixels[order[half:half + plan.count]])                # real images outside the reference

    def custom_metric(self):
        network = load_features().to(self.device)
        return lambda images: look(network, images)

    def inception_eye(self):
        from scfm.evaluation.image_metrics import inception
        eye = inception(self.plan.inception, self.device)
        return lambda images: eye.look((chunk, None) for chunk in images.split(100))

    def see(self, pixels):
        """{eye: features (N, D)} of images (N, 3, 32, 32) uint8, and what the classifier takes them for, "logits"."""
        seen = {name: eye(pixels) for name, eye in self.eyes.items()}
        return {**{name: s[0].float() for name, s in seen.items()}, "logits": seen["frechet"][1]}

    def seen(self, name, pixels):
        """The same, kept as a file."""
        path = self.plan.cells / f"reference-{name}-{len(pixels)}-{self.name}.safetensors"
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
    """generate(labels, noise, steps, solver) of a network."""
    network.bf16 = network.told["size"] != "tiny"
    return lambda labels, noise, steps, solver: generate(network, labels, noise, steps, solver)


def dialled(plan, seed, device, noises=32, goal_steps=64):
    """generate(...) of the distilled network at the scale of its dial, and the `LoraScales`, chosen on noises of its own."""
    models = CopiedModels(load_flow(folder_of(plan, "plain", seed) / "kept.safetensors").to(device))
    models.networks["student"].load_state_dict(load_flow(folder_of(plan, DISTILLED, seed) / "flow.safetensors").state_dict())
    for network in models.networks.values():
        network.eval().bf16 = plan.size != "tiny"
    g = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(noises, 3, 32, 32, generator=g).to(device)
    labels = (torch.arange(noises) % 10).to(device)
    walk = lambda field, n: sample(field, noise, time_grid(n), labels)
    curve = endpoint_curve(lambda n, a: walk(models.field("student", a), n), walk(models.field("teacher"), goal_steps), NFE[:-1], SCALES)
    dial = choose_lora_scales(curve)

    def generate(labels, noise, steps, solver):
        field = models.field("student", dial.scale(steps))
        return torch.cat([sample(field, z, time_grid(steps), y, solver) for z, y in zip(noise.split(500), labels.split(500))])
    return generate, dial


def lora_painter(plan, seed, names, device, noises=32):
    """(generate(...) with a strength of 1, the same on its dial, the `LoraScales`) of the LoRA; the dial's noises are its own."""
    step = StepLora(InferenceConfig(lora=str(folder_of(plan, LORA, seed)), seed=1000 + seed), device)
    network = step.pipe.transformer
    network.bf16 = plan.size != "tiny"
    captions = [f"a {names[i % len(names)]}" for i in range(noises)]
    dial, _ = search_lora_scales(step, captions, NFE[:-1], SCALES, seed=1000 + seed, progress=False)

    def at_scale(scale_of):
        def generate(labels, noise, steps, solver):
            step.set_scale(scale_of(steps))
            return generate(network, labels, noise, steps, solver)
        return generate
    return at(lambda n: 1.), at(dial.scale), dial


def generate_all(plan, name, generate, painter, solvers=("euler",)):
    """The images of one sampler for every solver and NFE, each set kept as a file; returns {(solver, nfe): file}."""
    files, folder = {}, plan.cells / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for solver, n in ((solver, n) for solver in solvers for n in plan.nfe if n % EVALUATIONS[solver] == 0):
        path = files[solver, n] = folder / f"{safe(name)}-{plan.count}-{solver}-{n}.safetensors"
        if not path.is_file():
            pixels, seconds = painter.pixels(generate, n // EVALUATIONS[solver], solver)
            save_file({"pixels": pixels}, f"{path}.part", metadata={"seconds": f"{seconds:.1f}"})
            Path(f"{path}.part").replace(path)
            print(f"generated {name}, {solver}, NFE {n}: {seconds:.1f} s", flush=True)
    return files


def score_all(plan, files, judge, about=None):
    """One row of the record for each generated set; each is kept as a file."""
    for (solver, n), path in files.items():
        row = plan.cells / "measured" / f"{path.stem}-{judge.name}.json"
        if not row.is_file():
            row.parent.mkdir(parents=True, exist_ok=True)
            told = {"solver": solver, "nfe": n, **judge.scores(judge.see(load_file(path)["pixels"]), judge.labels),
                    "seconds": float(header_of(path)["seconds"]), **(about or {})}
            row.with_suffix(".part").write_text(json.dumps(told))
            row.with_suffix(".part").replace(row)
            print(path.stem, told, flush=True)


def floor(plan, judge):
    """What as many real training images score that are in neither reference; kept as a file."""
    path = plan.cells / "measured" / f"floor-{plan.count}-{judge.name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(judge.scores(judge.fresh)))
        path.with_suffix(".part").replace(path)
    return json.loads(path.read_text())
