"""The record, the verdicts and the figures of bench/plane.py, from the measurements that it made."""
import statistics

from scfm.method.lora_scale import STEPS

AIMS = {"checkerboard": {3: .045, 4: .040, 8: .033}}         # SW2 that the dialled student should reach
RECOMMENDED = "damped, k/N .2"
RIVALS, MARGIN = ("teacher euler", "teacher midpoint"), 1.05


def gather(done):
    """The numbers of all measurements: `main` has curve -> step count -> mean, spread over seeds, every seed."""
    record = {"floor": {}, "main": {}, "ablations": {}, "choosers": {}, "teacher shift": {}}
    for job, value, _, _ in done:
        if value is None:
            continue
        if job.family == "choosers":
            record["choosers"].setdefault(job.data, {})[job.seed] = value
        elif job.family in record:                           # floor, teacher shift: one value for a set
            record[job.family][job.data] = value
        elif job.part == "ablations":
            record["ablations"].setdefault(job.family, {})[job.label] = value
        else:
            for curve, numbers in value.items():
                kept = record["main"].setdefault(job.data, {}).setdefault(f"{job.label} {curve}", {})
                for n, number in numbers.items():
                    kept.setdefault(n, {"seeds": []})["seeds"].append(number)
    for entry in (e for curves in record["main"].values() for curve in curves.values() for e in curve.values()):
        entry["mean"] = statistics.mean(entry["seeds"])
        entry["spread"] = statistics.stdev(entry["seeds"]) if len(entry["seeds"]) > 1 else None
    return record


def targets(record):
    """{recipe: the aims beside what its dialled students reached}, and how often the dial stood on the teacher itself."""
    recipes = dict.fromkeys(name.removesuffix(" dialled") for curves in record["main"].values() for name in curves
                            if name.endswith(" dialled"))
    return {recipe: targets_of(recipe, record) for recipe in recipes}


def targets_of(recipe, record):
    """The rival is the best that the teacher does in at most as many evaluations, on as many seeds as the recipe has."""
    against, aims, chosen = [], [], []
    for data, curves in record["main"].items():
        if not {f"{recipe} dialled", *RIVALS} <= curves.keys() or data not in record["floor"]:
            continue
        dialled, band = curves[f"{recipe} dialled"], record["floor"][data]["high"]
        for n in (n for n in STEPS if n >= 3):
            ours, seeds = dialled[n]["mean"], len(dialled[n]["seeds"])
            rival, name = min((statistics.mean(entry["seeds"][:seeds]), f"{name} {m}")
                              for name in RIVALS for m, entry in curves[name].items() if m <= n)
            against.append({"data": data, "evaluations": n, "dialled": ours, "rival": name, "teacher": rival, "seeds": seeds,
                            "ratio": ours / rival, "band": band, "met": ours <= max(MARGIN * rival, band),
                            "met_without_the_band": ours <= MARGIN * rival})
        for n, aim in AIMS.get(data, {}).items():
            ours = dialled[n]["mean"]
            aims.append({"data": data, "evaluations": n, "dialled": ours, "aim": aim, "met": ours <= aim})
        chosen += [s for entry in curves[f"{recipe} scales"].values() for s in entry["seeds"]]
    return {"against_teacher": against, "aims": aims, "scale_0_chosen": chosen.count(0), "scales_chosen": len(chosen)}


def table(record):
    """The main numbers and the verdicts as text."""
    lines = []
    for data, curves in record["main"].items():
        floor = record["floor"].get(data)
        lines += ["", data + ("   floor {mean:.3f}, band {low:.3f} to {high:.3f}".format(**floor) if floor else ""),
                  " " * 26 + "".join(f"{n:>15}" for n in STEPS)]
        lines += [f"{name:26}" + "".join(f"{entry_text(curve.get(n)):>15}" for n in STEPS) for name, curve in curves.items()]
    for recipe, found in record["targets"].items():
        both = found["against_teacher"] + found["aims"]
        missed = [t for t in both if not t["met"]]
        lines += ["", f"{recipe}: {len(missed)} of {len(both)} targets missed; scale 0 chosen "
                      f"{found['scale_0_chosen']} times of {found['scales_chosen']}"]
        lines += [f"  {t['data']}, {t['evaluations']} evaluations: {t['dialled']:.4f}, "
                  + (f"aim {t['aim']}" if "aim" in t else f"{t['rival']} {t['teacher']:.4f}") for t in missed]
    return "\n".join(lines)


def entry_text(entry):
    """A mean, with its spread where there are several seeds."""
    if entry is None:
        return "-"
    return f"{entry['mean']:.3f}" + (f" +-{entry['spread']:.3f}" if entry["spread"] is not None else "")


STYLES = {"teacher euler": dict(color="C7", marker="o", label="teacher, Euler"),
          "teacher midpoint": dict(color="C7", marker="s", ls="--", label="teacher, midpoint"),
          "teacher heun": dict(color="C7", marker="^", ls=":", label="teacher, Heun"),
          "paper raw": dict(color="C0", marker=".", ls="--", label="student by the paper, raw"),
          "paper dialled": dict(color="C0", marker=".", label="student by the paper, dialled"),
          "damped dialled": dict(color="C3", marker=".", label="damped models, dialled"),
          "damped, k/N .2 raw": dict(color="C1", marker=".", ls="--", label="damped models, k/N .2, raw"),
          "damped, k/N .2 dialled": dict(color="C1", marker="o", lw=2, label="damped models, k/N .2, dialled")}


LEVELS = (.01, .02, .03, .05, .1, .2, .3, .5, 1)             # marks of the axis of SW2


def canvas(rows, columns, size):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False)


def axes_of_steps(ax, steps, title, levels=LEVELS):
    ax.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="SW2 to the data")
    ax.set_xticks(steps, steps)
    limits = ax.get_ylim()
    ax.set_yticks(levels, [f"{level:g}" for level in levels])
    ax.minorticks_off()
    ax.set_ylim(limits)
    ax.set_title(title, fontsize=9)


def plot(record, path):
    """SW2 against evaluations, a panel for each set: mean, and spread over seeds as bars."""
    figure, axes = canvas(1, len(record["main"]), (13, 4.8))
    for ax, (data, curves) in zip(axes[0], record["main"].items()):
        for name, style in STYLES.items():
            curve = curves.get(name, {})
            ax.errorbar(list(curve), [e["mean"] for e in curve.values()], [e["spread"] or 0 for e in curve.values()],
                        capsize=2, ms=4, **{"lw": 1, **style})
        if data in record["floor"]:
            floor = record["floor"][data]
            ax.axhspan(floor["low"], floor["high"], color="C2", alpha=.25, lw=0, label="data against data, 95 %")
        axes_of_steps(ax, STEPS, data)
    against = record["targets"].get(RECOMMENDED, {}).get("against_teacher", [])
    figure.suptitle(f"From 3 evaluations on the dialled student ({RECOMMENDED}) is within {MARGIN} times its teacher's "
                    f"best, or in the noise, in {sum(t['met'] for t in against)} cases of {len(against)}", fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, .12, 1, 1))
    figure.savefig(path, dpi=90)


def plot_ablations(record, path):
    """A panel for each family: dialled as lines, raw as dashes."""
    families = record["ablations"]
    figure, axes = canvas(3, 4, (14, 9))
    for ax, (family, curves) in zip(axes.flat, families.items()):
        for i, (label, value) in enumerate(curves.items()):
            steps = list(value["dialled"])
            ax.plot(steps, list(value["dialled"].values()), f"C{i}o-", ms=3, label=label)
            ax.plot(steps, list(value["raw"].values()), f"C{i}--", lw=.8)
        axes_of_steps(ax, steps, family)
        ax.legend(fontsize=7)
    plot_choosers(record, axes[-1][-1])
    protocol = record["protocol"]
    figure.suptitle(f"One thing changed of the paper's recipe: {protocol['ablated']}, seed 0, "
                    f"{protocol['ablation_updates']} updates; lines: dialled, dashes: raw", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def plot_choosers(record, ax):
    """What each way of choosing the scale costs: the mean over sets and seeds of its SW2 over that of the best scale."""
    cells = [cell for seeds in record["choosers"].values() for cell in seeds.values()]
    for i, name in enumerate(("endpoints", "median endpoint", "cloud")):
        for style, kind in (("o--", name), ("o-", f"{name}, free")):
            steps = list(cells[0][kind]) if cells else []
            lost = [statistics.mean(c[kind][n][1] / c["best, free"][n][1] for c in cells) for n in steps]
            ax.plot(range(len(steps)), lost, f"C{i}{style}", ms=3, label=kind)
            ax.set_xticks(range(len(steps)), steps)
    ax.set(xlabel="network evaluations", ylabel="SW2 over that of the best scale")
    ax.set_title("ways to choose the scale, damped", fontsize=9)
    ax.set_ylim(.98, 1.25)
    ax.legend(fontsize=7, ncol=2, loc="upper center")
