"""`scfm demo`: distil the tiny Flux now, and set the result beside its teacher and beside the LoRA of a
longer run.

Everything comes from the repository: the pipeline, its captions, the carried LoRA, and the scores of what
does not change
(the teacher and the carried LoRA). The live run is the same code as `scfm distill`, cut to what minutes
allow: a few steps
are timed first, and the run is made as long as the time that is left for it. `python -m toy.demo --store`
scores the teacher
and the carried LoRA again.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from scfm.files import atomic_write
from scfm.method.ema import shorten
from scfm.models.lora_file import read_lora_scales
from scfm.training.config import DistillConfig, load_settings
from scfm.types import VelocityField
from toy.grid import draw_grid, step_label
from toy.judge import SHIFTS, STOCK, Entry, Judge, table
from toy.pipelines import FLUX, GUIDANCE, TOKENS, WEIGHTS

PROMPTS = WEIGHTS / "prompts.txt"
CARRIED = WEIGHTS / "lora"
TRAINED = WEIGHTS / "step_lora"  # a pair whose scale was trained in as the step size
STORED = WEIGHTS / "demo"  # scores of what does not change
CAPTIONS = 128  # that the stored scores are of
FEWEST = 100  # training steps below which a student has hardly learned
TIMED = 4  # training steps that are timed, after one that warms up
BATCHES = (32, 16, 8)  # tried in turn where a step is dear
STUDENT_STEPS = (1, 2, 3, 4, 8)


def main(argv: Sequence[str] | None = None) -> int:
    """Distils, scores, draws; returns the exit code."""
    args = parse(argv)
    if args.store:
        return store()
    start, out = time.time(), Path(args.output_dir)
    for folder in ("images", "cache", "timed", "live"):  # a demo starts from nothing
        shutil.rmtree(out / folder, ignore_errors=True)
    print(f"1/3  live distillation of {FLUX.name}", flush=True)
    make_images(args.prompts, out)
    plan = plan_run(out, args)
    print(plan.in_words(args.seconds), flush=True)
    trainer = make_trainer(out / "live", plan.steps, plan.batch_size, min(32, args.captions))
    trainer.train()
    from scfm.training.selection import select_and_save

    selection = select_and_save(trainer)

    print(f"2/3  scoring on {args.captions} captions of pairs that no training image showed", flush=True)
    judge, carried, entries = compare(trainer, selection, args.captions)
    record = describe(judge, selection, entries, carried, args.captions, plan)
    print("\n" + table(record["entries"]) + "\n\n" + explain(record), flush=True)

    print(f"3/3  writing {out / 'comparison.png'}, {out / 'emoji.png'} and {out / 'results.json'}")
    draw_comparison(trainer, selection, judge, out / "comparison.png")
    draw_emoji(out / "emoji.png")
    record["seconds_in_all"] = round(time.time() - start)
    write_json(out / "results.json", record)
    print(f"     done in {record['seconds_in_all']} s")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. ValueError for numbers that make no sense."""
    parser = argparse.ArgumentParser(
        prog="scfm demo",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", default="runs/demo", help="folder of comparison.png and results.json")
    parser.add_argument(
        "--max_train_steps", type=int, default=300, help="training steps of the live run, at most"
    )
    parser.add_argument("--seconds", type=int, default=85, help="seconds that the live run should take")
    parser.add_argument(
        "--prompts", default=str(PROMPTS), help="captions whose images the live run is trained on"
    )
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="captions on which all are scored")
    parser.add_argument(
        "--store", action="store_true", help="only score the teacher and the carried LoRA, and store it"
    )
    args = parser.parse_args(argv)
    for name in ("max_train_steps", "seconds", "captions"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}: give 1 or more")
    return args


# The live run


class Plan(NamedTuple):
    """How long the live run is. cost: seconds of a step."""

    steps: int
    batch_size: int
    cost: float

    def in_words(self, seconds: int) -> str:
        """What the run will do, and why."""
        takes = self.steps * self.cost
        text = (
            f"     {self.steps} training steps of {self.batch_size} examples; a step costs {self.cost:.2f} "
            f"s here, so about "
            f"{takes:.0f} s"
        )
        if takes > 1.2 * seconds:
            text += (
                f": more than the {seconds} s planned, since fewer steps teach nothing (is the machine busy?)"
            )
        return text + (
            f"\n     (EMA decays {shorten(0.99, self.steps):.3f} and {shorten(0.999, self.steps):.3f}: "
            f"scaled to the "
            "short run from .99 and .999)"
        )


def plan_run(out: Path, args: argparse.Namespace) -> Plan:
    """Times some steps and makes the run as long as they allow; where they are dear, first with fewer
    examples in each."""
    fewest, plan = min(FEWEST, args.max_train_steps), None
    for batch_size in BATCHES:
        cost = seconds_of_step(out / "timed" / str(batch_size), batch_size)
        plan = Plan(max(fewest, min(args.max_train_steps, int(args.seconds / cost))), batch_size, cost)
        if plan.steps * cost <= args.seconds or args.max_train_steps < FEWEST:
            break
    assert plan is not None
    return plan


def seconds_of_step(folder: Path, batch_size: int) -> float:
    """The median over `TIMED` training steps."""
    trainer = make_trainer(folder, TIMED + 1, batch_size)
    clocks = [time.perf_counter()]
    for step in range(TIMED + 1):
        trainer.train_step(step)
        clocks.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(clocks[1:], clocks[2:], strict=False))


def make_images(prompts: str, out: Path) -> None:
    """The teacher's images of the captions, once for all runs of this demo."""
    from accelerate import PartialState

    from scfm.data.prepare import DataConfig, make_data, read_inputs
    from scfm.models.source import PipelineSource

    recipe = load_settings(CARRIED / "config.json")
    config = DataConfig(
        pretrained_model_name_or_path=str(FLUX),
        prompts=prompts,
        output_dir=str(out / "images"),
        sizes=("32x32",),
        max_sequence_length=TOKENS,
        teacher_steps=recipe["teacher_steps"],
        teacher_guidance_scale=recipe["teacher_guidance_scale"],
        cache_dir=str(out / "cache"),
    )
    config.check()
    source = PipelineSource(FLUX)
    make_data(config, source, read_inputs(config, source), PartialState(cpu=not torch.cuda.is_available()))


def make_trainer(folder: Path, steps: int, batch_size: int, eval_prompts: int = 2) -> Any:
    """A trainer with the recipe of the carried LoRA, the memories of the EMAs scaled to the number of
    steps."""
    from diffusers.utils import logging

    from scfm.training.distill_trainer import DistillTrainer

    logging.set_verbosity_error()  # diffusers remarks that our LoRA has nothing for the text encoders
    return DistillTrainer(
        live_config(folder, steps, batch_size, eval_prompts), progress=folder.name == "live"
    )


def live_config(folder: Path, steps: int, batch_size: int = 32, eval_prompts: int = 32) -> DistillConfig:
    """The settings of a live run in `folder`, beside whose folder the images and their cache lie."""
    place = folder.parent if folder.name == "live" else folder.parent.parent
    own = {
        "pretrained_model_name_or_path": str(FLUX),
        "prompts": "",
        "train_data_dir": str(place / "images"),
        "cache_dir": str(place / "cache"),
        "output_dir": str(folder),
        "max_train_steps": steps,
        "global_batch_size": batch_size,
        "ema_decay_fast": shorten(0.99, steps),
        "ema_decay_slow": shorten(0.999, steps),
        "validation_steps": 0,
        "report_to": "none",
        "num_eval_prompts": eval_prompts,
        "eval_num_steps": STUDENT_STEPS,
        "eval_lora_scales": (0.5, 0.75, 1.0, 1.25),
    }
    return DistillConfig(**{**load_settings(CARRIED / "config.json"), **own})


# The scores


def compare(trainer: Any, selection: dict[str, Any], captions: int) -> tuple[Judge, Any, dict[str, list]]:
    """(judge, carried LoRA, {name: rows}) of the teacher, the live student and the carried LoRA, by one
    protocol.

    What does not change is read from the repository where it is of these captions, and scored now otherwise.
    """
    carried = carried_lora()
    judge = Judge(carried.family, captions)
    stored = read_stored() if captions == CAPTIONS else None
    if stored:
        judge.goal, fixed = stored
    else:
        judge.set_goal(trainer.models.teacher)
        fixed = judge.record(fixed_entries(trainer.models.teacher))
    name = f"live student ({selection['train_steps']} steps), its scales"
    live = judge.record([Entry(name, live_student(trainer, selection), (STOCK,))], steps=STUDENT_STEPS)
    teacher, *others = fixed
    return judge, carried, {teacher: fixed[teacher], **live, **{other: fixed[other] for other in others}}


def fixed_entries(teacher: VelocityField) -> list[Entry]:
    """What does not change from demo to demo."""
    carried, trained = carried_lora(), carried_lora(TRAINED)
    return [
        Entry("teacher", lambda steps: teacher, SHIFTS),
        Entry("carried LoRA, scale 1", lambda steps: carried.at_scale(1), (STOCK,)),
        Entry(
            "carried LoRA, its scales",
            lambda steps: carried.at_scale(carried.lora_scales.scale(steps)),
            (STOCK,),
        ),
        Entry(
            "carried LoRA, scale = step size",
            lambda steps: trained.at_scale(trained.lora_scales.scale(steps)),
            (STOCK,),
        ),
    ]


def store() -> int:
    """Scores what does not change, and writes it into the repository."""
    carried = carried_lora()
    judge = Judge(carried.family, CAPTIONS)
    judge.set_goal(carried.at_scale(0.0))
    record = judge.record(fixed_entries(carried.at_scale(0.0)))
    assert judge.goal is not None
    goal = judge.goal.contiguous()
    atomic_write(
        STORED / "teacher_endpoints.safetensors", lambda new: save_file({"endpoints": goal}, str(new))
    )
    write_json(STORED / "scores.json", {"captions": CAPTIONS, "entries": record, "machine": machine()})
    print(f"written to {STORED}")
    return 0


def read_stored() -> tuple[torch.Tensor, dict[str, list]] | None:
    """(the teacher's endpoints, {name: rows}) that the repository carries; None where it carries none."""
    path = STORED / "scores.json"
    if not path.is_file():
        return None
    return load_file(str(STORED / "teacher_endpoints.safetensors"))["endpoints"], json.loads(
        path.read_text()
    )["entries"]


def live_student(trainer: Any, selection: dict[str, Any]) -> Callable[[int], VelocityField]:
    """steps -> the field of the adapter that was selected, at its LoRA scale."""
    scales = read_lora_scales(trainer.output_dir / "pytorch_lora_weights.safetensors")
    assert scales is not None
    return lambda steps: trainer.models.field(selection["selected"], scales.scale(steps))


def carried_lora(folder: Path = CARRIED) -> Any:
    """A LoRA of the repository on a pipeline of its own."""
    from scfm.inference.step_lora import InferenceConfig, StepLora

    return StepLora(InferenceConfig(lora=str(folder), pretrained_model_name_or_path=str(FLUX)))


def describe(
    judge: Judge, selection: dict[str, Any], entries: dict[str, list], carried: Any, captions: int, plan: Plan
) -> dict[str, Any]:
    """The record: scores and all that they depend on."""
    scales = carried.lora_scales
    return {
        "captions": captions,
        "seeds": 1,
        "guidance": GUIDANCE,
        "target": "teacher, 32 steps, shift 3",
        "reference": "4000 drawings of held-out pairs",
        "frechet_floor": judge.floor(),
        "machine": machine(),
        "live": selection | plan._asdict(),
        "lora_scales": dict(zip(scales.steps, scales.scales, strict=True)),
        "entries": entries,
    }


def machine() -> str:
    """Where the numbers come from."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}"


def explain(record: dict[str, Any]) -> str:
    """What the columns of the table mean."""
    scales = ", ".join(f"{n}: {s:g}" for n, s in record["lora_scales"].items())
    return (
        "prompt acc.: share of the attributes named by the caption that a classifier sees (higher is "
        "better)\n"
        f"Frechet: distance on that classifier's features to drawings, not FID; {record['captions']} fresh "
        f"drawings "
        f"score {record['frechet_floor']:.3f} (lower is better)\n"
        "endpoint: root mean square distance, in latents, to the teacher's 32-step endpoint from the same "
        "noise\n"
        f"its scales: the LoRA scale by number of steps ({scales} for the carried one), found without data\n"
        "scale = step size: trained in (scfm distill --algorithm step_scaled), nothing is searched\n"
        "best shift per column: each column at whichever of the shifts "
        f"{', '.join(f'{s:g}' for s in SHIFTS)} is best for it"
    )


# The image


def draw_comparison(
    trainer: Any, selection: dict[str, Any], judge: Judge, path: Path, columns: int = 12
) -> None:
    """Rows of samplers, columns of captions; the noise of a column is the same in every row."""
    teacher, student = trainer.models.teacher, live_student(trainer, selection)
    trained = fixed_entries(teacher)[-1].field_for  # a field for each step count, made when it is its turn
    rows = [("teacher", lambda n: teacher, n) for n in (32, 1, 2, 4)]
    rows += [("live student", student, 4), *(("carried LoRA", trained, n) for n in (1, 2, 4))]
    images = [
        (step_label(name, n), judge.family.decode(judge.endpoints(field_for(n), n, STOCK, columns)))
        for name, field_for, n in rows
    ]
    draw_grid(images, judge.captions.text[:columns], path)


def draw_emoji(path: Path) -> None:
    """The second image: the carried emoji pipeline and its carried student, sampled now."""
    from toy.emoji import compare

    draw_grid(compare.sample_rows(compare.load(), compare.CAPTIONS), compare.CAPTIONS, path)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """A record, whole or not at all."""
    atomic_write(path, lambda new: new.write_text(json.dumps(record, indent=1)))


if __name__ == "__main__":
    raise SystemExit(main())
