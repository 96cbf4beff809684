"""The record, the intervals and the figures of bench/few_shot.py, from the measurements that it made."""
import statistics

from scipy.stats import t as student_t

from plane_report import canvas

# metric -> (1 where a larger number is worse, -1 where a smaller one is; what it is, in one line)
METRICS = {
    "plane": {"sw2": (1, "sliced Wasserstein-2 of 5000 samples to fresh data"),
              "coverage": (-1, "share of fresh data with a sample within the radius in which 95 % have other fresh data"),
              "endpoint": (1, "rms distance to the teacher's own endpoints in 128 steps from the same noises"),
              "spread": (0, "deviation of the samples over that of the data; 1 is right, so no verdict rests on it")},
    "flux": {"prompt_accuracy": (-1, "share of the attributes named by the captions that a classifier of drawings sees"),
             "frechet": (0, "Frechet distance on that classifier's features to drawings of such captions (not FID); of so few images it is "
                           "mostly its floor, so no verdict rests on it"),
             "endpoint": (1, "rms distance of the latents to the teacher's own in 32 steps from the same noises"),
             "spread": (-1, "rms deviation of pixels among images of one caption over the teacher's in 32 steps; more than 1 "
                        "counts as 1")}}
SCFM, DIALLED, TUNED = "SCFM", "SCFM, dialled", "fine-tuning"
ALL = "all"
LEVEL = .95
# metric -> (how much worse may still be called as good, whether that is a share of what all images give); fixed before the runs
MARGINS = {"sw2": (.05, True), "endpoint": (.05, True), "coverage": (.05, False), "spread": (.05, False), "prompt_accuracy": (.01, False)}
AS_GOOD, LOST, OPEN = "as good", "lost", "cannot tell"


def curves(job, value):
    """(world, method, {steps: {metric: number}}, floor) of a measurement."""
    method = {"scfm": SCFM, "tuned": TUNED, "teacher": "teacher"}[job.family]
    for way, name in (("raw", method), ("dialled", DIALLED)):
        if job.part == "flux":
            for kind, curve in value.get(way, {}).items():
                yield f"{job.data}, {kind}", name, curve, value.get("floor", {}).get(kind)
        elif way in value:
            yield job.data, name, value[way], value.get("floor")


def gather(done):
    """worlds: {world: part, floor, teacher: {steps: {metric: number}}, methods: {method: {size: {steps: {metric: entry}}}}};
    dials: {data: {size: {subset: {steps: scale}}}}."""
    worlds, dials = {}, {}
    for job, value, _, _ in done:
        if value is None:
            continue
        size = str(job.size or ALL)
        for world, method, curve, floor in curves(job, value):
            kept = worlds.setdefault(world, {"part": job.part, "floor": {}, "teacher": {}, "methods": {}})
            if method == "teacher":
                kept["teacher"] = {str(n): rounded(marks) for n, marks in curve.items()}
                kept["floor"] = rounded(floor)
                continue
            for n, marks in curve.items():
                found = kept["methods"].setdefault(method, {}).setdefault(size, {}).setdefault(str(n), {})
                for metric, number in rounded(marks).items():
                    found.setdefault(metric, {"values": {}})["values"][str(job.subset)] = number
        if "scales" in value:
            dials.setdefault(job.data, {}).setdefault(size, {})[str(job.subset)] = value["scales"]
    for entry in (e for world in worlds.values() for e in entries(world["methods"])):
        entry |= interval(list(entry["values"].values()))
    return {"worlds": worlds, "dials": dials}


def rounded(marks):
    return {name: round(number, 5) for name, number in marks.items()}


def entries(found):
    """All entries in nested dicts."""
    if "values" in found:
        return [found]
    return [entry for part in found.values() for entry in entries(part)]


def quantile(freedom):
    return float(student_t.ppf(.5 + LEVEL / 2, freedom))


def interval(values):
    """{mean, half}: the 95 % interval is mean +- half, by Student's t over the subsets; half is None for a single one."""
    many = len(values) > 1
    half = quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** .5 if many else None
    return {"mean": round(statistics.mean(values), 5), "half": None if half is None else round(half, 5)}


def worse_by(few, everything, sign, margin=(0., False)):
    """{difference, low, high, p, margin}: how much worse few are than all, its 95 % interval, the chance of so much or more if they
    were alike (one-sided), and how much may be called as good. No interval where one run of each is there.

    Student's t for two samples of one variance, which shows in the runs of both: a single run of `everything` may then do."""
    freedom, whole = len(few) + len(everything) - 2, statistics.mean(everything)
    difference, allowed = sign * (statistics.mean(few) - whole), margin[0] * (abs(whole) if margin[1] else 1)
    if freedom < 1:
        return {"difference": round(difference, 5), "low": None, "high": None, "p": None, "margin": round(allowed, 5)}
    squares = sum((v - statistics.mean(part)) ** 2 for part in (few, everything) for v in part)
    error = (squares / freedom * (1 / len(few) + 1 / len(everything))) ** .5
    chance = float(student_t.sf(difference / error, freedom)) if error else float(difference <= 0)
    low, high = (round(difference + side * quantile(freedom) * error, 5) for side in (-1, 1))
    return {"difference": round(difference, 5), "low": low, "high": high, "p": chance, "margin": round(allowed, 5)}


def counted(metric, entry):
    """{subset: what a verdict rests on}: images more varied than the teacher's are no gain."""
    return {subset: min(v, 1.) if metric == "spread" else v for subset, v in entry["values"].items()}


def lost(world):
    """{method: {size: {steps: {metric: `worse_by` of that size against all images}}}}, metrics with a verdict alone."""
    found = {}
    for method, sizes in world["methods"].items():
        for size, steps in sizes.items():
            for n, marks in steps.items():
                for metric, (sign, _) in METRICS[world["part"]].items():
                    whole = sizes.get(ALL, {}).get(n, {}).get(metric)
                    if size != ALL and sign and whole:
                        told = worse_by(*(list(counted(metric, entry).values()) for entry in (marks[metric], whole)), sign, MARGINS[metric])
                        found.setdefault(method, {}).setdefault(size, {}).setdefault(n, {})[metric] = told
    return found


def worded(tests):
    """The tests of one size, each with its word. As good: the whole interval lies below the margin. Lost: Holm's procedure over the size's tests
    tells of a loss, at 2.5 % for all of them together. Otherwise these runs cannot tell."""
    found, still = [], True
    for place, test in enumerate(sorted(tests, key=lambda test: test["p"])):
        still = still and test["p"] <= (1 - LEVEL) / 2 / (len(tests) - place)
        found.append(test | {"word": AS_GOOD if test["high"] <= test["margin"] else LOST if still else OPEN})
    return found


def verdicts(losses):
    """{method: {"at": {size: {tests, "as good", "cannot tell": numbers, "lost": [what is lost]}}, "smallest": size}}.

    smallest: the smallest size at which, as at all larger ones, nothing is lost; None where that is said of no size."""
    found = {}
    for method, sizes in losses.items():
        at = {}
        for size, steps in sizes.items():
            tests = worded([{"steps": n, "metric": metric, **told} for n, marks in steps.items() for metric, told in marks.items()
                            if told["low"] is not None])
            count = lambda word: sum(test["word"] == word for test in tests)
            at[size] = {"tests": len(tests), AS_GOOD: count(AS_GOOD), OPEN: count(OPEN), LOST: [test for test in tests if test["word"] == LOST]}
        smallest = None
        for size in sorted(at, key=int, reverse=True):
            if at[size][LOST] or not at[size]["tests"]:
                break
            smallest = size
        found[method] = {"at": at, "smallest": smallest}
    return found


def ahead(world):
    """{size: {steps: {metric: interval of how much better SCFM is than fine-tuning}}}, paired by subset."""
    found, methods = {}, world["methods"]
    for size in (size for size in methods.get(SCFM, {}) if size in methods.get(TUNED, {})):
        for n, marks in methods[SCFM][size].items():
            for metric, (sign, _) in METRICS[world["part"]].items():
                ours, other = (counted(metric, entry) for entry in (marks[metric], methods[TUNED][size][n][metric]))
                both = ours.keys() & other.keys()
                if sign and both:
                    pairs = [sign * (other[subset] - ours[subset]) for subset in sorted(both)]
                    found.setdefault(size, {}).setdefault(n, {})[metric] = interval(pairs)
    return found


def judged(record):
    """Adds to each world of a record what is lost, the verdicts, and how far SCFM is ahead of fine-tuning."""
    for world in record["worlds"].values():
        world["lost"] = lost(world)
        world["verdicts"], world["ahead"] = verdicts(world["lost"]), ahead(world)
    return record


def table(record):
    """Means and half widths, a line for each size, then the verdicts, as text."""
    lines = []
    for name, world in record["worlds"].items():
        for metric in METRICS[world["part"]]:
            steps = steps_of([world])
            lines += ["", f"{name}: {metric}" + (f"   (fresh: {world['floor'][metric]:.4g})" if metric in world["floor"] else ""),
                      f"{'steps':24}" + "".join(f"{n:>18}" for n in steps)]
            if world["teacher"]:
                lines.append(f"{'teacher':24}" + "".join(f"{world['teacher'][n][metric]:>18.4g}" for n in steps))
            for method, sizes in world["methods"].items():
                lines += [f"{method + ', ' + size:24}" + "".join(f"{told(curve[n][metric]):>18}" for n in steps)
                          for size, curve in sizes.items()]
        for method, verdict in world["verdicts"].items():
            lines += ["", f"{name}, {method}: nothing lost from {verdict['smallest'] or 'no number'} on; as good / cannot tell / lost at "
                      + ", ".join(f"{size}: {at[AS_GOOD]} / {at[OPEN]} / {len(at[LOST])}" for size, at in verdict["at"].items())]
    return "\n".join(lines)


def told(entry):
    return f"{entry['mean']:.4g}" + (f" +-{entry['half']:.3g}" if entry["half"] is not None else "")


LEVELS = (.01, .015, .02, .03, .04, .05, .07, .1, .15, .2, .3, .4, .5, .7, 1, 1.5, 2)      # marks of a logarithmic axis
STYLES = {SCFM: "C3o-", DIALLED: "C1o-", TUNED: "C0s--"}
SUMMARY = ("checkerboard", "moons", "8 gaussians", "tiny Flux, held-out pairs")


def plot(record, part, path):
    """A row for each world and metric of a part, a column for each number of steps: means and 95 % intervals by size."""
    worlds = {name: world for name, world in record["worlds"].items() if world["part"] == part and world["methods"]}
    draw(worlds, [(name, metric) for name in worlds for metric, (sign, _) in METRICS[part].items() if sign], path)


def plot_summary(record, path):
    """The distance to the teacher's endpoints alone, on those of `SUMMARY` that were measured; nothing where none was."""
    worlds = {name: world for name, world in record["worlds"].items() if name in SUMMARY and world["methods"]}
    if worlds:
        draw(worlds, [(name, "endpoint") for name in worlds], path)


def draw(worlds, rows, path):
    """A figure of panels. rows: [(world, metric)]."""
    steps, sizes = steps_of(worlds.values()), sizes_of(worlds.values())
    figure, axes = canvas(len(rows), len(steps), (3.2 * len(steps), 2.1 * len(rows) + .6))
    for line, (name, metric) in zip(axes, rows):
        for ax, n in zip(line, steps):
            panel(ax, worlds[name], sizes, n, metric)
            ax.set_title(f"{name}, {n} steps", fontsize=8)
        line[0].set_ylabel(metric, fontsize=8)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="lower center", ncol=5, fontsize=8)
    figure.tight_layout(rect=(0, .5 / (2.1 * len(rows) + .6), 1, 1))
    figure.savefig(path, dpi=60)


def steps_of(worlds):
    """The step counts that there are, in order."""
    curves = [curve for world in worlds for sizes in world["methods"].values() for curve in sizes.values()]
    return sorted({n for curve in (*curves, *(world["teacher"] for world in worlds)) for n in curve}, key=int)


def sizes_of(worlds):
    """The sizes that there are, `all` last."""
    there = {size for world in worlds for sizes in world["methods"].values() for size in sizes}
    return sorted(there - {ALL}, key=int) + [ALL] * (ALL in there)


def panel(ax, world, sizes, n, metric):
    """One metric at one number of steps against the number of images."""
    for method, style in STYLES.items():
        of = {size: curve[n][metric] for size, curve in world["methods"].get(method, {}).items() if n in curve}
        there = [size for size in sizes if size in of]
        ax.errorbar([sizes.index(size) for size in there], [of[size]["mean"] for size in there],
                    [of[size]["half"] or 0 for size in there], fmt=style, ms=3, lw=1, capsize=2, label=method)
    if n in world["teacher"]:
        ax.axhline(world["teacher"][n][metric], color="C7", lw=.8, ls=":", label="teacher, untouched")
    if metric in world["floor"]:
        ax.axhline(world["floor"][metric], color="C2", lw=.8, label="fresh data")
    ax.set_xticks(range(len(sizes)), sizes)
    ax.tick_params(labelsize=7)
    if metric in ("sw2", "endpoint") and ax.dataLim.intervaly.min() > 1e-6:   # fine-tuning lies many times above the rest
        ax.set_yscale("log")
        limits = ax.get_ylim()
        ax.set_yticks(LEVELS, [f"{level:g}" for level in LEVELS])
        ax.minorticks_off()
        ax.set_ylim(limits)
