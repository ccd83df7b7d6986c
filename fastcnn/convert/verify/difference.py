"""The difference of one value between fastcnn and PyTorch, and a table of them.

A difference counts as rounding while the error's norm is at most

    factor * PyTorch's own + 4 roundings + twice what the elements at a jump change

PyTorch's own error is the largest of three runs, whose inputs differ by a rounding. Two orders of
summation that are equally good differ by chance, by more where few values decide (a batch norm over
two, a loss). Of m independent errors the square of our norm over the mean square of three of theirs
has the F distribution with m and 3 m degrees of freedom: the factor is exceeded once in 10^9 places
(FACTORS). It is at least 4, because behind many layers errors are no longer independent, and m is
the larger of images and channels, because the error of a statistic is common to one of these. A
rounding is the norm of the errors that storing the value once makes. Of jumps determinism.py tells;
twice, since what several elements change may cancel in part.
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.common.text_table import WIDTH, columns
from fastcnn.convert.verify.capture import Place

FACTOR = 4.0
# Of 1, 2, ... values: the square root of F's quantile. From 11 on it is below FACTOR.
FACTORS = (1301.6, 54.7, 19.2, 11.3, 8.2, 6.6, 5.6, 4.9, 4.5, 4.1)


class Difference(NamedTuple):
    """Errors of one value, as parts of its norm: fastcnn's, PyTorch's, and the largest allowed."""

    place: str
    pattern: str
    what: str  # "forward", "backward" (the gradient of that value), "gradient" or "buffer"
    ours: float
    torch: float
    limit: float
    suspects: tuple[str, ...]  # the calls to blame if this is the first difference

    @property
    def ok(self) -> bool:
        """Whether the error is rounding; where PyTorch's is not finite, nothing can be said."""
        return self.ours <= self.limit or not self.comparable

    @property
    def comparable(self) -> bool:
        """Whether PyTorch's error is finite."""
        return self.torch < float("inf")


class Verification(NamedTuple):
    """What verify returns: all differences, in the order in which they arise."""

    rows: list[Difference]

    @property
    def ok(self) -> bool:
        """Whether no difference is above rounding."""
        return self.first is None

    @property
    def first(self) -> Difference | None:
        """The first difference above rounding, forward before backward."""
        return next((row for row in self.rows if not row.ok), None)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def difference(
    place: Place,
    what: str,
    suspects: tuple[str, ...],
    ours: Tensor | None,
    theirs: Sequence[Tensor | None],
    exact: Tensor,
    there: Tensor,
    terms: Tensor | None = None,
) -> Difference:
    """Compare one value.

    there: what it is in float64 on the other side of near jumps. terms: what is rounded, where it
    is larger than the value.
    """
    norm = float(exact.double().norm().item()) or 1.0
    if ours is None or ours.shape != exact.shape:
        inf = float("inf")
        return Difference(place.name, place.pattern, what, inf, 0.0, 0.0, suspects)
    error = _distance(ours, exact)
    usual = max(_distance(t, exact) for t in theirs if t is not None)
    once = _rounding(exact if terms is None else terms, ours.dtype)
    limit = _factor(exact) * usual + FACTOR * once + 2 * _distance(there, exact)
    sizes = (error / norm, usual / norm, limit / norm)
    return Difference(place.name, place.pattern, what, *sizes, suspects)


def _distance(a: Tensor, b: Tensor) -> float:
    """The norm of a difference, in float64."""
    return float((a.double() - b.double()).norm().item())


def _factor(t: Tensor) -> float:
    """How much larger than PyTorch's an error may be by chance."""
    values = max(t.shape[:2], default=1)
    return FACTORS[values - 1] if 1 <= values <= len(FACTORS) else FACTOR


def _rounding(t: Tensor, dtype: torch.dtype) -> float:
    """The norm of a tensor's rounding errors in a dtype: each is uniform."""
    return torch.finfo(dtype).eps / math.sqrt(12) * float(t.double().norm().item())


_SCALE = "errors against float64, as parts of each value's norm, and the largest that is rounding"
_COLUMNS = ("fastcnn", "PyTorch", "limit")


def _lines(result: Verification) -> Iterator[str]:
    """The verdict, then a line a place; of inputs, parameters, buffers the worst of each kind."""
    yield from textwrap.wrap(_verdict(result), WIDTH, subsequent_indent="  ")
    forward = {(r.place, r.pattern): r for r in result.rows if r.what == "forward"}
    backward = {(r.place, r.pattern): r for r in result.rows if r.what == "backward"}
    cells: list[tuple[str, ...]] = [
        ("", "", "forward", "", "", "backward", "", ""),
        ("place", "pattern", *_COLUMNS, *_COLUMNS),
    ]
    for place in dict.fromkeys((*forward, *backward)):
        cells.append((*place, *_sizes(forward.get(place)), *_sizes(backward.get(place))))
    for what in ("output", "buffer", "input", "gradient"):
        rows = [r for r in result.rows if r.what == what]
        if rows:
            worst = max(rows, key=lambda r: r.ours / r.limit if r.limit else r.ours)
            sizes, empty = _sizes(worst), ("",) * len(_COLUMNS)
            there = (*sizes, *empty) if what in ("output", "buffer") else (*empty, *sizes)
            cells.append((worst.place, f"worst of {len(rows)}", *there))
    yield _SCALE
    for lines in columns(cells, (23, 19, 8, 7, 7, 8, 7, 7)):
        yield from lines


def _sizes(row: Difference | None) -> tuple[str, str, str]:
    if row is None:
        return "-", "-", "-"
    return f"{row.ours:.1e}" + ("" if row.ok else "!"), f"{row.torch:.1e}", f"{row.limit:.1e}"


def _verdict(result: Verification) -> str:
    first = result.first
    if first is None:
        unknown = [row for row in result.rows if not row.comparable]
        compared = len(result.rows) - len(unknown)
        said = f"no difference above rounding in {compared} values; dropout ran with p=0"
        if unknown:
            said += (
                f"; of {len(unknown)} more nothing can be said, the first at {unknown[0].place}: "
                "PyTorch's are not finite"
            )
        return said
    where = " or ".join(dict.fromkeys(first.suspects)) or first.place
    return (
        f"the first difference above rounding arises in {where}: {first.what} at {first.place}: "
        f"{first.ours:.1e} of its norm, PyTorch {first.torch:.1e}, limit {first.limit:.1e}"
    )
