"""Frozen parts of conv_bn_act: no gradient, and no work. Counted by the operators that run."""

from typing import Any

import pytest
import torch
from support.chains import LEVELS, Operators, Stage, check_float64, stage
from torch import Tensor, nn

aten, fastcnn = torch.ops.aten, torch.ops.fastcnn


def backward_calls(model: Stage, x: Tensor) -> tuple[int, int, int]:
    """How often backward runs a convolution's backward, a batch norm's, and a convolution."""
    y = model(x).sum()
    with Operators() as operators:
        y.backward()
    calls = operators.calls
    return (
        calls[aten.convolution_backward],
        calls[fastcnn.batch_norm_act_bwd],
        calls[aten.convolution],
    )


def freeze(model: Stage, *but: int) -> Stage:
    """Freeze all steps but these; stage() numbers a shortcut's before its block's."""
    for i, part in enumerate(zip(model.convs, model.bns, strict=True)):
        for module in part:
            module.requires_grad_(i in but)
    return model


@pytest.mark.parametrize("memory", LEVELS)
def test_everything_is_trained(memory: str) -> None:
    # What the other tests count from: 4 + 3 + 5 steps. "lowest" recomputes the convolutions that
    # widen: 3, 1 and 2 of these. The projection is narrow and has a stride: its weight gradient is
    # a call of its own (onednn_overruns).
    model = stage("projection", "identity", "two steps", memory=memory)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    assert backward_calls(model, x) == (13, 12, 6 if memory == "lowest" else 0)


@pytest.mark.parametrize("memory", LEVELS)
def test_a_frozen_prefix_does_no_work(memory: str) -> None:
    # Fine-tuning of the head: backward ends where nothing further up is trained.
    model = stage("projection", "identity", "two steps", memory=memory)
    x = torch.randn(2, 4, 9, 8)
    for trained, steps in (
        ([11], 1),  # the last step alone
        ([9, 10, 11], 3),  # the last block but its shortcut, which gets no gradient either
        ([7, 8, 9, 10, 11], 5),  # the whole last block
        ([5, 6, *range(7, 12)], 7),  # and two steps of the one before
    ):
        convs, bns, _ = backward_calls(freeze(model, *trained), x)
        assert (convs, bns) == (steps, steps), trained


@pytest.mark.parametrize("memory", LEVELS)
def test_only_a_shortcut_is_trained(memory: str) -> None:
    # The gradient reaches it through the batch norm behind the addition, not through the steps.
    model = freeze(stage("two steps", memory=memory), 1)
    x = torch.randn(2, 4, 9, 8)
    convs, bns, _ = backward_calls(model, x)
    assert (convs, bns) == (1, 2)


@pytest.mark.parametrize("memory", LEVELS)
def test_frozen_steps_pass_the_gradient_on(memory: str) -> None:
    # Frozen in between, with trained steps before: no dweight, but dx.
    model = freeze(stage("projection", "identity", "two steps", memory=memory), 0, 1)
    wanted = []

    class Wants(Operators):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if op is aten.convolution_backward.default:
                wanted.append(tuple(args[-1]))
            return super().__torch_dispatch__(op, types, args, kwargs)

    y = model(torch.randn(2, 4, 9, 8)).sum()
    with Wants():
        y.backward()
    # The two trained ones: on the block's input, so without dx.
    assert wanted.count((False, True, False)) == 2
    assert wanted.count((True, False, False)) == 10


@pytest.mark.parametrize("memory", LEVELS)
def test_a_batch_norm_frozen_in_all_sums_nothing(memory: str) -> None:
    # Running statistics and no gradient of gamma and beta: dx alone, by an operator without sums.
    # A residual's gradient comes with the sums, so that the last step of a block still makes them.
    model = freeze(stage("identity", memory=memory), 0)
    for bn in model.bns:
        bn.eval()
    y = model(torch.randn(2, 4, 9, 8, requires_grad=True)).sum()
    with Operators() as operators:
        y.backward()
    assert operators.calls[fastcnn.batch_norm_act_bwd] == 2  # the trained one and the last one
    assert operators.calls[fastcnn.batch_norm_act_dx] == 1
    check_float64(model, (2, 4, 5, 6))


@pytest.mark.parametrize("memory", LEVELS)
def test_frozen_parts_in_float64(memory: str) -> None:
    # Single convolutions and batch norms, whose neighbours' gradients must stay right.
    for i in range(12):
        for part in ("convs", "bns"):
            for x_needs_grad in (True, False):
                model = stage("projection", "identity", "two steps", memory=memory)
                getattr(model, part)[i].requires_grad_(False)
                found = check_float64(model, (2, 4, 5, 6), x_needs_grad=x_needs_grad)
                assert found[f"d{part}.{i}.weight"] is None
    model = freeze(stage("projection", "identity", "two steps", memory=memory), 0, 5)
    check_float64(model, (2, 4, 5, 6), x_needs_grad=False)


@pytest.mark.parametrize("memory", LEVELS)
def test_nothing_needs_a_gradient(memory: str) -> None:
    model = freeze(stage("projection", "identity", memory=memory))
    assert not model(torch.randn(2, 4, 9, 8)).requires_grad
    assert isinstance(model, nn.Module)
