"""Size, scale and mode of interpolate, as torch.nn.functional.interpolate takes them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.checks import check_choice

OP = "interpolate"

# csrc/common/resample.h holds the same table: by mode and align_corners.
SAMPLING_NUMBER = {
    ("nearest", False): 0,
    ("nearest-exact", False): 1,
    ("bilinear", False): 2,
    ("bilinear", True): 3,
}
MODES = ("nearest", "nearest-exact", "bilinear")

LARGEST_SIDE = 2**31 - 1  # csrc/upsample.h: sides are 32-bit numbers

Pair = tuple[int, int]
Scales = tuple[float | None, float | None]


def output_size(
    input: Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    recompute_scale_factor: bool | None,
) -> tuple[Pair, Scales]:
    """Return h and w of the output, and the scales that coordinates are computed with, if given."""
    if (size is None) == (scale_factor is None):
        got = "neither" if size is None else "both"
        raise ValueError(f"{OP}: size, scale_factor: expected exactly one of the two, got {got}")
    if scale_factor is None:
        h, w = _pair("size", size, "an integer", (int, torch.SymInt))
        if recompute_scale_factor:
            raise ValueError(
                f"{OP}: recompute_scale_factor: expected a scale_factor to compute the size with, "
                f"got size={size!r}"
            )
        scales: Scales = (None, None)
    else:
        factors = _pair("scale_factor", scale_factor, "a number", (int, float))
        h, w = map(_resized, input.shape[2:], factors)
        scales = (None, None) if recompute_scale_factor else (float(factors[0]), float(factors[1]))
    small = h < 1 or w < 1
    # Not while tracing, where it would be a guard on each dynamic size; C++ checks it too.
    if small or (not torch.compiler.is_compiling() and max(h, w) > LARGEST_SIDE):
        asked = f"size={size!r}" if scale_factor is None else f"scale_factor={scale_factor!r}"
        limit = "at least 1x1 pixels" if small else f"at most {LARGEST_SIDE} pixels a side"
        raise ValueError(f"{OP}: {asked}: expected an output of {limit}, got {h}x{w}")
    return (h, w), scales


def _resized(pixels: int, factor: float) -> int:
    """floor(pixels * factor), of symbols too; 0 where that is no number of pixels.

    Symbols can be compared, but math.isfinite takes none and int() of a size makes it a constant.
    """
    if not 0 < pixels * factor < math.inf:
        return 0
    whole = torch.sym_int(factor)
    # A multiple of the size, which torch.export knows to be that of a skip, as the floor is not.
    return pixels * whole if whole == factor else torch.sym_int(pixels * factor)


def _pair(name: str, value: Any, kind: str, types: tuple[Any, ...]) -> tuple[Any, Any]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    good = [isinstance(v, types) and not isinstance(v, bool) for v in pair]
    if not all(good):
        raise TypeError(f"{OP}: {name}: expected {kind} or a pair of them, got {value!r}")
    if len(pair) != 2:
        raise ValueError(f"{OP}: {name}: expected {kind} or a pair of them, got {value!r}")
    return pair


def sampling_number(op: str, mode: str, align_corners: bool | None) -> int:
    """Return the schema's number of mode and align_corners, or raise ValueError."""
    check_choice(op, "mode", mode, MODES)
    if mode != "bilinear" and align_corners is not None:
        raise ValueError(
            f"{op}: align_corners: expected None beside mode={mode!r}, since only bilinear has "
            f"it, got {align_corners!r}"
        )
    return SAMPLING_NUMBER[mode, bool(align_corners)]
