"""The record of an evaluation as text, images and a page."""
import base64
import html
import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from scfm.files import atomic_write


def columns_of(record):
    """[(heading, value of a row or None, smaller is better)] of the numbers that a record has for at least one row."""
    far = lambda eye, which: lambda row: row.get("distances", {}).get(eye, {}).get(which)
    eyes = list(dict.fromkeys(eye for row in record["rows"] for eye in row.get("distances", {})))
    scores = list(dict.fromkeys(name for row in record["rows"] for name in row.get("scores", {})))
    found = [("endpoint distance", lambda row: row["endpoint"], True)]
    for eye in eyes:
        difference = f"|d{eye}|" if eye == "FID" else f"difference of the {eye} to the reference"
        found += [(f"{eye} to the teacher", far(eye, "teacher"), True), (f"{eye} to the reference", far(eye, "reference"), True),
                  (difference, far(eye, "difference"), True)]
    found += [(name, lambda row, name=name: row["scores"].get(name), False) for name in scores]
    found += [("seconds an image", lambda row: row["seconds"], True)]
    return [c for c in found if any(c[1](row) is not None for row in record["rows"])]


def best_of(record, rows):
    """{(name of a row, heading)}: the best of each column among these rows; nothing where only one has a number, nor for seconds,
    which at equal evaluations differ by noise."""
    marked = set()
    for heading, value, smaller in columns_of(record)[:-1]:
        told = {row["name"]: value(row) for row in rows if value(row) is not None}
        if len(told) > 1:
            best = (min if smaller else max)(told.values())
            marked |= {(name, heading) for name, number in told.items() if number == best}
    return marked


def groups_of(record):
    """The rows by cost: [(heading, rows)], the teacher at its steps first, then each number of evaluations."""
    rows = record["rows"]
    rest = sorted({row["evaluations"] for row in rows[1:]})
    return [("the teacher at its steps", rows[:1])] + [
        (f"{several(n, 'evaluation')} an image", [row for row in rows[1:] if row["evaluations"] == n]) for n in rest]


def several(n, word):
    return f"{n} {word}{'s' * (n > 1)}"


def number(value):
    """Four digits that count; a dash for what there is not."""
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def text_table(record):
    """The record as text, for the terminal: * marks the best of each column among equal evaluations."""
    columns = columns_of(record)
    lines = [["", "steps", *(heading for heading, _, _ in columns)]]
    for _, rows in groups_of(record):
        best = best_of(record, rows)
        lines += [[row["label"], str(row["steps"]), *(number(value(row)) + "*" * ((row["name"], heading) in best)
                                                      for heading, value, _ in columns)] for row in rows]
    wide = [min(30, max(len(line[k]) for line in lines)) for k in range(len(lines[0]))]
    cut = lambda text, width: text if len(text) <= width else text[:width - 1] + "~"
    fill = lambda k, word: cut(word, wide[k]).ljust(wide[k]) if k == 0 else cut(word, wide[k]).rjust(wide[k])
    return "\n".join("  ".join(fill(k, word) for k, word in enumerate(line)) for line in lines)


def sentence_of(protocol):
    """The protocol in words: what all numbers of a table have in common."""
    told = dict(protocol)
    said = (f"{told['count']} images of {told['height']} x {told['width']} pixels from {told['prompts']} captions, the "
            f"same noise for all (seed {told['seed']}); teacher: {told['pipeline']}, {told['teacher_steps']} Euler steps "
            f"at guidance scale {told['teacher_guidance_scale']:g}; time shift {told['shift']:g} unless a row says otherwise; "
            f"{told['precision']}; LoRA {told['lora']}, not fused")
    if told["negative_prompt"]:
        said += f"; negative prompt: {told['negative_prompt']!r}"
    if told["reference"]:
        said += f"; reference: {told['reference']} images of {told['reference_folder']}, scaled to cover the size and cut"
    return said + f"; looked at by: {', '.join(told['eyes']) or 'nobody'}."


def image_grid(record, folder, captions, side=128):
    """A PIL image: a caption's images in a column, a sampler in a row; the teacher first, then by evaluations.

    captions: those of the first images, one a column.
    """
    rows = [row for _, rows in groups_of(record) for row in rows]
    height = round(side * record["protocol"]["height"] / record["protocol"]["width"])
    font, small, margin, head = ImageFont.load_default(13), ImageFont.load_default(11), 190, 44
    grid = Image.new("RGB", (margin + len(captions) * side, head + len(rows) * (height + 2)), "white")
    pen = ImageDraw.Draw(grid)
    for k, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(caption, side // 6, max_lines=3, placeholder=" ..."))
        pen.multiline_text((margin + k * side + side // 2, head // 2), text, "black", small, "mm", 1, "center")
    for r, row in enumerate(rows):
        top = head + r * (height + 2)
        label = f"{row['label']}\n{several(row['steps'], 'step')}, {several(row['evaluations'], 'evaluation')}"
        pen.multiline_text((6, top + height // 2), label, "black", font, anchor="lm", spacing=3)
        for k in range(len(captions)):
            with Image.open(Path(folder) / row["name"] / f"{k:05d}.png") as image:
                how = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
                grid.paste(image.convert("RGB").resize((side, height), how), (margin + k * side, top))
    return grid


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff; }}
table {{ border-collapse: collapse; margin: .5rem 0; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; white-space: nowrap; }}
th {{ font-weight: 600; font-size: .85em; max-width: 9rem; }}
tr.group td {{ background: #f1f3f5; text-align: left; font-size: .85em; color: #555; }}
tr.student td:first-child {{ font-weight: 600; }}
td.best {{ background: #d9f2e0; font-weight: 600; }}
.protocol {{ background: #f1f3f5; padding: .6rem .9rem; border-left: 4px solid #888; }}
.warning {{ background: #fff4d6; padding: .4rem .9rem; border-left: 4px solid #d9a400; margin: .4rem 0; }}
.wide {{ overflow-x: auto; }} img {{ max-width: 100%; }} footer {{ color: #777; font-size: .85em; margin-top: 2rem; }}
</style></head><body>
<h1>{title}</h1>
<p class="protocol"><b>Protocol.</b> {protocol}</p>
{notes}
<div class="wide"><table><thead><tr><th>sampler</th><th>steps</th><th>evaluations</th>{heads}</tr></thead><tbody>
{body}
</tbody></table></div>
<p>Shaded: the best of its column among samplers of equal cost. Distances are better small, scores better large; "-": there is no
such number. <i>Evaluations</i>: rows that the network was asked about, counted. <i>Endpoint distance</i>: root mean square, in
latents, to where the teacher lands at its own steps from the same noise. <i>Seconds an image</i>: prompt to pixels at batch 1,
the median of {repeats} after a warm-up, on {device}.</p>
<h2>The same caption and the same noise in each column</h2>
<img alt="a row for each sampler, a column for each caption" src="data:image/png;base64,{image}">
<footer>Made by scfm evaluate; {versions}. All numbers: report.json beside this page.</footer>
</body></html>
"""


def html_report(record, grid):
    """The record as one HTML page that needs no other file and no network. grid: a PIL image."""
    quoted, columns = html.escape, columns_of(record)
    notes = [f'<p class="warning"><b>Note.</b> {quoted(text)}.</p>' for text in record["warnings"]]
    notes += [f'<p class="warning"><b>Missing: {quoted(name)}.</b> {quoted(why)}</p>' for name, why in record["missing"].items()]
    body = []
    for heading, rows in groups_of(record):
        best = best_of(record, rows)
        body.append(f'<tr class="group"><td colspan="{len(columns) + 3}">{heading}</td></tr>')
        for row in rows:
            shade = lambda name: " class=best" * ((row["name"], name) in best)
            cells = "".join(f"<td{shade(name)}>{number(value(row))}</td>" for name, value, _ in columns)
            body.append(f'<tr class="{row["kind"]}"><td>{quoted(row["label"])}</td><td>{row["steps"]}</td>'
                        f'<td>{row["evaluations"]}</td>{cells}</tr>')
    buffer = io.BytesIO()
    grid.save(buffer, format="png")
    return PAGE.format(title=quoted(f"{record['protocol']['pipeline']} in few steps"),
                       protocol=quoted(sentence_of(record["protocol"])), notes="\n".join(notes), body="\n".join(body),
                       heads="".join(f"<th>{quoted(name)}</th>" for name, _, _ in columns),
                       repeats=record["rows"][0]["repeats"], device=quoted(record["rows"][0]["device"]),
                       image=base64.b64encode(buffer.getvalue()).decode(),
                       versions=quoted(", ".join(f"{k} {v}" for k, v in record["versions"].items())))


def write_report(record, folder, captions, columns=6):
    """Writes grid.png and report.html into the folder of an evaluation; returns the path of the page."""
    folder = Path(folder)
    captions = captions[:columns]
    grid = image_grid(record, folder, captions)
    atomic_write(folder / "grid.png", lambda new: grid.save(new, format="png"))
    page = html_report(record, grid)
    atomic_write(folder / "report.html", lambda new: new.write_text(page, encoding="utf-8"))
    return folder / "report.html"
