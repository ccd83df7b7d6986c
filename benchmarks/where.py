"""Where the benchmarks run, on which cases, and how large.

On the card where there is one, else on the CPU. FASTCNN_BENCH says what else:

    all    on the card every case, not only those that end in three minutes
    tiny   the card's cases in sizes of nothing, on the CPU too: proves that they run, times nothing
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from card import DEVICE, HAS_CARD
from shapes import Conv

__all__ = ["ALL", "DEVICE", "HAS_CARD", "ON_CARD", "TINY", "cases", "on", "tiny", "tiny_conv"]

_WHICH = os.environ.get("FASTCNN_BENCH", "")
if _WHICH not in ("", "all", "tiny"):
    raise ValueError(f"FASTCNN_BENCH: expected all or tiny, got {_WHICH!r}")
ALL, TINY = _WHICH == "all", _WHICH == "tiny"
ON_CARD = HAS_CARD or TINY  # whether the card's cases are meant


def on(cpu: Any, card: Any) -> Any:
    """Return what holds here."""
    return card if ON_CARD else cpu


def tiny(*sizes: int, most: int = 16) -> tuple[int, ...]:
    """Return sizes as they are, with FASTCNN_BENCH=tiny none above `most`."""
    return tuple(min(size, most) for size in sizes) if TINY else sizes


def tiny_conv(conv: Conv) -> Conv:
    """Return a convolution as it is, with FASTCNN_BENCH=tiny a small one."""
    c_in, c_out, side = tiny(conv.c_in, conv.c_out, conv.side)
    return conv._replace(c_in=c_in, c_out=c_out, side=side)


def cases(everything: Mapping[str, Any], card: Iterable[str]) -> list[Any]:
    """Return parameters with their ids: on the card those that are named, or all."""
    names = list(card) if ON_CARD and not ALL else list(everything)
    return [pytest.param(everything[name], id=name) for name in names]
