"""dropout: the operators, what they return, and their autograd.

    y = x * keep * scale + residual        scale = 2^32 / T,  0 where p is 1
    keep(i) = u(i) < T                     T = (1 - p) * 2^32, rounded

x, residual, y: [n, c, h, w], dense in NCHW or channels_last, or any other number of dimensions,
contiguous; seed: one int64 on x's device.

i is the element's logical index (i_n * c + i_c) * h * w + i_h * w + i_w, whatever the memory layout
(per channel: i_n * c + i_c), and u(i) a draw of 32 bits that depends on seed and i alone:
csrc/common/dropout_mask.h. So the mask is the same bits on CPU and CUDA, in NCHW and channels_last,
on any number of threads, eager and compiled. The probability to be kept is exactly T / 2^32: 1 - p
to 2^-33, and never 0 or 1 unless p is 1 or 0 (T = 0: nothing is kept; T = 2^32: all is); the scale
is that of T.

Data movement in passes over the tensor: 2 (3 with a residual), backward 2. Saved for backward: the
seed, 8 bytes. Backward is the same map without a residual, applied to dy: it draws the mask again.
"""

from typing import Any

import torch
from torch import Tensor

from fastcnn.common.checks import check_dense, check_like, memory_format_of
from fastcnn.common.library import apply, declare, distinct, each_of_batched, positional
from fastcnn.common.overrides import plain_tensors

OP = "dropout"


def _apply_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


declare(
    "dropout_apply(Tensor x, Tensor? residual, Tensor seed, float p, bool per_channel) -> Tensor",
    _apply_fake,
)
declare(
    "dropout_apply_(Tensor(a!) x, Tensor? residual, Tensor seed, float p, bool per_channel) -> ()",
    lambda *_: None,
)

_apply = torch.ops.fastcnn.dropout_apply.default
_apply_inplace = torch.ops.fastcnn.dropout_apply_.default
_INT64 = torch.iinfo(torch.int64)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Return an int64 of the device's default generator, or of the one given, on the device.

    A captured CUDA graph draws a new one at every replay. It is the overload that takes a generator
    because inductor has random numbers of its own for torch.randint, but none for this one.
    """
    return torch.ops.aten.randint.low_generator(
        _INT64.min, _INT64.max, (), generator=generator, dtype=torch.int64, device=device
    )


class DropoutFunction(torch.autograd.Function):
    """y, which is x itself where inplace."""

    @staticmethod
    @positional
    def forward(
        x: Tensor, residual: Tensor | None, seed: Tensor, p: float, per_channel: bool, inplace: bool
    ) -> Tensor:
        if not inplace:
            return _apply(x, residual, seed, p, per_channel)
        _apply_inplace(x, residual, seed, p, per_channel)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, _, seed, ctx.p, ctx.per_channel, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.layout = memory_format_of(x) or torch.contiguous_format
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed)

    @staticmethod
    @each_of_batched
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        (seed,) = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            args = dy.contiguous(memory_format=ctx.layout), None, seed, ctx.p, ctx.per_channel
            # Through the Function, so that it can be differentiated again; Dynamo takes no Function
            # inside another one's backward, and torch.compile has no double backward.
            if torch.compiler.is_compiling():
                dx = _apply(*args)
            else:
                with plain_tensors():
                    dx = DropoutFunction.apply(*args, False)
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """One call a sample: each has logical indices of its own, and under "different" a seed."""
        if args[-1]:
            raise NotImplementedError(f"{OP}: inplace: expected False under torch.vmap, got True")

        def sample(i: int) -> list[Any]:
            pairs = zip(args, in_dims, strict=True)
            return [a if d is None else a.select(d, i).contiguous() for a, d in pairs]

        ys = [DropoutFunction.apply(*sample(i)) for i in range(info.batch_size)]
        return torch.stack(ys), 0


def _check(
    input: Tensor,
    p: float,
    inplace: bool,
    residual: Tensor | None,
    per_channel: bool,
    generator: torch.Generator | None,
) -> None:
    check_dense(OP, "input", input)
    if per_channel and input.dim() < 3:
        raise ValueError(
            f"{OP}: input: expected at least 3 dimensions [n, c, ...] with per_channel, "
            f"got {list(input.shape)}"
        )
    if not isinstance(p, (int, float)):
        raise TypeError(f"{OP}: p: expected a number, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"{OP}: p: expected a probability from 0 to 1, got {p}")
    if residual is not None:
        check_like(OP, "residual", residual, input)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{OP}: generator: expected a torch.Generator, got {type(generator).__name__}"
            )
        if generator.device.type != input.device.type:
            raise ValueError(
                f"{OP}: generator: expected one for {input.device}, got one for {generator.device}"
            )
    if inplace and input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        # Autograd would say so too, but only after the values are gone.
        raise RuntimeError(
            f"{OP}: inplace: a leaf Variable that requires grad is being used in an in-place "
            "operation"
        )


def dropout(
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    residual: Tensor | None,
    per_channel: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Check, draw the seed, apply: see fastcnn.functional.dropout."""
    _check(input, p, inplace, residual, per_channel, generator)
    if not training or p == 0 or input.numel() == 0:
        if residual is None:
            return input
        return input.add_(residual) if inplace else input + residual
    seed = draw_seed(input.device, generator)
    return apply(DropoutFunction, *distinct(input, residual), seed, float(p), per_channel, inplace)
