"""Text in columns of a terminal's width."""

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

WIDTH = 100


def columns(cells: Sequence[tuple[str, ...]], most: tuple[int, ...]) -> Iterator[list[str]]:
    """Yield each row's lines, in columns as wide as they need but at most `most`."""
    needed = (max(map(len, column)) for column in zip(*cells, strict=True))
    widths = list(map(min, needed, most))
    for texts in cells:
        parts = zip_longest(*map(_wrap, texts, widths), fillvalue="")
        yield ["  ".join(map(str.ljust, line, widths)).rstrip() for line in parts]


def _wrap(text: str, width: int) -> list[str]:
    """Break text at blanks, and between the dots of a long name."""
    lines = [""]
    for part in re.findall(r"[^ .]+[ .]?|[ .]+", text):
        if lines[-1].strip() and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("  ")
        lines[-1] += part
    return [line.rstrip() for line in lines]
