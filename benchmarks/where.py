"""Where the benchmarks run, on which cases, and how large.

On the GPU where there is one, else on the CPU. FASTCNN_BENCH says what else:

    all    on the GPU every case, not only those that end in three minutes
    tiny   the GPU's cases in sizes of nothing, on the CPU too: shows that they run, times nothing
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from support.device import DEVICE, HAS_GPU
from support.shapes import Conv

__all__ = ["ALL", "DEVICE", "HAS_GPU", "ON_GPU", "TINY", "cases", "on", "tiny", "tiny_conv"]

_WHICH = os.environ.get("FASTCNN_BENCH", "")
if _WHICH not in ("", "all", "tiny"):
    raise ValueError(f"FASTCNN_BENCH: expected all or tiny, got {_WHICH!r}")
ALL, TINY = _WHICH == "all", _WHICH == "tiny"
ON_GPU = HAS_GPU or TINY  # whether the GPU's cases are meant


def on(cpu: Any, gpu: Any) -> Any:
    """Return what holds here."""
    return gpu if ON_GPU else cpu


def tiny(*sizes: int, most: int = 16) -> tuple[int, ...]:
    """Return sizes as they are, with FASTCNN_BENCH=tiny none above `most`."""
    return tuple(min(size, most) for size in sizes) if TINY else sizes


def tiny_conv(conv: Conv) -> Conv:
    """Return a convolution as it is, with FASTCNN_BENCH=tiny a small one."""
    c_in, c_out, side = tiny(conv.c_in, conv.c_out, conv.side)
    return conv._replace(c_in=c_in, c_out=c_out, side=side)


def cases(everything: Mapping[str, Any], gpu: Iterable[str]) -> list[Any]:
    """Return parameters with their ids: on the GPU those that are named, or all."""
    names = list(gpu) if ON_GPU and not ALL else list(everything)
    return [pytest.param(everything[name], id=name) for name in names]
