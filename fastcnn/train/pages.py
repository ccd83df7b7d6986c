"""Pages of handwriting: scikit-learn's digits on shaded, noisy paper, with a class for each pixel.

The digits are 1,797 images of 8x8 pixels, scanned handwriting (UCI, Alpaydin and Kaynak 1998). A
page of 128x128 pixels holds 36 of them, enlarged to 16x16, each somewhere in a cell of 20x20:

    x        (n, 1, 128, 128)   paper, darker where there is ink
    classes  (n, 128, 128)      0 for paper, 1 + d for the ink of a digit d
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["CLASSES", "DIGITS_A_PAGE", "PAGE", "Digits", "Pages", "cells", "lay_out", "load"]

PAGE, CELL, DIGIT, MARGIN = 128, 20, 16, 4
ROWS = (PAGE - 2 * MARGIN) // CELL
DIGITS_A_PAGE = ROWS * ROWS
CLASSES = 11
INK = 0.25  # what is darker than that counts as ink
NOISE = 0.05  # standard deviation of a pixel; paper is 0.6 to 1.0, ink 0.4 to 0.6 darker
# The split is the same for every seed: seeds then differ by initial weights, order and paper only.
SPLIT_SEED = 0


class Digits(NamedTuple):
    """ink (n, 8, 8), 0 to 1; labels (n), 0 to 9."""

    ink: Tensor
    labels: Tensor


class Pages(NamedTuple):
    """x (n, 1, 128, 128) in channels_last; classes (n, 128, 128), 0 for paper, 1 + d for ink."""

    x: Tensor
    classes: Tensor


def load() -> dict[str, Digits]:
    """Split stratified by digit: 20 % "test", 15 % "validation", the rest "train"."""
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(
        range(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED
    )
    train, validation = train_test_split(
        rest, test_size=0.15 / 0.8, stratify=labels[rest], random_state=SPLIT_SEED
    )
    ink = torch.from_numpy(images).float().view(-1, 8, 8) / 16
    known = torch.from_numpy(labels)
    parts = {"train": train, "validation": validation, "test": test}
    return {name: Digits(ink[part], known[part]) for name, part in parts.items()}


def lay_out(digits: Digits, generator: torch.Generator) -> Pages:
    """Write the digits in order on as many pages as they need; cells that are left stay empty."""
    n = -(-len(digits.labels) // DIGITS_A_PAGE)
    empty = n * DIGITS_A_PAGE - len(digits.labels)
    small = F.pad(digits.ink, (0, 0, 0, 0, 0, empty))[:, None]
    ink = F.interpolate(small, size=(DIGIT, DIGIT), mode="bilinear")[:, 0]
    ink = _somewhere(ink, generator)
    labels = F.pad(digits.labels, (0, empty))[:, None, None]
    classes = _join(torch.where(ink > INK, labels + 1, 0))
    dark = 0.4 + 0.2 * torch.rand(n, 1, 1, generator=generator, device=generator.device)
    shades = torch.rand(n, 1, 5, 5, generator=generator, device=generator.device)
    paper = 0.6 + 0.4 * F.interpolate(shades, size=(PAGE, PAGE), mode="bilinear")[:, 0]
    noise = NOISE * torch.randn(n, PAGE, PAGE, generator=generator, device=generator.device)
    x = (paper - dark * _join(ink) + noise)[:, None]
    return Pages(x.contiguous(memory_format=torch.channels_last), classes)


def cells(pages: Tensor) -> Tensor:
    """Cut (n, 128, 128) into (36 n, 20, 20), in the order in which digits were written."""
    inner = pages[:, MARGIN : PAGE - MARGIN, MARGIN : PAGE - MARGIN]
    grid = inner.reshape(-1, ROWS, CELL, ROWS, CELL).transpose(2, 3)
    return grid.reshape(-1, CELL, CELL)


def _join(grid: Tensor) -> Tensor:
    """Join what `cells` cuts, with a margin of zeros."""
    rows = grid.view(-1, ROWS, ROWS, CELL, CELL).transpose(2, 3)
    return F.pad(rows.reshape(-1, ROWS * CELL, ROWS * CELL), (MARGIN,) * 4)


def _somewhere(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Set each (16, 16) at a place of its own in (20, 20)."""
    spare = CELL - DIGIT
    # windows (m, 5, 5, 20, 20): all places in a frame of zeros, as views.
    windows = F.pad(ink, (spare,) * 4).unfold(1, CELL, 1).unfold(2, CELL, 1)
    dy, dx = torch.randint(spare + 1, (2, len(ink)), generator=generator, device=generator.device)
    return windows[torch.arange(len(ink), device=ink.device), dy, dx]
