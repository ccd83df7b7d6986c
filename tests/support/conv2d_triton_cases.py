"""Problems of Triton's convolutions, and the types that each is run in."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from support.activations import ACTS
from support.device import slow_unless, thinned

from fastcnn.common.activation import ACT_NUMBER
from fastcnn.triton.conv2d_fwd import Tile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tile(m=32, n=16, k=16, warps=4, stages=2, group=2)
NAMES = list(ACT_NUMBER)


GEOMETRIES = {
    "1x1": ((2, 16, 5, 7), (32, 16, 1, 1), {}),
    "1x1, channels for no descriptor": ((2, 5, 5, 7), (9, 5, 1, 1), {}),
    "1x1, channels that end within a step": ((2, 24, 5, 7), (40, 24, 1, 1), {}),
    "1x1, stride": ((2, 16, 6, 7), (8, 16, 1, 1), {"stride": (2, 2)}),
    "1x1, padding": ((1, 16, 4, 3), (8, 16, 1, 1), {"padding": (1, 2)}),
    "3x3": ((2, 16, 6, 5), (16, 16, 3, 3), {"padding": (1, 1)}),
    "3x3, odd": ((1, 19, 7, 5), (17, 19, 3, 3), {"padding": (1, 1)}),
    "3x3, stride": ((2, 16, 7, 8), (16, 16, 3, 3), {"stride": (2, 2), "padding": (1, 1)}),
    "dilation": ((1, 16, 9, 8), (8, 16, 3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
    "stem: three channels, taps in one range": (
        (1, 3, 15, 14),
        (16, 3, 7, 7),
        {"stride": (2, 2), "padding": (3, 3)},
    ),
    "sides differ": (
        (1, 16, 9, 7),
        (8, 16, 3, 2),
        {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
    ),
    "groups": ((2, 32, 5, 5), (64, 16, 3, 3), {"padding": (1, 1), "groups": 2}),
    "groups of 4, ResNeXt": ((1, 32, 5, 5), (32, 4, 3, 3), {"padding": (1, 1), "groups": 8}),
    "depthwise": ((2, 20, 6, 5), (20, 1, 3, 3), {"padding": (1, 1), "groups": 20}),
    "depthwise, two outputs a channel": (
        (1, 6, 9, 8),
        (12, 1, 5, 3),
        {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2), "groups": 6},
    ),
    "1x1 image": ((3, 16, 1, 1), (16, 16, 1, 1), {}),
    "padding only at the corners": ((1, 16, 1, 1), (8, 16, 3, 3), {"padding": (1, 1)}),
}


def in_float32(_: str, dtype: torch.dtype) -> bool:
    return dtype is torch.float32


def in_two_types(names: Iterable[str], step: int) -> list[Any]:
    """Each in float32 and in a half type: the two differ where values are read and written."""
    halves = itertools.cycle(DTYPES[1:])
    cases = [(name, dtype) for name in names for dtype in (torch.float32, next(halves))]
    return slow_unless(in_float32, thinned(cases, step))


HALF = [("relu", torch.bfloat16), ("gelu", torch.bfloat16), ("silu", torch.float16)]
BEHIND = [*((act, torch.float32) for act in ACTS), *HALF]
