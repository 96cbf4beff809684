"""The record, the tables and the figures of the study `cifar`, from the cells that are there."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from experiments.figures import OPEN, headless_pyplot, look, save
from experiments.runner import Job, write_json
from experiments.stored import to_stored
from experiments.testbeds.cifar import (
    DISTILLED,
    LORA,
    NFE,
    SCALED,
    TEACHERS_SHARE,
    Cifar10,
    Plan,
    flow_notes,
    job_of,
    safe,
    saved_settings,
)
from experiments.testbeds.cifar_judge import GENERATED
from scfm.models.lora import WEIGHT_NAME
from toy.features import mark, recipe

NAMES = (
    "plain",
    "scfm 1/8",
    "scfm 1/4",
    "scfm 1/2",
    "shortcut",
    DISTILLED,
    f"{DISTILLED}, dialled",
    LORA,
    f"{LORA}, dialled",
    SCALED,
    "step_scaled 1/4",
)
SAME = ("about", "size", "budget", "images", "features", "recipe")  # of two records whose rows may be joined
SETTINGS = (
    "max_train_steps",
    "method",
    "non_shortcut_ratio",
    "teacher_ratio",
    "algorithm",
    "global_batch_size",
    "learning_rate",
    "lr_warmup_steps",
    "ema_decay_slow",
    "ema_decay_fast",
    "ema_decay",
    "shift",
    "self_grids",
    "weight_dtype",
    "seed",
)
AIMED_AT = (4, 64)  # evaluations at which a relation to the plain flow was aimed at
LEVELS = (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 7, 10, 20, 50)  # marks of the axis of the Frechet distance
PRINTED = ("frechet_test", "frechet_train", "label_accuracy", "balance", "recall")


def rows_of(plan: Plan, name: str, seed: int) -> list[dict]:
    """The measured rows of one sampler, by solver and NFE; only those that today's feature network saw."""
    paths = (plan.cells / "measured").glob(f"{safe(name)}-{seed}-{plan.count}-*-{mark()}.json")
    rows = [json.loads(path.read_text()) for path in sorted(paths)]
    return sorted(rows, key=lambda row: (row["solver"], row["nfe"]))


def gather(plan: Plan, seeds: Sequence[int], copy: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the cells hold, as one dict of plain numbers."""
    record: dict[str, Any] = {
        "about": f"CIFAR-10, {copy}" if copy else "CIFAR-10",
        "size": plan.size,
        "budget": plan.budget,
        "images": plan.count,
        "features": recipe(),
        "recipe": plan.recipe,
        "seeds": list(seeds),
        "kept": TEACHERS_SHARE,
        "device": device(),
        "torch": torch.__version__,
        "notes": list(notes),
        "samplers": {},
        "trained": {},
    }
    for path in sorted((plan.cells / "measured").glob(f"floor-{plan.count}-*-{mark()}.json")):
        record["floor"] = json.loads(path.read_text())
    for name, seed in ((name, seed) for name in NAMES for seed in seeds):
        rows, training = rows_of(plan, name, seed), training_of(Cifar10(plan), job_of(name, seed))
        for part, value in (("samplers", rows), ("trained", training)):
            if value:
                record[part].setdefault(name, {})[str(seed)] = value
    return record | {"aims": aims(record)}


def joined(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record, with the rows that it lacks from one in `path`. ValueError for another protocol."""
    old = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in SAME if to_stored(old[name]) != to_stored(record[name])]
    if other:
        raise ValueError(f"{path} is of another {', '.join(other)}: leave --keep out, or take another --out")
    both = {}
    for part in ("samplers", "trained"):
        found = {name: {**old[part].get(name, {}), **record[part].get(name, {})} for name in NAMES}
        both[part] = {name: by_seed for name, by_seed in found.items() if by_seed}
    seeds = sorted({int(seed) for by_seed in both["samplers"].values() for seed in by_seed})
    notes = list(dict.fromkeys([*old["notes"], *record["notes"]]))
    record = {
        **record,
        **{name: old[name] for name in SAME},
        **both,
        "seeds": seeds,
        "notes": notes,
        "floor": record.get("floor", old["floor"]),
    }
    return record | {"aims": aims(record)}


def training_of(bed: Cifar10, job: Job) -> dict[str, Any] | None:
    """Training steps, evaluations and settings; None where there is no result."""
    flow = bed.flow_file(job)
    if flow.is_file():
        notes = flow_notes(flow)
        return {
            "updates": notes["train_steps"],
            "evaluations": notes["evaluations"],
            "settings": settings(flow.parent),
        }
    if job.family == LORA and (flow.parent / WEIGHT_NAME).is_file():
        found = settings(flow.parent, "rank")
        steps = found["max_train_steps"]
        return {"updates": steps, "evaluations": 4 * steps * found["global_batch_size"], "settings": found}
    return None


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, 2 cores shared with other work"


def settings(folder: Path, *more: str) -> dict[str, Any]:
    """What was set for a training, without the places of things."""
    saved = saved_settings(folder)
    return {name: saved[name] for name in (*more, *SETTINGS) if name in saved}


def curve(
    record: dict[str, Any],
    name: str,
    key: str = "frechet_test",
    solver: str = "euler",
    seeds: Sequence[str] | None = None,
) -> dict[int, float]:
    """{nfe: mean over seeds, or over those named} of one sampler."""
    found: dict[int, list[float]] = {}
    rows = [
        row
        for seed, rows in record["samplers"].get(name, {}).items()
        if seeds is None or seed in seeds
        for row in rows
        if row["solver"] == solver and key in row
    ]
    for row in rows:
        found.setdefault(row["nfe"], []).append(row[key])
    return {n: sum(values) / len(values) for n, values in sorted(found.items())}


def aims(record: dict[str, Any]) -> dict[str, dict]:
    """The two relations that were aimed at, against the plain flow of the same budget and seed: by seed, and
    whether all meet them.
    """
    found = {}
    for name in NAMES[1:]:
        ratios: dict[int, dict[str, float]] = {n: {} for n in AIMED_AT}
        for seed in record["samplers"].get(name, {}):
            mine, plain = (curve(record, which, seeds=(seed,)) for which in (name, "plain"))
            if set(AIMED_AT) <= set(mine) & set(plain):
                for n in AIMED_AT:
                    ratios[n][seed] = round(mine[n] / plain[n], 3)
        if ratios[4]:
            found[name] = {
                "at 4, times plain": ratios[4],
                "at most half": max(ratios[4].values()) <= 0.5,
                "at 64, times plain": ratios[64],
                "at most 1.05": max(ratios[64].values()) <= 1.05,
            }
    return found


def table(record: dict[str, Any], key: str = "frechet_test") -> str:
    """One line a sampler, one column a number of evaluations."""
    real = f"; real images {record['floor'][key]:.3f}" if key in record["floor"] else ""
    lines = [
        f"{key}, {record['images']} images, {record['about']}{real}; in brackets the number of seeds, "
        "of which the mean is shown",
        f"{'':34}" + "".join(f"{n:>9}" for n in NFE),
    ]
    for name, by_seed in record["samplers"].items():
        for solver in ("euler", "midpoint"):
            values = curve(record, name, key, solver)
            if values:
                label = f"{name}{', midpoint' * (solver == 'midpoint')} ({len(by_seed)})"
                cells = "".join(f"{values[n]:9.3f}" if n in values else " " * 9 for n in NFE)
                lines.append(f"{label:34}{cells}")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Frechet distance and label accuracy against evaluations."""
    figure, axes = headless_pyplot().subplots(1, 2, figsize=(11, 3.6))
    not_fid = "Frechet distance on the features of a small ResNet (not FID)"
    plot_curves(axes[0], record, "frechet_test", not_fid)
    plot_curves(axes[1], record, "label_accuracy", "share of images taken for their label")
    axes[0].set_yscale("log")  # the floor is far below, and would squeeze the curves
    axes[0].minorticks_off()
    low, high = axes[0].get_ylim()
    levels = [level for level in LEVELS if low <= level <= high]
    axes[0].set_yticks(levels, [f"{level:g}" for level in levels])
    axes[0].text(
        0.98,
        0.95,
        f"real images: {record['floor']['frechet_test']:.3f}",
        ha="right",
        va="top",
        fontsize=8,
        transform=axes[0].transAxes,
    )
    axes[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    cost = f"{record['budget']} network evaluations of training each"
    figure.suptitle(f"{record['about']}; {record['size']}, {cost}", fontsize=9.5)
    figure.tight_layout()
    save(figure, path)


def plot_curves(ax: Any, record: dict[str, Any], key: str, title: str) -> None:
    for name in record["samplers"]:
        values, second = (curve(record, name, key, solver) for solver in ("euler", "midpoint"))
        ax.plot(list(values), list(values.values()), ms=3, label=name, **look(name))
        if second:
            style = look(name) | OPEN
            ax.plot(list(second), list(second.values()), lw=1, ms=3, label=f"{name}, midpoint", **style)
    ax.set_xscale("log", base=2)
    ax.set_xticks(NFE, NFE)
    ax.set_xlabel("network evaluations of an image (NFE)")
    ax.set_title(title, fontsize=9)


def plot_images(plan: Plan, record: dict[str, Any], path: Path, nfe: Sequence[int] = (1, 2, 4, 64)) -> None:
    """A strip of ten images from the same ten noises: a row per sampler and NFE. Nothing where none is of the
    first seed.
    """
    seed, across = str(record["seeds"][0]), 2
    names = [name for name, by_seed in record["samplers"].items() if seed in by_seed]
    if not names:
        return
    down = -(-len(names) // across)
    figure, axes = headless_pyplot().subplots(down, across, figsize=(9.2, 2.3 * down), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, name in zip(axes.flat, names, strict=False):
        stem = plan.cells / GENERATED / f"{safe(name)}-{seed}-{plan.count}-euler"
        files = {n: Path(f"{stem}-{n}.safetensors") for n in nfe}
        show_strips(ax, {n: file for n, file in files.items() if file.is_file()}, f"{name}; NFE at the left")
    figure.suptitle(record["about"], fontsize=9)
    figure.tight_layout()
    save(figure, path)


def show_strips(ax: Any, files: dict[int, Path], title: str) -> None:
    """The first ten images of each file, one below the other. files: {NFE: file}."""
    ax.axis("on")
    strips = [
        load_file(file)["pixels"][:10].permute(2, 0, 3, 1).reshape(32, 320, 3) for file in files.values()
    ]
    ax.imshow(torch.cat(strips).numpy())
    ax.set_xticks([])
    ax.set_yticks([16 + 32 * i for i in range(len(strips))], list(files), fontsize=7)
    ax.set_title(title, fontsize=8)


def report(
    plan: Plan,
    seeds: Sequence[int],
    out: Path,
    copy: str = "",
    notes: Sequence[str] = (),
    keep: bool = False,
) -> dict[str, Any]:
    """Writes out.json, out.png and out_images.png, and prints the tables.

    keep: what the cells lack stays as the record that is there has it; the images, of which there are those
        of the cells alone, go into out_images_more.png
    """
    record = gather(plan, seeds, copy, notes)
    plot_images(plan, record, out.with_name(out.name + "_images" + "_more" * keep + ".png"))
    if keep:
        record = joined(record, out.with_suffix(".json"))
    write_json(json.dumps(record, indent=1), out.with_suffix(".json"))
    plot(record, out.with_suffix(".png"))
    for key in PRINTED:
        print(table(record, key), end="\n\n")
    print(json.dumps(record["aims"], indent=1))
    return record
