"""interpolate against torch.nn.functional.interpolate (support/upsample_cases.py).

Of PyTorch's two definitions of nearest sampling csrc/common/resample.h names the one that is
ours, and TWO_WAYS where the other one differs.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from support.upsample_cases import CASES, DTYPES, MODES, Resize, check, image, resized, run

from fastcnn import functional


@pytest.mark.every_level
@pytest.mark.parametrize("how", MODES, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case: Resize, layout: str, how: dict[str, Any]) -> None:
    for dtype in DTYPES:
        check(case, dtype, layout, how)


@pytest.mark.parametrize("how", MODES, ids=lambda how: "-".join(map(str, how.values())))
def test_the_reference_against_torch(how: dict[str, Any]) -> None:
    # It is the oracle of the CUDA kernels' tests, and of nearest gradients in float64.
    for case in CASES:
        x = image(case.sizes, torch.float32, "nchw")
        actual = resized(x.double(), {**case.to, **how})
        if how["mode"] == "bilinear":
            assert_same(actual, F.interpolate(x.double(), **case.to, **how), name=str(case))
        else:
            assert torch.equal(actual, F.interpolate(x, **case.to, **how).double()), case


def test_the_same_source_pixels_as_torch() -> None:
    # Nearest picks by floor(): one rounding otherwise, and it is another pixel. Many sizes and
    # factors, among them those whose outputs are exactly doubled or that keep the size.
    factors = [1.1, 2.0, 2.05, 2.3, 0.7, 3.7, 1 / 3, 1 / 3.7]
    for size, mode in itertools.product(range(1, 60), ["nearest", "nearest-exact"]):
        x = torch.arange(float(size)).expand(1, 1, 1, size).contiguous()
        ways: list[dict[str, Any]] = [{"size": (1, s)} for s in (1, 7, size, 2 * size, 57, 161)]
        ways += [{"scale_factor": (1.0, f)} for f in factors if int(size * f) > 0]
        for how in ways:
            expected = F.interpolate(x, **how, mode=mode)
            assert torch.equal(functional.interpolate(x, **how, mode=mode), expected), (size, how)


TWO_WAYS: list[tuple[tuple[int, int], torch.dtype, dict[str, Any]]] = [
    ((3, 24), torch.float32, {"scale_factor": (53.03, 1.0414), "mode": "nearest"}),  # w stays 24
    ((5, 60), torch.float32, {"scale_factor": 2.05, "mode": "nearest"}),  # h is doubled
    ((2, 5), torch.float32, {"size": (47, 166), "mode": "nearest-exact"}),
    ((2, 14), torch.float64, {"size": (2, 194), "mode": "nearest"}),
]


@pytest.mark.parametrize(("sizes", "dtype", "how"), TWO_WAYS, ids=str)
def test_where_torch_differs_from_itself(
    sizes: tuple[int, int], dtype: torch.dtype, how: dict[str, Any]
) -> None:
    # In NCHW, h + w beyond 128, its forward picks other pixels than in channels_last and than its
    # own backward. Ours picks the latter in both. Integers: sums of gradients are exact.
    x = torch.arange(4.0 * sizes[0] * sizes[1], dtype=dtype).view(1, 4, *sizes)
    last = x.contiguous(memory_format=torch.channels_last)
    shape = F.interpolate(x, **how).shape
    dy = (torch.arange(shape.numel()) % 61).to(dtype).view(shape)
    y, dx = run(F.interpolate, last, dy, **how)
    theirs, their_dx = run(F.interpolate, x, dy, **how)
    assert torch.equal(their_dx, dx)
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":  # by whose code all are alike
        assert not torch.equal(theirs, y), "torch agrees with itself now: resample.h says otherwise"
    for given in (x, last):
        ours, our_dx = run(functional.interpolate, given, dy, **how)
        assert torch.equal(ours, y)
        assert torch.equal(our_dx, dx)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_any_layout(layout: str) -> None:
    # Slices of channels are read in place, others brought to x's layout: the same bits as dense.
    x = image((2, 6, 5, 4), torch.float32, layout)
    other = LAYOUTS["nchw" if layout == "channels_last" else "channels_last"]
    wide = image((2, 20, 10, 8), torch.float32, layout)
    for dy in (
        torch.ones(()).expand(2, 6, 10, 8),
        torch.randn(6, 1, 1).expand(2, 6, 10, 8),
        torch.randn(2, 6, 10, 8).contiguous(memory_format=other),
        torch.randn(2, 6, 10, 16)[..., ::2],
        torch.randn(2, 6, 8, 10).mT,
        wide[:, 3:9],
        wide[:, ::3][:, :6],
    ):
        dense = dy.contiguous(memory_format=LAYOUTS[layout])
        for how in MODES:
            actual, expected = (
                run(functional.interpolate, x, g, scale_factor=2, **how) for g in (dy, dense)
            )
            assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_propagate_as_in_torch(value: float) -> None:
    # To the pixels that a bad one is in, and to no others: a weight of 0 is no excuse for a pick.
    for layout, how, factor in itertools.product(LAYOUTS, MODES, [2, 0.4, 3.3]):
        x = image((1, 3, 6, 20), torch.float32, layout)
        x[0, 1, 2, 3] = value
        shape = F.interpolate(x, scale_factor=factor, **how).shape
        dy = image(shape, torch.float32, layout, 1)
        dy[0, 1, 1, 3] = value
        actual, expected = (
            run(fn, x, dy, scale_factor=factor, **how)
            for fn in (functional.interpolate, F.interpolate)
        )
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a.isfinite(), e.isfinite()), (layout, how, factor)


def test_an_empty_batch() -> None:
    # The last batch of a sharded loader.
    for layout, c_skip in itertools.product(LAYOUTS, [None, 2]):
        x = image((0, 3, 4, 5), torch.float32, layout).requires_grad_()
        skip = None if c_skip is None else torch.ones(0, c_skip, 8, 10)
        y = functional.interpolate(x, scale_factor=2, concat=skip)
        y.sum().backward()
        assert y.shape == (0, 3 + (c_skip or 0), 8, 10)
        assert x.grad.shape == x.shape


def test_the_same_bits_on_any_number_of_threads_and_in_deterministic_mode() -> None:
    # Large enough for several tasks; a slice of one image is the whole batch's.
    threads, x = torch.get_num_threads(), torch.randn(4, 24, 40, 50)
    for layout, how in itertools.product(LAYOUTS, MODES):
        x = x.contiguous(memory_format=LAYOUTS[layout])
        dy = image((4, 24, 80, 100), torch.float32, layout)
        first = run(functional.interpolate, x, dy, scale_factor=2, **how)
        try:
            torch.use_deterministic_algorithms(True)
            for count in (1, 2):
                torch.set_num_threads(count)
                again = run(functional.interpolate, x, dy, scale_factor=2, **how)
                assert all(map(torch.equal, again, first)), (layout, how, count)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(threads)


@pytest.mark.every_level
def test_a_large_output_is_stored_around_the_cache() -> None:
    # 16 MiB and more take other stores, a single image of them does not: rows and pixels that are
    # whole vectors or lines and such that are not, each beside a skip too, and halves.
    channels = [(96, 0), (72, 0), (96, 33), (72, 128)]
    cases = itertools.product(LAYOUTS, DTYPES[:2], [64, 61], ["nearest", "bilinear"], channels)
    for layout, dtype, w, mode, (c, c_skip) in cases:
        n = 16 // dtype.itemsize
        x = image((n, c, 64, w), dtype, layout)
        assert 4 * x.nbytes >= 16 << 20
        skip = image((n, c_skip, 128, 2 * w), dtype, layout, 1) if c_skip else None
        y = functional.interpolate(x, scale_factor=2, mode=mode, concat=skip)
        one = None if skip is None else skip[1:2]
        expected = functional.interpolate(x[1:2], scale_factor=2, mode=mode, concat=one)
        assert torch.equal(y[1:2], expected), (layout, dtype, w, mode, c_skip, c)
