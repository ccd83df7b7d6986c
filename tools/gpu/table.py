"""Results as tables: a short one for the terminal, and a whole one in Markdown."""

from collections.abc import Iterable, Sequence

from gpu import benchmark_table
from gpu.run import Found


def short(found: Found) -> str:
    """Return a line a stage."""
    rows = [
        (name, stage["status"], f"{stage['seconds']:.0f} s", stage["why"] or said(stage))
        for name, stage in found["stages"].items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def said(stage: Found) -> str:
    """Return what a stage found, in some words."""
    words = []
    if "build_seconds" in stage:
        words.append(f"built in {stage['build_seconds']:.0f} s")
    if "passed" in stage:
        words.append(f"{stage['passed']} passed, {len(stage['skipped'])} skipped")
    if "kernels" in stage:
        words.append(f"{stage['kernels']} kernels, no errors")
    if "rows" in stage:
        words.append(f"{len(stage['rows'])} cases, {benchmark_table.tally(stage['rows'])}")
    if "plans" in stage:
        words.append(f"{stage['plans']} plans")
    return ", ".join(words)


def whole(found: Found) -> str:
    """Return all of it in Markdown, losses included."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [
        f"{found['device']}, driver {found['driver']}, {versions}\n\n"
        f"commit {found['commit']}, {found['date']}",
        markdown(
            ("stage", "result", "seconds", ""),
            [
                (name, stage["status"], f"{stage['seconds']:.0f}", stage["why"] or said(stage))
                for name, stage in found["stages"].items()
            ],
        ),
    ]
    test = found["stages"].get("test", {})
    for title in ("failures", "skipped"):
        if rows := test.get(title):
            parts.append(markdown((f"test: {title}", "why"), rows.items()))
    if errors := found["stages"].get("sanitize", {}).get("errors"):
        rows = [(job, f"{number}") for job, number in errors.items()]
        parts.append(markdown(("compute-sanitizer", "errors"), rows))
    rows = [row for stage in found["stages"].values() for row in stage.get("rows", ())]
    if rows:
        parts.append(benchmark_table.table(rows))
    return "\n\n".join(parts) + "\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
