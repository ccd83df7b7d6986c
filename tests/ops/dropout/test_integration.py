"""dropout inside what PyTorch offers: compile, export, func, vmap, checkpoint. Everywhere the same
seed must be drawn and the same mask made as in eager mode."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.seeds import seed_all
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastcnn.functional import dropout
from fastcnn.nn import Dropout, Dropout2d

# Dynamo makes an instance of the autograd.Function, against PyTorch's own advice; inductor imports
# parts of torch.jit.
pytorchs_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Network(nn.Module):
    """Two dropouts of the same tensor with the same arguments, which must not be made one; one of
    channels, one that gets a tensor twice, one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.one, self.channels, self.inplace = Dropout(0.3), Dropout2d(0.4), Dropout(0.2, True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.channels(self.one(x) - self.one(x), x)
        x = self.one(x, x)
        return self.inplace(x * 2)


def step(run: Callable[[Tensor], Tensor], network: Network, layout: str = "nchw") -> list[Tensor]:
    """Outputs and gradients of two batches after one seed."""
    seed_all(3)
    found, dtype = [], next(network.parameters()).dtype
    for _ in range(2):
        x = (
            torch.randn(2, 3, 8, 9, dtype=dtype)
            .contiguous(memory_format=LAYOUTS[layout])
            .requires_grad_()
        )
        y = run(x)
        y.square().mean().backward()
        found += [y.detach(), x.grad]
    return found + [p.grad for p in network.parameters()]


@pytorchs_own_warnings
@pytest.mark.parametrize(
    ("backend", "layout"),
    [("aot_eager", "nchw"), ("aot_eager", "channels_last"),
     pytest.param("inductor", "nchw", marks=pytest.mark.slow),
     pytest.param("inductor", "channels_last", marks=pytest.mark.slow)],
)  # fmt: skip
def test_compile(layout: str, backend: str) -> None:
    seed_all(0)
    network = Network().double()
    compiled = copy.deepcopy(network)
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    actual, expected = step(run, compiled, layout), step(network, network, layout)
    assert all(torch.equal(a == 0, e == 0) for a, e in zip(actual, expected, strict=True))
    assert_same(actual, expected)


@pytorchs_own_warnings
def test_export() -> None:
    network = Network()
    x = torch.randn(2, 3, 8, 9)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
    for n in (2, 5):
        x = torch.randn(n, 3, 8, 9)
        found = []
        for run in (network, program.module()):
            seed_all(1)
            found.append(run(x))
        assert torch.equal(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    # Forward runs again in backward, with the generator's state put back: the same masks.
    seed_all(0)
    network = Network()
    expected = step(network, network)
    network.zero_grad()
    found = step(lambda x: checkpoint(network, x, use_reentrant=reentrant), network)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_func_grad() -> None:
    x, residual = torch.randn(2, 2, 3, 4, 5).unbind()

    def loss(x: Tensor, residual: Tensor) -> Tensor:
        seed_all(1)
        return dropout(x, 0.5, residual=residual).square().sum()

    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.func.grad(loss, argnums=(0, 1))(x, residual)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("per_channel", [False, True])
def test_vmap_follows_torchs_randomness(per_channel: bool) -> None:
    x = torch.ones(3, 2, 8, 4, 5)

    def samples(randomness: str) -> Tensor:
        def run(t: Tensor) -> Tensor:
            return dropout(t, 0.5, per_channel=per_channel)

        return torch.vmap(run, randomness=randomness)(x)

    with pytest.raises(RuntimeError, match="randomness error mode"):
        samples("error")
    for randomness in ("same", "different"):
        y = samples(randomness)
        assert ((y == 0) | (y == 2)).all()
        assert torch.equal(y[0], y[1]) == (randomness == "same")
    grads = torch.vmap(torch.func.grad(lambda t: dropout(t, 0.5).sum()), randomness="same")(x)
    assert torch.equal(grads[0], grads[2])
    assert set(grads.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_both_orders(layout: str, per_channel: bool) -> None:
    # It is linear in x: the double backward of a gradient penalty is the same map once more.
    seed_all(0)
    x, residual = (
        torch.randn(2, 3, 3, 5, dtype=torch.float64)
        .contiguous(memory_format=LAYOUTS[layout])
        .requires_grad_()
        for _ in range(2)
    )

    def run(x: Tensor, residual: Tensor) -> Tensor:
        seed_all(1)
        return dropout(x, 0.4, residual=residual, per_channel=per_channel)

    assert gradcheck(run, (x, residual))
    assert gradgradcheck(run, (x, residual))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    x, r = (
        torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    for residual, per_channel in ((None, False), (r, True)):
        opcheck(torch.ops.fastcnn.dropout_apply, (x, residual, torch.tensor(5), 0.3, per_channel))
        opcheck(torch.ops.fastcnn.dropout_apply_, (x, residual, torch.tensor(5), 0.3, per_channel))


def test_meta_and_autocast() -> None:
    # Sizes without numbers; and autocast, which leaves dropout alone as it does PyTorch's.
    x = torch.empty(4, 3, 8, 8, device="meta", requires_grad=True)
    y = dropout(x, 0.5)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            t = torch.ones(2, 3, dtype=dtype)
            assert dropout(t, 0.5).dtype is F.dropout(t, 0.5).dtype is dtype
