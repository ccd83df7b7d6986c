"""Chains of convolution, BatchNormAct2d and pooling modules."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastcnn import functional
from fastcnn.common.conv_geometry import Pair, padding_of
from fastcnn.nn.batch_norm_act import (
    BatchNormAct2d,
    running_statistics,
    step_momentum,
    uses_batch_statistics,
)
from fastcnn.ops.conv_bn_act.step import Memory

Step = (
    tuple[torch.nn.Conv2d, BatchNormAct2d]
    | tuple[torch.nn.Conv2d, BatchNormAct2d, torch.nn.MaxPool2d]
)
OP = "conv_bn_act"
_KINDS = (torch.nn.Conv2d, BatchNormAct2d, torch.nn.MaxPool2d)


class Block(NamedTuple):
    """Steps and the shortcut beside them: None, () for the block's input, or steps of its own.

    Example:
        >>> conv, norm = torch.nn.Conv2d(8, 8, 3, padding=1), fastcnn.nn.BatchNormAct2d(8)
        >>> x = torch.randn(2, 8, 6, 6)
        >>> fastcnn.nn.conv_bn_act_blocks(x, [fastcnn.nn.Block([(conv, norm)], shortcut=())]).shape
        torch.Size([2, 8, 6, 6])
    """

    steps: Sequence[Step]
    shortcut: Sequence[Step] | None = None


def conv_bn_act(
    x: Tensor,
    steps: Sequence[Step],
    residual: Tensor | Sequence[Step] | None = None,
    memory: Memory = "default",
) -> Tensor:
    """Run modules as one chain: see :func:`fastcnn.functional.conv_bn_act`.

    ``steps[i] = (conv, bn)`` computes ``bn(conv(x))``, the last one ``bn(conv(x), residual)``, and
    ``(conv, bn, pool)`` pools what comes out. The modules lend their parameters and count their
    batches; their own forward does not run.

    Args:
        x: [n, c, h, w], as the function's input.
        steps: at least one, (conv, bn) or (conv, bn, pool).
        residual: None, a tensor, or steps on x; no steps add x itself.
        memory: "auto", "full", "default", "low" or "lowest".

    Returns:
        The last step's output [n, c_out, h_out, w_out].

    Raises:
        TypeError: a step of other modules than Conv2d, BatchNormAct2d and MaxPool2d.
        ValueError: a convolution whose padding_mode is not "zeros" or whose padding="same" pads one
            side more, a pooling with dilation, ceil_mode or indices, a module with hooks on its
            forward, and all that the function refuses.

    Example:
        >>> conv, norm = torch.nn.Conv2d(8, 8, 3, padding=1), fastcnn.nn.BatchNormAct2d(8)
        >>> x = torch.randn(2, 8, 6, 6)
        >>> fastcnn.nn.conv_bn_act(x, [(conv, norm)], residual=x).shape
        torch.Size([2, 8, 6, 6])
    """
    added = _steps(OP, "residual", residual) if isinstance(residual, Sequence) else residual
    return functional.conv_bn_act(x, _steps(OP, "steps", steps), added, memory=memory)


def conv_bn_act_blocks(x: Tensor, blocks: Sequence[Block], memory: Memory = "default") -> Tensor:
    """Run modules as blocks: see :func:`fastcnn.functional.conv_bn_act_blocks`.

    Args:
        x: [n, c, h, w], as the function's input.
        blocks: at least one.
        memory: "auto", "full", "default", "low" or "lowest".

    Returns:
        The last block's output [n, c_out, h_out, w_out].

    Raises:
        TypeError, ValueError: as conv_bn_act; a block that is no Block.

    Example:
        >>> conv, norm = torch.nn.Conv2d(8, 8, 3, padding=1), fastcnn.nn.BatchNormAct2d(8)
        >>> x = torch.randn(2, 8, 6, 6)
        >>> blocks = [fastcnn.nn.Block([(conv, norm)], shortcut=[(conv, norm)])]
        >>> fastcnn.nn.conv_bn_act_blocks(x, blocks, memory="low").shape
        torch.Size([2, 8, 6, 6])
    """
    parts = [_block(f"{OP}: block {i}", block) for i, block in enumerate(blocks)]
    return functional.conv_bn_act_blocks(x, parts, memory=memory)


def _block(op: str, block: Block) -> functional.ConvBnActBlock:
    if not isinstance(block, Block):
        raise TypeError(f"{op}: expected a Block, got {type(block).__name__}")
    shortcut = None if block.shortcut is None else _steps(op, "shortcut", block.shortcut)
    return functional.ConvBnActBlock(_steps(op, "steps", block.steps), shortcut)


def _steps(op: str, name: str, steps: Sequence[Step]) -> list[functional.ConvBnActStep]:
    if not isinstance(steps, Sequence):
        raise TypeError(
            f"{op}: {name}: expected a sequence of steps (conv, bn) or (conv, bn, pool), got "
            f"{type(steps).__name__}"
        )
    return [_step(f"{op}: step {i}", step) for i, step in enumerate(steps)]


def _check_modules(op: str, step: Step) -> None:
    if not isinstance(step, Sequence) or len(step) not in (2, 3):
        got = f"{len(step)} of them" if isinstance(step, Sequence) else type(step).__name__
        raise TypeError(f"{op}: expected modules (conv, bn) or (conv, bn, pool), got {got}")
    for module, kind in zip(step, _KINDS, strict=False):
        if not isinstance(module, kind):
            raise TypeError(f"{op}: expected a {kind.__name__}, got {type(module).__name__}")
        own = differs(module, kind)
        if own is not None:
            raise ValueError(
                f"{op}: expected a {kind.__name__} that does what its class says, since its "
                f"forward does not run, got {type(module).__name__} with {own}; call the modules "
                f"one by one"
            )


def differs(module: torch.nn.Module, kind: type[torch.nn.Module]) -> str | None:
    """Say what of a module's own would be left out, if anything."""
    if module._forward_pre_hooks or module._forward_hooks:
        return "forward hooks, as pruning and spectral_norm add them"
    if module._backward_hooks or module._backward_pre_hooks:
        return "backward hooks"
    for name in ("forward", "_conv_forward"):
        # By its class or by itself. Parametrizations make a class, too, that changes neither.
        expected = getattr(kind, name, None)
        has = own_method(module, name) is not None
        if has or getattr(type(module), name, None) is not expected:
            return f"a {name} of its own"
    return None


def own_method(module: torch.nn.Module, name: str) -> Any:
    """Return what an instance has in place of its class's method, if it is another.

    accelerate's unwrap_model sets the class's own forward, bound to the instance: that is none.
    """
    found = vars(module).get(name)
    if getattr(found, "__self__", None) is not module:
        return found
    # A converted module's are its fused forward and the one that it was written with.
    methods = [getattr(cls, name, None) for cls in (type(module), module.__class__)]
    return None if getattr(found, "__func__", found) in methods else found


def _step(op: str, step: Step) -> functional.ConvBnActStep:
    _check_modules(op, step)
    conv, bn = step[:2]
    if conv.padding_mode != "zeros" or padding_of(conv) is None:
        raise ValueError(
            f"{op}: expected padding of both sides alike with padding_mode='zeros', got "
            f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r}"
        )
    return functional.ConvBnActStep(
        conv.weight,
        conv.bias,
        cast(Pair, conv.stride),
        cast(Pair, padding_of(conv)),
        cast(Pair, conv.dilation),
        conv.groups,
        *running_statistics(bn),
        bn.weight,
        bn.bias,
        uses_batch_statistics(bn),
        step_momentum(bn),
        bn.eps,
        bn.act,
        bn.sync,
        bn.process_group,
        _pool(op, step[2]) if len(step) == 3 else None,
    )


def _pool(op: str, pool: torch.nn.MaxPool2d) -> functional.MaxPool:
    if pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        raise ValueError(
            f"{op}: expected a MaxPool2d without dilation, ceil_mode and return_indices, got {pool}"
        )
    return functional.MaxPool(
        cast(Pair, pool.kernel_size), cast(Pair, pool.stride), cast(Pair, pool.padding)
    )
