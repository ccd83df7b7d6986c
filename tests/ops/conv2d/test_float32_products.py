"""Convolutions of half types whose products are in float32: which, what they give."""

from typing import Any

import pytest
import torch
from support.seeds import seeded
from support.tolerance import assert_rounded, walk
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.nn import BatchNormAct2d, conv_bn_act
from fastcnn.ops.conv2d import float32_products
from fastcnn.ops.conv2d.aten import convolve, convolve_bwd
from fastcnn.ops.conv2d.float32_products import Least, in_float32
from fastcnn.ops.conv2d.onednn import convolve_onednn

HALVES = (torch.bfloat16, torch.float16)
ALWAYS = dict.fromkeys(HALVES, Least(0, 0))
G = ConvGeometry((1, 1), (1, 1), (1, 1), 1)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the products in float32 on any processor."""
    monkeypatch.setattr(float32_products, "LEAST", ALWAYS)


class Types(TorchDispatchMode):
    """The types of the images and weights that convolutions of PyTorch and oneDNN read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.dtype] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in op.__name__ and "reorder" not in op.__name__:
            self.read += [t.dtype for t in args[:3] if isinstance(t, Tensor)]
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("sizes", "stride", "groups", "added"),
    [
        ((8, 8, 1, 1), 1, 1, 64 / 16),
        ((8, 8, 1, 1), 2, 1, 64 / 40),
        ((8, 4, 1, 1), 1, 2, 32 / 16),
        ((24, 8, 3, 1), 1, 1, 576 / 32),
    ],
)
def test_the_rule_counts_multiply_adds_a_value(
    sizes: tuple[int, ...],
    stride: int,
    groups: int,
    added: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.empty(2, sizes[1] * groups, 6, 6, dtype=torch.bfloat16)
    weight = torch.empty(sizes, dtype=torch.bfloat16)
    g = ConvGeometry((stride, stride), (0, 0), (1, 1), groups)
    for least, more in ((int(added), True), (int(added) + 1, False)):
        for backward in (False, True):
            pair = Least(10**9, least) if backward else Least(least, 10**9)
            monkeypatch.setattr(float32_products, "LEAST", {torch.bfloat16: pair})
            assert in_float32(x, weight, g, backward) is more
            assert not in_float32(x, weight, g, not backward)
            for kept in (x.float(), x.half(), x.double(), x.to("meta")):
                assert not in_float32(kept, weight, g, backward)


@pytest.mark.parametrize(
    ("machine", "fast", "native", "expected"),
    [
        ("x86_64", True, True, None),
        ("x86_64", False, True, Least(40, 18)),
        ("x86_64", False, False, Least(0, 0)),
        ("aarch64", True, False, None),
    ],
)
def test_which_processors(
    machine: str, fast: bool, native: bool, expected: Least | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32_products.platform, "machine", lambda: machine)
    monkeypatch.setattr(float32_products._C, "has_fast_bf16", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    found = float32_products._least()
    assert found.get(torch.bfloat16) == expected
    assert (torch.float16 in found) is (machine == "x86_64")


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_each_value_is_rounded_once(dtype: torch.dtype, channels_last: bool) -> None:
    generator = seeded(0)

    def drawn(*sizes: int) -> Tensor:
        t = torch.randn(sizes, generator=generator).to(dtype)
        return t.to(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t

    x, dy, added = drawn(2, 12, 6, 5), drawn(2, 8, 6, 5), drawn(2, 8, 6, 5)
    weight, bias = drawn(8, 12, 3, 3), drawn(8)
    xs, dys, weights = x.double(), dy.double(), weight.double()
    layout = torch.channels_last if channels_last else torch.contiguous_format

    exact = nn.functional.conv2d(xs, weights, bias.double(), padding=1)
    size = nn.functional.conv2d(xs.abs(), weights.abs(), bias.double().abs(), padding=1)
    with Types() as types:
        y = convolve(x, weight, bias, G)
        total = convolve_onednn(x, weight, bias, G, "relu", added, False)
        dx, dweight, dbias = convolve_bwd(dy, x, weight, bias, G, (True, True, True))
        alone = convolve_bwd(dy, x, weight, bias, G, (True, False, False))
    assert set(types.read) == {torch.float32}
    assert_rounded("y", y, exact, walk(12 * 9 + 1, dtype) * size)
    size += added.double().abs()
    assert_rounded("total", total, (exact + added).relu(), walk(12 * 9 + 2, dtype) * size)

    def gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            dy, x, weight, [8], *G[:3], False, (0, 0), 1, (True, True, True)
        )  # type: ignore[no-any-return]

    sizes = gradients(dys.abs(), xs.abs(), weights.abs())
    for name, found, value, size, terms in zip(
        ("dx", "dweight", "dbias"), (dx, dweight, dbias), gradients(dys, xs, weights), sizes,
        (8 * 9, 60, 60), strict=True,
    ):  # fmt: skip
        assert found is not None
        assert found.dtype is dtype
        assert_rounded(name, found, value, walk(terms, dtype) * size)
    assert alone[0] is not None
    assert alone[0].is_contiguous(memory_format=layout)
    assert torch.equal(alone[0], dx) and alone[1:] == (None, None)  # noqa: PT018


def _chain(dtype: torch.dtype) -> tuple[Tensor, nn.Conv2d, BatchNormAct2d]:
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False, dtype=dtype)
    x = torch.randn(2, 8, 6, 6, dtype=dtype, requires_grad=True)
    return x.to(memory_format=torch.channels_last), conv, BatchNormAct2d(8)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", HALVES)
def test_all_of_a_chain_is(dtype: torch.dtype) -> None:
    x, conv, bn = _chain(dtype)
    with Types() as types:
        conv_bn_act(x, [(conv, bn)]).sum().backward()
        with torch.no_grad():
            conv_bn_act(x, [(conv, bn.eval())])
    assert len(types.read) == 2 + 3 + 3
    assert set(types.read) == {torch.float32}


@pytest.mark.usefixtures("always")
def test_a_program_for_all_processors_keeps_its_types() -> None:
    x, conv, bn = _chain(torch.bfloat16)

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv, bn.eval()

        def forward(self, x: Tensor) -> Tensor:
            return conv_bn_act(x, [(self.conv, self.bn)])

    program = torch.export.export(Chain(), (x.detach(),))
    found = [
        [a.meta["val"].dtype for a in node.args[:2]]  # type: ignore[union-attr]
        for node in program.graph.nodes
        if "aten.conv" in str(node.target)
    ]
    assert found == [[torch.bfloat16] * 2]
