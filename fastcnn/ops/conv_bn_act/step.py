"""One step of a conv_bn_act chain: what it takes, and what is asked of it."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastcnn.common.activation import ACT_NUMBER, act_number, derivative_needs_only_y
from fastcnn.common.autocast import cast_dtype
from fastcnn.common.checks import check_choice, check_flag, check_parameters
from fastcnn.common.conv_geometry import (
    INTEGERS,
    ConvGeometry,
    Pool,
    output_size,
    pair,
    refuse_window,
)
from fastcnn.common.process_group import Group, group_of

Memory = Literal["auto", "full", "default", "low", "lowest"]


class MaxPool(NamedTuple):
    """The arguments of torch.nn.functional.max_pool2d: an int or a pair each.

    Example:
        >>> fastcnn.functional.MaxPool(kernel_size=3, stride=2, padding=1)
        MaxPool(kernel_size=3, stride=2, padding=1)
    """

    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int]
    padding: int | tuple[int, int] = 0


class ConvBnActStep(NamedTuple):
    """One step of a chain: act(batch_norm(conv2d(x))), then max_pool2d where `pool` is given.

    The arguments and defaults are those of torch.nn.functional.conv2d and batch_norm: weight
    [c_out, c_in / groups, kh, kw], conv_bias [c_out] or None, and per output channel running_mean,
    running_var, bn_weight, bn_bias or None. stride, padding, dilation: an int or a pair.
    sync, process_group: as in batch_norm_act, for each step by itself.

    Example:
        >>> step = fastcnn.functional.ConvBnActStep(torch.randn(8, 3, 3, 3), padding=1, act="silu")
        >>> step.stride, step.pool
        (1, None)
    """

    weight: Tensor
    conv_bias: Tensor | None = None
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    act: str = "relu"
    sync: bool = False
    process_group: ProcessGroup | None = None
    pool: MaxPool | None = None


class ConvBnActBlock(NamedTuple):
    """A chain with its shortcut: steps(x) + shortcut(x), added before the last activation.

    shortcut: None for no residual, () for x itself, or the steps of a projection of x.

    Example:
        >>> step = fastcnn.functional.ConvBnActStep(torch.randn(8, 8, 3, 3), padding=1)
        >>> fastcnn.functional.ConvBnActBlock([step, step], shortcut=()).shortcut
        ()
    """

    steps: Sequence[ConvBnActStep]
    shortcut: Sequence[ConvBnActStep] | None = None


class StepSettings(NamedTuple):
    """What is not a tensor in a step, as the Function takes it."""

    conv: ConvGeometry
    training: bool
    eps: float
    act: int
    group: Group | None = None
    pool: Pool | None = None
    recompute: bool = False  # the convolution's output is not saved: backward runs it again
    saves_indices: bool = False  # the pooling's
    saves_output: bool = False  # the next step's input: backward recomputes nothing of it
    by_triton: bool = False  # the convolution, with its statistics: candidates.py

    def saved(self) -> tuple[str, ...]:
        """Return what the Function keeps of a step for backward, in order."""
        names: tuple[str, ...] = () if self.recompute else ("raw",)
        if self.training:
            names += ("mean", "var") if self.group is None else ("mean", "var", "total")
        names += ("indices",) if self.saves_indices else ()
        return (*names, "output") if self.saves_output else names


def any_by_triton(steps: Iterable[StepSettings]) -> bool:
    """Whether Triton, which reads channels_last, runs a convolution of these steps."""
    return any(s.by_triton for s in steps)


class BlockSettings(NamedTuple):
    """A ConvBnActBlock without its tensors."""

    steps: tuple[StepSettings, ...]
    shortcut: tuple[StepSettings, ...] | None

    def saves_y(self) -> bool:
        """Whether backward knows the last activation's derivative from the block's output."""
        act = self.steps[-1].act
        return act != ACT_NUMBER["none"] and derivative_needs_only_y(act)

    def needs_residual(self) -> bool:
        """Whether it needs what is added before that activation."""
        return self.steps[-1].act != ACT_NUMBER["none"] and not self.saves_y()


def check_memory(op: str, memory: str) -> None:
    """Check the name of a memory level."""
    check_choice(op, "memory", memory, get_args(Memory))


def level_on(device: str, memory: Memory) -> Memory:
    """Return a memory level, for "auto" the fastest on a kind of device.

    On a CPU recomputation is what it costs: docs/performance.md. On a GPU nothing was measured.
    """
    if memory != "auto":
        return memory
    return "full" if device == "cpu" else "default"


Checked = tuple[StepSettings, list[int], list[int]]
# By all that check_step looks at: what it has found. A known step takes 4 us, another one 13
# (2-core Xeon with AVX-512, beside other work).
_known: dict[tuple[Any, ...], Checked] = {}
_MOST_KNOWN = 4096


def check_step(
    op: str,
    step: ConvBnActStep,
    x: Tensor,
    sizes: list[int],
    dtype: torch.dtype | None,
    memory: str,
) -> Checked:
    """Check a step whose input has these sizes and x's dtype, and whose weights are cast to dtype.

    Returns the sizes of its convolution output, and of its output, which are others where it pools.
    """
    # Processes may join, groups are not to be kept, sizes may be symbols.
    if step.sync or step.process_group is not None or torch.compiler.is_compiling():
        return _check_step(op, step, x, sizes, dtype, memory)
    try:
        key = (*_seen_of(step), x.dtype, x.device, tuple(sizes), dtype, memory)
        found = _known.get(key)
    except (AttributeError, TypeError):  # no tensors, or a list, which has no hash
        return _check_step(op, step, x, sizes, dtype, memory)
    if found is None:
        found = _check_step(op, step, x, sizes, dtype, memory)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = found
    return found


def _seen_of(step: ConvBnActStep) -> tuple[Any, ...]:
    """Return what the checks see of a step."""
    (
        weight, conv_bias, stride, padding, dilation, groups, mean, var, bn_weight, bn_bias,
        training, momentum, eps, act, sync, group, pool,
    ) = step  # fmt: skip
    of_weight = weight.shape, weight.dtype, weight.device
    of_buffers = [
        None if t is None else (t.is_contiguous(), t.requires_grad and torch.is_grad_enabled())
        for t in (mean, var)
    ]
    of_vectors = [
        None if t is None else (t.shape, t.dtype, t.device)
        for t in (conv_bias, bn_weight, bn_bias, mean, var)
    ]
    plain = stride, padding, dilation, groups, training, momentum, eps, act, sync, group, pool
    return *of_weight, *of_buffers, *of_vectors, *plain, *map(type, plain)  # 1.0 == 1 == True


def _check_step(
    op: str,
    step: ConvBnActStep,
    x: Tensor,
    sizes: list[int],
    dtype: torch.dtype | None,
    memory: str,
) -> Checked:
    check_flag(op, "training", step.training)
    c_in = _check_weights(op, step, x, sizes, dtype)
    c_out, kernel = step.weight.shape[0], step.weight.shape[2:]
    pool, group = step.pool, group_of(op, step.sync, step.process_group)
    g = ConvGeometry(
        pair(op, "stride", step.stride),
        pair(op, "padding", step.padding),
        pair(op, "dilation", step.dilation),
        int(step.groups),
    )
    s = StepSettings(
        g,
        step.training,
        step.eps,
        act_number(op, step.act),
        group if step.training else None,
        None if pool is None else _check_pool(op, pool),
        # Its output is larger than its input, and it is the cheapest convolution there is.
        recompute=memory == "lowest" and tuple(kernel) == (1, 1) and c_out > c_in,
        saves_indices=memory == "full" and pool is not None,
    )
    sides = [] if min(g.stride) < 1 else g.output_size(sizes[2:], kernel)
    if not sides or min(sides) < 1 or min(g.padding) < 0 or min(g.dilation) < 1:
        refuse_window(op, sizes, kernel, *g[:3])
    out = [sizes[0], c_out, *sides]
    check_parameters(
        op, out, x, step.bn_weight, step.bn_bias, step.running_mean, step.running_var,
        step.training, step.momentum, step.eps, "bn_", group is not None,
    )  # fmt: skip
    if s.pool is None:
        return s, out, out
    pooled = output_size(out[2:], *s.pool)
    if min(pooled) < 1:
        raise ValueError(
            f"{op}: pool: expected a window that fits into the padded image, got "
            f"{step.pool} for {out}"
        )
    return s, out, out[:2] + pooled


def _check_weights(
    op: str, step: ConvBnActStep, x: Tensor, sizes: list[int], dtype: torch.dtype | None
) -> int:
    """Check the convolution's tensors against each other and x; return its input channels."""
    weight = step.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight: expected a Tensor, got {type(weight).__name__}")
    if weight.dim() != 4:
        raise ValueError(
            f"{op}: weight: expected 4 dimensions [c_out, c_in / groups, kh, kw], "
            f"got {list(weight.shape)}"
        )
    if not isinstance(step.groups, INTEGERS):
        raise TypeError(f"{op}: groups: expected an integer, got {type(step.groups).__name__}")
    if step.groups < 1:
        raise ValueError(f"{op}: groups: expected at least 1, got {step.groups}")
    c_out, c_in = weight.shape[0], weight.shape[1] * step.groups
    if c_in != sizes[1]:
        raise ValueError(
            f"{op}: input: expected {c_in} channels for weight {list(weight.shape)} with "
            f"groups={step.groups}, got {sizes[1]}: {sizes}"
        )
    if c_out % step.groups != 0:
        raise ValueError(
            f"{op}: groups: expected a divisor of {c_out} output channels, got {step.groups}"
        )
    for name, t in (("weight", weight), ("conv_bias", step.conv_bias)):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name}: expected a Tensor, got {type(t).__name__}")
        if t is not None and (found := cast_dtype(t, dtype)) != x.dtype:
            raise TypeError(f"{op}: {name}: expected {x.dtype} as the input, got {found}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name}: expected device {x.device}, got {t.device}")
    if step.conv_bias is not None and step.conv_bias.shape != (c_out,):
        raise ValueError(
            f"{op}: conv_bias: expected {c_out} numbers, got {list(step.conv_bias.shape)}"
        )
    return c_in


def _check_pool(op: str, pool: MaxPool) -> Pool:
    if not isinstance(pool, MaxPool):
        raise TypeError(f"{op}: pool: expected None or a MaxPool, got {type(pool).__name__}")
    kernel, stride, padding = (
        pair(op, f"pool.{name}", getattr(pool, name)) for name in MaxPool._fields
    )
    if min(*kernel, *stride) < 1 or any(
        not 0 <= 2 * p <= k for k, p in zip(kernel, padding, strict=True)
    ):
        raise ValueError(
            f"{op}: pool: expected a kernel and a stride of at least 1 and a padding of at most "
            f"half the kernel, got {pool}"
        )
    return kernel, stride, padding
