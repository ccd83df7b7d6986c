"""Random calls of every op against PyTorch in float64: `make fuzz N=100000` runs as many as asked.

support/fuzz_cases.py has what is drawn, support/fuzz_check.py how results are compared,
support/tolerance.py how exact they must be. A call that is refused must be one that PyTorch refuses
too.
"""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from support import depthwise_conv2d_cases as depthwise
from support.activations import ACTS
from support.batch_norm_cases import Case, normalised
from support.fuzz_cases import (
    ACTIVATIONS,
    FLAGS,
    SIDES,
    STRANGE,
    Numbers,
    fuzz,
    images,
)
from support.fuzz_check import Tensors, check, layouts, norm_bounds
from support.norm_cases import normalised_by_group
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import walk
from support.upsample_cases import axes, resize_errors, resized
from torch import Tensor

from fastcnn import functional, reference
from fastcnn.common.conv_geometry import output_size
from fastcnn.ops.dropout import draw_seed
from fastcnn.ops.group_norm_act import pixel_norm_act

EPS = st.sampled_from([1e-5, 1e-3, 0.1, 1e-8])
AFFINE = st.sampled_from([("weight", "bias"), ("weight",), ("bias",), ()])


def parameters(numbers: Numbers, c: int, names: tuple[str, ...], wide: bool) -> dict[str, Tensor]:
    """Gamma of both signs and now and then 0; float32 beside half images if wide."""
    half = numbers.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if wide and half else None
    found = {k: numbers.uniform(c, -2.0, 2.0, dtype) for k in names}
    if "weight" in found:
        found["weight"][1::5] = 0
    return found


@fuzz(
    "batch_norm_act", image=images(), act=ACTIVATIONS, residual=FLAGS, affine=AFFINE, wide=FLAGS,
    running=FLAGS, training=FLAGS, eps=EPS, momentum=st.floats(0, 1), kind=STRANGE,
)  # fmt: skip
def test_batch_norm_act(
    image: dict[str, Any], act: str, residual: bool, affine: tuple[str, ...], wide: bool,
    running: bool, training: bool, eps: float, momentum: float, kind: str,
) -> None:  # fmt: skip
    numbers, sizes, (mean, deviation) = Numbers(image), image["sizes"], image["scale"]
    n, c, h, w = sizes
    x = numbers.normal(sizes, mean, deviation)
    tensors = {"x": x, **parameters(numbers, c, affine, wide)}
    if residual:
        tensors["residual"] = numbers.normal(sizes)
    if running or not training:
        dtype = torch.float32 if wide and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        low, high = mean - deviation, mean + deviation
        tensors["running_mean"] = numbers.uniform(c, low, high, dtype)
        tensors["running_var"] = numbers.uniform(c, 0.5 * deviation**2, 2 * deviation**2, dtype)

    def arguments(t: Tensors) -> tuple[Any, ...]:
        stats = t.get("running_mean"), t.get("running_var")
        return t["x"], *stats, t.get("weight"), t.get("bias"), training, momentum, eps

    def ours(t: Tensors) -> Tensor:
        return functional.batch_norm_act(*arguments(t), residual=t.get("residual"), act=act)

    def before(t: Tensors) -> Tensor:
        z = F.batch_norm(*arguments(t))
        return z + t["residual"] if "residual" in t else z

    def eager(t: Tensors) -> Tensor:
        return ACTS[act](before(t))

    if training and n * h * w == 1:
        for refuses in (ours, eager):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                refuses(tensors)
        return
    wide = {k: t.double() for k, t in tensors.items()}
    dy = numbers.normal(sizes)
    given = map(wide.get, ("x", "residual", "weight", "bias", "running_mean", "running_var"))
    case = Case(*given, dy, training, act, momentum, eps)
    z = before({k: t.clone() for k, t in wide.items()})
    errors, halves = norm_bounds(normalised(case), z, act, dy)
    check(ours, eager, tensors, dy, errors, kind, halves)


@fuzz(
    "group_norm_act", image=images(), group=st.integers(0, 11), act=ACTIVATIONS, affine=AFFINE,
    wide=FLAGS, eps=EPS, kind=STRANGE,
)  # fmt: skip
def test_group_norm_act(
    image: dict[str, Any], group: int, act: str, affine: tuple[str, ...], wide: bool, eps: float,
    kind: str,
) -> None:  # fmt: skip
    # Every divisor of c, and None: each pixel over its channels, as LayerNorm2d.
    numbers, sizes = Numbers(image), image["sizes"]
    n, c, h, w = sizes
    choices = [None, *(g for g in range(1, c + 1) if c % g == 0)]
    groups = choices[group % len(choices)]
    tensors = {"x": numbers.normal(sizes, *image["scale"]), **parameters(numbers, c, affine, wide)}

    def ours(t: Tensors) -> Tensor:
        args = t.get("weight"), t.get("bias"), eps
        if groups is None:
            return pixel_norm_act("fuzz", t["x"], c, *args, act)
        return functional.group_norm_act(t["x"], groups, *args, act=act)

    def before(t: Tensors) -> Tensor:
        # Without a weight PyTorch's backward of an empty batch fails: "does not have a device".
        args = t.get("weight", t["x"].new_ones(c)), t.get("bias"), eps
        if groups is None:
            return F.layer_norm(t["x"].permute(0, 2, 3, 1), (c,), *args).permute(0, 3, 1, 2)
        return F.group_norm(t["x"], groups, *args)

    def eager(t: Tensors) -> Tensor:
        return ACTS[act](before(t))

    if groups is not None and n * (c // groups) * h * w == 1:
        for refuses in (ours, eager):
            with pytest.raises(ValueError, match="more than 1 value"):
                refuses(tensors)
        return
    wide = {k: t.double() for k, t in tensors.items()}
    dy = numbers.normal(sizes)
    given = wide["x"], wide.get("weight"), wide.get("bias"), dy.double()
    terms = normalised_by_group(*given, groups, eps)
    errors, _ = norm_bounds(terms, before(wide), act, dy)
    check(ours, eager, tensors, dy, errors, kind)


def pairs(numbers: list[int]) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.sampled_from(numbers), st.sampled_from(numbers))


@fuzz(
    "depthwise_conv2d", image=images(8_000), kernel=pairs([1, 2, 3, 3, 5, 7, 9]), same=FLAGS,
    stride=pairs([1, 2, 3, 4]), padding=pairs([0, 1, 2, 3, 4, 5]), dilation=pairs([1, 1, 1, 2, 3]),
    act=ACTIVATIONS, bias=FLAGS, wide=FLAGS, kind=STRANGE,
)  # fmt: skip
def test_depthwise_conv2d(
    image: dict[str, Any], kernel: tuple[int, int], same: bool, stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], act: str, bias: bool, wide: bool,
    kind: str,
) -> None:  # fmt: skip
    numbers, sizes = Numbers(image), image["sizes"]
    if same:  # as networks have them
        kernel, stride, dilation = (kernel[0],) * 2, (min(stride[0], 2),) * 2, (1, 1)
        padding = (kernel[0] // 2,) * 2
    geometry = (stride, padding, dilation)
    x, c = numbers.normal(sizes, *image["scale"]), sizes[1]
    dtype = torch.float32 if wide and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    weight = numbers.uniform(c * kernel[0] * kernel[1], -1.0, 1.0, dtype)
    tensors = {"x": x, "weight": weight.view(c, 1, *kernel)}
    if bias:
        tensors["bias"] = numbers.uniform(c, -1.0, 1.0, dtype)

    def ours(t: Tensors) -> Tensor:
        return functional.depthwise_conv2d(t["x"], t["weight"], t.get("bias"), *geometry, act=act)

    def eager(t: Tensors) -> Tensor:
        return depthwise.eager(t["x"], t["weight"], t.get("bias"), *geometry, act=act)

    out = output_size(sizes[2:], kernel, *geometry)
    if min(out) < 1:
        with pytest.raises(ValueError, match="expected a kernel that fits"):
            ours(tensors)
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            eager({k: t.double() for k, t in tensors.items()})
        return
    dy = numbers.normal((sizes[0], c, *out))
    if c == 1 or sizes[2] * sizes[3] == 1:  # dense in both layouts: strides decide
        dy = dy.contiguous(memory_format=LAYOUTS[layouts(ours(tensors))[0]])
    case = depthwise.Case(x, tensors["weight"], tensors.get("bias"), dy, geometry, act)
    if sizes[0] == 0:
        errors: dict[str, Any] = dict.fromkeys(("y", "dx", "dweight", "dbias"), 0.0)
    else:
        dy.copy_(depthwise.away_from_jumps(case))
        errors = depthwise.errors(case)
    check(ours, eager, tensors, dy, errors, kind)


@fuzz(
    "dropout", image=images(), p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]) | st.floats(0, 0.9),
    rank=st.sampled_from([1, 2, 3, 4, 4, 4, 5]), per_channel=FLAGS, residual=FLAGS, inplace=FLAGS,
    training=st.sampled_from([True, True, True, False]), kind=STRANGE,
)  # fmt: skip
def test_dropout(
    image: dict[str, Any], p: float, rank: int, per_channel: bool, residual: bool, inplace: bool,
    training: bool, kind: str,
) -> None:  # fmt: skip
    numbers = Numbers(image)
    sizes = {5: (*image["sizes"][:3], 1, image["sizes"][3])}.get(rank, image["sizes"][:rank])
    tensors = {"x": numbers.normal(sizes, *image["scale"])}
    if residual:
        tensors["residual"] = numbers.normal(sizes)

    def generator() -> torch.Generator:
        return seeded(image["seed"])

    def ours(t: Tensors) -> Tensor:
        x = t["x"] * 1 if inplace else t["x"]
        return functional.dropout(
            x, p, training, inplace, residual=t.get("residual"), per_channel=per_channel,
            generator=generator(),
        )  # fmt: skip

    def eager(t: Tensors) -> Tensor:
        if not training or p == 0 or t["x"].numel() == 0:
            return t["x"] + t["residual"] if residual else t["x"] * 1
        seed = int(draw_seed(t["x"].device, generator()))
        return reference.dropout(t["x"], seed, p, t.get("residual"), per_channel)

    if per_channel and rank < 3:
        with pytest.raises(ValueError, match="expected at least 3 dimensions"):
            ours(tensors)
        return
    dy = numbers.normal(sizes)
    factor = 1 / (1 - p) if p < 1 else 0.0
    errors = {"y": tensors["x"].double().abs() * factor, "dx": dy.double().abs() * factor}
    if residual:
        errors["y"] = errors["y"] + tensors["residual"].double().abs()
    errors = {k: walk(1, dy.dtype) * t for k, t in errors.items()} | {"dresidual": 0.0}
    check(ours, eager, tensors, dy, errors, kind if rank == 4 else "nchw")


FACTORS = st.sampled_from([2, 2, 4, 3, 0.5, 2.3, 1.1, 0.7, 0.29, 1 / 3]) | st.floats(0.1, 4.0)
HOW = st.sampled_from(
    [("nearest", None), ("nearest-exact", None), ("bilinear", False), ("bilinear", True)]
)


@fuzz(
    "interpolate", image=images(8_000), how=HOW, size=st.tuples(FLAGS, st.integers(0, 40), SIDES),
    factors=st.tuples(FACTORS, FACTORS), by=st.sampled_from(["size", "factor", "factors"]),
    recompute=st.sampled_from([None, True, False]), c_skip=st.sampled_from([None, 0, 1, 3, 16, 33]),
    kind=STRANGE,
)  # fmt: skip
def test_interpolate(
    image: dict[str, Any], how: tuple[str, bool | None], size: tuple[bool, int, int],
    factors: tuple[float, float], by: str, recompute: bool | None, c_skip: int | None, kind: str,
) -> None:  # fmt: skip
    numbers, sizes = Numbers(image), image["sizes"]
    n, c, h, w = sizes
    mode, align_corners = how
    asked: dict[str, Any] = {"mode": mode, "align_corners": align_corners}
    if by == "size":
        out = asked["size"] = (size[1], size[1] if size[0] else size[2])
    else:
        asked["scale_factor"] = factors[0] if by == "factor" else factors
        asked["recompute_scale_factor"] = recompute
        pair = (factors[0], factors[0 if by == "factor" else 1])
        out = (int(h * pair[0]), int(w * pair[1]))
    tensors = {"x": numbers.normal(sizes, *image["scale"])}
    if min(out) == 0:
        with pytest.raises(ValueError, match="expected an output of at least 1x1 pixels"):
            functional.interpolate(tensors["x"], **asked)
        with pytest.raises(RuntimeError, match="should be greater than 0"):
            F.interpolate(tensors["x"], **asked)
        return
    if c_skip is not None:
        tensors["skip"] = numbers.normal((n, c_skip, *out))

    def concatenated(y: Tensor, t: Tensors) -> Tensor:
        return torch.cat([t["skip"], y], 1) if "skip" in t else y

    def ours(t: Tensors) -> Tensor:
        return functional.interpolate(t["x"], **asked, concat=t.get("skip"))

    def eager(t: Tensors) -> Tensor:
        return concatenated(F.interpolate(t["x"], **asked), t)

    def exact(t: Tensors) -> Tensor:
        # PyTorch's float64 has float64 coordinates: of the nearest pixels it picks others.
        return eager(t) if mode == "bilinear" else concatenated(resized(t["x"], asked), t)

    dy = numbers.normal((n, c + (c_skip or 0), *out))
    if c == 1 or h * w == 1:  # dense in both layouts: a skip, or the strides, decide
        dy = dy.contiguous(memory_format=LAYOUTS[layouts(ours(tensors))[0]])
    errors: dict[str, Tensor | float] = {"y": 0.0, "dx": 0.0, "dskip": 0.0}
    if n > 0:
        errors |= resize_errors(tensors["x"], dy[:, c_skip or 0 :], *axes(tensors["x"], asked))
        errors["y"] = torch.cat([torch.zeros(n, c_skip or 0, *out), errors["y"]], 1)
    check(ours, exact, tensors, dy, errors, kind)
    if mode != "bilinear" and n > 0:
        y, single = ours(tensors), {k: t.float() for k, t in tensors.items()}
        assert torch.equal(y, exact(single).to(dy))
        if sum(out) <= 128:  # beyond, PyTorch has two definitions: csrc/common/resample.h
            assert torch.equal(y, eager(single).to(dy))
