"""Random chains and blocks of convolutions against torch.nn modules: test_ops.py says more.

In float64 all that there is. In other types what is smooth, by what roundings do to it
(support/roundings.py); gradients are the same bits in every memory level.
"""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume
from support.activations import ACTS
from support.chains import (
    LEVELS,
    SHORTCUTS,
    Stage,
    baseline,
    check_float64,
    expected_roundings,
    results,
)
from support.fuzz_cases import DTYPES, FLAGS, SEEDS, fuzz
from support.fuzz_check import same_bits
from support.seeds import seed_all
from support.shapes import LAYOUTS
from torch import Tensor, nn

from fastcnn.nn import BatchNormAct2d, Block
from fastcnn.nn.conv_bn_act import Step
from fastcnn.ops.conv2d.onednn_workarounds import onednn_crashes

# 26 and more: where bfloat16 in channels_last has a weight gradient of its own.
WIDTHS = st.one_of(st.integers(1, 12), st.sampled_from([16, 26, 32, 40, 64]))
ONE_OR_TWO = st.sampled_from([1, 1, 2])
PAIRS = st.tuples(ONE_OR_TWO, ONE_OR_TWO)
SMOOTH = ["none", "silu", "gelu", "sigmoid"]  # no derivative that jumps


@st.composite
def steps(draw: st.DrawFn, same: bool, smooth: bool, pools: bool) -> dict[str, Any]:
    """One step. same: whether its output has its input's size, over the stride."""
    sides = st.sampled_from([1, 3]) if same else st.integers(1, 4)
    kernel, dilation = draw(st.tuples(sides, sides)), draw(PAIRS)
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    affine = draw(st.sampled_from([True, True, False]))
    pool = st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3))
    return {
        "width": draw(WIDTHS),
        "kernel": kernel,
        "stride": (1, 1) if same else draw(PAIRS),
        "padding": padding if same else draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "dilation": dilation,
        "groups": draw(st.sampled_from([1, 1, 2, 3, "depthwise"])),
        "bias": draw(st.booleans()),
        # Without beta a channel whose values are all equal lies where derivatives jump, at 0.
        "act": draw(st.sampled_from(SMOOTH if smooth or not affine else list(ACTS))),
        "affine": affine,
        "track": draw(st.sampled_from([True, True, False])),
        "momentum": draw(st.sampled_from([0.1, 0.9, None])),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        "frozen": draw(st.sampled_from([False, False, True])),
        "pool": draw(pool) if pools and not same else None,
    }


@st.composite
def blocks(draw: st.DrawFn, smooth: bool, pools: bool) -> dict[str, Any]:
    """One to three steps and a shortcut."""
    shortcut = draw(st.sampled_from([*SHORTCUTS, "tensor"]))
    same = shortcut not in ("none", "tensor")
    return {
        "shortcut": shortcut,
        "stride": draw(PAIRS),
        "steps": draw(st.lists(steps(same, smooth, pools), min_size=1, max_size=3)),
        "beside": draw(steps(same, smooth, pools)),
    }


@st.composite
def stages(draw: st.DrawFn, smooth: bool, pools: bool) -> dict[str, Any]:
    """One or two blocks, the image's channels and how it is run."""
    return {
        "c": draw(WIDTHS),
        "blocks": draw(st.lists(blocks(smooth, pools), min_size=1, max_size=2)),
        "memory": draw(st.sampled_from(LEVELS)),
    }


def make_step(c: int, s: dict[str, Any], **changes: Any) -> Step:
    s = s | changes
    groups = c if s["groups"] == "depthwise" else s["groups"]
    groups = groups if c % groups == 0 else 1
    # An output to every group, as near to the width as can be; what is added decides it for itself.
    width = s["width"] if s.get("exact") else -(-s["width"] // groups) * groups
    if width % groups != 0:
        groups = 1
    conv = nn.Conv2d(
        c, width, s["kernel"], s["stride"], s["padding"], s["dilation"], groups, s["bias"]
    )
    bn = BatchNormAct2d(width, s["eps"], s["momentum"], s["affine"], s["track"], act=s["act"])
    bn.train(not s["frozen"])
    if s["pool"] is None:
        return conv, bn
    size, stride = s["pool"]
    return conv, bn, nn.MaxPool2d(size, stride, size // 2)


def make_stage(drawn: dict[str, Any]) -> tuple[Stage, bool]:
    """The stage, and whether it takes a tensor as residual: a single block can."""
    c, made = drawn["c"], []
    for block in drawn["blocks"]:
        shortcut = block["shortcut"]
        if shortcut == "tensor" and len(drawn["blocks"]) > 1:
            shortcut = "none"
        parts, c_in = [], c
        for i, s in enumerate(block["steps"], start=1):
            last: dict[str, Any] = {"stride": block["stride"]} if i == 1 else {}
            if shortcut in ("none", "tensor", "identity"):
                last = {}
            if i == len(block["steps"]):
                last |= {"pool": s["pool"] if shortcut == "none" else None}
                last |= {"width": c_in, "exact": True} if shortcut == "identity" else {}
            parts.append(make_step(c, s, **last))
            c = parts[-1][0].out_channels
        added: list[Step] | None = [] if shortcut == "identity" else None
        point = {"kernel": (1, 1), "padding": (0, 0), "width": c, "exact": True, "pool": None}
        if shortcut == "projection":
            added = [make_step(c_in, block["beside"], **point, stride=block["stride"])]
        elif shortcut == "two steps":
            first = make_step(c_in, block["beside"], stride=block["stride"])
            added = [first, make_step(first[0].out_channels, block["beside"], **point)]
        made.append(Block(parts, added))
    return Stage(*made, memory=drawn["memory"]), drawn["blocks"][0]["shortcut"] == "tensor" and (
        len(made) == 1
    )


def crashes(conv: nn.Module, args: tuple[Tensor]) -> None:
    """Drop the case where PyTorch's own convolution would end this process."""
    assert isinstance(conv, nn.Conv2d)
    x, g = args[0], (conv.stride, conv.padding, conv.dilation)
    assume(x.dtype is torch.float64 or not onednn_crashes(x, conv.weight, *g))


def check_roundings(model: Stage, x: Tensor, added: Tensor | None, mode: Callable[[], Any]) -> None:
    """Compare with float64; and the memory levels, which recompute what they do not save."""

    def run(model: Stage) -> dict[str, Tensor | None]:
        with mode():
            return results(copy.deepcopy(model), x, added)

    # Evaluation rounds weights into which the batch norm is folded.
    autocast = x.dtype if mode is torch.no_grad else None
    with mode():
        expected = expected_roundings(model, x, added, autocast)
    actual = run(model)
    if x.dtype is torch.float16:  # it overflows where float64 does not: there PyTorch's does too
        nchw = torch.contiguous_format
        given = [t if t is None else t.contiguous() for t in (x, added)]
        with mode():
            eager = results(baseline(model).to(memory_format=nchw), *given)
        for name, t in eager.items():
            if t is not None and not t.isfinite().all():
                del expected.exact[name]
    expected.check({name: actual[name] for name in expected.exact})
    for level in () if mode is torch.no_grad else LEVELS:
        model.memory = level
        for name, t in run(model).items():
            same = t is None or same_bits(t, actual[name])
            assert same, f"{name}: other bits with memory={level}"


@fuzz(
    "conv_bn_act", dtype=st.sampled_from([torch.float64, *DTYPES]), data=st.data(),
    n=st.integers(0, 4), h=st.integers(1, 12), w=st.integers(1, 12),
    layout=st.sampled_from(list(LAYOUTS)), x_needs_grad=FLAGS, evaluates=FLAGS, seed=SEEDS,
)  # fmt: skip
def test_conv_bn_act(
    dtype: torch.dtype, data: st.DataObject, n: int, h: int, w: int, layout: str,
    x_needs_grad: bool, evaluates: bool, seed: int,
) -> None:  # fmt: skip
    # In float64 all that there is; in other types what is smooth. A rounding may decide which value
    # of a window a gradient goes to.
    wide = dtype is torch.float64
    drawn = data.draw(stages(smooth=not wide, pools=wide or evaluates))
    seed_all(seed)
    model, residual = make_stage(drawn)
    sizes = (n, drawn["c"], h, w)
    x = torch.randn(sizes).contiguous(memory_format=LAYOUTS[layout])
    model = model.to(memory_format=LAYOUTS[layout])
    eager, counts = baseline(model), []
    for conv in eager.convs:
        conv.register_forward_pre_hook(crashes)
        conv.register_forward_hook(lambda _, __, y: counts.append(y[:, 0].numel()))
    try:
        shape = eager(x).shape
    except (RuntimeError, ValueError):
        with pytest.raises(ValueError, match=r"conv_bn_act: .*expected"):
            model(x)
        return
    # Of few values a channel a batch norm's dx is what is left where nearly all cancels.
    if wide or min(counts) < 16:
        check_float64(model, sizes, residual, layout, x_needs_grad=x_needs_grad)
        return
    added = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) if residual else None
    model, x, added = model.to(dtype), x.to(dtype), added if added is None else added.to(dtype)
    if evaluates:
        check_roundings(model.eval(), x, added, torch.no_grad)
    else:
        check_roundings(model, x, added, torch.enable_grad)
