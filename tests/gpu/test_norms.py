"""The normalisations on the GPU, through their public functions and autograd, against float64.

Cases, oracle and limits are those of the tests on the CPU (tests/ops/batch_norm_act/test_values.py,
tests/ops/group_norm_act/test_values.py).
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import batch_norm_cases as batch_norm, group_norm_cases as group_norm
from support.activations import ACTS
from support.device import DEVICE, GPU, needs_gpu, on_gpu
from support.group_norm_cases import PIXELS
from support.shapes import EDGES, GROUPED, LAYOUTS, RESNET50, Image
from torch import Tensor

from fastcnn import functional, reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = [pytest.param(image, marks=needs_gpu) for image in RESNET50[::2]]
TRAINING_AND_EVAL = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image", [*EDGES, *LARGE], ids=str)
def test_batch_norm_act_of_every_shape(image: Image, layout: str) -> None:
    # The backward has four ways to dz: each in one of these.
    make = batch_norm.make_case
    batch_norm.check(make(image.sizes, torch.float32, layout, "relu6"), GPU)
    batch_norm.check(make(image.sizes, torch.float32, layout, "silu", residual=True), GPU)
    batch_norm.check(make(image.sizes, torch.bfloat16, layout, "gelu"), GPU)
    batch_norm.check(make(image.sizes, torch.float16, layout, "relu", residual=True), GPU)


@TRAINING_AND_EVAL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination_of_batch_norm_act(
    dtype: torch.dtype, layout: str, training: bool
) -> None:
    for act, residual in itertools.product(ACTS, [False, True]):
        case = batch_norm.make_case((5, 7, 9, 11), dtype, layout, act, residual, training)
        batch_norm.check(case, GPU)
    mixed = (4, 6, 5, 5), dtype, layout, "relu", True, training, torch.float32
    batch_norm.check(batch_norm.make_case(*mixed), GPU)
    for missing in (["weight"], ["bias"], ["weight", "bias"]):
        case = batch_norm.make_case((3, 5, 4, 6), dtype, layout, "none", False, training)
        batch_norm.check(replace(case, **dict.fromkeys(missing)), GPU)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("image", "groups"),
    [*GROUPED, *(pytest.param(i.values[0], 32, marks=needs_gpu) for i in LARGE)],
    ids=str,
)
def test_group_norm_act_of_every_shape(image: Image, groups: int, layout: str) -> None:
    make = group_norm.make_case
    group_norm.check(make(image.sizes, groups, torch.float32, layout, "relu"), GPU)
    group_norm.check(make(image.sizes, groups, torch.bfloat16, layout, "silu"), GPU)
    group_norm.check(make(image.sizes, groups, torch.float16, layout, "none"), GPU)
    group_norm.check(make(image.sizes, PIXELS, torch.float32, layout, "none"), GPU)
    group_norm.check(make(image.sizes, PIXELS, torch.bfloat16, layout, "gelu"), GPU)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination_of_group_norm_act(dtype: torch.dtype, layout: str) -> None:
    for act, groups in itertools.product(ACTS, (1, 2, 6, PIXELS)):
        group_norm.check(group_norm.make_case((5, 6, 9, 11), groups, dtype, layout, act), GPU)


def calls(layout: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, Any, Any]]:
    """A case, our function of it and how it runs, for each normalisation, on the device."""
    sizes = (4, 6, 5, 7)
    batch = batch_norm.make_case(sizes, dtype, layout, residual=True)
    found = {"batch": (batch.to(DEVICE), batch_norm.fastcnn_batch_norm_act, batch_norm.run)}
    for name, groups in (("group", 3), ("pixel", PIXELS)):
        case = group_norm.make_case(sizes, groups, dtype, layout).to(DEVICE)
        found[name] = (case, group_norm.fastcnn_norm_act, group_norm.run)
    return found


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for k, t in actual.items():
        assert torch.equal(t, expected[k]), k


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_any_layout(layout: str) -> None:
    # Brought to x's layout: strides of 0, the other layout, strided. The same bits as dense.
    other = LAYOUTS["nchw" if layout == "channels_last" else "channels_last"]
    for case, fn, run in calls(layout).values():
        shape = case.x.shape
        for dy in (
            torch.ones((), device=DEVICE).expand(shape),
            torch.randn(shape, device=DEVICE).contiguous(memory_format=other),
            torch.randn(4, 6, 5, 14, device=DEVICE)[..., ::2],
        ):
            dense = dy.contiguous(memory_format=LAYOUTS[layout])
            with on_gpu():
                assert_equal(run(fn, replace(case, dy=dy)), run(fn, replace(case, dy=dense)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_misaligned_images(layout: str, dtype: torch.dtype) -> None:
    # 3 * 5 * 7 elements an image: a slice starts at an address that no vector may be read from.
    sizes = (4, 3, 5, 7)

    def sliced(t: Tensor) -> Tensor:
        base = t.new_empty(5, *t.shape[1:]).contiguous(memory_format=LAYOUTS[layout])
        base[1:] = t
        assert base[1:].data_ptr() % 16 != 0
        return base[1:]

    case = batch_norm.make_case(sizes, dtype, layout, residual=True)
    expected = batch_norm.check(case, GPU)
    here = case.to(DEVICE)
    views = {k: sliced(getattr(here, k)) for k in ("x", "residual", "dy")}
    with on_gpu():
        found = batch_norm.run(batch_norm.fastcnn_batch_norm_act, replace(here, **views))
    assert_equal({k: t.cpu() for k, t in found.items()}, expected)
    for groups in (1, 3, PIXELS):
        small = group_norm.make_case(sizes, groups, dtype, layout)
        expected = group_norm.check(small, GPU)
        there = small.to(DEVICE)
        with on_gpu():
            of_views = replace(there, x=sliced(there.x), dy=sliced(there.dy))
            found = group_norm.run(group_norm.fastcnn_norm_act, of_views)
        assert_equal({k: t.cpu() for k, t in found.items()}, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_twice_and_all_of_them_written(layout: str) -> None:
    # In deterministic mode PyTorch fills what is allocated with NaN: an element that no kernel
    # writes, or a sum in an order of its own, would be seen.
    for dtype in DTYPES:
        for case, fn, run in calls(layout, dtype).values():
            with on_gpu():
                first = run(fn, case)
                torch.use_deterministic_algorithms(True)
                try:
                    assert_equal(run(fn, case), first)
                finally:
                    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_keeps_its_variance(layout: str) -> None:
    # Mean 1e4, deviation 1: of E[x^2] - E[x]^2 no digit is left in float32. The bound: the means of
    # a sum's parts, off by an ulp of 1e4 at each of up to 8 merges, times the largest deviation.
    eps, ops = torch.finfo(torch.float32).eps, torch.ops.fastcnn
    for image, groups in [*((image, 1) for image in EDGES), *GROUPED]:
        x = group_norm.make_case(image.sizes, groups, torch.float32, layout, "none").x + 1e4
        there = x.to(DEVICE)
        with on_gpu():
            _, _, var = ops.batch_norm_act_fwd(there, None, None, None, 1e-5, 0)
            found = [(var, x.double().var((0, 2, 3), correction=0))]
            for form in (groups, PIXELS):
                args = (there, None, None, *([] if form is PIXELS else [form]), 1e-5, 0)
                op = ops.pixel_norm_act_fwd if form is PIXELS else ops.group_norm_act_fwd
                found.append((op(*args)[2], reference.group_norm_act(x.double(), form)[2]))
        for var, exact in found:
            limit = 8 * eps * 1e4 * (x - 1e4).abs().max()
            assert ((var.cpu().view(exact.shape) - exact).abs() <= limit).all(), image


@needs_gpu
def test_float64_is_refused_in_the_user_s_words() -> None:
    x = torch.ones(2, 3, 4, 5, dtype=torch.float64, device=DEVICE)
    for run in (
        lambda: functional.batch_norm_act(x, None, None, training=True),
        lambda: functional.group_norm_act(x, 3),
        lambda: functional.dropout(x),
        lambda: functional.interpolate(x, 8),
    ):
        with pytest.raises(TypeError, match="expected float32, bfloat16 or float16 on CUDA"):
            run()


@TRAINING_AND_EVAL
def test_empty_batches(training: bool) -> None:
    # The last batch of a sharded loader: nothing to normalise, statistics stay, gradients are 0.
    for layout in LAYOUTS:
        case = batch_norm.make_case((0, 3, 4, 5), torch.float32, layout, "relu", True, training)
        expected = batch_norm.run(batch_norm.torch_batch_norm_act, case)
        (found,) = GPU.run(batch_norm.run, case, batch_norm.fastcnn_batch_norm_act)
        assert_equal(found, expected)
        for groups in (1, 3, PIXELS):
            x = torch.empty((0, 3, 4, 5), memory_format=LAYOUTS[layout])
            small = group_norm.Case(x, torch.ones(3), torch.ones(3), x.clone(), groups, "relu")
            (found,) = GPU.run(group_norm.run, small, group_norm.fastcnn_norm_act)
            assert_equal(found, group_norm.run(group_norm.torch_norm_act, small))
