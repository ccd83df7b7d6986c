"""Rows of the benchmarks on a GPU as Markdown, each beside the floor that it is held against.

python tools/gpu/benchmark_table.py ROWS...    files that `pytest benchmarks --rows=FILE` wrote; of
                                               the same case in several runs the last counts
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]


class Floor(NamedTuple):
    """What is asked for: a speedup over `beside`, or a share of the copy's bandwidth."""

    least: float
    beside: str = "best"

    def of(self, row: Row) -> float | None:
        """Return what was reached, None where it was not measured."""
        if self.beside == "copy":
            return row.get("of_copy")
        name = row["best"] if self.beside == "best" else self.beside
        return row["speedup"]["ours"].get(name)

    def __str__(self) -> str:
        if self.beside == "copy":
            return f"{self.least:.0%} of copy"
        return f"{self.least:g}x {self.beside}"


MEMORY_BOUND = [Floor(0.8, "copy"), Floor(1.2)]
# By file, test and the beginning of the case; the first that fits.
FLOORS = [
    ("bench_batch_norm_act", "", "", MEMORY_BOUND),
    ("bench_group_norm_act", "", "", MEMORY_BOUND),
    ("bench_dropout", "", "", MEMORY_BOUND),
    ("bench_upsample", "test_doubled", "", MEMORY_BOUND),
    ("bench_upsample", "test_backward", "", [Floor(0.8, "copy"), Floor(5, "eager")]),
    ("bench_squeeze_excite", "", "", [Floor(1.2, "eager")]),
    ("bench_depthwise_conv2d", "", "", [Floor(2, "eager")]),
    ("bench_conv_bn_act", "test_inference", "", [Floor(1.0)]),
    ("bench_conv2d_int8", "", "", [Floor(1.2, "eager")]),
    ("bench_networks", "test_training_step", "resnet50-224px-bf16-low", []),  # lowest too
    (
        "bench_networks",
        "test_training_step",
        "resnet50",
        [Floor(1.3, "eager"), Floor(1.1, "compiled")],
    ),
    ("bench_networks", "test_training_step", "unet", [Floor(1.3, "eager")]),
]


def floors_of(row: Row) -> list[Floor]:
    """Return what a row is held against."""
    for file, test, case, floors in FLOORS:
        if row["file"] == file and row["test"].startswith(test) and row["case"].startswith(case):
            return floors
    return []


def tally(rows: Iterable[Row]) -> str:
    """Say in some words how many floors were reached."""
    rows = list(rows)
    timed = [row for row in rows if "ms" in row]
    verdicts = " ".join(map(verdict, timed))
    said = f"{verdicts.count(': reached')} floors reached, {verdicts.count('**missed**')} missed"
    lost = len(rows) - len(timed)
    return f"{said}, {lost} cases not measured" if lost else said


def verdict(row: Row) -> str:
    """Say for each floor what was reached."""
    said = []
    for floor in floors_of(row):
        value = floor.of(row)
        if value is None:
            said.append(f"{floor}: not measured")
            continue
        reached = "reached" if value >= floor.least else "**missed**"
        value_text = f"{value:.0%}" if floor.beside == "copy" else f"{value:.2f}x"
        rest = " of those that ran" if floor.beside == "best" and "errors" in row else ""
        said.append(f"{floor}{rest}: {reached}, {value_text}")
    return "; ".join(said) or "-"


def milliseconds(row: Row, name: str) -> str:
    """Return median and quartiles."""
    median, (lower, upper) = row["ms"][name], row["quartiles"][name]
    digits = 2 if median >= 1 else 4
    return f"{median:.{digits}f} ({lower:.{digits}f} to {upper:.{digits}f})"


def op_lines(rows: list[Row]) -> Iterator[str]:
    """Yield the table of an op: a line a case."""
    yield "| case | fastcnn ms | PyTorch ms | beside | speedup | of copy | copy GB/s | asked for |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        best = row["best"]
        beside = ["-", "-", "-"]
        if best:
            beside = [milliseconds(row, best), best, f"{row['speedup']['ours'][best]:.2f}x"]
        of_copy = f"{row['of_copy']:.0%}" if "of_copy" in row else "-"
        notes = "".join(f"; {n} late: {name}" for name, n in row.get("late", {}).items())
        cells = [
            row["case"],
            milliseconds(row, "ours"),
            *beside,
            of_copy,
            f"{row['copy_gb_s']:.0f}",
            verdict(row) + notes,
        ]
        yield f"| {' | '.join(cells)} |"


def network_lines(rows: list[Row]) -> Iterator[str]:
    """Yield the table of whole networks: a line for each way to run one."""
    yield "| case | way | ms | images/s | fastcnn's speedup | peak GB | kept | asked for |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        for name in row["images_per_s"]:
            ours = name == "ours"
            speedup = row["speedup"]["ours"].get(name)
            peak = row.get("peak_bytes", {}).get(name)
            kept = row.get("kept_ratio") if ours else None
            cells = [
                row["case"],
                name,
                milliseconds(row, name),
                f"{row['images_per_s'][name]:.0f}",
                "-" if speedup is None else f"{speedup:.2f}x",
                "-" if peak is None else f"{peak / 1e9:.2f}",
                "-" if kept is None else f"{kept:.2f}",
                verdict(row) if ours else "",
            ]
            yield f"| {' | '.join(cells)} |"


def table(rows: Iterable[Row]) -> str:
    """Return the rows' Markdown."""
    last: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row["file"], row["test"], row["case"]
        if "skipped" not in row or key not in last:
            last[key] = row
    out: list[str] = []
    for device in dict.fromkeys(row["device"] for row in last.values()):
        out += [f"{device}:", ""]
        of_device = [row for row in last.values() if row["device"] == device]
        for file, test in dict.fromkeys((row["file"], row["test"]) for row in of_device):
            found = [row for row in of_device if (row["file"], row["test"]) == (file, test)]
            out += [f"### {file.removeprefix('bench_')}, {test.removeprefix('test_')}", ""]
            if timed := [row for row in found if "ms" in row]:
                lines = network_lines if "images_per_s" in timed[0] else op_lines
                out += [*lines(timed), ""]
            errors = [
                f"- {row['case']}: {name}: {' '.join(error.split())}"
                for row in found
                for name, error in {**row.get("errors", {}), **_whole(row)}.items()
            ]
            out += [*errors, ""] if errors else []
    return "\n".join(out)


def _whole(row: Row) -> dict[str, str]:
    why = row.get("error") or row.get("skipped")
    return {"not measured": why} if why else {}


def read(path: pathlib.Path) -> list[Row]:
    """Return the rows of a file, without the last one if it was cut off."""
    *lines, rest = path.read_text().split("\n")
    if rest:
        print(f"{path}: the last row is incomplete", file=sys.stderr)
    return [json.loads(line) for line in lines]


def main(paths: list[str]) -> None:
    """Print the table of these files."""
    print(table(row for path in paths for row in read(pathlib.Path(path))))


if __name__ == "__main__":
    main(sys.argv[1:])
