"""upsample_conv2d in inference, behind it a batch norm and an activation: weights folded once.

    y = act(batch_norm(conv2d(cat([concat, up(x)], 1))))

As conv_bn_act/folded.py has it, with the two weights of interface.py: kept in oneDNN's layouts for
the last sizes. The skip's convolution adds what x has given, and applies the activation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcnn.common.activation import ACT_NUMBER, eager_activation
from fastcnn.common.autocast import autocast_dtype, cast
from fastcnn.ops.conv2d.onednn import (
    convolve_onednn,
    convolving_onednn,
    folds,
    packed_onednn,
    residual_beside,
    weight_type,
)
from fastcnn.ops.conv2d.winograd import KEPT, by_winograd, conv2d_winograd, transformed
from fastcnn.ops.conv_bn_act.folded import FoldedConv2d
from fastcnn.ops.conv_bn_act.inference import folded, norm_of_step
from fastcnn.ops.conv_bn_act.step import ConvBnActStep
from fastcnn.ops.conv_bn_act.weight_cache import Run
from fastcnn.ops.upsample.interface import interpolate
from fastcnn.ops.upsample_conv2d.interface import (
    AROUND,
    POINTWISE,
    Resize,
    by_taps,
    check_upsample_conv2d,
    resize_of,
    split,
)
from fastcnn.ops.upsample_conv2d.taps import upsample_taps_fwd


class FoldedUpsampleConv2d:
    """``act(norm(conv(cat([concat, interpolate(x)], 1))))`` of modules in evaluation.

    A call takes what :func:`fastcnn.functional.interpolate` takes. Arguments and errors are those
    of FoldedConv2d; refresh() is as there, and a copy or a pickle keeps nothing.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, act: str = "none"
    ) -> None:
        self.folded = FoldedConv2d(conv, norm, act)

    def refresh(self) -> None:
        """Fold anew at the next call."""
        self.folded.refresh()

    def __call__(
        self,
        x: Tensor,
        concat: Tensor | None = None,
        *,
        concat_last: bool = False,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ) -> Tensor:
        """Return act(norm(conv(cat([concat, interpolate(x)], 1))))."""
        dtype = autocast_dtype(x)
        x, concat = cast(x, dtype), cast(concat, dtype)
        how = (size, scale_factor, mode, align_corners, recompute_scale_factor)
        resize = resize_of(x, *how)
        tensors, numbers = self.folded.read()
        conv = self.folded.conv
        around = (conv.stride, conv.padding, conv.dilation, conv.groups) == ((1, 1),) * 3 + (1,)
        state = None
        if around and folds(x) and by_taps(x, concat, conv.weight, resize):
            state = self.folded.state_for(x, concat, tensors, numbers)
        if state is None:
            return self.folded(interpolate(x, *how, False, concat, concat_last))
        key = (
            x.shape,
            None if concat is None else concat.shape,
            x.dtype,
            dtype,
            resize,
            concat_last,
        )
        known = state.runs.get(key)
        if known is None:
            step = self.folded.step(tensors)
            weight, conv_bias = cast(step.weight, dtype), cast(step.conv_bias, dtype)
            check_upsample_conv2d(x, concat, weight, conv_bias, resize)
            known = state.keep(key, _run(x, concat, step, resize, concat_last), [])
        return known[0](x, concat, False)


def _run(
    x: Tensor, concat: Tensor | None, step: ConvBnActStep, resize: Resize, concat_last: bool
) -> Run:
    weight, bias = folded(step.weight, step.conv_bias, norm_of_step(step), torch.float32)
    ws, wz = split(weight, x.shape[1], concat_last)
    winograd = False
    wz = packed_onednn(x, wz.to(weight_type(x, wz, POINTWISE)), POINTWISE)
    of_x = convolving_onednn(x, wz, None, POINTWISE, "none")
    if ws is not None and concat is not None:
        winograd = by_winograd(concat, ws, AROUND, KEPT)
        if winograd:
            ws = transformed(ws)
        else:
            ws = ws.to(weight_type(concat, ws, AROUND))
            bias = bias.to(ws.dtype)
            ws = packed_onednn(concat, ws, AROUND)
    else:
        bias = bias.to(x.dtype)

    def run(x: Tensor, concat: Tensor | None, _: bool) -> Tensor:
        y: Tensor = upsample_taps_fwd(of_x(x), *resize)
        if ws is None or concat is None:
            return eager_activation(y.add_(bias[:, None, None]), step.act, inplace=True)
        if winograd:
            added = residual_beside(concat, y, True)
            act = ACT_NUMBER[step.act]
            return conv2d_winograd(concat, ws, bias, AROUND.padding, act, added)
        return convolve_onednn(concat, ws, bias, AROUND, step.act, y, True, into=True)

    return run
