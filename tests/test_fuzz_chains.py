"""Random chains and blocks of convolutions against torch.nn modules: tests/test_fuzz.py says more.

In float64 all that there is. In other types what has no kinks, by the errors of several draws
(tests/test_conv_bn_act.py says why); gradients are the same bits in every memory level.
"""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from activations import ACTS
from chains import SHORTCUTS, Stage, check_float64, results, twin, uses_batch_statistics
from fuzz_cases import DTYPES, FLAGS, SEEDS, fuzz
from fuzz_check import distance, same_bits
from hypothesis import assume
from seeds import seed_all
from shapes import LAYOUTS
from tolerance import ROUNDINGS, assert_as_exact_as_torch, error_ratio
from torch import Tensor, nn

from fastcnn.nn import BatchNormAct2d, Block
from fastcnn.nn.conv_bn_act import Step
from fastcnn.ops.convolution import onednn_crashes, onednn_overruns

# 26 and more: where bfloat16 in channels_last has a weight gradient of its own.
WIDTHS = st.one_of(st.integers(1, 12), st.sampled_from([16, 26, 32, 40, 64]))
ONE_OR_TWO = st.sampled_from([1, 1, 2])
PAIRS = st.tuples(ONE_OR_TWO, ONE_OR_TWO)
SMOOTH = ["none", "silu", "gelu", "sigmoid"]  # no kink that turns a rounding into a jump


@st.composite
def steps(draw: st.DrawFn, same: bool, smooth: bool) -> dict[str, Any]:
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
        # Without beta a channel whose values are all equal lies on the kink at 0.
        "act": draw(st.sampled_from(SMOOTH if smooth or not affine else list(ACTS))),
        "affine": affine,
        "track": draw(st.sampled_from([True, True, False])),
        "momentum": draw(st.sampled_from([0.1, 0.9, None])),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        "frozen": draw(st.sampled_from([False, False, True])),
        "pool": None if same else draw(pool),
    }


@st.composite
def blocks(draw: st.DrawFn, smooth: bool) -> dict[str, Any]:
    """One to three steps and a shortcut."""
    shortcut = draw(st.sampled_from([*SHORTCUTS, "tensor"]))
    same = shortcut not in ("none", "tensor")
    return {
        "shortcut": shortcut,
        "stride": draw(PAIRS),
        "steps": draw(st.lists(steps(same, smooth), min_size=1, max_size=3)),
        "beside": draw(steps(same, smooth)),
    }


@st.composite
def stages(draw: st.DrawFn, smooth: bool) -> dict[str, Any]:
    """One or two blocks, the image's channels and how it is run."""
    return {
        "c": draw(WIDTHS),
        "blocks": draw(st.lists(blocks(smooth), min_size=1, max_size=2)),
        "memory": draw(st.sampled_from(["default", "low", "lowest"])),
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


def rounded_tensor(t: Tensor) -> Tensor:
    """A float64 tensor in which each number is an ulp of float32 off, up or down."""
    ulp = torch.finfo(torch.float32).eps * torch.randn_like(t).sign()
    return t * (1 + ulp)


def rounded(model: Stage) -> Stage:
    for p in model.parameters():
        p.data.copy_(rounded_tensor(p.data))
    return model


def overruns(model: Stage) -> bool:
    """Whether PyTorch itself would corrupt the heap in channels_last, and end this process."""
    return any(onednn_overruns(conv.weight, conv.stride) for conv in model.convs)


def crashes(conv: nn.Module, args: tuple[Tensor]) -> None:
    """Drop the case where PyTorch's own convolution would end this process."""
    assert isinstance(conv, nn.Conv2d)
    x, g = args[0], (conv.stride, conv.padding, conv.dilation)
    assume(x.dtype is torch.float64 or not onednn_crashes(x, conv.weight, *g))


def check_pooled(
    model: Stage, sizes: tuple[int, ...], shape: tuple[int, ...], residual: bool,
    dtype: torch.dtype, layout: str, mode: Callable[[], Any],
) -> None:  # fmt: skip
    """Compare with float64 by eager's own error, the larger one of its layouts.

    Values and statistics over 4 draws. A gradient may be what is left where nearly all cancels, and
    its error a single number's, so that of few draws either side may have the larger one by any
    factor. But not always: it passes with the first draw, of 16, in which its error is at most
    twice eager's in norm. What is wrong in every draw is found, or not finite in one, not more.
    """
    model = model.to(dtype)
    # 0 but for errors: float64 has them.
    undone = [f"dconvs.{i}.bias" for i, bn in enumerate(model.bns) if uses_batch_statistics(bn)]
    found: dict[str, list[list[Tensor]]] = {}
    gradients: dict[str, float] = {}  # the least ratio of errors so far
    for i in range(16):
        x, added = torch.randn(sizes).to(dtype), torch.randn(shape).to(dtype) if residual else None

        # dy is drawn anew, too: a bias' gradient depends on nothing else.
        def run(
            model: Stage, layout: str, x: Tensor = x, added: Tensor | None = added, seed: int = i
        ) -> Any:
            as_asked = {"memory_format": LAYOUTS[layout]}
            t = None if added is None else added.to(model.convs[0].weight.dtype, **as_asked)
            with mode():
                return results(
                    copy.deepcopy(model), x.to(model.convs[0].weight.dtype, **as_asked), t,
                    seed=seed,
                )  # fmt: skip

        actual, exact = run(model, layout), run(twin(model).double(), "nchw")
        # PyTorch's, and what a rounding of all inputs changes: its own may cancel by chance.
        eager = [run(twin(model), k) for k in LAYOUTS if k == "nchw" or not overruns(model)]
        eager.append(run(rounded(twin(model).double()), "nchw", rounded_tensor(x.double())))
        for name, t in actual.items():
            if t is None or not t.is_floating_point() or name in undone:
                continue
            assert t.dtype is dtype, name
            others = [e[name] for e in eager]
            if not name.startswith("d"):
                found.setdefault(name, []).append([t, exact[name], *others])
            else:
                overflows = not all(e.isfinite().all() for e in others)
                assert t.isfinite().all() or overflows, f"{name}: not finite where PyTorch's is"
                if overflows:
                    continue
                ratio = min(error_ratio(t, e, exact[name]) for e in others)
                gradients[name] = min(ratio, gradients.get(name, ratio))
        if i >= 3 and all(ratio <= 2 for ratio in gradients.values()):
            break
    assert all(ratio <= 2 for ratio in gradients.values()), f"times eager's error: {gradients}"
    for name, draws in found.items():
        got, exact, *eager = (torch.stack(t) for t in zip(*draws, strict=True))
        worst = max(eager, key=lambda e, x=exact: distance(e, x))
        # A mean is of values of both signs, as large as their deviation.
        var = found.get(name.replace("running_mean", "running_var"), draws)
        scale = max(d[1].max().item() for d in var) ** 0.5 if "running_mean" in name else 0.0
        assert_as_exact_as_torch(name, got, worst, exact, ROUNDINGS * scale)
    # The memory levels rebuild what they do not keep: the same bits. Evaluation folds what it can
    # of the blocks that run in one call.
    for memory in () if mode is torch.no_grad else ("default", "low", "lowest"):
        model.memory = memory
        for name, t in run(model, layout).items():
            same = t is None or same_bits(t, actual[name])
            assert same, f"{name}: other bits with memory={memory}"


@fuzz(
    "conv_bn_act", dtype=st.sampled_from([torch.float64, *DTYPES]), data=st.data(),
    n=st.integers(0, 4), h=st.integers(1, 12), w=st.integers(1, 12),
    layout=st.sampled_from(list(LAYOUTS)), x_needs_grad=FLAGS, evaluates=FLAGS, seed=SEEDS,
)  # fmt: skip
def test_conv_bn_act(
    dtype: torch.dtype, data: st.DataObject, n: int, h: int, w: int, layout: str,
    x_needs_grad: bool, evaluates: bool, seed: int,
) -> None:  # fmt: skip
    # In float64 all that there is; in other types what has no kinks, by pooled errors.
    drawn = data.draw(stages(smooth=dtype is not torch.float64))
    seed_all(seed)
    model, residual = make_stage(drawn)
    sizes = (n, drawn["c"], h, w)
    x = torch.randn(sizes).contiguous(memory_format=LAYOUTS[layout])
    model = model.to(memory_format=LAYOUTS[layout])
    eager, counts = twin(model), []
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
    if dtype is torch.float64 or min(counts) < 16:
        check_float64(model, sizes, residual, layout, x_needs_grad=x_needs_grad)
    elif evaluates:
        check_pooled(model.eval(), sizes, shape, residual, dtype, layout, torch.no_grad)
    else:
        check_pooled(model, sizes, shape, residual, dtype, layout, torch.enable_grad)
