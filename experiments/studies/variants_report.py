"""The record, the verdicts and the figure of bench/variants.py, from the measurements that it made."""
import math

from plane_report import canvas

MARGIN, WORSE = .9, .01                                      # a gain is a tenth or more; so much accuracy may be lost
KINDS, TINY = ("endpoints", "quality"), 1e-9


def gathered(done):
    """worlds: {part: {variant: {set: what was measured}}}; ratios: {variant: {part: {kind: times the base, ...}}}; chance: {part: the
    smallest ratio of the base's other seeds}; wins: [variant]."""
    worlds = {}
    for job, value, _, _ in done:
        if value is not None:
            worlds.setdefault(job.part, {}).setdefault(job.label, {})[job.data] = value
    labels = [label for label in dict.fromkeys(job.label for job, *_ in done) if label != "base"]
    ratios = {label: {part: found for part, world in worlds.items() if (found := against(world, label))} for label in labels}
    chance = {part: min([1., *(found[part]["endpoints"] for label, found in ratios.items() if of_base(label) and part in found)]) for part in worlds}
    wins = [label for label, found in ratios.items() if not of_base(label) and len(found) > 1 and all(gains(found[part], chance[part]) for part in found)]
    return {"worlds": worlds, "ratios": ratios, "chance": chance, "wins": wins}


def of_base(label):
    return label.startswith("base")


def against(world, label):
    """{kind: geometric mean over sets and step counts of the variant's distance over the base's; least accuracy: the largest fall of it; end of
    table: whether a chosen scale is the largest}; {} where a measurement is missing."""
    mine, base = world.get(label, {}), world.get("base", {})
    if not mine or mine.keys() != base.keys():
        return {}
    pairs = {kind: [(mine[data][kind][n], base[data][kind][n]) for data in base for n in base[data][kind]] for kind in KINDS}
    falls = [base[data]["accuracy"][n] - mine[data]["accuracy"][n] for data in base for n in base[data].get("accuracy", {})]
    told = {kind: math.exp(sum(math.log(max(a, TINY) / max(b, TINY)) for a, b in found) / len(found)) for kind, found in pairs.items()}
    return told | {"accuracy_lost": max(falls, default=None), "end_of_table": any(of_set["at_the_end"] for of_set in mine.values())}


def gains(found, chance):
    """Whether the endpoints come nearer by the margin and by more than chance does, and the quality holds: where accuracy was measured it decides."""
    holds = found["quality"] < 1 / MARGIN if found["accuracy_lost"] is None else found["accuracy_lost"] <= WORSE
    return found["endpoints"] <= MARGIN and found["endpoints"] < chance and holds


def text(record):
    """All ratios as a table; below it those that win in both worlds."""
    parts = list(record["worlds"])
    lines = ["times the base (damped models, k/N .2, on its dial), geometric mean over 2, 3, 4 and 8 steps; below 1 is better; > the dial stood at its end",
             f"{'':34}" + "".join(f"{f'{part}, {kind}':>22}" for part in parts for kind in KINDS)]
    for label, found in record["ratios"].items():
        cells = [f"{found[part][kind]:.3f}{'>' if found[part]['end_of_table'] else ' '}" if part in found else "- " for part in parts for kind in KINDS]
        lines.append(f"{label:34}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join([*lines, "wins on both: " + (", ".join(record["wins"]) or "none")])


def plot(record, path):
    """A line for each variant: full marks the distance to the teacher's endpoints, hollow the quality; 1 is the base, grey what its seeds do."""
    figure, ((ax,),) = canvas(1, 1, (7.5, .32 * len(record["ratios"]) + 1.4))
    for row, found in enumerate(reversed(record["ratios"].values())):
        for i, part in enumerate(record["worlds"]):
            for kind in KINDS if part in found else ():
                ax.plot(found[part][kind], row, "os"[i], color=f"C{i}", mfc=f"C{i}" if kind == "endpoints" else "none", ms=6,
                        label=f"{part}, {kind}")
    least = min(record["chance"].values(), default=1.)
    ax.axvspan(least, 1 / least, color=".92", lw=0)
    ax.axvline(1, color="k", lw=.8)
    ax.set(yticks=range(len(record["ratios"])), yticklabels=list(reversed(record["ratios"])), xscale="log", xlabel="times the base, 2 to 8 steps (below 1 is better)")
    ax.set_xticks((.7, .8, .9, 1, 1.2, 1.5, 2), (.7, .8, .9, 1, 1.2, 1.5, 2))
    ax.minorticks_off()
    ax.grid(axis="y", alpha=.3)
    named = dict(zip(*reversed(ax.get_legend_handles_labels())))
    ax.legend(named.values(), named, fontsize=7, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
