"""The record, the verdicts and the figure of bench/variants.py, from the measurements that it made."""
import math

from plane_report import canvas

MARGIN = .9                                                  # a variant gains where a distance is at most this times the base's
KINDS, TINY = ("endpoints", "quality"), 1e-9


def gathered(done):
    """{"worlds": {part: {variant: {set: what was measured}}}, "ratios": {variant: {part: {kind: times the base}}}, "wins": [variant]}."""
    worlds = {}
    for job, value, _, _ in done:
        if value is not None:
            worlds.setdefault(job.part, {}).setdefault(job.label, {})[job.data] = value
    labels = [label for label in dict.fromkeys(job.label for job, *_ in done) if label != "base"]
    ratios = {label: {part: found for part, world in worlds.items() if (found := against(world, label))} for label in labels}
    return {"worlds": worlds, "ratios": ratios, "wins": [label for label, found in ratios.items() if len(found) > 1 and all(map(gains, found.values()))]}


def against(world, label):
    """{kind: geometric mean over sets and step counts of the variant's distance over the base's}; {} where one is missing."""
    mine, base = world.get(label, {}), world.get("base", {})
    if not mine or mine.keys() != base.keys():
        return {}
    pairs = {kind: [(mine[data][kind][n], base[data][kind][n]) for data in base for n in base[data][kind]] for kind in KINDS}
    return {kind: math.exp(sum(math.log(max(a, TINY) / max(b, TINY)) for a, b in found) / len(found)) for kind, found in pairs.items()}


def gains(found):
    return found["endpoints"] <= MARGIN and found["quality"] < 1 / MARGIN


def text(record):
    """All ratios as a table; below it those that win in both worlds."""
    parts = list(record["worlds"])
    lines = ["times the base (damped speakers, k/N .2, on its dial), geometric mean over 2, 3, 4 and 8 steps; below 1 is better",
             f"{'':24}" + "".join(f"{f'{part}, {kind}':>22}" for part in parts for kind in KINDS)]
    lines += [f"{label:24}" + "".join(f"{format(found[part][kind], '.3f') if part in found else '-':>22}" for part in parts for kind in KINDS)
              for label, found in record["ratios"].items()]
    return "\n".join([*lines, "wins on both: " + (", ".join(record["wins"]) or "none")])


def plot(record, path):
    """A line for each variant: full marks the distance to the teacher's endpoints, hollow the quality; 1 is the base."""
    figure, ((ax,),) = canvas(1, 1, (7.5, .32 * len(record["ratios"]) + 1.4))
    for row, found in enumerate(reversed(record["ratios"].values())):
        for i, part in enumerate(record["worlds"]):
            for kind in KINDS if part in found else ():
                ax.plot(found[part][kind], row, "os"[i], color=f"C{i}", mfc=f"C{i}" if kind == "endpoints" else "none", ms=6,
                        label=f"{part}, {kind}")
    ax.axvline(1, color="k", lw=.8)
    ax.set(yticks=range(len(record["ratios"])), yticklabels=list(reversed(record["ratios"])), xscale="log", xlabel="times the base, 2 to 8 steps (below 1 is better)")
    ax.set_xticks((.7, .8, .9, 1, 1.2, 1.5, 2), (.7, .8, .9, 1, 1.2, 1.5, 2))
    ax.minorticks_off()
    ax.grid(axis="y", alpha=.3)
    named = dict(zip(*reversed(ax.get_legend_handles_labels())))
    ax.legend(named.values(), named, fontsize=7, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
