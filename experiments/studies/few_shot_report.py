"""The record, the intervals and the figures of the study `few_shot`, from its results."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from scipy.stats import t as student_t

from experiments.runner import Job, Result

# metric -> (1 where a larger number is worse, -1 where a smaller one is, 0 for no verdict; what it is, in one
# line)
METRICS = {
    "plane": {
        "sw2": (1, "sliced Wasserstein-2 of 5000 samples to fresh data"),
        "coverage": (
            -1,
            "share of fresh data with a sample within the radius in which 95 % have other fresh data",
        ),
        "endpoint": (1, "rms distance to the teacher's own endpoints in 128 steps from the same noises"),
        "spread": (
            0,
            "deviation of the samples over that of the data; 1 is right, so no verdict rests on it",
        ),
    },
    "flux": {
        "prompt_accuracy": (
            -1,
            "share of the attributes named by the captions that a classifier of drawings sees",
        ),
        "frechet": (
            0,
            "Frechet distance on that classifier's features to drawings of such captions (not "
            "FID); of so few images it is mostly its floor, so no verdict rests on it",
        ),
        "endpoint": (1, "rms distance of the latents to the teacher's own in 32 steps from the same noises"),
        "spread": (
            -1,
            "rms deviation of pixels among images of one caption over the teacher's in 32 steps; "
            "more than 1 counts as 1",
        ),
    },
}
SCFM, DIALLED, TUNED = "SCFM", "SCFM, dialled", "fine-tuning"
ALL = "all"
LEVEL = 0.95
# metric -> (how much worse may still be called as good, whether that is a share of what all images give);
# fixed before
# the runs
MARGINS = {
    "sw2": (0.05, True),
    "endpoint": (0.05, True),
    "coverage": (0.05, False),
    "spread": (0.05, False),
    "prompt_accuracy": (0.01, False),
}
AS_GOOD, LOST, OPEN = "as good", "lost", "cannot tell"
Entry = dict[str, Any]  # {"values": {subset: number}, "mean", "half"}


def curves(job: Job, value: dict) -> Iterator[tuple[str, str, dict, dict | None]]:
    """(world, method, {steps: {metric: number}}, floor) of a measurement."""
    method = {"scfm": SCFM, "tuned": TUNED, "teacher": "teacher"}[job.family]
    for way, name in (("raw", method), ("dialled", DIALLED)):
        if job.part == "flux":
            for kind, curve in value.get(way, {}).items():
                yield f"{job.data}, {kind}", name, curve, value.get("floor", {}).get(kind)
        elif way in value:
            yield job.data, name, value[way], value.get("floor")


def gather(results: Sequence[Result]) -> dict[str, Any]:
    """worlds: {world: part, floor, teacher: {steps: {metric: number}}, methods: {method: {size: {steps:
    {metric: entry}}}}}; dials: {data: {size: {subset: {steps: scale}}}}.
    """
    worlds: dict[str, dict] = {}
    dials: dict[str, dict] = {}
    for job, value, *_ in (result for result in results if result.value is not None):
        size, subset = str(job.change.get("few") or ALL), str(job.change.get("seed", 0))
        for name, method, curve, floor in curves(job, value):
            world = worlds.setdefault(name, {"part": job.part, "floor": {}, "teacher": {}, "methods": {}})
            if method == "teacher":
                world["teacher"] = {str(n): rounded(marks) for n, marks in curve.items()}
                world["floor"] = rounded(floor)
            else:
                add_values(world["methods"].setdefault(method, {}).setdefault(size, {}), subset, curve)
        if "scales" in value:
            dials.setdefault(job.data, {}).setdefault(size, {})[subset] = value["scales"]
    for entry in (entry for world in worlds.values() for entry in entries(world["methods"])):
        entry |= interval(list(entry["values"].values()))
    return {"worlds": worlds, "dials": dials}


def add_values(steps: dict[str, dict], subset: str, curve: dict[int, dict[str, float]]) -> None:
    for n, marks in curve.items():
        for metric, number in rounded(marks).items():
            entry = steps.setdefault(str(n), {}).setdefault(metric, {"values": {}})
            entry["values"][subset] = number


def rounded(marks: dict[str, float]) -> dict[str, float]:
    return {name: round(number, 5) for name, number in marks.items()}


def entries(found: dict) -> list[Entry]:
    """All entries in nested dicts."""
    if "values" in found:
        return [found]
    return [entry for part in found.values() for entry in entries(part)]


def quantile(freedom: int) -> float:
    return float(student_t.ppf(0.5 + LEVEL / 2, freedom))


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """{mean, half}: the 95 % interval is mean +- half, by Student's t over the subsets; half is None for a
    single one.
    """
    many = len(values) > 1
    half = quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if many else None
    return {"mean": round(statistics.mean(values), 5), "half": None if half is None else round(half, 5)}


def worse_by(
    few: Sequence[float], everything: Sequence[float], sign: int, margin: tuple[float, bool] = (0.0, False)
) -> dict[str, float | None]:
    """{difference, low, high, p, margin}: how much worse few are than all, its 95 % interval, the chance of
    so much or more if they were alike (one-sided), and how much may be called as good. No interval where one
    run of each is there.

    Student's t for two samples of one variance, which shows in the runs of both: a single run of `everything`
    may then do.
    """
    freedom, whole = len(few) + len(everything) - 2, statistics.mean(everything)
    difference, allowed = sign * (statistics.mean(few) - whole), margin[0] * (abs(whole) if margin[1] else 1)
    found = {
        "difference": round(difference, 5),
        "low": None,
        "high": None,
        "p": None,
        "margin": round(allowed, 5),
    }
    if freedom < 1:
        return found
    squares = sum((v - statistics.mean(part)) ** 2 for part in (few, everything) for v in part)
    error = (squares / freedom * (1 / len(few) + 1 / len(everything))) ** 0.5
    chance = float(student_t.sf(difference / error, freedom)) if error else float(difference <= 0)
    low, high = (round(difference + side * quantile(freedom) * error, 5) for side in (-1, 1))
    return found | {"low": low, "high": high, "p": chance}


def counted(metric: str, entry: Entry) -> dict[str, float]:
    """{subset: what a verdict rests on}: images more varied than the teacher's are no gain."""
    return {subset: min(v, 1.0) if metric == "spread" else v for subset, v in entry["values"].items()}


def lost(world: dict[str, Any]) -> dict[str, dict]:
    """{method: {size: {steps: {metric: `worse_by` of that size against all images}}}}, metrics with a verdict
    alone.
    """
    found: dict[str, dict] = {}
    signs = {metric: sign for metric, (sign, _) in METRICS[world["part"]].items() if sign}
    cases = [
        (method, size, n, metric)
        for method, sizes in world["methods"].items()
        for size, steps in sizes.items()
        for n in steps
        for metric in signs
        if size != ALL
    ]
    for method, size, n, metric in cases:
        sizes = world["methods"][method]
        whole = sizes.get(ALL, {}).get(n, {}).get(metric)
        if whole:
            few, everything = (
                list(counted(metric, entry).values()) for entry in (sizes[size][n][metric], whole)
            )
            test = worse_by(few, everything, signs[metric], MARGINS[metric])
            found.setdefault(method, {}).setdefault(size, {}).setdefault(n, {})[metric] = test
    return found


def worded(tests: Sequence[dict]) -> list[dict]:
    """The tests of one size, each with its word. As good: the whole interval lies below the margin. Lost:
    Holm's procedure over the size's tests tells of a loss, at 2.5 % for all of them together. Otherwise these
    runs cannot tell.
    """
    found, still = [], True
    for place, test in enumerate(sorted(tests, key=lambda test: test["p"])):
        still = still and test["p"] <= (1 - LEVEL) / 2 / (len(tests) - place)
        found.append(test | {"word": AS_GOOD if test["high"] <= test["margin"] else LOST if still else OPEN})
    return found


def verdicts(losses: dict[str, dict]) -> dict[str, dict]:
    """{method: {"at": {size: {tests, "as good", "cannot tell": numbers, "lost": [what is lost]}}, "smallest":
    size}}.

    smallest: the smallest size at which, as at all larger ones, nothing is lost; None where no size is judged
    so.
    """
    found = {}
    for method, sizes in losses.items():
        at = {size: verdict_at(steps) for size, steps in sizes.items()}
        smallest = None
        for size in sorted(at, key=int, reverse=True):
            if at[size][LOST] or not at[size]["tests"]:
                break
            smallest = size
        found[method] = {"at": at, "smallest": smallest}
    return found


def verdict_at(steps: dict[str, dict]) -> dict[str, Any]:
    """How many tests of a size have each word, and which are lost. steps: {steps: {metric: test}}."""
    tests = worded(
        [
            {"steps": n, "metric": metric, **test}
            for n, marks in steps.items()
            for metric, test in marks.items()
            if test["low"] is not None
        ]
    )
    words = [test["word"] for test in tests]
    return {
        "tests": len(tests),
        AS_GOOD: words.count(AS_GOOD),
        OPEN: words.count(OPEN),
        LOST: [test for test in tests if test["word"] == LOST],
    }


def ahead(world: dict[str, Any]) -> dict[str, dict]:
    """{size: {steps: {metric: interval of how much better SCFM is than fine-tuning}}}, paired by subset."""
    found: dict[str, dict] = {}
    ours, theirs = (world["methods"].get(method, {}) for method in (SCFM, TUNED))
    signs = {metric: sign for metric, (sign, _) in METRICS[world["part"]].items() if sign}
    both = [(size, n) for size in ours if size in theirs for n in ours[size]]
    for size, n in both:
        for metric, sign in signs.items():
            mine, other = (counted(metric, method[size][n][metric]) for method in (ours, theirs))
            pairs = [sign * (other[subset] - mine[subset]) for subset in sorted(mine.keys() & other.keys())]
            if pairs:
                found.setdefault(size, {}).setdefault(n, {})[metric] = interval(pairs)
    return found


def add_verdicts(record: dict[str, Any]) -> dict[str, Any]:
    """Adds to each world of a record what is lost, the verdicts, and how far SCFM is ahead of fine-tuning."""
    for world in record["worlds"].values():
        world["lost"] = lost(world)
        world["verdicts"], world["ahead"] = verdicts(world["lost"]), ahead(world)
    return record


def table(record: dict[str, Any]) -> str:
    """Means and half widths, a line for each size, then the verdicts, as text."""
    lines = []
    for name, world in record["worlds"].items():
        for metric in METRICS[world["part"]]:
            lines += metric_table(name, world, metric)
        for method, verdict in world["verdicts"].items():
            counts = ", ".join(
                f"{size}: {at[AS_GOOD]} / {at[OPEN]} / {len(at[LOST])}" for size, at in verdict["at"].items()
            )
            lines += [
                "",
                f"{name}, {method}: nothing lost from {verdict['smallest'] or 'no number'} on; "
                f"as good / cannot tell / lost at {counts}",
            ]
    return "\n".join(lines)


def metric_table(name: str, world: dict[str, Any], metric: str) -> list[str]:
    steps, floor = steps_of([world]), world["floor"].get(metric)
    lines = [
        "",
        f"{name}: {metric}" + (f"   (fresh: {floor:.4g})" if floor is not None else ""),
        f"{'steps':24}" + "".join(f"{n:>18}" for n in steps),
    ]
    if world["teacher"]:
        lines.append(f"{'teacher':24}" + "".join(f"{world['teacher'][n][metric]:>18.4g}" for n in steps))
    rows = {
        f"{method}, {size}": curve
        for method, sizes in world["methods"].items()
        for size, curve in sizes.items()
    }
    return lines + [
        f"{name:24}" + "".join(f"{entry_text(curve[n][metric]):>18}" for n in steps)
        for name, curve in rows.items()
    ]


def steps_of(worlds: Iterable[dict]) -> list[str]:
    """The step counts that there are, in order."""
    worlds = list(worlds)
    curves = [world["teacher"] for world in worlds]
    curves += [curve for world in worlds for sizes in world["methods"].values() for curve in sizes.values()]
    return sorted({n for curve in curves for n in curve}, key=int)


def entry_text(entry: Entry) -> str:
    return f"{entry['mean']:.4g}" + (f" +-{entry['half']:.3g}" if entry["half"] is not None else "")
