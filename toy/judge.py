"""One protocol for every sampler of the tiny Flux: same captions, same noises, same reference, whatever is
judged.

Per step count: prompt accuracy (read by `toy.reader`), Frechet distance on the reader's features (not FID)
to drawings of the same captions, distance to the teacher's own 32-step endpoints from the same noise, and
seconds.
The captions name only colour-shape pairs of which the teacher never saw an image, unless a judge is asked for
the others.
"""

import time
from typing import NamedTuple

import torch
from tqdm import tqdm

from scfm.method.metrics import endpoint_distance, frechet_distance
from scfm.models.sampling import euler_endpoints, start_noise
from toy.pipelines import GUIDANCE
from toy.reader import load_reader, prompt_accuracy, read
from toy.shapes import COLOURS, PLACES, SHAPES, SIZES, Captions, draw_captions, draw_images, name_attributes

STEPS = (1, 2, 3, 4, 8, 32)
SHIFTS = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0)  # 3 is the scheduler's own ("stock")
STOCK = 3.0
REFERENCE = 4000  # drawings


class Entry(NamedTuple):
    """What is judged: `name`, `field_for` (steps -> a field of the family), the shifts at which it is
    sampled."""

    name: str
    field_for: object
    shifts: tuple


class Judge:
    """Holds what all entries share. `count` captions, each with `noises` noises; `seed` fixes captions,
    noises and reference drawings.

    held_out: captions of pairs that the teacher never saw; else of pairs that it was trained on. known:
    captions not to be asked.
    """

    def __init__(
        self, family, count, seed=1, guidance=GUIDANCE, progress=True, held_out=True, noises=1, known=()
    ):
        generator = torch.Generator().manual_seed(seed)
        self.family, self.guidance, self.reader, self.progress = family, guidance, load_reader(), progress
        captions = draw_unknown(count, generator, held_out, known)
        self.captions = Captions(
            [text for text in captions.text for _ in range(noises)],
            captions.named.repeat_interleave(noises, 0),
        )
        drawings, _ = draw_images(draw_captions(REFERENCE, generator, held_out), generator)
        self.reference, _ = read(self.reader, drawings)
        self.noise = start_noise(family, range(count * noises), seed)
        self.goal = None

    def endpoints(self, field, steps, shift, rows=None):
        """Latents reached in `steps` Euler steps at `shift`, for all captions or the first `rows`."""
        text = self.captions.text[:rows]
        return euler_endpoints(self.family, field, text, self.noise[: len(text)], steps, shift, self.guidance)

    def measure(self, field, steps, shift):
        """One row of the record: a dict of plain numbers."""
        start = time.time()
        ends = self.endpoints(field, steps, shift)
        images = torch.cat([self.family.decode(chunk) for chunk in ends.split(256)])
        seconds = time.time() - start
        return {"steps": steps, "shift": shift, **self.score(ends, images), "seconds": round(seconds, 2)}

    def score(self, ends, images):
        """Latents that were reached for all captions, and their images: a dict of plain numbers."""
        if self.goal is None:
            raise ValueError("no goal yet: call judge.set_goal(teacher) first")
        features, seen = read(self.reader, images)
        accuracy = prompt_accuracy(seen, self.captions.named)
        return {
            "prompt_accuracy": round(accuracy["named"], 4),
            "per_attribute": {k: round(v, 4) for k, v in accuracy.items()},
            "frechet": round(frechet_distance(features, self.reference), 4),
            "endpoint": round(endpoint_distance(ends, self.goal), 4),
        }

    def set_goal(self, teacher, steps=32):
        """The teacher's own endpoints at its full number of steps and the stock shift."""
        self.goal = self.endpoints(teacher, steps, STOCK)

    def floor(self):
        """Frechet distance of as many fresh drawings as there are captions: what a perfect sampler would
        score."""
        generator = torch.Generator().manual_seed(99)
        drawings, _ = draw_images(self.captions, generator)
        return round(frechet_distance(read(self.reader, drawings)[0], self.reference), 4)

    def record(self, entries, steps=STEPS):
        """All rows of all entries: {name: [row, ...]}. The one-step row needs one shift only: a single step
        has no grid."""
        jobs = [
            (e, n, s)
            for e in entries
            for n in steps
            for s in (e.shifts if n > 1 else (STOCK,))
            if not (n == max(STEPS) and s != STOCK)
        ]
        record = {e.name: [] for e in entries}
        for entry, n, shift in tqdm(jobs, desc="judging", disable=not self.progress):
            record[entry.name].append(self.measure(entry.field_for(n), n, shift))
        return record


def draw_unknown(count, generator, held_out, known):
    """`Captions` of which none is among the `known`. ValueError when there are not enough."""
    drawn = draw_captions(count * (4 if known else 1), generator, held_out)
    kept = [i for i, text in enumerate(drawn.text) if text not in known][:count]
    if len(kept) < count:
        raise ValueError(
            f"{len(kept)} of {len(drawn.text)} captions are unknown, {count} are asked for: ask for fewer"
        )
    return Captions([drawn.text[i] for i in kept], drawn.named[kept])


def at_stock(rows, steps):
    return next(r for r in rows if r["steps"] == steps and r["shift"] == STOCK)


def best_of(rows, steps):
    """The best value of each column over the shifts: the hardest baseline there is, no single shift need
    reach it."""
    rows = [r for r in rows if r["steps"] == steps]

    def pick(key, choose):
        return choose(rows, key=lambda r: r[key])

    return {
        "steps": steps,
        "shift": {k: pick(k, c)["shift"] for k, c in COLUMNS.items()},
        **{k: pick(k, c)[k] for k, c in COLUMNS.items()},
        "seconds": min(r["seconds"] for r in rows),
    }


COLUMNS = {"prompt_accuracy": max, "frechet": min, "endpoint": min}


def table(record, teacher="teacher"):
    """The record as text: a block per entry, a line per step count."""
    lines = [f"{'':46}{'steps':>6}{'prompt acc.':>13}{'Frechet':>10}{'endpoint':>10}{'seconds':>9}"]

    def line(name, r):
        return (
            f"{name:46}{r['steps']:>6}{r['prompt_accuracy']:>13.3f}{r['frechet']:>10.3f}"
            f"{r['endpoint']:>10.3f}{r['seconds']:>9.1f}"
        )

    for name, rows in record.items():
        steps = sorted({r["steps"] for r in rows})
        lines += [
            line(f"{name}, shift {STOCK:g}" if i == 0 else "", at_stock(rows, n)) for i, n in enumerate(steps)
        ]
        if name == teacher:
            several = [n for n in steps if len([r for r in rows if r["steps"] == n]) > 1]
            lines += [
                line(f"{name}, best shift per column" if i == 0 else "", best_of(rows, n))
                for i, n in enumerate(several)
            ]
    return "\n".join(lines)


def look(images, captions):
    """What the attribute reader says, for `scfm evaluate --custom_metric toy.judge:look`: (its features
    (n, 64), {"prompt accuracy":
    (n,) share of the attributes that each caption names}). images: (n, 3, 32, 32) in [-1, 1]; captions None:
    no accuracy."""
    features, seen = read(load_reader(), images)
    if captions is None:
        return features, {}
    named = torch.tensor([named_in(text) for text in captions])
    right = ((seen == named) & (named >= 0)).sum(1)
    return features, {"prompt accuracy": right / (named >= 0).sum(1)}  # nan where a caption names nothing


def named_in(text):
    """The row of `Captions.named` for a caption that somebody wrote."""
    words = text.split()

    def first(options):
        return next((word for word in words if word in options), None)

    return name_attributes(
        first(COLOURS), first(SHAPES), first(SIZES), next((p for p in PLACES if p in text), None)
    )
