"""The record of an evaluation as a table: its columns, its rows by cost, and what is best."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from scfm.evaluation.measure import Row

SET_COLUMNS = ["", "steps", "KID x 1000", "error", "precision", "recall", "density", "coverage"]


class Column(NamedTuple):
    """A column of numbers. value: of a row, or None where it has none; smaller_is_better: None where neither
    is."""

    heading: str
    value: Callable[[Row], float | None]
    smaller_is_better: bool | None


class Group(NamedTuple):
    """Rows of equal cost."""

    heading: str
    rows: list[Row]


def columns_of(record: Mapping[str, Any]) -> list[Column]:
    """The columns for which a record has a number in at least one row; the seconds come last."""
    rows = record["rows"]
    distances = dict.fromkeys(name for row in rows for name in row.get("distances", {}))
    scores = dict.fromkeys(name for row in rows for name in row.get("scores", {}))
    columns = [Column("endpoint distance", partial(entry, name="endpoint_distance"), True)]
    for name in distances:
        difference = f"|d{name}|" if name == "FID" else f"difference of the {name} to the reference"
        columns += [
            Column(f"{name} to the teacher", partial(distance, name=name, to="teacher"), True),
            Column(f"{name} to the reference", partial(distance, name=name, to="reference"), True),
            Column(difference, partial(distance, name=name, to="difference"), True),
        ]
    columns += [Column(name, partial(score, name=name), False) for name in scores]
    columns += [Column("change from frame to frame", partial(entry, name="motion"), None)]
    columns += [Column("seconds an image", partial(entry, name="seconds"), True)]
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


def sets_of(record: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """[(title, lines)] of small tables, one for each metric with features and each set that the images are
    compared with: KID times 1000 with its standard error, precision, recall, density, coverage.

    The first line of each names the columns.
    """
    tables = []
    names = dict.fromkeys(name for row in record["rows"] for name in row.get("sets", {}))
    for name, to in ((name, to) for name in names for to in ("teacher", "reference")):
        floor = record.get("floors", {}).get(name) if to == "reference" else None
        lines = [cells_of("its own halves", "-", floor)] if floor else []
        for row in (row for group in groups_of(record) for row in group.rows):
            found = row.get("sets", {}).get(name, {}).get(to)
            if found:
                lines.append(cells_of(row["label"], str(row["steps"]), found))
        if lines:
            title = f"{name}, to the teacher's images" if to == "teacher" else f"{name}, to the reference"
            if floor:
                counts = " and ".join(map(str, floor["counts"]))
                title += f" (its own halves, {counts} images: Frechet distance {floor['frechet']:.4g})"
            tables.append((title, [SET_COLUMNS, *lines]))
    return tables


def cells_of(label: str, steps: str, found: Mapping[str, Any]) -> list[str]:
    """A line of `sets_of`. found: as from `compare_sets`"""
    shares = [f"{found[key]:.3f}" for key in SET_COLUMNS[4:]]
    return [label, steps, f"{1000 * found['kid']:.3g}", f"{1000 * found['kid_error']:.2g}", *shares]


def entry(row: Row, name: str) -> float | None:
    """A number of a row itself."""
    return row.get(name)


def distance(row: Row, name: str, to: str) -> float | None:
    """A Frechet distance of a row, by what it is called and what it is to."""
    return row.get("distances", {}).get(name, {}).get(to)


def score(row: Row, name: str) -> float | None:
    """A score of a row."""
    return row.get("scores", {}).get(name)


def best_of(record: Mapping[str, Any], rows: Sequence[Row]) -> set[tuple[str, str]]:
    """{(name of a row, heading)}: the best of each column among these rows.

    Nothing where only one has a number, nor for the seconds, which at equal evaluations differ by noise.
    """
    marked = set()
    for heading, value, smaller_is_better in columns_of(record)[:-1]:
        numbers = {row["name"]: n for row in rows if (n := value(row)) is not None}
        if len(numbers) > 1 and smaller_is_better is not None:
            best = (min if smaller_is_better else max)(numbers.values())
            marked |= {(name, heading) for name, n in numbers.items() if n == best}
    return marked


def groups_of(record: Mapping[str, Any]) -> list[Group]:
    """The rows by cost: the teacher at its steps first, then each number of evaluations."""
    teacher, *rest = record["rows"]
    groups = [Group("the teacher at its steps", [teacher])]
    for n in sorted({row["evaluations"] for row in rest}):
        rows = [row for row in rest if row["evaluations"] == n]
        groups.append(Group(f"{several(n, 'evaluation')} an image", rows))
    return groups


def several(n: int, word: str) -> str:
    """1 step, 2 steps."""
    return f"{n} {word}{'s' * (n > 1)}"


def format_number(value: float | None) -> str:
    """Four digits that count; a dash for what there is not."""
    if value is None:
        return "-"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def text_table(record: Mapping[str, Any], widest: int = 30) -> str:
    """The record as text, for the terminal: * marks the best of each column among equal evaluations."""
    columns = columns_of(record)
    lines = [["", "steps", *(column.heading for column in columns)]]
    for _, rows in groups_of(record):
        best = best_of(record, rows)
        for row in rows:
            cells = [
                format_number(value(row)) + "*" * ((row["name"], heading) in best)
                for heading, value, _ in columns
            ]
            lines.append([row["label"], str(row["steps"]), *cells])
    parts = [aligned(lines, widest)]
    parts += [f"{title}\n{aligned(lines, widest)}" for title, lines in sets_of(record)]
    return "\n\n".join(parts)


def aligned(lines: Sequence[Sequence[str]], widest: int) -> str:
    """Lines of cells as text, each column as wide as its widest cell, but for `widest`."""
    widths = [min(widest, max(map(len, column))) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(padded(line, widths)) for line in lines)


def padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The cells of a line at their widths: the first to the left, numbers to the right, longer ones cut."""
    cells = [
        cell if len(cell) <= width else cell[: width - 1] + "~"
        for cell, width in zip(line, widths, strict=True)
    ]
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return [cells[0].ljust(widths[0]), *numbers]


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """The protocol in words: what all numbers of a table have in common."""
    frames = protocol.get("num_frames")
    kind = f"videos of {frames} frames" if frames else "images"
    parts = [
        f"{protocol['num_images']} {kind} of {protocol['height']} x {protocol['width']} pixels from "
        f"{protocol['num_captions']} captions, the same noise for all (seed {protocol['seed']})",
        f"teacher: {protocol['pipeline']}, {protocol['teacher_steps']} Euler steps at guidance scale "
        f"{protocol['teacher_guidance_scale']:g}",
        f"time shift {protocol['inference_shift']:g} unless a row says otherwise",
        ", ".join(filter(None, (protocol["weight_dtype"], protocol["quantize"]))),
        f"LoRA {protocol['lora']}, not fused",
    ]
    if protocol["negative_prompt"]:
        parts.append(f"negative prompt: {protocol['negative_prompt']!r}")
    if protocol["reference_images"]:
        parts.append(
            f"reference: {protocol['reference_images']} images of {protocol['reference_dir']}, scaled to "
            "cover the size and cut"
        )
    parts.append(f"metrics: {', '.join(protocol['metrics']) or 'none'}")
    return "; ".join(parts) + "."
