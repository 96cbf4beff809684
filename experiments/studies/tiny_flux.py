"""The committed evaluation of the carried LoRA, on captions that its teacher never saw:

    python -m experiments.studies.tiny_flux --run runs/carried --captions 2048

The teacher at several sampling shifts; at the stock shift the carried LoRA at its searched scale for each
number of steps, and the carried pair of LoRAs whose scale was trained in as the step size; with --run all
three adapters of the run at 3 and 4 steps. Same captions, noises and reference
drawings for all (see toy/judge.py). Resumes: a row that stands in the result is not measured again. Writes
experiments/results/tiny_flux.json and .png.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from experiments.figures import OPEN, STUDENT, canvas, look, save
from experiments.figures import TEACHER as TEACHER_LOOK
from experiments.runner import RESULTS, write_json
from experiments.testbeds import Field
from scfm.inference.step_lora import lora_files
from scfm.method.lora_scale import LoraScales
from scfm.models.flux import Flux
from scfm.models.lora import ADAPTERS, WEIGHT_NAME
from scfm.models.lora_file import read_lora_scales
from toy.judge import COLUMNS, SHIFTS, STEPS, STOCK, Judge, at_stock, best_of, table
from toy.pipelines import FLUX, GUIDANCE, TOKENS, WEIGHTS, load_flux

TEACHER, DIALLED, TRAINED = "teacher", "carried LoRA, its dial", "carried LoRA, scale = step size"
COMPARED = (1, 2, 3, 4, 8)  # step counts of the summary and of the README's table
SAME = ("captions", "seed", "guidance")  # what an earlier record must share with this one
TITLES = {
    "prompt_accuracy": "prompt accuracy (higher is better)",
    "frechet": "Frechet distance on the reader's features",
    "endpoint": "distance to the teacher's 32-step endpoint",
}
FieldFor = Callable[[int], Field]  # steps -> the field that is sampled


class Row(NamedTuple):
    """What is measured: who, in how many steps, at which shift."""

    name: str
    steps: int
    shift: float


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    pipe = load_flux()
    family = Flux(pipe, 32, 32, TOKENS)
    judge = Judge(family, args.captions, args.seed, progress=False)
    record, fields = start_record(args, judge), fields_of(args, family, pipe)
    missing = [row for row in rows_of(args) if not is_measured(record, row)]
    if missing:
        judge.set_goal(fields[TEACHER](32))
    for name, steps, shift in tqdm(missing, desc="judging"):
        record["entries"].setdefault(name, []).append(judge.measure(fields[name](steps), steps, shift))
        write_json(json.dumps(record, indent=1), args.out)
    record["summary"] = summary(record["entries"])
    write_json(json.dumps(record, indent=1), args.out)
    plot(record, args.out.with_suffix(".png"))
    print(table(record["entries"]))
    print(json.dumps(record["summary"], indent=1))
    if args.readme:
        put_table(args.readme, readme_table(record))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--captions", type=int, default=2048, help="captions of held-out pairs (default 2048)"
    )
    parser.add_argument(
        "--seed", type=int, default=2026, help="of captions, noises and reference drawings (default 2026)"
    )
    parser.add_argument("--lora", type=Path, default=WEIGHTS / "lora", help="folder of the carried LoRA")
    parser.add_argument(
        "--step_lora", type=Path, default=WEIGHTS / "step_lora", help="folder of the one with a trained scale"
    )
    parser.add_argument("--run", type=Path, help="folder of the run, to compare its student and its EMAs")
    parser.add_argument("--out", type=Path, default=RESULTS / "tiny_flux.json", help="path of the result")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="put the table between this file's table marks"
    )
    return parser.parse_args(argv)


def rows_of(args: argparse.Namespace) -> list[Row]:
    rows = [Row(TEACHER, n, s) for n in STEPS for s in SHIFTS if s == STOCK or 1 < n < max(STEPS)]
    rows += [Row(name, n, STOCK) for name in (DIALLED, TRAINED) for n in STEPS]
    return rows + [Row(of_run(name), n, STOCK) for name in (ADAPTERS if args.run else ()) for n in (3, 4)]


def of_run(adapter: str) -> str:
    return f"{adapter} of the run, its dial"


def fields_of(args: argparse.Namespace, family: Flux, pipe: Any) -> dict[str, FieldFor]:
    teacher = partial(family.velocity, pipe.transformer)
    fields = {
        TEACHER: lambda steps: teacher,
        DIALLED: dialled(family, args.lora),
        TRAINED: dialled(family, args.step_lora),
    }
    if args.run:
        fields |= {of_run(name): dialled(family, args.run / name) for name in ADAPTERS}
    return fields


def dialled(family: Flux, folder: Path) -> FieldFor:
    """steps -> the field of a LoRA, or of a pair, at its scale for so many; through the stock loader."""
    pipe, scales = load_flux(), scales_of(folder)
    files = lora_files(folder / WEIGHT_NAME, scales)
    for name, file in files.items():
        pipe.load_lora_weights(str(folder), weight_name=file.name, adapter_name=name)

    def field_for(steps: int) -> Field:
        pipe.set_adapters(list(files), [scales.scale(steps) ** power for power in range(1, len(files) + 1)])
        return partial(family.velocity, pipe.transformer)

    return field_for


def scales_of(folder: Path) -> LoraScales:
    """The scales in a LoRA's header; scale 1 for all step counts where there are none."""
    return read_lora_scales(folder / WEIGHT_NAME) or LoraScales((1,), (1.0,))


def is_measured(record: dict[str, Any], row: Row) -> bool:
    return any((r["steps"], r["shift"]) == row[1:] for r in record["entries"].get(row.name, []))


def start_record(args: argparse.Namespace, judge: Judge) -> dict[str, Any]:
    """The record so far, as far as it is of the same weights and captions; a fresh one otherwise."""
    scales = scales_of(args.lora)
    fresh = {
        "captions": args.captions,
        "seed": args.seed,
        "guidance": GUIDANCE,
        "goal": "teacher, 32 steps, shift 3",
        "reference": "4000 drawings of held-out pairs",
        "frechet_floor": judge.floor(),
        "weights": {
            "teacher": digest(FLUX / "transformer"),
            "lora": digest(args.lora),
            "step_lora": digest(args.step_lora),
        },
        "dial": {str(n): s for n, s in zip(scales.steps, scales.scales, strict=True)},
        "rule": scales_of(args.step_lora).exponent,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "entries": {},
    }
    old = json.loads(args.out.read_text()) if args.out.is_file() else {}
    fresh["entries"] = {
        name: rows for name, rows in old.get("entries", {}).items() if still(name, old, fresh)
    }
    return fresh


def still(name: str, old: dict[str, Any], fresh: dict[str, Any]) -> bool:
    """Whether what an old record says of an entry holds: the same captions, teacher, LoRA and scales."""
    depends = {TEACHER: [], TRAINED: ["step_lora"]}.get(name, ["lora"])
    was, now = old.get("weights", {}), fresh["weights"]
    same = all(old.get(key) == fresh[key] for key in (*SAME, *(["dial"] if depends == ["lora"] else [])))
    return same and all(was.get(part) == now[part] for part in ("teacher", *depends))


def digest(folder: Path) -> str:
    """Eight digits that tell weights apart."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    total = sum(
        (i + 1) * tensor.double().abs().sum().item()
        for tensors in files
        for i, tensor in enumerate(tensors.values())
    )
    return f"{total:.8g}"


def summary(entries: dict[str, list[dict]]) -> dict[str, dict]:
    """Both carried LoRAs beside the teacher's best shift, and what accuracy they lose on its 32 steps."""
    teacher = entries[TEACHER]
    full = at_stock(teacher, 32)
    found = {"teacher_32": {key: full[key] for key in (*COLUMNS, "per_attribute")}}
    for steps, (kind, name) in product(COMPARED, (("", DIALLED), ("trained_", TRAINED))):
        best, ours = best_of(teacher, steps), at_stock(entries[name], steps)
        found[f"{kind}at_{steps}_steps"] = {
            **{f"{key}_ratio": round(ours[key] / best[key], 3) for key in ("frechet", "endpoint")},
            "prompt_accuracy_lost": round(full["prompt_accuracy"] - ours["prompt_accuracy"], 4),
        }
    return found


def readme_table(record: dict[str, Any]) -> str:
    """The rows that a reader needs, in Markdown."""
    teacher, ours, trained = (record["entries"][name] for name in (TEACHER, DIALLED, TRAINED))
    scales = LoraScales(tuple(map(int, record["dial"])), tuple(record["dial"].values()))
    lines = [
        "| | steps | prompt accuracy | Frechet distance | endpoint distance |",
        "|---|---|---|---|---|",
        readme_line("teacher", 32, at_stock(teacher, 32)),
    ]
    for n in COMPARED:
        lines.append(readme_line("teacher, stock shift" if n > 1 else "teacher", n, at_stock(teacher, n)))
        if n > 1:
            lines.append(readme_line("teacher, best shift for each column", n, best_of(teacher, n)))
        lines.append(readme_line(f"LoRA, searched scale {scales.scale(n):g}", n, at_stock(ours, n)))
        lines.append(
            readme_line(f"**LoRA, scale {n ** -record['rule']:.2g} = step size**", n, at_stock(trained, n))
        )
    return "\n".join(lines)


def readme_line(name: str, steps: int, row: dict[str, float]) -> str:
    accuracy = f"{100 * row['prompt_accuracy']:.1f} %"
    return f"| {name} | {steps} | {accuracy} | {row['frechet']:.0f} | {row['endpoint']:.3f} |"


def put_table(path: Path, text: str) -> None:
    """Replaces what stands between <!-- table --> and the empty line after the old table."""
    before, rest = path.read_text(encoding="utf-8").split("<!-- table -->\n", 1)
    after = rest.split("\n\n", 1)[1]
    path.write_text(f"{before}<!-- table -->\n{text}\n\n{after}", encoding="utf-8")


def plot(record: dict[str, Any], path: Path) -> None:
    """A panel for each metric, against network evaluations."""
    teacher, ours, trained = (record["entries"][name] for name in (TEACHER, DIALLED, TRAINED))
    figure, axes = canvas(1, 3, (10, 3))
    for ax, (key, title) in zip(axes[0], TITLES.items(), strict=True):
        steps = [n for n in STEPS if not (key == "endpoint" and n == 32)]
        for style, label, pick, rows in (
            (look("teacher euler"), "teacher, stock shift", at_stock, teacher),
            (TEACHER_LOOK | OPEN, "teacher, best shift", best_of, teacher),
            (look("SCFM, dialled"), DIALLED, at_stock, ours),
            (STUDENT, TRAINED, at_stock, trained),
        ):
            ax.plot(steps, [pick(rows, n)[key] for n in steps], label=label, **style)
        ax.set(xscale="log", xticks=STEPS, xticklabels=STEPS, xlabel="network evaluations")
        ax.minorticks_off()
        ax.set_title(title, fontsize=9)
        if key != "prompt_accuracy":
            ax.set_yscale("log")
    axes[0][1].axhline(record["frechet_floor"], color="k", lw=0.8, ls=":", label="drawings against drawings")
    axes[0][1].legend(fontsize=7)
    figure.tight_layout()
    save(figure, path)


if __name__ == "__main__":
    main()
