"""The record, the tables and the figures of bench/compare.py, from the measurements that it made."""
import math

from PIL import Image

import compare_flux
from compare_cells import plan, spent
from plane_report import LEVELS, axes_of_steps, canvas, gather, table
from scfm.method.lora_scale import STEPS

FLUX = compare_flux.NAME
STYLES = {"Reflow raw": "C0o-", "progressive own stage": "C1o-", "consistency re-noised": "C2o-", "Shortcut raw": "C4o-",
          "MeanFlow raw": "C5o-", "SCFM, Algorithm 2 raw": "C3.--", "SCFM, tuned dialled": "C3o-", "SCFM, tuned stepwise": "C3*-"}
ON_FLUX_ALONE, BOLD = "SCFM, tuned dialled", "SCFM, tuned stepwise"             # the plane has better, and many lines
FLUX_LEVELS = (30, 50, 70, 100, 150, 200, 300, 500, 1000)
FREE_STYLES = {"teacher euler": "ko-", "teacher midpoint": "ks--", "teacher multistep": "k^:"}
BESIDE = ("coupling", "scales", "deviation", "accuracy")          # curves of something else than the quality
NEEDS = {"teacher euler": "nothing", "teacher midpoint": "nothing", "teacher heun": "nothing", "teacher multistep": "nothing", "Reflow raw": "stored pairs",
         "progressive own stage": "a network a stage", "consistency re-noised": "re-noising", "consistency raw": "nothing", "Shortcut raw": "a second input",
         "MeanFlow raw": "a second input, a JVP", "SCFM, Algorithm 2 raw": "nothing", "SCFM, Algorithm 2 dialled": "a dial", "SCFM, Algorithm 2 stepwise": "a dial for each step",
         "SCFM, Algorithm 1 stepwise": "a dial for each step", "SCFM, self grid 2 stepwise": "a dial for each step",
         "SCFM, damped dialled": "a dial", "SCFM, tuned dialled": "a dial", "SCFM, damped stepwise": "a dial for each step",
         "SCFM, tuned stepwise": "a dial for each step"}


def gathered(done, protocol, flux_protocol, budgets):
    """floor; free: the teacher's curves; budgets: for each its evaluations, what each method makes of them, and the curves.

    budgets: {name: (evaluations on the plane, on the tiny Flux)}.
    """
    free = of_jobs(done, lambda job: job.budget == 0)
    record = {"floor": free["floor"], "free": free["main"], "budgets": {}}
    for name, (plane, flux) in budgets.items():
        methods = sorted({job.family for job, *_ in done if job.budget == plane and job.data != FLUX})
        step_lora = sorted({job.family for job, *_ in done if 0 < job.budget == flux and job.data == FLUX})
        main = of_jobs(done, lambda job: 0 < job.budget == (flux if job.data == FLUX else plane))["main"]
        record["budgets"][name] = {
            "evaluations": plane, "methods": {m: cost(plan(protocol, m, plane), spent(protocol, m, plane)) for m in methods},
            "flux_evaluations": flux, "flux_methods": {m: cost(compare_flux.plan(flux_protocol, m, flux), compare_flux.spent(flux_protocol, m, flux))
                                                          for m in step_lora}, "main": main}
    return record


def of_jobs(done, wanted):
    return gather([(job._replace(part="main"), *rest) for job, *rest in done if wanted(job)])


def cost(planned, evaluations):
    return {"updates": planned[0], "pairs": planned[1], "evaluations": evaluations}


def ruler(data):
    return "Frechet (toy reader, not FID)" if data == FLUX else "SW2 to the data"


def plot(record, path):
    """A row for each budget, a column for each set."""
    sets = list(record["free"])
    figure, axes = canvas(len(record["budgets"]), len(sets), (4.4 * len(sets), 10))
    for row, (name, found) in zip(axes, record["budgets"].items()):
        for ax, data in zip(row, sets):
            spent_there = found["flux_evaluations" if data == FLUX else "evaluations"]
            draw(ax, record, found, data, f"{data}, {name} ({spent_there:,} evaluations)") if data in found["main"] else ax.axis("off")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8)
    figure.tight_layout(rect=(0, .06, 1, 1))
    figure.savefig(path, dpi=80)


def plot_summary(record, path, budget="medium"):
    """One budget on a screen: the sets of the plane, the tiny Flux by two rulers, and the legend."""
    places = [(data, "") for data in sorted(record["free"], key=lambda data: data == FLUX)] + [(FLUX, " coupling")] * (FLUX in record["free"])
    figure, axes = canvas(-(-(len(places) + 1) // 3), 3, (10.8, 3 * -(-(len(places) + 1) // 3)))
    cells = [ax for row in axes for ax in row]
    for ax, (data, kind) in zip(cells, places):
        draw(ax, record, record["budgets"][budget], data, data + (", endpoints" if kind else ""), kind)
    for ax in cells[len(places):]:
        ax.axis("off")
    named = {label: line for ax in cells for line, label in zip(*ax.get_legend_handles_labels())}
    cells[len(places)].legend(named.values(), named.keys(), loc="center left", fontsize=8.5, frameon=False)
    figure.suptitle(f"Few-step methods from one teacher, {budget} budget: lower is better", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)       # a third of the bytes, for the page that shows it


def draw(ax, record, found, data, title, kind=""):
    """Every curve of STYLES that there is. kind: of the curve, such as " coupling"."""
    curves = record["free"][data] | found["main"].get(data, {})
    for label, style in {**FREE_STYLES, **STYLES}.items():
        curve = {n: e for n, e in curves.get(label + kind, {}).items() if e["mean"] > 0}         # the tiny Flux's goal is the teacher's own 32 steps
        if curve and (label != ON_FLUX_ALONE or data == FLUX):
            ax.errorbar(list(curve), [e["mean"] for e in curve.values()], [e["spread"] or 0 for e in curve.values()], fmt=style,
                        ms=7 if label == BOLD else 3, lw=2 if label == BOLD else 1, elinewidth=.6, label=label)
    floor = record["floor"].get(data) if not kind else None
    if floor:                                                # one number on the tiny Flux, a band of 95 % on the plane
        ax.axhspan(floor["low"] or .99 * floor["mean"], floor["high"] or 1.01 * floor["mean"], color="C2", alpha=.25, lw=0,
                   label="data against data")
    axes_of_steps(ax, STEPS, title, FLUX_LEVELS if data == FLUX and not kind else LEVELS)
    ax.set_ylabel("distance to the teacher's endpoints" if kind else ruler(data))


def text(record):
    """All curves of the quality as text, by budget."""
    quality = lambda of: {label: curve for label, curve in of.items() if not label.endswith(BESIDE)}
    free = {data: quality(of) for data, of in record["free"].items()}
    floor = {data: found for data, found in record["floor"].items() if data != FLUX}
    parts = [table({"main": free, "floor": floor, "targets": {}}), floor_of_flux(record)]
    for name, found in record["budgets"].items():
        curves = {data: quality(of) for data, of in found["main"].items()}
        parts += [f"\n{name}: {found['evaluations']:,} evaluations on the plane, {found['flux_evaluations']:,} on the tiny Flux",
                  table({"main": curves, "floor": {}, "targets": {}})]
    return "\n".join(parts)


def over_sets(record, budget, label, steps):
    """Of a curve at a step count: the geometric mean over the plane's sets of its value over the best of all curves, and whether it lies
    on every set within what data score against data. None where it is missing."""
    ratios, in_noise = [], True
    for data, of in record["free"].items():
        if data != FLUX:
            curves = quality_of(record, budget, data)
            best = min((c[steps]["mean"] for c in curves.values() if steps in c), default=None)
            if best is None or steps not in curves.get(label, {}):
                return None
            ratios.append(curves[label][steps]["mean"] / best)
            in_noise &= data in record["floor"] and curves[label][steps]["mean"] <= record["floor"][data]["high"]
    return (math.exp(sum(map(math.log, ratios)) / len(ratios)), in_noise) if ratios else None


def floor_of_flux(record):
    """What the Frechet distance on the tiny Flux cannot get below, as a sentence; empty where it was not measured."""
    if FLUX not in record["floor"]:
        return ""
    count, floor = record["protocol"]["flux"]["judged"], record["floor"][FLUX]["mean"]
    return f"tiny Flux: {count} images, of which fresh drawings score {floor:.0f}; one seed"


def quality_of(record, budget, data):
    """The curves that the summary shows, of one set at one budget."""
    curves = record["free"][data] | record["budgets"][budget]["main"].get(data, {})
    return {label: curves[label] for label in NEEDS if label in curves}


def summary(record, budget="medium", steps=(1, 2, 3, 4, 8, 32)):
    """One table for a screen: on the plane times the best of that column, on the tiny Flux the Frechet distance itself."""
    found = record["budgets"][budget]
    flux = quality_of(record, budget, FLUX) if FLUX in record["free"] else {}
    show = lambda value: f"{format(value, '.0f') if value is not None else '-':>7}"
    times = lambda pair: f"{pair[0]:6.2f}{'=' if pair[1] else ' '}" if pair else f"{'-':>6} "
    lines = [f"{budget}: {found['evaluations']:,} evaluations on the plane, {found['flux_evaluations']:,} on the tiny Flux",
             f"{'':26}{'plane: times the best there':^{7 * len(steps)}}  {'tiny Flux: Frechet':^{7 * len(steps)}}",
             f"{'':26}" + "".join(f"{n:7}" for n in steps) + "  " + "".join(f"{n:7}" for n in steps) + "  needs"]
    for label, needs in NEEDS.items():
        plane = [over_sets(record, budget, label, n) for n in steps]
        step_lora = [flux.get(label, {}).get(n, {}).get("mean") for n in steps]
        lines.append(f"{label:26}" + "".join(map(times, plane)) + "  " + "".join(map(show, step_lora)) + f"  {needs}")
    lines += ["= on every set within what data score against data; means of the seeds", floor_of_flux(record)]
    return "\n".join(lines)
