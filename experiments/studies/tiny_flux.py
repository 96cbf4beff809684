"""The committed evaluation of the carried LoRA:  python bench/tiny_flux.py --run runs/carried --captions 2048

The teacher at five sampling shifts, the carried LoRA at the stock shift and at the strengths of its dial, and
with --run all three adapters of the run at 3 and 4 steps. Same captions, noises and reference drawings for
all (see toy/judge.py). Resumes: a row that stands in the result is not measured again. Writes
bench/results/tiny_flux.json and .png.
"""
import argparse
import json
import os
import platform
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from scfm.method.lora_scale import LoraScales
from scfm.models.lora_file import read_lora_scales
from scfm.models.flux import Flux
from scfm.models.lora import WEIGHT_NAME
from toy.judge import COLUMNS, SHIFTS, STEPS, STOCK, Judge, at_stock, best_of, table
from toy.pipelines import FLUX, GUIDANCE, TOKENS, WEIGHTS, load_flux

TEACHER, DIALLED = "teacher", "carried LoRA, its dial"


def main():
    args = parse()
    pipe = load_flux()
    family = Flux(pipe, 32, 32, TOKENS)
    judge = Judge(family, args.captions, args.seed, progress=False)
    record = begin(args, judge)
    fields = {TEACHER: lambda steps: field_of(family, pipe), DIALLED: dialled(family, args.lora)}
    jobs = [(TEACHER, n, s) for n in STEPS for s in SHIFTS if s == STOCK or 1 < n < max(STEPS)]
    jobs += [(DIALLED, n, STOCK) for n in STEPS]
    if args.run:
        for name in ("student", "ema_fast", "ema_slow"):
            label = f"{name} of the run, its dial"
            fields[label] = dialled(family, Path(args.run) / name)
            jobs += [(label, n, STOCK) for n in (3, 4)]
    missing = [j for j in jobs if not any((r["steps"], r["shift"]) == j[1:] for r in record["entries"].get(j[0], []))]
    if missing:
        judge.set_goal(fields[TEACHER](32))
    for name, steps, shift in tqdm(missing, desc="judging"):
        record["entries"].setdefault(name, []).append(judge.measure(fields[name](steps), steps, shift))
        write(args.out, record)
    summarise(record)
    write(args.out, record)
    plot(record, Path(args.out).with_suffix(".png"))
    print(table(record["entries"]))
    print(json.dumps(record["summary"], indent=1))
    if args.readme:
        put_table(Path(args.readme), readme_table(record))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=2048, help="captions of held-out pairs (default 2048)")
    parser.add_argument("--seed", type=int, default=2026, help="of captions, noises and reference drawings (default 2026)")
    parser.add_argument("--lora", default=str(WEIGHTS / "lora"), help="folder of the LoRA that ships")
    parser.add_argument("--run", default="", help="folder of the run, to compare its student, fast and slow")
    parser.add_argument("--out", default="bench/results/tiny_flux.json", help="path of the result")
    parser.add_argument("--readme", default="", metavar="FILE", help="put the table between this file's table marks")
    return parser.parse_args()


def field_of(family, pipe):
    return lambda x, t, cond: family.velocity(pipe.transformer, x, t, cond)


def dialled(family, folder):
    """steps -> the field of a LoRA at the strength of its dial; through the stock loader."""
    pipe = load_flux()
    pipe.load_lora_weights(str(folder), adapter_name="step")
    dial = dial_of(folder)

    def field_for(steps):
        pipe.set_adapters(["step"], [dial.scale(steps)])
        return field_of(family, pipe)
    return field_for


def dial_of(folder):
    """The dial in a LoRA's header; strength 1 for all step counts where there is none."""
    return read_lora_scales(Path(folder) / WEIGHT_NAME) or LoraScales((1,), (1.,))


def begin(args, judge):
    """The record so far, as far as it is of the same weights and captions; a fresh one otherwise."""
    fresh = {"captions": args.captions, "seed": args.seed, "guidance": GUIDANCE, "goal": "teacher, 32 steps, shift 3",
             "reference": "4000 drawings of held-out pairs", "frechet_floor": judge.floor(),
             "weights": {"teacher": digest(FLUX / "transformer"), "lora": digest(args.lora)},
             "dial": {str(n): s for n, s in zip(*dial_of(args.lora)[:2])},
             "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
             "torch": torch.__version__, "entries": {}}
    path = Path(args.out)
    if path.is_file():
        old = json.loads(path.read_text())
        if all(old.get(k) == fresh[k] for k in ("captions", "seed", "guidance", "weights", "dial")):
            return old
        if all(old.get(k) == fresh[k] for k in ("captions", "seed", "guidance")) and \
                old["weights"]["teacher"] == fresh["weights"]["teacher"]:
            fresh["entries"] = {TEACHER: old["entries"].get(TEACHER, [])}  # another LoRA, the same teacher
    return fresh


def digest(folder):
    """Eight digits that tell weights apart."""
    total = sum((i + 1) * v.double().abs().sum().item()
                for path in sorted(Path(folder).glob("*.safetensors")) for i, v in enumerate(load_file(path).values()))
    return f"{total:.8g}"


def summarise(record):
    """The aims that the project set itself, beside what was reached."""
    teacher = record["entries"][TEACHER]
    full = at_stock(teacher, 32)
    record["summary"] = {"teacher_32": {k: full[k] for k in (*COLUMNS, "per_attribute")}}
    for steps in (1, 2, 3, 4, 8):
        best, ours = best_of(teacher, steps), at_stock(record["entries"][DIALLED], steps)
        record["summary"][f"at_{steps}_steps"] = {
            "frechet_ratio": round(ours["frechet"] / best["frechet"], 3),
            "endpoint_ratio": round(ours["endpoint"] / best["endpoint"], 3),
            "prompt_accuracy_lost": round(full["prompt_accuracy"] - ours["prompt_accuracy"], 4)}


def readme_table(record):
    """The rows that a reader needs, in Markdown."""
    entries, steps = record["entries"], (1, 2, 3, 4, 8)
    line = lambda name, n, r: f"| {name} | {n} | {100 * r['prompt_accuracy']:.1f} % | {r['frechet']:.0f} | {r['endpoint']:.3f} |"
    strength = lambda n: LoraScales(tuple(map(int, record["dial"])), tuple(record["dial"].values())).scale(n)
    lines = ["| | steps | prompt accuracy | Frechet distance | endpoint distance |", "|---|---|---|---|---|",
             line("teacher", 32, at_stock(entries[TEACHER], 32))]
    for n in steps:
        lines.append(line("teacher, stock shift" if n > 1 else "teacher", n, at_stock(entries[TEACHER], n)))
        if n > 1:
            lines.append(line("teacher, best shift for each column", n, best_of(entries[TEACHER], n)))
        lines.append(line(f"**LoRA at strength {strength(n):g}**", n, at_stock(entries[DIALLED], n)))
    return "\n".join(lines)


def put_table(path, text):
    """Replaces what stands between <!-- table --> and the empty line after the old table."""
    before, rest = path.read_text(encoding="utf-8").split("<!-- table -->\n", 1)
    after = rest.split("\n\n", 1)[1]
    path.write_text(f"{before}<!-- table -->\n{text}\n\n{after}", encoding="utf-8")


def write(path, record):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)


def plot(record, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    teacher, turned = record["entries"][TEACHER], record["entries"][DIALLED]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3))
    titles = {"prompt_accuracy": "prompt accuracy (higher is better)", "frechet": "Frechet distance on the reader's features",
              "endpoint": "distance to the teacher's 32-step endpoint"}
    for ax, (key, title) in zip(axes, titles.items()):
        steps = [n for n in STEPS if not (key == "endpoint" and n == 32)]
        ax.plot(steps, [at_stock(teacher, n)[key] for n in steps], "o-", color="C7", label="teacher, stock shift")
        ax.plot(steps, [best_of(teacher, n)[key] for n in steps], "o--", color="C0", label="teacher, best shift")
        ax.plot(steps, [at_stock(turned, n)[key] for n in steps], "o-", color="C1", label="carried LoRA, its dial")
        ax.set(xscale="log", xticks=STEPS, xticklabels=STEPS, xlabel="network evaluations")
        ax.minorticks_off()
        ax.set_title(title, fontsize=9)
        if key != "prompt_accuracy":
            ax.set_yscale("log")
    axes[1].axhline(record["frechet_floor"], color="C2", lw=.8, ls=":", label="drawings against drawings")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
