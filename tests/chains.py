"""Chains and stages of convolutions: fused, as PyTorch's users write them, and compared."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from activations import ACTS
from roundings import Expected
from seeds import seeded
from shapes import LAYOUTS
from tolerance import assert_same
from torch import Tensor, nn

from fastcnn.nn import BatchNormAct2d, Block, conv_bn_act, conv_bn_act_blocks
from fastcnn.nn.conv_bn_act import Step


def randomize(model: nn.Module) -> None:
    """Fresh BatchNorms are too kind: gamma 1, beta 0, mean 0 and variance 1 hide what is unused."""
    generator = seeded(1)
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            for t, low, high in (
                (bn.weight, -1.5, 1.5),  # negative gamma too: trained networks have it
                (bn.bias, -0.5, 0.5),
                (bn.running_mean, -0.5, 0.5),
                (bn.running_var, 0.5, 2.0),
            ):
                if t is not None:
                    t.data.uniform_(low, high, generator=generator)


class Stage(nn.Module):
    """Blocks, fused or as eager PyTorch runs them; `residual` is for a single block."""

    def __init__(self, *blocks: Block, memory: str = "default", fused: bool = True) -> None:
        super().__init__()
        self.blocks, self.memory, self.fused = blocks, memory, fused
        steps = [step for block in blocks for step in (*(block.shortcut or ()), *block.steps)]
        self.convs = nn.ModuleList(step[0] for step in steps)
        self.bns = nn.ModuleList(step[1] for step in steps)
        randomize(self)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.fused and len(self.blocks) > 1:
            return conv_bn_act_blocks(x, self.blocks, self.memory)
        for block in self.blocks:
            added = residual if block.shortcut is None else block.shortcut
            if self.fused:
                return conv_bn_act(x, block.steps, added, self.memory)
            if block.shortcut is not None:
                added = self._eager(x, block.shortcut)
            x = self._eager(x, block.steps, added)
        return x

    def _eager(self, x: Tensor, steps: Sequence[Step], residual: Tensor | None = None) -> Tensor:
        for i, (conv, bn, *pool) in enumerate(steps, start=1):
            x = nn.BatchNorm2d.forward(bn, conv(x))
            if residual is not None and i == len(steps):
                x = x + residual
            x = ACTS[bn.act](x)
            for module in pool:
                x = module(x)
        return x


class Chain(Stage):
    """Steps (conv, bn) or (conv, bn, pool)."""

    def __init__(self, *steps: Step, **kwargs: Any) -> None:
        super().__init__(Block(steps), **kwargs)


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or bn.running_mean is None


def baseline(chain: Stage) -> Stage:
    eager = copy.deepcopy(chain)
    eager.fused = False
    return eager


def results(
    chain: Stage, x: Tensor, residual: Tensor | None, x_needs_grad: bool = True, seed: int = 1
) -> dict[str, Tensor | None]:
    """The output, all gradients, None where there is none, and all buffers after the call.

    seed: of the output's gradient, of eighths, which every type holds as they are.
    """
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x_needs_grad)
    if residual is not None:
        residual = residual.detach().clone().requires_grad_()
    y = chain(x, residual)
    found = {"y": y.detach(), "dx": None, "dresidual": None}
    if y.requires_grad:
        dy = (8 * torch.randn(y.shape, generator=seeded(seed))).round() / 8
        y.backward(dy.to(y))
        found["dx"] = x.grad
        found["dresidual"] = None if residual is None else residual.grad
        found |= {f"d{name}": p.grad for name, p in chain.named_parameters()}
    return found | {name: b.clone() for name, b in chain.named_buffers()}


def assert_same_results(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], **scales: float
) -> None:
    """All results in float64; scales: of those that cancel (tests/tolerance.py)."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert_same(actual[name], want, scales.get(name, 1.0), name)


def check_float64(
    chain: Stage,
    sizes: tuple[int, ...] = (3, 4, 9, 8),
    residual: bool = False,
    layout: str = "nchw",
    **kwargs: Any,
) -> dict[str, Tensor | None]:
    """Run the chain and its eager baseline in float64, and compare all that there is.

    The gradient of a bias that a batch norm undoes is 0, so that all of it is rounding errors of
    the gradients that it is summed of.
    """
    chain = copy.deepcopy(chain).double()  # without the gradients of earlier checks
    x = torch.randn(sizes, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])
    eager = baseline(chain)
    with torch.no_grad():
        added = torch.randn_like(copy.deepcopy(eager)(x)) if residual else None
    actual, expected = results(chain, x, added, **kwargs), results(eager, x, added, **kwargs)
    steps = zip(eager.convs, eager.bns, strict=True)
    undone = {conv.bias for conv, bn in steps if uses_batch_statistics(bn)}
    gradients = [p.grad for p in eager.parameters() if p.grad is not None]
    largest = max([1.0, *(t.abs().max().item() for t in gradients)])
    scales = {f"d{name}": largest for name, p in eager.named_parameters() if p in undone}
    assert_same_results(actual, expected, **scales)
    return actual


def expected_roundings(
    chain: Stage,
    x: Tensor,
    residual: Tensor | None = None,
    autocast: torch.dtype | None = None,
    **how: Any,
) -> Expected:
    """Return what `results` of a chain in a low precision may be: that of x, or autocast's."""
    exact, state = baseline(chain).cpu().double(), [*chain.bns.parameters(), *chain.bns.buffers()]
    x_dtype, x = x.dtype, x.cpu().double()
    added = None if residual is None else residual.cpu().double()
    return Expected(
        lambda: results(copy.deepcopy(exact), x, added, **how),
        autocast or x_dtype,
        next((t.dtype for t in state if t.is_floating_point()), x_dtype),
        autocast is not None,
    )


def conv_bn(
    c_in: int,
    c_out: int,
    size: int = 1,
    act: str = "relu",
    stride: int | tuple[int, int] = 1,
    bias: bool = False,
) -> tuple[nn.Conv2d, BatchNormAct2d]:
    conv = nn.Conv2d(c_in, c_out, size, stride=stride, padding=size // 2, bias=bias)
    return conv, BatchNormAct2d(c_out, act=act)


# What a block adds to its steps: nothing, its input, a projection, a projection in two steps.
SHORTCUTS = ["none", "identity", "projection", "two steps"]


def stage(*shortcuts: str, act: str = "relu", c_in: int = 4, **kwargs: Any) -> Stage:
    """ResNet's bottlenecks, the first step of one that is not an identity with stride 2.

    Every convolution that "lowest" recomputes is there: on a block's input (4 to 6 channels, the
    projections), behind a step, and behind another such one's activation.
    """
    blocks = []
    for i, shortcut in enumerate(shortcuts):
        c_out = c_in if shortcut == "identity" else c_in + 4
        stride = 2 if i == 0 and shortcut != "identity" else 1
        steps = [
            conv_bn(c_in, 6, 1, act),
            conv_bn(6, 6, 3, act, stride),
            conv_bn(6, c_out, 1, act, bias=True),
        ]
        added: list[Step] | None = None if shortcut == "none" else []
        if shortcut == "projection":
            added = [conv_bn(c_in, c_out, 1, "none", stride)]
        elif shortcut == "two steps":
            added = [conv_bn(c_in, 6, 3, act, stride), conv_bn(6, c_out, 1, "none")]
        blocks.append(Block(steps, added))
        c_in = c_out
    return Stage(*blocks, **kwargs)
