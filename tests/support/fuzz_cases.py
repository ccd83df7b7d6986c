"""What the fuzz draws, and where it puts it.

Hypothesis draws sizes, types, layouts, offsets and parameters, so that it can shrink them; numbers
come from a generator whose seed is drawn. They are float32's, rounded to the case's dtype.
"""

import os
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from support.activations import ACTS
from support.seeds import seeded
from support.shapes import LAYOUTS
from torch import Tensor

# Of every 100 cases. The same in every run, as many as below; `make fuzz N=...` runs N new ones.
SHARES = {
    "batch_norm_act": 24,
    "depthwise_conv2d": 10,
    "group_norm_act": 20,
    "dropout": 12,
    "interpolate": 16,
    "augment": 10,
    "conv_bn_act": 8,
}
QUICK, ALL = 300, 10_000  # of make test, and what make test-all adds
ASKED = os.environ.get("FASTCNN_FUZZ")
TOTALS = [int(ASKED)] if ASKED else [QUICK, pytest.param(ALL, marks=pytest.mark.slow)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GUARD = 64  # elements before and behind a tensor: as many as the widest vector of bytes


def fuzz(op: str, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Run a test on the op's number of cases, and see to it that so many ran."""

    def decorate(test: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("total", TOTALS)
        def run(total: int) -> None:
            cases, ran = -(-total * SHARES[op] // 100), 0

            def counted(**drawn: Any) -> None:
                nonlocal ran
                ran += 1
                test(**drawn)

            known = settings(
                max_examples=cases,
                deadline=None,
                derandomize=ASKED is None,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink],
            )
            known(given(**strategies)(counted))()
            assert ran >= cases, f"{op}: expected {cases} cases, ran {ran}"

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


SEEDS = st.integers(0, 2**32 - 1)
FLAGS = st.booleans()
SIDES = st.one_of(st.integers(1, 17), st.sampled_from([24, 32, 33, 57, 96]))
CHANNELS = st.one_of(st.integers(1, 40), st.sampled_from([1, 3, 16, 32, 64, 96, 128, 257, 640]))
# Mean and deviation. What is large or tiny stays within float16 where it is, and in all of them
# within what squares and their sums can be.
SCALES = [(0.0, 1.0), (1e3, 1.0), (-30.0, 1.0), (0.0, 1e-3), (0.0, 30.0)]
WIDE_SCALES = [*SCALES, (0.0, 1e-9), (0.0, 1e9), (1e6, 1e5)]


@st.composite
def images(draw: st.DrawFn, largest: int = 40_000) -> dict[str, Any]:
    """Sizes, dtype, layout, the elements by which memory is shifted, and the numbers' scale."""
    n, c, h = draw(st.integers(0, 5)), draw(CHANNELS), draw(SIDES)
    h = min(h, max(1, largest // (max(n, 1) * c)))
    w = min(draw(SIDES), max(1, largest // (max(n, 1) * c * h)))
    dtype = draw(st.sampled_from(DTYPES))
    return {
        "sizes": (n, c, h, w),
        "dtype": dtype,
        "layout": draw(st.sampled_from(list(LAYOUTS))),
        "offset": draw(st.sampled_from([0, 0, 1, 2, 3, 8])),
        "scale": draw(st.sampled_from(SCALES if dtype is torch.float16 else WIDE_SCALES)),
        "seed": draw(SEEDS),
    }


class Numbers:
    """Tensors of a case, each inside memory whose other elements are NaN.

    So a read out of bounds shows in the results, and a write in the memory.
    """

    def __init__(self, image: dict[str, Any]) -> None:
        self.layout, self.offset = LAYOUTS[image["layout"]], image["offset"]
        self.dtype = image["dtype"]
        self.generator = seeded(image["seed"])

    def normal(self, sizes: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        t = torch.randn(sizes, generator=self.generator) * deviation + mean
        return self.placed(t.to(self.dtype))

    def uniform(self, c: int, low: float, high: float, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.rand(c, generator=self.generator) * (high - low) + low
        return self.placed(t.to(self.dtype).to(dtype or self.dtype))

    def placed(self, t: Tensor) -> Tensor:
        return placed(t, self.layout, self.offset)


def placed(t: Tensor, layout: torch.memory_format, offset: int) -> Tensor:
    if t.dim() == 4:
        t = t.contiguous(memory_format=layout)
    nothing = float("nan") if t.is_floating_point() else 171
    base = torch.full((t.numel() + 2 * GUARD + offset,), nothing).to(t.dtype)
    view = base.as_strided(t.shape, t.stride(), GUARD + offset)
    return view.copy_(t)


def strange(dy: Tensor, kind: str) -> Tensor:
    """The same gradients with other strides, as autograd may send them."""
    if kind == "expanded":
        return dy.flatten()[:1].sum().expand(dy.shape)  # other values: of a sum's backward
    if kind == "strided":
        return dy.repeat_interleave(2, 3)[..., ::2]
    if kind == "transposed":
        return dy.mT.contiguous().mT
    if kind == "slice":
        return torch.cat([dy, dy, dy], 1)[:, dy.shape[1] : 2 * dy.shape[1]]
    return dy.contiguous(memory_format=LAYOUTS[kind])


STRANGE = st.sampled_from([*LAYOUTS, "expanded", "strided", "transposed", "slice"])
ACTIVATIONS = st.sampled_from(list(ACTS))
