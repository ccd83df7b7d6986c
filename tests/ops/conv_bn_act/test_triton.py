"""Chains whose convolutions are Triton's, in its interpreter, against PyTorch in float64.

The plan of each step is forced here: its convolution by PyTorch or by Triton, next to either.
"""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from support import triton_interpreter  # noqa: F401 (mends the interpreter)
from support.activations import ACTS
from support.chains import (
    Chain,
    Stage,
    chain,
    conv_bn,
    expected_roundings,
    image,
    pooled_grouped_and_depthwise,
    results,
    stage,
)
from support.device import slow_unless
from support.roundings import Expected
from torch import Tensor, nn

from fastcnn.nn import BatchNormAct2d, Block
from fastcnn.ops.conv_bn_act import (
    folded as conv2d_folded,
    inference_candidates,
    interface as conv_bn_act,
    planning,
)
from fastcnn.ops.conv_bn_act.folded import FoldedConv2d

Force = Callable[..., None]
Case = tuple[Stage, Tensor, Tensor | None, Expected]
Plans = tuple[bool, ...]  # of a chain's steps in turn: whether Triton runs the convolution


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    """Gives the steps of all chains these plans, in turn; without the batch's statistics none."""

    def set_plans(*plans: bool) -> None:
        turn = itertools.cycle(plans)
        monkeypatch.setattr(conv_bn_act, "is_planned", lambda x: True)
        monkeypatch.setattr(planning, "plan_step", lambda s, *_: next(turn) and s.training)

    return set_plans


def check(model: Stage, x: Tensor, residual: Tensor | None = None, **how: bool) -> None:
    """Run fused, and as eager PyTorch in float64."""
    expected_roundings(model, x, residual, **how).check(results(model, x, residual, **how))


SMOOTH = ["none", "silu", "sigmoid"]  # and gelu
ALL = (True,)
NEXT_TO_EACH_OTHER = [(False,), (True, False, True), (False, True, False)]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Trained and with fixed statistics, without and with a residual, for all plans."""
    found = []
    for training, residual in itertools.product([True, False], [None, image(2, 24, 3, 4)]):
        model, x = chain().train(training), image(2, 16, 6, 7)
        found.append((model, x, residual, expected_roundings(model, x, residual)))
    return found


@pytest.mark.parametrize(
    "plans",
    slow_unless(lambda p: any(p), [(p,) for p in (ALL, *NEXT_TO_EACH_OTHER)]),
    ids=str,
)
def test_every_plan(plans: Plans, cases: list[Case], force: Force) -> None:
    force(*plans)
    for model, x, residual, expected in cases:
        expected.check(results(copy.deepcopy(model), x, residual))


@pytest.mark.parametrize(
    "act", ["gelu", *(pytest.param(act, marks=pytest.mark.slow) for act in SMOOTH)]
)
def test_activations(act: str, force: Force) -> None:
    force(True, False, True)
    for residual in (None, image(2, 24, 3, 4)):
        check(chain(act), image(2, 16, 6, 7), residual)


@pytest.mark.parametrize(
    "plans",
    slow_unless(lambda p: p == ALL, [(ALL,), ((False, True),), ((True, False),)]),
    ids=str,
)
def test_blocks(plans: Plans, force: Force) -> None:
    force(*plans)
    for shortcut in ("none", "identity", "projection", "two steps"):
        check(stage(shortcut, act="silu"), image(2, 4, 6, 7))


@pytest.mark.parametrize(
    "plans",
    slow_unless(lambda p: p == (False, True), [(ALL,), ((True, False),), ((False, True),)]),
    ids=str,
)
def test_pooling_grouped_and_depthwise(plans: Plans, force: Force) -> None:
    force(*plans)
    check(*pooled_grouped_and_depthwise())


@pytest.mark.parametrize(
    "kind",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}],
    ids=str,
)
def test_batch_norms_of_other_kinds(kind: dict[str, object], force: Force) -> None:
    force(True)
    for training in (True, False):
        steps = [(nn.Conv2d(8, 8, 1), BatchNormAct2d(8, act="silu", **kind)) for _ in range(2)]
        check(Chain(*steps).train(training), image(2, 8, 4, 5))


@pytest.mark.parametrize(
    "plans",
    slow_unless(lambda p: p != ALL, [(ALL,), ((True, False, True),)]),
    ids=str,
)
def test_frozen_parts(plans: Plans, force: Force) -> None:
    # Without a gradient for x, for weights, for batch norms; some statistics fixed.
    force(*plans)
    for part in ("convs.0.weight", "convs.1.weight", "bns.1.weight", "bns.2.bias"):
        model = chain()
        model.get_parameter(part).requires_grad_(False)
        model.bns[1].eval()
        check(model, image(2, 16, 6, 7))
    check(chain(), image(2, 16, 6, 7), x_needs_grad=False)


@pytest.mark.parametrize("memory", [pytest.param("low", marks=pytest.mark.slow), "lowest"])
def test_memory_levels_give_the_same_bits(memory: str, force: Force) -> None:
    for training in (True, False):
        model = stage("projection", "identity", act="silu").train(training)
        other, x = copy.deepcopy(model), image(2, 4, 6, 7)
        other.memory = memory
        force(True)
        expected = results(model, x, None)
        for name, t in results(other, x, None).items():
            assert t is None or torch.equal(t, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype, force: Force) -> None:
    for plans in (ALL, (False, True, False)):
        force(*plans)
        model = chain(bias=False)
        model.convs.to(dtype)
        check(model, image(2, 16, 6, 7, dtype=dtype))


def test_images_that_are_in_both_layouts(force: Force) -> None:
    # PyTorch's convolution of one channel, or of 1x1 images, may choose NCHW; Triton's reads the
    # other, right behind it and behind a pooling.
    for sizes in ((2, 1, 6, 7), (20, 8, 1, 1)):
        for pool in ((), (nn.MaxPool2d(1),)):
            force(False, True)
            first = (*conv_bn(sizes[1], 8, 1, "silu"), *pool)
            check(Chain(first, conv_bn(8, 8, 1, "silu")), image(*sizes))


def test_gradients_in_any_layout(force: Force) -> None:
    # A sum's gradient has strides of 0; another consumer's may be NCHW.
    force(True)
    model, x = chain(), image(2, 16, 6, 7).requires_grad_()
    weights = list(model.parameters())
    dense = torch.autograd.grad(model(x), weights, torch.ones(2, 24, 3, 4))
    expanded = torch.autograd.grad(model(x).sum(), weights)
    for a, b in zip(dense, expanded, strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_twice(force: Force) -> None:
    force(True)
    model, x = chain(), image(2, 16, 6, 7)
    first, second = (results(copy.deepcopy(model), x, None) for _ in range(2))
    for name in ("y", "dx", "dconvs.1.weight", "dbns.0.weight"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("act", "plan"),
    slow_unless(
        lambda act, plan: act in ("relu", "silu"), itertools.product(ACTS, ["cudnn", "triton"])
    ),
)
def test_inference(act: str, plan: str, force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    force(False)
    monkeypatch.setattr(conv_bn_act, "folds", lambda x: False)
    monkeypatch.setattr(inference_candidates, "choose", lambda problem: plan)
    model = chain(act).eval()
    with torch.no_grad():
        for residual in (None, image(2, 24, 3, 4)):
            check(model, image(2, 16, 6, 7), residual)
        check(stage("projection", "identity", act=act).eval(), image(2, 4, 6, 7))


@pytest.mark.parametrize("plan", ["cudnn", "triton"])
def test_inference_in_autocast(plan: str, force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of weights in float32: as of the same weights in bfloat16.
    force(False)
    monkeypatch.setattr(conv_bn_act, "folds", lambda x: False)
    monkeypatch.setattr(inference_candidates, "choose", lambda problem: plan)
    monkeypatch.setattr(conv2d_folded, "folds", lambda x: False)
    monkeypatch.setattr(conv2d_folded, "is_planned", lambda x: True)
    model, x = chain(bias=False).eval(), image(2, 16, 6, 7)
    half = copy.deepcopy(model)
    half.convs.bfloat16()
    whole = FoldedConv2d(model.convs[0], model.bns[0], "silu")
    with torch.no_grad():
        wanted, first = half(x.bfloat16()), Chain((half.convs[0], half.bns[0]))(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), wanted)
            for _ in range(2):  # made, and kept
                assert torch.equal(whole(x), first)


@pytest.mark.parametrize("c_in", [1, 3])
@pytest.mark.parametrize("plan", ["cudnn", "triton"])
def test_inference_of_a_block_in_any_layout(
    plan: str, c_in: int, force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's convolutions go by the weight where the image is NCHW, or is both layouts.
    force(False)
    monkeypatch.setattr(conv_bn_act, "folds", lambda x: False)
    monkeypatch.setattr(inference_candidates, "choose", lambda problem: plan)
    block = Block([conv_bn(c_in, 4, 3)], [conv_bn(c_in, 4, 1, "none")])
    x = image(2, c_in, 6, 6)
    for format in (torch.channels_last, torch.contiguous_format):
        model = Stage(block).to(memory_format=format).eval()
        with torch.no_grad():
            check(model, x)
            if plan == "cudnn":
                check(model, x.contiguous())


def test_a_residual_in_the_other_layout(force: Force, monkeypatch: pytest.MonkeyPatch) -> None:
    force(True)
    monkeypatch.setattr(conv_bn_act, "folds", lambda x: False)
    monkeypatch.setattr(inference_candidates, "choose", lambda problem: "triton")
    for training in (True, False):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="conv_bn_act: residual: expected the"),
        ):
            chain().train(training)(image(2, 16, 6, 7), torch.randn(2, 24, 3, 4))


def test_parameters_that_are_not_dense(force: Force) -> None:
    model, x = chain(), image(2, 16, 6, 7)
    dense = [torch.full((bn.num_features,), 0.5) for bn in model.bns]
    found = []
    for weights in (dense, [t[:1].expand_as(t) for t in dense]):
        force(True)
        for bn, weight in zip(model.bns, weights, strict=True):
            del bn.weight
            bn.weight = weight
        found.append(results(copy.deepcopy(model), x, None))
    assert torch.equal(found[0]["y"], found[1]["y"])
    assert torch.equal(found[0]["dx"], found[1]["dx"])


def test_an_empty_batch_takes_pytorchs_way(force: Force) -> None:
    force(True)
    y = chain().eval()(image(0, 16, 6, 7))
    assert y.shape == (0, 24, 3, 4)
