"""batch_norm_act of a concatenation, each piece of which is read where it lies.

    x = cat(xs, 1)
    y = act((x - mean) * rstd * weight + bias + residual)

xs: [n, c_i, h, w], all NCHW or all channels_last; y, residual: [n, c, h, w], c = sum(c_i).

Data movement in passes over x, T: forward in training 3 (the statistics read the pieces; they are
read again, and y is written), in evaluation 2: torch.cat would add 2. Backward 5, also of a frozen
batch norm, which takes 3 where x is one tensor: dx is written in tensors like the pieces, dense, so
that what gathers a piece's gradients adds dense tensors. Saved for backward: the pieces, which all
their readers share, and what batch_norm_act saves beside x. So of a DenseNet's layers none keeps
the concatenation of all before it, which grows with their square.

On CUDA, and where other processes hold more of the batch, torch.cat runs before batch_norm_act.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.checks import check_format, check_image, check_image_of, memory_format_of
from fastcnn.common.dtypes import acc_type, new_image
from fastcnn.common.library import declare


def _new_channels(x: Tensor, c: int) -> Tensor:
    return x.new_empty(c, dtype=acc_type(x))


def _apply_fake(xs: Sequence[Tensor], *_: Any) -> Tensor:
    layout = format_of(xs)
    if layout is None:
        raise RuntimeError("fastcnn::batch_norm_act_concat: xs: expected dense tensors, one layout")
    return new_image(xs[0], sizes_of(xs), layout is torch.channels_last)


def _fwd_fake(xs: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = _apply_fake(xs)
    return y, _new_channels(y, y.shape[1]), _new_channels(y, y.shape[1])


def _bwd_fake(
    dy: Tensor, xs: Sequence[Tensor], *args: Any
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    want_dresidual = args[-1]
    dresidual = torch.empty_like(dy) if want_dresidual else dy.new_empty(0)
    sums = [_new_channels(dy, dy.shape[1]) for _ in range(2)]
    return [torch.empty_like(x) for x in xs], dresidual, sums[0], sums[1]


declare(
    "batch_norm_act_concat_fwd(Tensor[] xs, Tensor? residual, Tensor? weight, Tensor? bias, "
    "float eps, int act) -> (Tensor y, Tensor mean, Tensor var)",
    _fwd_fake,
)
declare(
    "batch_norm_act_concat_apply(Tensor[] xs, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor var, float eps, int act) -> Tensor",
    _apply_fake,
)
declare(
    "batch_norm_act_concat_bwd(Tensor dy, Tensor[] xs, Tensor? saved, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor var, float eps, int act, bool training, "
    "bool want_dresidual) -> (Tensor[] dxs, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _bwd_fake,
)

concat_fwd = torch.ops.fastcnn.batch_norm_act_concat_fwd.default
concat_apply = torch.ops.fastcnn.batch_norm_act_concat_apply.default
concat_bwd = torch.ops.fastcnn.batch_norm_act_concat_bwd.default


def sizes_of(xs: Sequence[Tensor]) -> list[int]:
    """Return the concatenation's sizes."""
    n, _, h, w = xs[0].shape
    return [n, sum(x.shape[1] for x in xs), h, w]


def format_of(xs: Sequence[Tensor]) -> torch.memory_format | None:
    """Return the memory format in which all are dense, the contiguous one first; None: none."""
    xs = [x for x in xs if x.shape[1] != 0] or xs
    first = memory_format_of(xs[0])
    if all(memory_format_of(x) is first for x in xs):
        return first
    for layout in (torch.contiguous_format, torch.channels_last):
        if all(x.is_contiguous(memory_format=layout) for x in xs):
            return layout
    return None


def check_pieces(op: str, xs: Sequence[Tensor]) -> None:
    """Check tensors that are read as one: dense images, alike in all but their channels."""
    if not xs:
        raise ValueError(f"{op}: input: expected a Tensor or several, got none")
    check_image(op, "input[0]", xs[0])
    first, layout, (n, _, h, w) = xs[0], memory_format_of(xs[0]), xs[0].shape
    for i, x in enumerate(xs):
        if not is_piece(x, first, layout):
            check_image(op, f"input[{i}]", x)
            check_image_of(op, f"input[{i}]", x, [n, x.shape[1], h, w], first)
            if format_of(xs) is None:
                check_format(op, f"input[{i}]", x, layout)


def is_piece(x: Any, first: Tensor, layout: torch.memory_format | None) -> bool:
    """Whether x is like a dense image in a layout, in all but its channels.

    A call of 16 small pieces takes 74 us so, and 116 asking for each error (Xeon with AVX-512).
    """
    if not isinstance(x, Tensor) or x.dtype is not first.dtype or x.device != first.device:
        return False
    n, _, *image = first.shape
    return (
        layout is not None
        and x.dim() == 4
        and x.shape[0] == n
        and x.shape[2:] == (*image,)
        and x.is_contiguous(memory_format=layout)
    )
