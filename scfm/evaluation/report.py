"""The record of an evaluation as a page that opens from disk, and a grid of its images."""

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from scfm.data.animation import middle_frame
from scfm.evaluation.image_store import image_path
from scfm.evaluation.measure import Row
from scfm.evaluation.table import (
    Column,
    best_of,
    columns_of,
    describe_protocol,
    format_number,
    groups_of,
    sets_of,
    several,
)
from scfm.files import atomic_write

MARGIN, HEAD, GAP = (
    190,
    44,
    2,
)  # of the grid, in pixels: labels at the left, captions at the top, between rows

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }}
table {{ border-collapse: collapse; margin: .5rem 0; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; white-space: nowrap; }}
th {{ font-weight: 600; font-size: .85em; max-width: 9rem; }}
tr.group td {{ background: #f1f3f5; text-align: left; font-size: .85em; color: #555; }}
tr.student td:first-child {{ font-weight: 600; }}
td.best {{ background: #d9f2e0; font-weight: 600; }}
.protocol {{ background: #f1f3f5; padding: .6rem .9rem; border-left: 4px solid #888; }}
.warning {{ background: #fff4d6; padding: .4rem .9rem; border-left: 4px solid #d9a400; margin: .4rem 0; }}
.wide {{ overflow-x: auto; }} img {{ max-width: 100%; }}
footer {{ color: #777; font-size: .85em; margin-top: 2rem; }}
</style></head><body>
<h1>{title}</h1>
<p class="protocol"><b>Protocol.</b> {protocol}</p>
{notes}
<div class="wide"><table>
<thead><tr><th>sampler</th><th>steps</th><th>evaluations</th>{heads}</tr></thead><tbody>
{body}
</tbody></table></div>
<p>Shaded: the best of its column among samplers of equal cost. Distances are better small, scores better
large; "-": there is no such number. <i>Evaluations</i>: examples that the network was called on, counted.
<i>Endpoint distance</i>: root mean square, in latents, to where the teacher lands at its own steps from the
same noise. <i>Seconds an image</i>: prompt to pixels at batch size 1, the median of {repeats} after a
warm-up, on {device}.</p>
{sets}
<h2>The same caption and the same noise in each column</h2>
<img alt="a row for each sampler, a column for each caption" src="data:image/png;base64,{image}">
<footer>Made by scfm evaluate; {versions}. All numbers: report.json beside this page.</footer>
</body></html>
"""

SETS = """<h2>{title}</h2>
<p>KID: the kernel distance, unbiased, with its standard error; below two errors it is no difference.
Precision and density: do the images lie among the others; recall and coverage: are the others reached. To the
teacher's images these four are high by the shared noise alone. Its own halves: one random half of the
reference against the other, what images as good as the reference would get.</p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>
"""


def write_report(
    record: Mapping[str, Any], folder: str | Path, captions: Sequence[str], columns: int = 6
) -> Path:
    """Writes grid.png and report.html into the folder of an evaluation; returns the path of the page."""
    folder = Path(folder)
    grid = image_grid(record, folder, captions[:columns])
    page = html_report(record, grid)
    atomic_write(folder / "grid.png", lambda new: grid.save(new, format="png"))
    atomic_write(folder / "report.html", lambda new: new.write_text(page, encoding="utf-8"))
    return folder / "report.html"


def html_report(record: Mapping[str, Any], grid: Image.Image) -> str:
    """The record as one HTML page that needs no other file and no network."""
    columns, teacher = columns_of(record), record["rows"][0]
    notes = [warning("Note.", f"{text}.") for text in record["warnings"]]
    notes += [warning(f"Missing: {name}.", reason) for name, reason in record["missing"].items()]
    body = []
    for heading, rows in groups_of(record):
        best = best_of(record, rows)
        body.append(f'<tr class="group"><td colspan="{len(columns) + 3}">{heading}</td></tr>')
        body += [table_row(row, columns, best) for row in rows]
    buffer = io.BytesIO()
    grid.save(buffer, format="png")
    return PAGE.format(
        title=html.escape(f"{record['protocol']['pipeline']} in few steps"),
        protocol=html.escape(describe_protocol(record["protocol"])),
        notes="\n".join(notes),
        heads="".join(f"<th>{html.escape(column.heading)}</th>" for column in columns),
        body="\n".join(body),
        repeats=teacher["latency_repeats"],
        device=html.escape(teacher["device"]),
        sets="\n".join(sets_table(title, lines) for title, lines in sets_of(record)),
        image=base64.b64encode(buffer.getvalue()).decode(),
        versions=html.escape(", ".join(f"{name} {v}" for name, v in record["versions"].items())),
    )


def warning(title: str, text: str) -> str:
    """A note above the table, in HTML."""
    return f'<p class="warning"><b>{html.escape(title)}</b> {html.escape(text)}</p>'


def table_row(row: Row, columns: Sequence[Column], best: set[tuple[str, str]]) -> str:
    """A row of the table, in HTML. best: as from `best_of`."""
    cells = [f"<td>{html.escape(row['label'])}</td><td>{row['steps']}</td><td>{row['evaluations']}</td>"]
    for heading, value, _ in columns:
        shade = " class=best" if (row["name"], heading) in best else ""
        cells.append(f"<td{shade}>{format_number(value(row))}</td>")
    return f'<tr class="{row["kind"]}">{"".join(cells)}</tr>'


def sets_table(title: str, lines: Sequence[Sequence[str]]) -> str:
    """How sets of images lie in each other, in HTML; lines: as from `sets_of`."""
    head, *body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines)
    rows = "".join(f"<tr>{cells}</tr>" for cells in body)
    return SETS.format(title=html.escape(title), head=head, rows=rows)


def image_grid(
    record: Mapping[str, Any], folder: Path, captions: Sequence[str], side: int = 128
) -> Image.Image:
    """A caption's images in a column, a sampler in a row; the teacher first, then by evaluations.

    captions: those of the first images, one a column
    side: width of an image, in pixels
    """
    rows = [row for group in groups_of(record) for row in group.rows]
    height = round(side * record["protocol"]["height"] / record["protocol"]["width"])
    grid = Image.new("RGB", (MARGIN + len(captions) * side, HEAD + len(rows) * (height + GAP)), "white")
    pen = ImageDraw.Draw(grid)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    for k, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(caption, side // 6, max_lines=3, placeholder=" ..."))
        pen.multiline_text(
            (MARGIN + k * side + side // 2, HEAD // 2), text, "black", small, "mm", 1, "center"
        )
    for r, row in enumerate(rows):
        top = HEAD + r * (height + GAP)
        cost = f"{several(row['steps'], 'step')}, {several(row['evaluations'], 'evaluation')}"
        label = f"{row['label']}\n{cost}"
        pen.multiline_text((6, top + height // 2), label, "black", font, anchor="lm", spacing=3)
        for k in range(len(captions)):
            image = resized(image_path(folder / row["name"], k), side, height)
            grid.paste(image, (MARGIN + k * side, top))
    return grid


def resized(path: Path, width: int, height: int) -> Image.Image:
    """An image of a file, or the frame in the middle of a video, at another size; a small one shows its
    pixels."""
    with Image.open(path) as image:
        how = Image.Resampling.NEAREST if image.width < width else Image.Resampling.LANCZOS
        return middle_frame(image).convert("RGB").resize((width, height), how)
