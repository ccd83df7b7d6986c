"""upsample_conv2d: a convolution of an upsampled activation and a skip, as PyTorch's operators."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.activations import ACTS
from support.chains import randomize
from support.paths import TESTS
from support.roundings import Expected
from support.seeds import seed_all
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import _C
from fastcnn.ops.upsample_conv2d import interface as module
from fastcnn.ops.upsample_conv2d.folded import FoldedUpsampleConv2d
from fastcnn.ops.upsample_conv2d.interface import upsample_conv2d
from fastcnn.ops.upsample_conv2d.taps import upsample_taps_bwd, upsample_taps_fwd

CL = torch.channels_last

RESIZES: dict[str, dict[str, Any]] = {
    "bilinear by 2": {"scale_factor": 2, "mode": "bilinear"},
    "corners": {"scale_factor": 2, "mode": "bilinear", "align_corners": True},
    "nearest": {"scale_factor": 2},
    "nearest-exact": {"size": (11, 9), "mode": "nearest-exact"},
    "other sizes": {"size": (13, 7), "mode": "bilinear"},  # unequal factors
    "one axis": {"size": (12, 4), "mode": "bilinear"},
    "by 3.5": {"scale_factor": 3.5, "mode": "bilinear"},
    "skip last": {"scale_factor": 2, "concat_last": True},
}


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_all(0)
    monkeypatch.setattr(module, "_LEAST_CHANNELS", 1)


NAMES = ("x", "concat", "weight", "bias")


def concatenated(x: Tensor, concat: Tensor | None, how: dict[str, Any]) -> Tensor:
    how = dict(how)
    last = how.pop("concat_last", False)
    x = F.interpolate(x, **how)
    return x if concat is None else torch.cat([x, concat] if last else [concat, x], 1)


def expected(
    x: Tensor, concat: Tensor | None, weight: Tensor, bias: Tensor | None, how: dict[str, Any]
) -> Tensor:
    return F.conv2d(concatenated(x, concat, how), weight, bias, padding=1)


def draw(how: dict[str, Any], skip: int, c: int = 5, c_out: int = 6) -> list[Tensor | None]:
    """x, concat, weight and bias in float64."""
    x = torch.randn(2, c, 5, 4, dtype=torch.float64).contiguous(memory_format=CL)
    size = concatenated(x, None, how).shape[2:]
    concat = torch.randn(2, skip, *size, dtype=torch.float64).contiguous(memory_format=CL)
    weight = torch.randn(c_out, skip + c, 3, 3, dtype=torch.float64) / 8
    return [x, concat if skip else None, weight, torch.randn(c_out, dtype=torch.float64)]


def taken(run: Any) -> bool:
    with torch.profiler.profile() as profile:
        run()
    return any("upsample_taps" in event.name for event in profile.events())


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("how", RESIZES)
def test_float64(how: str, skip: int) -> None:
    ours, theirs = draw(RESIZES[how], skip), []
    for t in ours:
        theirs.append(None if t is None else t.clone().requires_grad_())
        if t is not None:
            t.requires_grad_()
    x, concat, weight, bias = ours
    y = upsample_conv2d(x, weight, bias, concat=concat, **RESIZES[how])
    want = expected(*theirs, RESIZES[how])
    assert_same(y, want, name="y")
    assert y.is_contiguous(memory_format=CL)
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy)
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        if a is not None and b is not None:
            assert_same(a.grad, b.grad, name=f"d{name}")
    assert taken(lambda: upsample_conv2d(x, weight, bias, concat=concat, **RESIZES[how]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["bilinear by 2", "nearest"])
def test_roundings(how: str, dtype: torch.dtype) -> None:
    # Channels beyond a task's 128, pixels beyond a tile.
    drawn = [t.to(dtype) for t in draw(RESIZES[how], 7, c=34, c_out=140) if t is not None]
    dy = torch.randn(2, 140, 10, 8).to(dtype)

    def results(
        run: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor
    ) -> dict[str, Tensor | None]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = run(*leaves)
        y.backward(dy)
        grads = {f"d{name}": t.grad for name, t in zip(NAMES, leaves, strict=True)}
        return {"y": y.detach(), **grads}

    def ours(x: Tensor, concat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return upsample_conv2d(x, weight, bias, concat=concat, **RESIZES[how])

    wide = [t.double() for t in drawn]
    exact = Expected(
        lambda: results(lambda *t: expected(*t, RESIZES[how]), wide, dy.double()), dtype
    )
    exact.check(results(ours, drawn, dy))


def test_taps_are_each_other_s_transpose() -> None:
    for width in (1, 2, 75):  # one column; tiles
        z = torch.randn(2, 9 * 130, 3, width).contiguous(memory_format=CL)
        how = (7, 2 * width, None, None, 2)
        y = upsample_taps_fwd(z, *how)
        dy = torch.randn_like(y)
        dz = upsample_taps_bwd(dy, 3, width, *how[2:])
        wide = upsample_taps_fwd(z.double(), *how)
        back = upsample_taps_bwd(dy.double(), 3, width, *how[2:])
        products = wide * dy.double()
        scale = products.abs().sum().item()
        assert_same(products.sum(), (back * z.double()).sum(), scale, name="products")
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):  # the work is cut by shape alone
                torch.set_num_threads(count)
                assert torch.equal(upsample_taps_fwd(z, *how), y)
                assert torch.equal(upsample_taps_bwd(dy, 3, width, *how[2:]), dz)
        finally:
            torch.set_num_threads(threads)


def test_invalid_arguments_are_refused() -> None:
    z = torch.randn(2, 18, 3, 4).contiguous(memory_format=CL)
    with pytest.raises(RuntimeError, match="z: expected a multiple of 9 channels, got 17"):
        upsample_taps_fwd(z[:, :17].contiguous(memory_format=CL), 6, 8, None, None, 2)
    for run in (upsample_taps_fwd, upsample_taps_bwd):
        for bad, how in (
            (z.contiguous(), (6, 8, None, None, 2)),
            (z[:, :9], (6, 8, None, None, 2)),
            (z, (6, 8, None, None, 4)),
            (z, (6, 0, None, None, 2)),
            (z, (6, 8, 9.5, None, 2)),
            (z[0], (6, 8, None, None, 2)),
            (z.int(), (6, 8, None, None, 2)),
        ):
            with pytest.raises(RuntimeError, match="expected"):
                run(bad, *how)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"concat": torch.randn(2, 3, 4, 8).to(memory_format=CL)}, "concat: expected sizes"),
        (
            {"weight": torch.randn(6, 4, 3, 3)},
            "input: expected 4 channels, concat's included, .*got 8",
        ),
        ({"bias": torch.randn(5)}, "bias: expected 6 numbers"),
        ({"weight": torch.randn(6, 8, 3, 3).bfloat16()}, "weight: expected torch.float32"),
        ({"size": (4, 4)}, "exactly one"),
        ({"mode": "bicubic"}, "mode: expected"),
    ],
)
def test_errors(change: dict[str, Any], match: str) -> None:
    x, concat, weight, bias = (t.float() for t in draw(RESIZES["bilinear by 2"], 3))
    arguments = {"weight": weight, "bias": bias, "concat": concat} | RESIZES["bilinear by 2"]
    with pytest.raises((TypeError, ValueError), match=match):
        upsample_conv2d(x, **(arguments | change))


def test_where_it_is_not_used() -> None:
    x, concat, weight, bias = (t.float() for t in draw(RESIZES["bilinear by 2"], 3))
    how = RESIZES["bilinear by 2"]
    nchw = [t.contiguous() for t in (x, weight, bias, concat)]

    def run(x: Tensor, weight: Tensor, bias: Tensor, concat: Tensor) -> Tensor:
        return upsample_conv2d(x, weight, bias, concat=concat, **how)

    assert not taken(lambda: run(*nchw))
    a, w, b, skip = (t.double() for t in nchw)
    assert_same(run(a, w, b, skip), expected(a, skip, w, b, how), name="y")
    assert not taken(lambda: upsample_conv2d(x, weight[:, :5], size=(5, 5), mode="bilinear"))


class Decoder(nn.Module):
    def __init__(self, act: str, skip: int, bias: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(skip + 5, 6, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(6) if norm else None
        self.act = act
        randomize(self)
        self.folded = FoldedUpsampleConv2d(self.conv, self.norm, act)
        self.eval()

    def forward(self, x: Tensor, concat: Tensor | None, how: dict[str, Any]) -> Tensor:
        return self.folded(x, concat, **how)

    def plain(self, x: Tensor, concat: Tensor | None, how: dict[str, Any]) -> Tensor:
        y = self.conv(concatenated(x, concat, how))
        return ACTS[self.act](y if self.norm is None else self.norm(y))


def check_folded(
    model: Decoder, drawn: list[Tensor | None], how: dict[str, Any], autocast: bool = False
) -> Tensor:
    """Return y in float32, or by autocast in bfloat16, compared with PyTorch's in float64."""
    dtype, exact = torch.bfloat16 if autocast else torch.float32, copy.deepcopy(model).double()
    x, concat = (None if t is None else t.float() for t in drawn[:2])
    wide = [None if t is None else t.double() for t in (x, concat)]
    # Weights are rounded after the batch norm is folded into them.
    expected = Expected(
        lambda: {"y": exact.plain(*wide, how).detach()}, dtype, torch.float32, autocast=True
    )
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = model(x, concat, how)
        assert torch.equal(model(x, concat, how), y)
    expected.check({"y": y})
    return y


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_folded(autocast: bool) -> None:
    for act, skip, norm in (
        ("relu", 3, True),
        ("silu", 3, True),
        ("relu", 0, True),
        ("silu", 3, False),
    ):
        for how in RESIZES.values():
            model = Decoder(act, skip, bias=skip == 0, norm=norm)
            with torch.no_grad():
                check_folded(model, draw(how, skip), how, autocast)


def test_folded_notices_changes_and_gradients() -> None:
    how = RESIZES["bilinear by 2"]
    model, drawn = Decoder("relu", 3), draw(RESIZES["bilinear by 2"], 3)
    x, concat, *_ = (t.float() for t in drawn)
    with torch.no_grad():
        assert taken(lambda: model(x, concat, how))
        before = check_folded(model, drawn, how)
        model.norm.weight.mul_(1.5)
        after = check_folded(model, drawn, how)
        assert not torch.equal(after, before)
        assert torch.equal(copy.deepcopy(model)(x, concat, how), after)
    assert check_folded(model, drawn, how).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("level", _C.cpu_levels.split(","))
def test_every_instruction_set(level: str) -> None:
    order = _C.cpu_levels.split(",")
    if order.index(level) >= order.index(_C.cpu_capability()):
        pytest.skip("this processor's own is what all other tests run at, and it has none higher")
    arguments = [
        __file__,
        "-q",
        "-k",
        "float64 or roundings or transpose",
        "-p",
        "no:cacheprovider",
    ]
    code = f"import pytest; raise SystemExit(pytest.main({arguments}))"
    env = {**os.environ, "FASTCNN_CPU_CAPABILITY": level, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
