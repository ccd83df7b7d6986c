"""Several steps of FoldedConv2d as one call: an inverted residual block's, in inference.

To the bits of the steps one by one in float32, where their products are pointwise_conv2d's; in half
types the images between are not rounded, and on AVX-512 the first product is not oneDNN's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.ops.conv2d.inverted_residual import (
    Convolution,
    Depthwise,
    Pointwise,
    inverted_residual,
    taken_together,
)
from fastcnn.ops.conv2d.onednn import residual_beside
from fastcnn.ops.conv2d.pointwise import takes_products
from fastcnn.ops.conv_bn_act.folded import FoldedConv2d, in_panels
from fastcnn.ops.conv_bn_act.inference import folded, norm_of_step
from fastcnn.ops.conv_bn_act.interface import OP
from fastcnn.ops.conv_bn_act.step import ConvBnActBlock
from fastcnn.ops.conv_bn_act.validate import check_block
from fastcnn.ops.conv_bn_act.weight_cache import Attribute, Run, State


class Together(NamedTuple):
    """The first steps of some that run as one call: how many, for how long they may, and how."""

    steps: int
    kept: list[tuple[State, Attribute]]
    run: Run


def prepare_together(
    foldings: Sequence[FoldedConv2d],
    x: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype | None,
) -> Together | None:
    """Return what runs the first of these steps on images like x as one call.

    None where they are not known to be faster so, or nothing is kept. residual: added behind the
    last of all. dtype: as prepare's.
    """
    if not any(f.conv.groups > 1 for f in foldings[:2]) or not takes_products(x):
        return None
    given = [folding.read() for folding in foldings[:3]]
    steps = [folding.step(read[0]) for folding, read in zip(foldings, given, strict=False)]
    block = check_block(OP, ConvBnActBlock(steps), x, list(x.shape), dtype, "default", False)
    found = [(s, checked.settings.conv) for s, checked in zip(steps, block.steps, strict=True)]
    count = taken_together(x, [Convolution(s.weight, g, s.act) for s, g in found])
    added = residual if count == len(foldings) else None
    if count == 0 or (added is not None and not _is_added(added, x, found[-1][1], block.output)):
        return None
    kept, parts = list[tuple[State, Attribute]](), list[Pointwise | Depthwise]()
    for folding, read, (step, g) in zip(foldings[:count], given, found, strict=False):
        state = folding.state_for(x, added, *read)
        if state is None:
            return None
        kept.append((state, folding.keeps(state)))
        how = step.weight, step.conv_bias, norm_of_step(step), torch.float32
        weight, bias = state.kept(folded if g.groups > 1 else in_panels, *how)
        part = Pointwise(weight, bias, step.act)
        parts.append(Depthwise(*part, g) if g.groups > 1 else part)

    def run(x: Tensor, residual: Tensor | None, _: bool) -> Tensor:
        return inverted_residual(x, parts, residual_beside(x, residual, False))

    return Together(count, kept, run)


def _is_added(residual: Tensor, x: Tensor, last: ConvGeometry, sizes: list[int]) -> bool:
    """Whether a call of several steps adds a residual: behind a 1x1 convolution, of y's kind."""
    fits = residual.dtype is x.dtype and residual.device == x.device
    return last.groups == 1 and fits and list(residual.shape) == sizes
