"""Tables and images of bench/cifar.py from the cells that are there."""
import json
import platform
from pathlib import Path

import matplotlib
import torch
from safetensors.torch import load_file

from cifar_training import DISTILLED, KEPT, LORA, NFE, RECIPES, Plan, folder_of, safe
from scfm.models.lora import WEIGHT_NAME
from scfm.models.unet import header_of
from toy.features import mark, recipe

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NAMES = ("plain", "scfm 1/8", "scfm 1/4", "scfm 1/2", "shortcut", DISTILLED, f"{DISTILLED}, dialled", LORA, f"{LORA}, dialled")


def rows_of(plan, name, seed):
    """The measured rows of one sampler, by solver and NFE; only those that today's feature network saw."""
    rows = [(p, json.loads(p.read_text())) for p in (plan.cells / "measured").glob(f"{safe(f'{name} {seed}')}-{plan.count}-*-{mark()}.json")]
    return [r for _, r in sorted(rows, key=lambda pair: (pair[1]["solver"], pair[1]["nfe"], str(pair[0])))]


def gather(plan, seeds, copy, notes=()):
    """Everything that the cells say, as one dict of plain numbers."""
    record = {"about": f"CIFAR-10, {copy}" if copy else "CIFAR-10", "size": plan.size, "budget": plan.budget, "images": plan.count,
              "features": recipe(), "recipe": RECIPES[plan.size], "seeds": list(seeds), "kept": KEPT, "device": device(),
              "torch": torch.__version__, "notes": list(notes), "samplers": {}, "trained": {}}
    for path in sorted((plan.cells / "measured").glob(f"floor-{plan.count}-*-{mark()}.json")):
        record["floor"] = json.loads(path.read_text())
    for name in NAMES:
        for seed in seeds:
            rows = rows_of(plan, name, seed)
            if rows:
                record["samplers"].setdefault(name, {})[str(seed)] = rows
            path = folder_of(plan, name, seed) / "flow.safetensors"
            if path.is_file():
                record["trained"].setdefault(name, {})[str(seed)] = {**json.loads(header_of(path)["notes"]), "settings": settings(path)}
            if name == LORA and (path.parent / WEIGHT_NAME).is_file():
                told = settings(path, "rank")
                record["trained"].setdefault(name, {})[str(seed)] = {
                    "updates": told["updates"], "evaluations": 4 * told["updates"] * told["batch"], "settings": told}
    record["aims"] = aims(record)
    return record


def device():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, 2 cores shared with other work"


def settings(path, *more):
    """What was set for a training, without the places of things."""
    told = json.loads((path.parent / "config.json").read_text())
    return {k: told[k] for k in (*more, "updates", "method", "non_shortcut_ratio", "teacher_ratio", "algorithm", "batch", "lr", "warmup", "ema_decay_slow", "ema_decay_fast",
                                 "shift", "self_grids", "precision", "seed") if k in told}


def curve(record, name, key="frechet_test", solver="euler", seeds=None):
    """{nfe: mean over seeds, or over those named} of one sampler."""
    found = {}
    for seed, rows in record["samplers"].get(name, {}).items():
        for row in rows:
            if row["solver"] == solver and key in row and (seeds is None or seed in seeds):
                found.setdefault(row["nfe"], []).append(row[key])
    return {n: sum(v) / len(v) for n, v in sorted(found.items())}


def aims(record):
    """The two relations that were aimed at, against the plain flow of the same budget and seed: by seed, and whether all meet them."""
    told = {}
    for name in NAMES[1:]:
        ratios = {n: {} for n in (4, 64)}
        for seed in record["samplers"].get(name, {}):
            mine, plain = (curve(record, which, seeds=(seed,)) for which in (name, "plain"))
            if {4, 64} <= set(mine) & set(plain):
                for n in ratios:
                    ratios[n][seed] = round(mine[n] / plain[n], 3)
        if ratios[4]:
            told[name] = {"at 4, times plain": ratios[4], "at most half": max(ratios[4].values()) <= .5,
                          "at 64, times plain": ratios[64], "at most 1.05": max(ratios[64].values()) <= 1.05}
    return told


def table(record, key="frechet_test"):
    """One line a sampler, one column a number of evaluations."""
    real = f"; real images {record['floor'][key]:.3f}" if key in record["floor"] else ""
    lines = [f"{key}, {record['images']} images, {record['about']}{real}; in brackets the number of seeds, of which the mean is shown",
             f"{'':34}" + "".join(f"{n:>9}" for n in NFE)]
    for name in record["samplers"]:
        for solver in ("euler", "midpoint"):
            values = curve(record, name, key, solver)
            if values:
                label = f"{name}{', midpoint' * (solver == 'midpoint')} ({len(record['samplers'][name])})"
                lines.append(f"{label:34}" + "".join(f"{values[n]:9.3f}" if n in values else " " * 9 for n in NFE))
    return "\n".join(lines)


def plot(record, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), dpi=80)
    for axis, key, what in zip(axes, ("frechet_test", "label_accuracy"), ("Frechet distance on the features of a small ResNet (not FID)",
                                                                         "share of images taken for what was asked")):
        for i, name in enumerate(record["samplers"]):
            values = curve(record, name, key)
            axis.plot(list(values), list(values.values()), "o-", ms=3, color=f"C{i}", label=name)
            second = curve(record, name, key, "midpoint")
            if second:
                axis.plot(list(second), list(second.values()), "--", lw=1, color=f"C{i}", label=f"{name}, midpoint")
        axis.set_xscale("log", base=2)
        axis.set_xticks(NFE, NFE)
        axis.set_xlabel("network evaluations of an image (NFE)")
        axis.set_title(what, fontsize=9)
    axes[0].set_yscale("log")                               # the floor is far below, and would squeeze the curves
    axes[0].minorticks_off()
    marks = [m for m in (.05, .1, .2, .5, 1, 2, 3, 4, 5, 7, 10, 20, 50) if axes[0].get_ylim()[0] <= m <= axes[0].get_ylim()[1]]
    axes[0].set_yticks(marks, [f"{m:g}" for m in marks])
    axes[0].text(.98, .95, f"real images: {record['floor']['frechet_test']:.3f}", ha="right", va="top", fontsize=8, transform=axes[0].transAxes)
    axes[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, .5))
    figure.suptitle(f"{record['about']}; {record['size']}, {record['budget']} network evaluations of training each", fontsize=9.5)
    figure.tight_layout()
    save(figure, path)


def plot_images(plan, record, path, nfe=(1, 2, 4, 64)):
    """A strip of ten images from the same ten noises: a row per sampler and NFE."""
    seed = str(record["seeds"][0])
    names = [n for n in record["samplers"] if seed in record["samplers"][n]]
    across = 2
    figure, axes = plt.subplots(-(-len(names) // across), across, figsize=(9.2, 2.3 * -(-len(names) // across)), dpi=80, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, name in zip(axes.flat, names):
        axis.axis("on")
        strips = []
        for n in nfe:
            found = sorted((plan.cells / "generated").glob(f"{safe(f'{name} {seed}')}-{plan.count}-euler-{n}.safetensors"))
            if found:
                strips.append((n, load_file(found[0])["pixels"][:10].permute(2, 0, 3, 1).reshape(32, 320, 3)))
        axis.imshow(torch.cat([s for _, s in strips]))
        axis.set_xticks([])
        axis.set_yticks([16 + 32 * i for i in range(len(strips))], [n for n, _ in strips], fontsize=7)
        axis.set_title(f"{name}; NFE at the left", fontsize=8)
    figure.suptitle(record["about"], fontsize=9)
    figure.tight_layout()
    save(figure, path)


def save(figure, path):
    figure.savefig(f"{path}.part", format="png", bbox_inches="tight", pil_kwargs={"optimize": True})
    Path(f"{path}.part").replace(path)
    plt.close(figure)


def report(plan: Plan, seeds, out, copy="", notes=()):
    """Writes out.json, out.png and out_images.png, and prints the tables."""
    record = gather(plan, seeds, copy, notes)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1))
    part.replace(out.with_suffix(".json"))
    plot(record, out.with_suffix(".png"))
    plot_images(plan, record, out.with_name(out.name + "_images.png"))
    for key in ("frechet_test", "frechet_train", "label_accuracy", "balance", "recall"):
        print(table(record, key), end="\n\n")
    print(json.dumps(record["aims"], indent=1))
    return record
