"""Draw docs/networks.svg and write README's table of networks from benchmarks/results/.

make chart

The chart and the table hold the same rows; tests/project/test_chart.py compares them with each
other and with docs/performance.md.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
from between_marks import write_between
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-networks.json"
CHART = ROOT / "docs" / "networks.svg"
README = ROOT / "README.md"
BEGIN, END = "<!-- table: make chart -->\n", "<!-- end of the table -->"
GAIN, LOSS = "#1d4ed8", "#c2410c"

Row = dict[str, Any]


def main() -> None:
    """Write both."""
    found = json.loads(RESULTS.read_text())
    draw(found, CHART)
    write_between(README, BEGIN, END, table(found))


def named(row: Row) -> str:
    """Return the network and what it did, in a line."""
    memory = f', memory="{row["memory"]}"' if "memory" in row else ""
    return f"{row['network']}, {row['what']}{memory}"


def sized(row: Row) -> str:
    """Return type, batch and size, in a line."""
    return f"{row['dtype']}, {row['batch']} x {row['size']}²"


def conditions(found: Row) -> list[str]:
    """Return what the numbers depend on, in two lines."""
    return [
        f"{found['processor']}; {found['threads']} threads",
        f"torch {found['torch']}, {found['memory_format']}; {found['rounds']}; {found['date']}",
    ]


def table(found: Row) -> str:
    """Return the rows as Markdown."""
    others = ("eager", "torch.compile", "OpenVINO")
    lines = [
        "| network | type, batch x size² | vs. eager | vs. torch.compile | vs. OpenVINO | "
        "memory saved for backward |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        ratios = [f"{row['speedup'][o]:.2f}x" if o in row["speedup"] else "-" for o in others]
        saved = f"{row['saved']:.2f}x" if "saved" in row else "-"
        lines.append(f"| {' | '.join([named(row), sized(row), *ratios, saved])} |")
    return "\n".join(lines) + "\n"


def draw(found: Row, path: Path) -> None:
    """Draw speed and memory of each row compared with eager; a loss has the other colour."""
    rows = found["rows"]
    # Text stays text, so that a test can read it; no date and no random names, so that the file
    # changes only with its contents.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "fastcnn", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        speed, memory = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [4, 3]})
        bars(speed, [row["speedup"]["eager"] for row in rows], gain_above=True)
        bars(memory, [row.get("saved") for row in rows], gain_above=False)
        speed.set_yticks(range(len(rows)), [f"{named(row)}\n{sized(row)}" for row in rows])
        speed.invert_yaxis()
        speed.set_title("speed (PyTorch eager: 1; more is better)", fontsize=10)
        memory.set_title("saved for backward (less is better)", fontsize=10)
        figure.supxlabel("\n".join(conditions(found)), fontsize=8, color="#444444")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def bars(axes: Axes, values: list[float | None], gain_above: bool) -> None:
    """Draw a bar from 0 for each value, and the line that is eager's."""
    for place, value in enumerate(values):
        if value is None:
            axes.text(0.03, place, "inference saves nothing", va="center", color="#666666")
            continue
        gain = value == 1 or (value > 1) == gain_above
        axes.barh(place, value, height=0.62, color=GAIN if gain else LOSS)
        axes.text(0.03, place, f"{value:.2f}x", va="center", color="white", weight="bold")
    axes.axvline(1, color="#222222", linewidth=1, linestyle=(0, (4, 3)))
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.1 * max(1.0, *(value for value in values if value is not None)))
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
