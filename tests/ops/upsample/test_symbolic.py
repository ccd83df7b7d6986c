"""interpolate where sizes or factors are symbols: torch.compile of several calls, torch.export.

What F.interpolate and nn.Upsample compile or export, ours must too, and with the bits of eager.
"""

from typing import Any

import pytest
import torch
from support.seeds import seeded
from torch import Tensor, nn

from fastcnn.functional import interpolate
from fastcnn.nn import Upsample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FACTORS = [1.5, 1.25, 2, 3, 1 / 3, (1.5, 2.3)]


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch.compiler.reset()


def image(h: int = 12, w: int = 15, n: int = 2) -> Tensor:
    return torch.randn(n, 3, h, w, generator=seeded(h))


def gradients(run: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), x)]


@pytest.mark.parametrize(
    ("backend", "factors"),
    [
        ("aot_eager", FACTORS),
        ("inductor", FACTORS[4:]),
        pytest.param("inductor", FACTORS, marks=pytest.mark.slow),
    ],
    ids=["aot_eager", "inductor", "inductor, all"],
)
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_modules_of_several_factors(dynamic: bool | None, backend: str, factors: list[Any]) -> None:
    # The second factor that dynamo meets is a symbol; so are, with dynamic=True, the sizes.
    # A third whose digits a generated program cuts off makes 3 rows of 12.
    for factor in factors:
        module = Upsample(None, factor, "bilinear")
        run = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=backend)
        for x in (image(), image(37, 100)):
            assert all(map(torch.equal, gradients(run, x), gradients(module, x))), factor


def test_modules_of_several_sizes() -> None:
    for size in (7, 8, (9, 10), (11, 12), (13, 12)):
        module = Upsample(size)
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, gradients(run, image()), gradients(module, image()))), size


@pytest.mark.parametrize("recompute", [False, True])
def test_a_factor_that_is_an_argument(recompute: bool) -> None:
    def resize(x: Tensor, factor: Any) -> Tensor:
        return interpolate(x, scale_factor=factor, recompute_scale_factor=recompute)

    run = torch.compile(resize, fullgraph=True, backend="aot_eager")
    for factor in FACTORS:
        assert torch.equal(run(image(), factor), resize(image(), factor)), factor


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0, 0.0], ids=str)
def test_a_bad_factor_is_refused_while_compiling(factor: float) -> None:
    # As F.interpolate's, the graph that was made for good factors must not let it through.
    run = torch.compile(lambda x, f: interpolate(x, scale_factor=f), backend="aot_eager")
    for good in (1.5, 1.25):
        run(image(), good)
    with pytest.raises(ValueError, match="expected an output of at least 1x1 pixels"):
        run(image(), factor)


EXPORTED = [
    ("scale_factor", 1.5),
    ("scale_factor", 1 / 3.7),
    ("scale_factor", (2, 0.29)),
    ("size", (9, 7)),
]


@pytest.mark.parametrize("strict", [False, True], ids=["fake", "strict"])
@pytest.mark.parametrize(("name", "value"), EXPORTED, ids=str)
def test_export_with_dynamic_sizes(name: str, value: Any, strict: bool) -> None:
    # Sizes at which size * factor is just below an integer are among them: 100 * 0.29.
    arguments = {name: value, "mode": "bilinear"}
    module = nn.Sequential(nn.Conv2d(3, 4, 1), Upsample(**arguments))
    dims = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim("h", min=8, max=256)}
    dims[3] = torch.export.Dim("w", min=8, max=256)
    program = torch.export.export(module, (image(),), dynamic_shapes=(dims,), strict=strict)
    exported = program.module()
    for x in (image(), image(37, 100), image(8, 11, 1), image(100, 200, 3)):
        assert torch.equal(exported(x), module(x)), x.shape


class Doubled(nn.Module):
    """Twice the size, behind a skip."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return interpolate(x, scale_factor=2.0, concat=skip)


@pytest.mark.parametrize("strict", [False, True], ids=["fake", "strict"])
def test_export_beside_a_skip(strict: bool) -> None:
    # As torch.cat's: the skip's size is known to be twice the other one.
    n, h, w = (torch.export.Dim(name, min=2, max=64) for name in "nhw")
    dims = {0: n, 2: h, 3: w}, {0: n, 2: 2 * h, 3: 2 * w}
    arguments = image(), image(24, 30)
    exported = torch.export.export(Doubled(), arguments, dynamic_shapes=dims, strict=strict)
    x, skip = image(7, 9, 3), image(14, 18, 3)
    assert torch.equal(exported.module()(x, skip), Doubled()(x, skip))
