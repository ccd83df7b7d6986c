"""curves.png: how both networks learnt, what a step of either costs, and a page that was read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastcnn.train.pages import Pages

__all__ = ["draw"]

COLOURS = {"fastcnn": "#1d4ed8", "eager": "#f59e0b"}
# Paper, then the ten digits.
CLASS_COLOURS = ListedColormap(["#f5f5f4", *matplotlib.color_sequences["tab10"]])
History = Mapping[str, Mapping[str, Sequence[float]]]


def draw(
    history: History,
    rows: Sequence[tuple[str, str, str, str]],
    conditions: str,
    page: Pages,
    predicted: Tensor,
    out: Path,
) -> None:
    """Write curves.png into `out`.

    history: by network, the demo's lists by epoch. rows: the demo's table, whose texts appear as
    they are; bars are drawn of those that have a ratio, and the title is the first one. page: one
    page; predicted: its classes as fastcnn's network reads it, (1, h, w).
    """
    figure = Figure(figsize=(11, 6.4), dpi=130, layout="constrained")
    first = rows[0]
    figure.suptitle(f"{first[0]}: fastcnn {first[1]}, plain PyTorch {first[2]}")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    upper, lower = halves
    bars = [row for row in rows if row[3]]
    loss, read, *costs = upper.subplots(
        1, 2 + len(bars), width_ratios=[1.4, 1.4, *[0.8] * len(bars)]
    )
    loss.set_title("training loss", fontsize=10)
    loss.set_yscale("log")
    read.set_title("validation digits read (%)", fontsize=10)
    curves(loss, {name: lists["train_loss"] for name, lists in history.items()})
    shares = {name: lists["validation_digits_read"] for name, lists in history.items()}
    curves(read, {name: [100 * share for share in of] for name, of in shares.items()})
    read.legend(loc="lower right", frameon=False, fontsize=9)
    for axes, row in zip(costs, bars, strict=True):
        bar(axes, row)
    pictures = lower.subplots(1, 3)
    titles = (
        "a page of the test",
        "its ink, a colour for each digit",
        "as fastcnn's network reads it",
    )
    for axes, title in zip(pictures, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    pictures[0].imshow(page.x[0, 0].numpy(), cmap="gray")
    for axes, classes in zip(pictures[1:], (page.classes, predicted), strict=True):
        axes.imshow(classes[0].numpy(), cmap=CLASS_COLOURS, vmin=-0.5, vmax=10.5)
    figure.supxlabel(conditions, fontsize=7, color="#444444")
    figure.savefig(out / "curves.png")


def curves(axes: Axes, values: Mapping[str, Sequence[float]]) -> None:
    """Draw a line by network over the epochs, the later ones wide and below, so that all show."""
    for i, (name, of) in enumerate(values.items()):
        epochs = range(1, len(of) + 1)
        # One epoch has no line: its points are drawn.
        marker = "o" if len(of) == 1 else ""
        axes.plot(
            epochs, of, color=COLOURS[name], linewidth=1.5 + 2.5 * i, zorder=3 - i, marker=marker,
            label=name,
        )  # fmt: skip
    axes.set_xlabel("epoch", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def bar(axes: Axes, row: tuple[str, str, str, str]) -> None:
    """Draw a row's two numbers as bars that carry them."""
    what, *texts, compared = row
    axes.set_title(f"{what}\n{compared}", fontsize=10)
    for place, (name, text) in enumerate(zip(COLOURS, texts, strict=True)):
        axes.bar(place, float(text), width=0.7, color=COLOURS[name])
        axes.text(place, float(text), text, ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(texts)), list(COLOURS))
    axes.set_yticks([])
    axes.margins(y=0.12)
    axes.spines[["top", "right", "left"]].set_visible(False)
