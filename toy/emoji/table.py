"""The emoji tables of README and docs/results.md, from the report of `scfm evaluate`:

    python -m toy.emoji.table

Reads experiments/results/emoji.json, and puts the tables between <!-- emoji --> and <!-- /emoji -->.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "experiments" / "results" / "emoji.json"
METRIC = "EfficientNet-Lite0"
COUNTS = (1, 2, 4, 8)
SOLVERS = ("teacher", "teacher-heun", "teacher-midpoint", "teacher-dpm")
OPEN, CLOSE = "<!-- emoji -->\n", "<!-- /emoji -->"


def kid(row: dict[str, Any], to: str = "teacher") -> tuple[float, float]:
    """(kernel distance, its standard error), times 1000. to: "teacher" or "reference"."""
    found = row["sets"][METRIC][to]
    return 1000 * found["kid"], 1000 * found["kid_error"]


def show(value: float, error: float | None = None) -> str:
    """A number to three figures at most, with its error where there is one."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def short_table(record: dict[str, Any]) -> str:
    """A line for each number of steps: teacher, best of the solvers, student."""
    rows = {row["name"]: row for row in record["rows"]}
    lines = [
        "| steps | teacher | best of four solvers | student |",
        "|---|---|---|---|",
    ]
    for n in COUNTS:
        solved = [rows[f"{name}-{n}"] for name in SOLVERS if f"{name}-{n}" in rows]
        best = min(solved, key=kid)
        numbers = (show(*kid(row)) for row in (rows[f"teacher-{n}"], best, rows[f"student-{n}"]))
        lines.append(f"| {n} | {' | '.join(numbers)} |")
    return "\n".join([*lines, "| 32 | 0, by definition | | |"])


def long_table(record: dict[str, Any]) -> str:
    """Every row that was measured, by number of evaluations."""
    lines = [
        "| | evaluations | endpoint distance | KID to the teacher's 32 steps | "
        "KID to real images | precision | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(record["rows"], key=lambda row: (row["evaluations"] % 32, row["name"])):
        if row["name"].startswith("teacher-stock"):
            continue  # its own grid is that of the protocol: the same numbers
        real = row["sets"][METRIC]["reference"]
        own = row["sets"][METRIC]["teacher"]
        name = "**student**" if row["kind"] == "student" else row["label"]
        lines.append(
            f"| {name} | {row['evaluations']} | {row['endpoint_distance'] or 0:.3f} | "
            f"{show(*kid(row)) if own else '0'} | {show(*kid(row, 'reference'))} | "
            f"{real['precision']:.3f} | {real['recall']:.3f} |"
        )
    return "\n".join(lines)


def put(page: Path, table: str) -> None:
    """Replaces what stands between a page's marks."""
    before, rest = page.read_text(encoding="utf-8").split(OPEN, 1)
    after = rest.split(CLOSE, 1)[1]
    page.write_text(f"{before}{OPEN}{table}\n{CLOSE}{after}", encoding="utf-8")


def main() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    put(ROOT / "README.md", short_table(record))
    put(ROOT / "docs" / "results.md", long_table(record))


if __name__ == "__main__":
    main()
