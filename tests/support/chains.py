"""Chains and stages of convolutions: fused, as PyTorch's users write them, and compared."""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from support.activations import ACTS
from support.roundings import Expected
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.nn import BatchNormAct2d, Block, conv_bn_act, conv_bn_act_blocks
from fastcnn.nn.conv_bn_act import Step
from fastcnn.ops.conv_bn_act.step import Memory

LEVELS = [level for level in get_args(Memory) if level != "auto"]


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
    """All results in float64; scales: of those that cancel (support/tolerance.py)."""
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


class Operators(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[op.overloadpacket] += 1
        return op(*args, **(kwargs or {}))


def expected_bytes(model: Stage, x: Tensor, residual: Tensor | None = None) -> int:
    """The table at the top of fastcnn/ops/conv_bn_act/interface.py as a sum."""
    raw: dict[nn.Module, Tensor] = {}
    eager = copy.deepcopy(model).train(False)
    eager.fused = False
    for conv in eager.convs:
        conv.register_forward_hook(lambda module, _, y: raw.update({module: y}))
    images = [x]  # the blocks' inputs, and the last one's output
    with torch.no_grad():
        for block in eager.blocks:
            images.append(Stage(block, fused=False).eval()(images[-1], residual))
    kept = [x, *(images[1:-1] if model.memory != "low" else [])]
    if model.memory == "full":
        kept += _activations(eager, x, residual)
    last = model.blocks[-1]
    act = last.steps[-1][1].act
    if act == "relu" and (last.shortcut is not None or residual is not None):
        kept.append(images[-1])
    if act == "silu" and residual is not None:
        kept.append(residual)
    statistics = 0
    for conv, bn in zip(eager.convs, model.bns, strict=True):
        widens = conv.kernel_size == (1, 1) and conv.out_channels > conv.in_channels
        if not (model.memory == "lowest" and widens):
            kept.append(raw[conv])
        statistics += 2 * 4 * bn.num_features  # mean and variance, float32; running ones as copies
    return sum(t.nbytes for t in kept) + statistics


def _activations(eager: Stage, x: Tensor, residual: Tensor | None) -> list[Tensor]:
    """What eager makes between convolutions, and the indices of its poolings."""
    found = []
    for block in eager.blocks:
        act = block.steps[-1][1].act
        for steps, ends in ((block.shortcut or (), act != "silu"), (block.steps, True)):
            for i in range(len(steps)):
                part = Stage(Block(steps[: i + 1]), fused=False).eval()
                y = part(x)
                if i + 1 < len(steps) or not ends:
                    found.append(y)
                if len(steps[i]) > 2:  # indices are 8 bytes each
                    found.append(torch.empty_like(y, dtype=torch.int64))
        x = Stage(block, fused=False).eval()(x, residual)
    return found


def state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def chain(act: str = "silu", bias: bool = True) -> Chain:
    """1x1, 3x3 with a stride, 1x1 that widens; a smooth activation: support/roundings.py."""
    steps = [
        conv_bn(16, 8, 1, act, bias=bias),
        conv_bn(8, 8, 3, act, stride=2, bias=bias),
        conv_bn(8, 24, 1, act, bias=bias),
    ]
    return Chain(*steps)


def pooled_grouped_and_depthwise() -> tuple[Chain, Tensor]:
    """Every kind of step, and an input: no rounding decides which value of a window is largest."""
    for _ in range(100):
        pooled = (*conv_bn(16, 8, 3, "silu"), nn.MaxPool2d(3, 2, 1))
        wide = nn.Conv2d(8, 16, 3, padding=1, groups=2), BatchNormAct2d(16, act="gelu")
        deep = nn.Conv2d(16, 32, (3, 1), padding=(1, 0), groups=16), BatchNormAct2d(32, act="silu")
        model, x = Chain(pooled, wide, deep, conv_bn(32, 8, 1, "none")), image(2, 16, 6, 7)
        before = results(Chain(copy.deepcopy(pooled[:2]), fused=False).double(), x.double(), None)[
            "y"
        ]
        windows = F.unfold(F.pad(before, (1, 1, 1, 1), value=-math.inf), 3, stride=2)
        largest, next_one = windows.unflatten(1, (8, 9)).topk(2, dim=2).values.unbind(2)
        if (largest - next_one).min() > 1e-4:  # a thousand of float32's roundings
            return model, x
    raise AssertionError("no such data found")


def image(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes).to(dtype).contiguous(memory_format=torch.channels_last)
