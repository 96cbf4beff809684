"""Two rulers for the same images of CIFAR-10, and whether they agree:

    python -m experiments.studies.cifar_rulers FOLDER --flow "step_scaled 1/4"=FILE

The study `cifar` judges by a small ResNet that was trained here; this one puts beside it features that
somebody else trained on ImageNet (EfficientNet-Lite0, extra `judges`). Images of the flows that the
repository carries, and of those named by --flow, from the same noises and labels; against real images of the
test set, with as many real training images as the floor. Of each ruler: the kernel distance with its standard
error, the Frechet distance (neither is FID), precision, recall, density and coverage; and the rank
correlation of the two over all samplers and step counts. Images and features are files under --cells. Writes
experiments/results/cifar_rulers.json and cifar_rulers.png.

    --count 12 --nfe 1 2 --cells /tmp/c --out /tmp/rulers      seconds; the numbers mean nothing
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from experiments.figures import RIVAL, canvas, labelled_handles, level_axis, save
from experiments.figures import look as look_of
from experiments.runner import RESULTS, write_json
from experiments.testbeds.cifar import NFE, safe
from experiments.testbeds.cifar_judge import Samples
from scfm.data.fingerprint import file_fingerprint
from scfm.data.labelled_images import load_labelled_images
from scfm.evaluation.feature_distances import FeatureSet, compare_sets, frechet
from scfm.evaluation.imagenet_features import ImageNetMetric, features_of
from scfm.files import atomic_write
from scfm.models.unet import generate, header_of, load_flow
from toy.features import load_features, look
from toy.pipelines import WEIGHTS

CARRIED = {"plain": "plain", "scfm 1/4": "scfm", "shortcut": "shortcut"}  # name -> file
OWN, OUTSIDE = "ResNet trained here", "EfficientNet-Lite0"
See = Callable[[torch.Tensor], torch.Tensor]  # pixels (n, 3, 32, 32) uint8 -> features (n, D)


def make_rulers() -> dict[str, See]:
    """MetricUnavailable where the outside weights are not installed."""
    own, outside = load_features(), ImageNetMetric()

    def see_outside(pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([features_of(outside.network, chunk) for chunk in pixels.split(50)])

    return {OWN: lambda pixels: look(own, pixels).features.float(), OUTSIDE: torch.no_grad()(see_outside)}


def stored_features(path: Path, see: See, pixels: Callable[[], torch.Tensor]) -> FeatureSet:
    """Of a file beside the images, or made now."""
    if not path.is_file():
        atomic_write(path, partial(save_file, {"features": see(pixels()).contiguous()}))
    return FeatureSet(load_file(path)["features"])


def measure(
    flows: dict[str, Path], data: str, cells: Path, count: int, nfe: Sequence[int]
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{ruler: {sampler: {evaluations: numbers}}}, with the floor as a sampler of 0 evaluations."""
    samples, rulers = Samples(cells, count, "cpu"), make_rulers()
    real, train = load_labelled_images(data, "test").pixels[: 2 * count], load_labelled_images(data).pixels
    fresh = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(2))[:count]]
    found: dict[str, Any] = {ruler: {"real training images": {}} for ruler in rulers}
    folder = cells / "features"
    references = {}
    for ruler, see in rulers.items():
        of_real, of_fresh = (
            folder / f"{part}-{count}-{safe(ruler)}.safetensors" for part in ("test", "train")
        )
        references[ruler] = stored_features(of_real, see, lambda: real)
        floor = stored_features(of_fresh, see, lambda: fresh)
        found[ruler]["real training images"]["0"] = numbers(floor, references[ruler])
    places = [(name, path, n) for name, path in flows.items() for n in nfe]
    for name, path, n in tqdm(places, desc="samplers"):
        stem = f"{safe(name)}-{file_fingerprint(path).hex()[:8]}"
        images = samples.generate(stem, sampler_of(path), n, "euler")
        for ruler, see in rulers.items():
            place = folder / f"{images.stem}-{safe(ruler)}.safetensors"
            seen = stored_features(place, see, lambda images=images: load_file(images)["pixels"])
            found[ruler].setdefault(name, {})[str(n)] = numbers(seen, references[ruler])
    return found


def sampler_of(path: Path) -> Callable[..., torch.Tensor]:
    """At the scale of the number of steps where one was trained in."""

    def sampler(labels: torch.Tensor, noise: torch.Tensor, steps: int, solver: str) -> torch.Tensor:
        return generate(load_flow(path, steps).eval(), labels, noise, steps, solver)

    return sampler


def numbers(seen: FeatureSet, reference: FeatureSet) -> dict[str, float]:
    """Rounded for the record."""
    marks = {"frechet": frechet(seen.points, reference.points), **(compare_sets(seen, reference) or {})}
    return {name: round(value, 5) for name, value in marks.items() if value is not None}


def agreement(found: dict[str, Any], mark: str) -> float:
    """Spearman's rank correlation of the two rulers over all samplers and step counts."""
    by_ruler = [
        torch.tensor(
            [at[mark] for name, of in found[ruler].items() if name in found[OWN] for at in of.values()]
        )
        for ruler in (OWN, OUTSIDE)
    ]
    ranks = [values.argsort().argsort().double() for values in by_ruler]
    return round(torch.corrcoef(torch.stack(ranks))[0, 1].item(), 4)


def style_of(name: str) -> dict[str, Any]:
    """The look of a flow; one that was named on the command line may have none of its own."""
    try:
        return look_of(name)
    except ValueError:
        return RIVAL


def plot(found: dict[str, Any], path: str | Path) -> None:
    """A panel for each ruler: the kernel distance against network evaluations."""
    figure, axes = canvas(1, 2, (11, 4.4))
    for ax, (ruler, samplers) in zip(axes[0], found.items(), strict=True):
        floor = 1000 * samplers["real training images"]["0"]["kid"]
        curves = {name: of for name, of in samplers.items() if name != "real training images"}
        for name, of in curves.items():
            values, errors = ([1000 * at[key] for at in of.values()] for key in ("kid", "kid_error"))
            ax.errorbar([int(n) for n in of], values, errors, **style_of(name), ms=4, lw=1.5, label=name)
        ax.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="kernel distance x 1000")
        ticks = [int(n) for n in next(iter(curves.values()))]
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        level_axis(ax, (10, 20, 50, 100, 200, 400))
        ax.set_title(f"{ruler} (real training images: {floor:.1f})", fontsize=10)
    lines = labelled_handles(axes.flat)
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncol=6, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(figure, path)


def text(record: dict[str, Any]) -> str:
    """A line for each sampler and ruler."""
    lines = []
    for ruler, samplers in record["rulers"].items():
        lines += ["", f"kernel distance x 1000, {ruler}"]
        for name, of in samplers.items():
            cells = (f"{n}: {1000 * at['kid']:.1f} +- {1000 * at['kid_error']:.1f}" for n, at in of.items())
            lines.append(f"{name:24}" + "   ".join(cells))
    return "\n".join([*lines, "", f"rank correlation of the two: {record['agreement']}"])


def named_flow(words: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, _, path = words.partition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{words}: no file {path!r}; give NAME=FILE")
    return name, Path(path)


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "data", nargs="?", default=os.environ.get("SCFM_CIFAR10"), help="folder of parquet files"
    )
    parser.add_argument("--flow", type=named_flow, nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--count", type=int, default=1000, help="images of each sampler (default 1000)")
    parser.add_argument("--nfe", type=int, nargs="+", default=list(NFE))
    parser.add_argument("--cells", type=Path, default=Path("runs/cifar/cells"))
    parser.add_argument("--out", type=Path, default=RESULTS / "cifar_rulers", help="path without suffix")
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("where is CIFAR-10? give the folder of its parquet files, or set SCFM_CIFAR10")
    flows = {name: WEIGHTS / "cifar" / f"{file}.safetensors" for name, file in CARRIED.items()}
    flows |= dict(args.flow)
    found = measure(flows, args.data, args.cells, args.count, args.nfe)
    record = {
        "about": "CIFAR-10; kernel and Frechet distances to twice as many test images; not FID",
        "images": args.count,
        "flows": {name: json.loads(header_of(path).get("notes", "{}")) for name, path in flows.items()},
        "rulers": found,
        "agreement": {mark: agreement(found, mark) for mark in ("kid", "frechet")},
    }
    write_json(json.dumps(record, indent=1), args.out.with_suffix(".json"))
    plot(found, args.out.with_suffix(".png"))
    print(text(record))


if __name__ == "__main__":
    main()
