"""The record and the figures of bench/ablations.py, from the measurements that it made; its chapter draws with them too."""
import math
import statistics

SCORED = (2, 3, 4, 8)                                        # the step counts of a score
KINDS = ("raw", "dialled")


def gathered(done):
    """floor, teacher: set -> ...; plane: family -> set -> label -> what `run` gave; grids: "first, second" -> first -> second -> ...;
    flux: family -> label -> ...; flux_teacher. Step counts and updates are text, as in a JSON file."""
    record = {"floor": {}, "teacher": {}, "plane": {}, "grids": {}, "flux": {}, "flux_teacher": {}}
    for job, value, _, _ in done:
        if value is None:
            continue
        value = rounded(value)
        if job.family == "teacher" and job.part == "flux":
            record["flux_teacher"] = value
        elif job.family in ("teacher", "floor"):
            record[job.family][job.data] = value
        elif job.part == "grids":
            first, second = job.label.split("|")
            record["grids"].setdefault(job.family, {}).setdefault(first, {})[second] = value
        elif job.part == "flux":
            record["flux"].setdefault(job.family, {})[job.label] = value
        else:
            record["plane"].setdefault(job.family, {}).setdefault(job.data, {})[job.label] = value
    return record


def rounded(value):
    """Numbers to five digits, keys as text, all the way down."""
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


def last(value):
    """What the last look at a run gave."""
    return value["looks"][max(value["looks"], key=int)]


def score(curve):
    """The geometric mean of a curve {steps: SW2} at `SCORED`."""
    return math.exp(statistics.mean(math.log(curve[str(n)]) for n in SCORED))


def most_sensitive(done, candidates, data, small=False):
    """([{"family", "raw", "dialled", "beyond_chance"}, ...] from the largest dialled span down, the names of the first two or ()).

    candidates: family -> the labels that count. The span of a family is the mean over `SCORED` of log(worst / best) over these after the
    last update; beyond chance: twice that of the family `seed` or more. A family that is not whole is left out, and then nothing is
    chosen. small: fewer labels will do, as in a smoke run."""
    found = {}
    for job, value, _, _ in done:
        if job.part == "plane" and job.data == data and job.label in {**candidates, "seed": (job.label,)}.get(job.family, ()):
            found.setdefault(job.family, {})[job.label] = value and last(rounded(value))
    whole = {family: looks for family, looks in found.items() if all(looks.values()) and (small or len(looks) >= len(candidates.get(family, looks)))}

    def span(looks, kind):
        columns = [[look[kind][str(n)] for look in looks.values()] for n in SCORED]
        return round(statistics.mean(math.log(max(column) / min(column)) for column in columns), 4)
    chance = span(whole.pop("seed"), "dialled") if "seed" in whole else 0.
    ranked = [{"family": family, **{kind: span(looks, kind) for kind in KINDS}} for family, looks in whole.items()]
    ranked = [row | {"beyond_chance": row["dialled"] >= 2 * chance} for row in sorted(ranked, key=lambda row: -row["dialled"])]
    return ranked, tuple(row["family"] for row in ranked[:2]) if set(whole) == set(candidates) else ()


# As text


def text(record):
    """Every family's last look: raw, dialled."""
    lines = []
    for family, sets in record["plane"].items():
        for data, values in sets.items():
            lines += ["", f"{family}, {data}", *table(values)]
    for grid, rows in record["grids"].items():
        lines += ["", f"{grid}: score raw, dialled"]
        lines += [f"  {a:>12} {b:>12}" + "".join(f"{score(last(value)[kind]):8.3f}" for kind in KINDS)
                  for a, row in rows.items() for b, value in row.items()]
    for family, values in record["flux"].items():
        lines += ["", f"{family}, tiny Flux, slow EMA", *table({label: of("ema_slow", value) for label, value in values.items()})]
    lines += ["", "span of log SW2 over the values tried", *(f"  {row['family']:20} raw {row['raw']:.2f}, dialled {row['dialled']:.2f}"
                                                             + ("" if row["beyond_chance"] else "   (not told from three seeds)") for row in record["sensitivity"])]
    return "\n".join(lines)


def table(values):
    """A line for each value: raw and dialled at each step count, after the last update."""
    steps = list(last(next(iter(values.values())))["raw"])
    lines = [f"{'':24}" + "".join(f"{n:>8}" for n in steps) + "   dialled" + "".join(f"{n:>8}" for n in steps)]
    for label, value in values.items():
        raw, dialled = (last(value)[kind] for kind in KINDS)
        lines.append(f"{label:24}" + "".join(f"{raw[n]:8.3f}" for n in steps) + "          " + "".join(f"{dialled[n]:8.3f}" for n in steps))
    return lines


def of(who, value):
    """A run of the tiny Flux as one of the plane: who is read out."""
    return {**value, "looks": {updates: found[who] for updates, found in value["looks"].items()}}


# As figures. Each function draws into axes that it is given.


LEVELS = (.03, .04, .05, .07, .1, .15, .2, .3, .5, .7, 1)    # marks of the axis of the score


def heat_map(ax, rows, columns, values, title, by_column=True):
    """The numbers themselves, the darker the further from the best: of the column, or of all. values: {(row, column): number}.

    far: a student that has run away."""
    best = {c: min((v for (_, at), v in values.items() if at == c or not by_column), default=1.) for c in columns}
    shade = [[math.log2(values[r, c] / best[c]) if (r, c) in values else math.nan for c in columns] for r in rows]
    ax.imshow(shade, cmap="Oranges", vmin=0, vmax=3, aspect="auto")                # at 8 times the best it is darkest
    for (r, c), value in values.items():
        y, x = rows.index(r), columns.index(c)
        ax.text(x, y, f"{value:.3f}".lstrip("0") if value < 10 else "far", ha="center", va="center", fontsize=7, color="w" if shade[y][x] > 2 else "k")
    ax.set_xticks(range(len(columns)), columns, fontsize=7)
    ax.set_yticks(range(len(rows)), rows, fontsize=7)
    ax.tick_params(length=0)
    ax.set_title(title, fontsize=9)


def show_last(ax, values, title):
    """A heat map of a family after the last update: raw on the left, dialled (*) on the right."""
    looks = {label: last(value) for label, value in values.items()}
    steps = list(next(iter(looks.values()))["raw"])
    columns = [f"{n}{mark}" for mark in ("", "*") for n in steps]
    numbers = {(label, n + mark): look[kind][n] for label, look in looks.items() for kind, mark in zip(KINDS, ("", "*")) for n in steps}
    heat_map(ax, list(looks), columns, numbers, title)
    ax.axvline(len(steps) - .5, color="w", lw=3)


def show_iterations(ax, values, kind, title):
    """The score against the updates done, a line for each value."""
    for i, (label, value) in enumerate(values.items()):
        looks = value["looks"]
        ax.plot([int(n) for n in looks], [score(look[kind]) for look in looks.values()], "o-" if i < 10 else "s--", ms=3, lw=1,
                color=f"C{i % 10}", label=label)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks([int(n) for n in looks], looks, fontsize=7)
    ax.set_title(title, fontsize=9)


def show_family(axes, values, title):
    """Three axes: the last look, and the score by iterations, raw and dialled, on one scale."""
    show_last(axes[0], values, title)
    axes[2].sharey(axes[1])
    for ax, kind in zip(axes[1:], KINDS):
        show_iterations(ax, values, kind, f"{kind}, by updates")
    limits = axes[1].get_ylim()                              # of both, as they share it
    axes[1].set_yticks(LEVELS, [f"{level:g}" for level in LEVELS], fontsize=7)
    axes[1].set_ylim(limits)
    for ax in axes[1:]:
        ax.minorticks_off()
    axes[2].tick_params(labelleft=False)
    axes[2].legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1, .5), frameon=False)


GRID_COLUMNS = (("raw", 3), ("raw", 8), ("dialled", 3), ("dialled", 8))


def show_grid(axes, name, rows):
    """Four axes: SW2 raw and dialled at 3 and 8 steps, of two settings against each other."""
    first, second = name.split(", ")
    columns = list(dict.fromkeys(b for row in rows.values() for b in row))
    for ax, (kind, n) in zip(axes, GRID_COLUMNS):
        values = {(a, b): last(value)[kind][str(n)] for a, row in rows.items() for b, value in row.items()}
        heat_map(ax, list(rows), columns, values, f"{kind}, {n} steps", by_column=False)
        ax.set_xlabel(second, fontsize=8)
    axes[0].set_ylabel(first, fontsize=8)


def canvas(heights, columns, **words):
    """(figure, axes) 13 inches wide, of rows so many inches high."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    gap, heights = .55, list(heights)
    total = sum(heights) + gap * (len(heights) + 1)
    return pyplot.subplots(len(heights), columns, figsize=(13, total), squeeze=False, gridspec_kw={
        "height_ratios": heights, "left": .12, "right": .89, "bottom": gap / total, "top": 1 - gap / total,
        "hspace": gap * len(heights) / sum(heights), "wspace": .13, **words})


def save(figure, path, dpi):
    from matplotlib import pyplot
    figure.savefig(path, dpi=dpi)
    pyplot.close(figure)


def height(values):
    return max(.9, .19 * len(values))


def plot_families(record, path):
    """A row for each family and set."""
    shown = [(family, data, values) for family, sets in record["plane"].items() for data, values in sets.items()]
    if not shown:
        return
    figure, axes = canvas((height(values) for *_, values in shown), 3, width_ratios=(2, 1, 1))
    for row, (family, data, values) in zip(axes, shown):
        show_family(row, values, f"{family}, {data}: SW2 by steps (*: dialled)")
    save(figure, path, 60)


def plot_grids(record, path):
    grids = record["grids"]
    if not grids:
        return
    figure, axes = canvas((1.4 for _ in grids), len(GRID_COLUMNS))
    for row, (name, rows) in zip(axes, grids.items()):
        show_grid(row, name, rows)
    save(figure, path, 70)


def show_flux(axes, values, title):
    """Two axes: student and slow EMA after the last update."""
    for ax, who in zip(axes, ("student", "ema_slow")):
        show_last(ax, {label: of(who, value) for label, value in values.items()}, f"{title}, {who}")


def plot_flux(record, path):
    """A row for each family of the tiny Flux."""
    found = record["flux"]
    if not found:
        return
    figure, axes = canvas((height(values) for values in found.values()), 2)
    for row, (family, values) in zip(axes, found.items()):
        show_flux(row, values, f"{family}: endpoint distance (*: dialled)")
    save(figure, path, 70)
