"""batch_norm_act of several tensors against PyTorch's of their concatenation, in float64.

What is asked of every op, as torch.compile, is asked of this one where SMALL names it.
"""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.activations import ACTS
from support.batch_norm_cases import (
    check,
    fastcnn_batch_norm_act,
    make_case,
    of_pieces,
    run,
    torch_batch_norm_act,
)
from support.shapes import LAYOUTS
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from fastcnn import functional
from fastcnn.nn import BatchNormAct2d

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TRAINING_AND_EVAL = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])

# The channels of the pieces. A vector is 4 to 16 floats wide.
PIECES = {
    "one piece": [5],
    "as DenseNet's": [64, 32, 32],
    "pieces that end within a vector": [3, 13, 17],
    "pieces of one channel, and an empty one": [1, 5, 0, 7, 1],
    "an empty one at each end": [0, 21, 0],
}


@pytest.mark.every_level
@TRAINING_AND_EVAL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pieces", PIECES)
def test_every_split(pieces: str, layout: str, training: bool) -> None:
    # The backward has four ways to dz: each in one of these.
    channels = PIECES[pieces]
    sizes = (3, sum(channels), 9, 7)
    for dtype, act, residual in (
        (torch.float32, "relu6", False), (torch.float32, "silu", True),
        (torch.bfloat16, "gelu", False), (torch.bfloat16, "relu", True),
    ):  # fmt: skip
        case = make_case(sizes, dtype, layout, act, residual, training)
        check(case, fn=partial(of_pieces, channels=channels))


@pytest.mark.every_level
@TRAINING_AND_EVAL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(dtype: torch.dtype, layout: str, training: bool) -> None:
    for act, residual in itertools.product(ACTS, [False, True]):
        case = make_case((5, 23, 9, 3), dtype, layout, act, residual, training)
        check(case, fn=partial(of_pieces, channels=[4, 16, 3]))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((37, 21, 1, 1), id="1x1 images are in both layouts"),
        pytest.param((2, 21, 1, 9), id="one row"),
        pytest.param((2, 21, 61, 57), id="over several tasks, and rows over several sums"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_at_an_edge(sizes: tuple[int, ...], layout: str) -> None:
    check(make_case(sizes, torch.float32, layout, "relu"), fn=partial(of_pieces, channels=[5, 16]))


@TRAINING_AND_EVAL
def test_an_empty_batch_is_torchs(training: bool) -> None:
    for layout in LAYOUTS:
        case = make_case((0, 7, 4, 5), torch.float32, layout, training=training)
        found, expected = (
            run(fn, case) for fn in (partial(of_pieces, channels=[3, 4]), torch_batch_norm_act)
        )
        assert all(torch.equal(t, expected[k]) for k, t in found.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_piece_that_is_there_twice(layout: str) -> None:
    # Its gradients are added up, as those of torch.cat's are.
    case = make_case((3, 13, 5, 7), torch.float64, layout)
    a, b = (t.contiguous(memory_format=LAYOUTS[layout]) for t in case.x.split([5, 3, 5], 1)[:2])
    found = []
    for whole in (False, True):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        xs: Any = [leaves[0], leaves[1], leaves[0]]
        x = torch.cat(xs, 1).contiguous(memory_format=LAYOUTS[layout]) if whole else xs
        y = fastcnn_batch_norm_act(replace(case, x=x))
        found.append([y, *torch.autograd.grad(y, leaves, case.dy)])
    for t, expected in zip(*found, strict=True):
        torch.testing.assert_close(t, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_dense_and_nothing_is_concatenated(layout: str) -> None:
    # What backward keeps are the pieces themselves, and numbers of channels.
    xs = [torch.randn(2, c, 6, 5).contiguous(memory_format=LAYOUTS[layout]) for c in (8, 24)]
    leaves = [t.requires_grad_() for t in xs]
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        y = BatchNormAct2d(32)(leaves)
    pieces = {t.data_ptr() for t in leaves}
    images = [t for t in saved if t.dim() == 4]
    assert {t.data_ptr() for t in images} == pieces
    for x, dx in zip(leaves, torch.autograd.grad(y, leaves, torch.randn_like(y)), strict=True):
        assert dx.stride() == x.stride()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    case = make_case((2, 7, 4, 4), torch.float32)
    a, b = (t.clone() for t in case.x.split([3, 4], 1))
    y = fastcnn_batch_norm_act(replace(case, x=[a, b.requires_grad_()]))
    y.backward(case.dy)
    assert a.grad is None
    expected = run(partial(of_pieces, channels=[3, 4]), case)["dx"][:, 3:]
    assert b.grad is not None
    assert torch.equal(b.grad, expected)


def test_the_same_bits_on_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for layout in LAYOUTS:
            case = make_case((8, 48, 29, 31), torch.float32, layout)
            found = []
            for count in (1, 2, 2):
                torch.set_num_threads(count)
                found.append(run(partial(of_pieces, channels=[16, 32]), case))
            for k, t in found[0].items():
                assert all(torch.equal(other[k], t) for other in found[1:]), (k, layout)
    finally:
        torch.set_num_threads(threads)


@TRAINING_AND_EVAL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, training: bool) -> None:
    # silu has no jump that a step might cross.
    mean, var = (torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64).abs() for _ in range(2))
    stats = (None, None) if training else (mean, var)

    def of(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.batch_norm_act([a, b], *stats, weight, bias, training, act="silu")

    leaves = [torch.randn(2, c, 3, 2, dtype=torch.float64) for c in (1, 2)]
    leaves = [t.contiguous(memory_format=LAYOUTS[layout]) for t in leaves]
    leaves += [torch.randn(3, dtype=torch.float64) for _ in range(2)]
    assert gradcheck(of, [t.requires_grad_() for t in leaves])


def test_it_is_differentiable_once() -> None:
    xs = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
    y = functional.batch_norm_act(xs, None, None, training=True)
    (dx,) = torch.autograd.grad(y.sum(), xs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"batch_norm_act .*expected to be differentiated once"):
        dx.sum().backward()
