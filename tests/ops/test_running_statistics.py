"""When running statistics move, and which of them backward sees: against PyTorch, in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.conversions import images, prepared
from support.small_models import SMALL, made, mean_square
from support.tolerance import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastcnn import convert, models

TRACKED = [name for name in SMALL if any("running" in b for b, _ in made(name).named_buffers())]


def test_there_are_models() -> None:
    assert {"batch_norm_act", "InstanceNormAct2d", "conv_bn_act", "converted"} <= set(TRACKED)


@pytest.mark.parametrize("name", TRACKED)
def test_backward_of_evaluation_behind_training(name: str) -> None:
    # A forward in training moves the statistics that an earlier one in evaluation has used.
    model, inputs = made(name, torch.float64).eval(), SMALL[name].inputs(2, 0, torch.float64)
    wanted = [*inputs, *model.parameters()]
    expected = torch.autograd.grad(mean_square(model(*inputs)), wanted, allow_unused=True)
    y = model(*inputs)
    before = {k: b.clone() for k, b in model.named_buffers()}
    model.train()(*(t.detach() * 3 + 1 for t in inputs))
    moved = not all(torch.equal(b, before[k]) for k, b in model.named_buffers())
    assert moved or name == "batch_norm_act, fixed statistics"
    for k, b in model.named_buffers():  # what moves them outside of fastcnn
        if "running" in k:
            b.data.add_(1)
    assert_same(torch.autograd.grad(mean_square(y), wanted, allow_unused=True), expected)


@pytest.mark.parametrize("tracks", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_step_of_an_instance_norm_s_parameters_before_backward(
    tracks: bool, training: bool
) -> None:
    # PyTorch's repeats them for each sample: backward has those of the forward.
    model = nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=tracks), nn.SiLU())
    model = prepared(model).train(training)
    x, found = images(2, 4, 5, 6), []
    for m in (copy.deepcopy(model), convert(model)):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(-2).add_(1)
        mean_square(y).backward()
        found.append([leaf.grad, *(p.grad for p in m.parameters())])
    assert_same(found[1], found[0])


class Chains(nn.Module):
    """Chains in one checkpoint: with residuals, pooled, and without an activation at the end."""

    def __init__(self, momentum: float | None, last: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.block = models.resnet.BasicBlock(4, 4)
        norms: dict[str, nn.Module] = {
            "chain": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
            "chain, relu": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
            "batch norm": nn.BatchNorm2d(4),
            "batch norm, silu": nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()),
            "instance norm": nn.InstanceNorm2d(4, track_running_stats=True),
            "instance norm, relu": nn.Sequential(
                nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.ReLU()
            ),
        }
        self.last = norms[last]
        for m in self.modules():
            if hasattr(m, "momentum"):
                m.momentum = momentum if isinstance(m, nn.BatchNorm2d) else 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.stem(x)))


LASTS = [
    "chain", "chain, relu", "batch norm", "batch norm, silu", "instance norm", "instance norm, relu"
]  # fmt: skip


@pytest.mark.parametrize("how", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("last", LASTS)
def test_checkpointing_moves_them_as_pytorch_s(
    last: str, momentum: float | None, how: dict[str, Any]
) -> None:
    # It runs forward again, up to the last tensor that is saved: what has moved by then moves
    # twice. A mean over batches (momentum=None) counts by that, too.
    model = prepared(Chains(momentum, last)).train()
    x = images(3, 3, 10, 12)
    runs: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda m, x: checkpoint(m, x, **how),
        lambda m, x: checkpoint(m.last, checkpoint(m.block, m.stem(x), **how), **how),
    ]
    for run in runs:
        found = []
        for m in (copy.deepcopy(model), convert(copy.deepcopy(model))):
            for i in range(3):
                leaf = (x + i).requires_grad_()
                mean_square(run(m, leaf)).backward()
            state = {k: b for k, b in m.named_buffers() if b.is_floating_point()}
            counts = [int(b) for b in m.buffers() if not b.is_floating_point()]
            grads = {f"d {k}": p.grad for k, p in m.named_parameters()}
            found.append((state | grads | {"dx": leaf.grad}, counts))
        assert found[1][1] == found[0][1]
        assert_same(found[1][0], found[0][0])
