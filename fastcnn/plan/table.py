"""What was chosen, as a table for people; `fastcnn.report()` prints it."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastcnn.common.text_table import WIDTH

__all__ = ["Row", "table"]

HEADER = ("problem", "plan", "source", "ms")
# What a problem is without saying so.
DEFAULTS = {"stride=1x1", "padding=0x0", "dilation=1x1", "groups=1"}


class Row(NamedTuple):
    """A line of the report."""

    problem: str
    plan: str
    source: str
    reason: str
    milliseconds: float | None

    @property
    def device(self) -> str:
        """Name and capability, which end the problem's key."""
        return self.problem.split(" on ", 1)[1]


def table(rows: Sequence[Row]) -> str:
    """Return the rows by device, in WIDTH columns: each reason below its plan."""
    if not rows:
        return "nothing was planned: no op with several candidates has run"
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    cells = [_cells(row) for row in rows]
    problem, plan, source, ms = (
        max(map(len, column)) for column in zip(HEADER, *cells, strict=True)
    )
    problem = min(problem, WIDTH - 3 * len("  ") - plan - source - ms)

    def line(what: str, name: str, origin: str, took: str) -> str:
        return f"{what:{problem}}  {name:{plan}}  {origin:{source}}  {took:>{ms}}"

    yield line(*HEADER)
    by_device = sorted(zip(rows, cells, strict=True), key=lambda pair: pair[0].device)
    for device, group in itertools.groupby(by_device, lambda pair: pair[0].device):
        yield f"on {device}"
        for row, (what, *others) in group:
            first, *more = _wrapped(what, problem, "", "  ")
            yield line(first, *others)
            yield from more
            yield from _wrapped(row.reason, WIDTH, "    ", "    ")


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
    )


def _cells(row: Row) -> tuple[str, str, str, str]:
    words = row.problem.removesuffix(f" on {row.device}").split()
    took = "-" if row.milliseconds is None else f"{row.milliseconds:.4g}"
    return " ".join(word for word in words if word not in DEFAULTS), row.plan, row.source, took
