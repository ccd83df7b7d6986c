"""What the fuzz draws, where it puts it, and how each result is compared.

Hypothesis draws sizes, types, layouts, offsets and parameters, so that it can shrink them; numbers
come from a generator whose seed is drawn. They are float32's, rounded to the case's dtype.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import torch
from activations import ACTS, near_a_kink
from hypothesis import HealthCheck, Phase, given, settings
from shapes import LAYOUTS
from tolerance import assert_as_exact_as_torch, assert_same_in_float64, margin
from torch import Tensor

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], Tensor]

# Of every 100 cases. CI runs 2,400, the same in every run; `make fuzz N=...` runs N new ones.
SHARES = {
    "batch_norm_act": 28, "group_norm_act": 20, "dropout": 14, "interpolate": 20, "augment": 10,
    "conv_bn_act": 8,
}  # fmt: skip
IN_CI = 2400
ASKED = os.environ.get("FASTCNN_FUZZ")
CASES = {op: -(-int(ASKED or IN_CI) * share // 100) for op, share in SHARES.items()}

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GUARD = 64  # elements before and behind a tensor: as many as the widest vector of bytes
# Of the terms that an error is told by: each is rounded that often at most, in float32's or
# float64's ulps, before it is summed (converted, centred, scaled, multiplied).
ROUNDINGS = 4.0


def fuzz(op: str, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Run a test on the op's number of cases, and see to it that so many ran."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        ran = 0

        def counted(**drawn: Any) -> None:
            nonlocal ran
            ran += 1
            test(**drawn)

        known = settings(
            max_examples=CASES[op], deadline=None, derandomize=ASKED is None, database=None,
            print_blob=True, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        drawn = known(given(**strategies)(counted))

        def run() -> None:
            drawn()
            assert ran >= CASES[op], f"{op}: expected {CASES[op]} cases, ran {ran}"

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


# ---- what is drawn -----------------------------------------------------------------------------

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
        self.generator = torch.Generator().manual_seed(image["seed"])

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


def memory(t: Tensor) -> Tensor:
    """The bytes of all the memory that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, NaN and signs of zero included."""
    if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
        return False
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}[a.element_size()]
    return torch.equal(a.view(whole), b.view(whole))


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


# ---- how results are compared ------------------------------------------------------------------


def outcome(fn: Function, tensors: Tensors, leaves: list[str], dy: Tensor) -> dict[str, Tensor]:
    """y, the leaves' gradients, and the running statistics after the call."""
    given = {k: t.detach().requires_grad_(k in leaves) for k, t in tensors.items()}
    running = {k: placed(t, LAYOUTS["nchw"], 1) for k, t in tensors.items() if "running" in k}
    y = fn({**given, **running})
    y.backward(dy)
    return {"y": y.detach(), **running} | {f"d{k}": given[k].grad for k in leaves}


def to(tensors: Tensors, **how: Any) -> dict[str, Tensor]:
    """Convert all; the memory format of images alone."""
    images = {k: t.to(**how) for k, t in tensors.items() if t.dim() == 4}
    how.pop("memory_format", None)
    return images | {k: t.to(**how) for k, t in tensors.items() if t.dim() != 4}


def check(
    ours: Function,
    eager: Function,
    tensors: Tensors,
    dy: Tensor,
    scales: Mapping[str, float],
    terms: int,
    kind: str,
    exact: Function | None = None,
) -> None:
    """Compare y and all gradients with float64, and what needs no tolerance bit by bit.

    scales: of the terms that each result is summed of. kind: of the second dy.
    """
    leaves = [k for k in tensors if "running" not in k]
    x = tensors["x"]
    before = {k: memory(t) for k, t in [*tensors.items(), ("dy", dy)]}
    actual = outcome(ours, tensors, leaves, dy)
    # NCHW: there PyTorch's group norm has two passes, and loses no digits to a large mean.
    wide = to(tensors, dtype=torch.float64, memory_format=torch.contiguous_format)
    expected = outcome(exact or eager, wide, leaves, dy.double())
    # Layouts sum in other orders: PyTorch's error is the larger one of the two.
    yardsticks = [
        outcome(eager, to(tensors, dtype=x.dtype, memory_format=f), leaves, dy.to(x.dtype))
        for f in LAYOUTS.values()
    ]
    assert actual.keys() == expected.keys()
    for k, t in actual.items():
        like = dy if k == "y" else tensors[k.removeprefix("d")]
        assert t.dtype == like.dtype, f"{k}: expected {like.dtype}, got {t.dtype}"
        if t.dim() == 4 and t.numel() > 0 and k != "dskip":  # that is a view of dy
            assert layouts(t) == layouts(like), f"{k}: expected {layouts(like)}, got {t.stride()}"
        scale = ROUNDINGS * scales[k]
        if t.dtype is torch.float64:
            assert_same_in_float64(k, t, expected[k], max(terms, 1), scale)
        else:
            worst = max((y[k] for y in yardsticks), key=lambda y, e=expected[k]: distance(y, e))
            assert_as_exact_as_torch(k, t, worst, expected[k], scale)
        if "running" in k:
            assert memory_around_is_nan(t), f"{k}: written around"
    for k, t in [*tensors.items(), ("dy", dy)]:
        assert torch.equal(memory(t), before[k]), f"{k}: modified, or written around"
    check_bits(ours, tensors, leaves, dy, actual, kind)


def check_bits(
    ours: Function,
    tensors: Tensors,
    leaves: list[str],
    dy: Tensor,
    first: Mapping[str, Tensor],
    kind: str,
) -> None:
    """The same in a second run, on one thread, for a dy of any strides, and for x alone.

    But for a residual: where its gradient is wanted, dx is made of it, rounded as it is.
    """
    with one_thread():
        again = outcome(ours, tensors, leaves, dy)
        alone = {} if "residual" in tensors else outcome(ours, tensors, ["x"], dy)
    for k, t in again.items():
        assert same_bits(t, first[k]), f"{k}: other bits on one thread"
    for k, t in alone.items():
        assert same_bits(t, first[k]), f"{k}: other bits where x alone requires a gradient"
    if dy.numel() == 0:
        return
    other = strange(dy, kind)
    layout = torch.contiguous_format if dy.is_contiguous() else torch.channels_last
    dense = outcome(ours, tensors, leaves, other.clone(memory_format=layout))
    for k, t in outcome(ours, tensors, leaves, other).items():
        assert torch.equal(t, dense[k]), f"{k}: other bits for a dy that is {kind}"


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def layouts(t: Tensor) -> list[str]:
    """In which a tensor is dense: in both with one channel or one pixel."""
    return [k for k, layout in LAYOUTS.items() if t.is_contiguous(memory_format=layout)]


def distance(t: Tensor, exact: Tensor) -> float:
    return (t.double() - exact).abs().max().item() if t.numel() > 0 else 0.0


def memory_around_is_nan(t: Tensor) -> bool:
    base, start = t._base, t.storage_offset()
    return bool(base[:start].isnan().all() & base[start + t.numel() :].isnan().all())


def norm_scales(
    tensors: Tensors, mean: Tensor, std: Tensor, z: Tensor, dy: Tensor
) -> dict[str, float]:
    """Of the terms of a normalisation with these statistics, all in float64, broadcast to x.

    Centring costs an ulp of x and of its mean, which is then divided by std; an error of z goes on
    into the activation's slope, and so into every gradient.
    """
    if dy.numel() == 0:
        return dict.fromkeys(("y", "dx", "dresidual", "dweight", "dbias"), 0.0)
    x, c = tensors["x"].double(), dy.shape[1]
    weight = tensors["weight"].double().abs() if "weight" in tensors else torch.ones(c)
    weight = weight.reshape(1, c, 1, 1)
    centred = 1 + (x.abs() + mean.abs()) / std
    added = tensors["residual"].double().abs().max().item() if "residual" in tensors else 0.0
    z_error = (weight * centred).max().item() + z.abs().max().item() + added
    largest, total = dy.abs().max().item(), dy.double().abs().sum((0, 2, 3)).max().item()
    normalised = ((x - mean) / std).abs().max().item()
    gain, slope = (weight / std).max().item(), largest * z_error
    return {
        "y": z_error,
        "dx": (weight / std * centred).max().item() * largest + gain * slope,
        "dresidual": largest + slope,
        "dweight": total * (centred.max().item() + z_error * normalised),
        "dbias": total * (1 + z_error),
    }


def away_from_kinks(dy: Tensor, z: Tensor, act: str, z_error: float) -> None:
    """Zero dy where a rounding of z decides about a gradient: either one is right there."""
    if dy.numel() > 0:
        sums = torch.float64 if dy.dtype is torch.float64 else torch.float32
        reach = margin(dy.dtype) * (1 + z.abs().max().item() / 8)
        reach += ROUNDINGS * torch.finfo(sums).eps * z_error
        dy.masked_fill_(near_a_kink(z, act, reach), 0)


ACTIVATIONS = st.sampled_from(list(ACTS))
