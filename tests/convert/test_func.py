"""torch.func on converted models, against the unconverted ones in float64."""

import copy

import pytest
import torch
from support.conversions import images, prepared
from support.small_models import SMALL, made
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert, models
from fastcnn.convert.codegen import fit

ONCE = [name for name, small in SMALL.items() if small.gradient != "none"]


def model() -> nn.Module:
    layers = (
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), models.resnet.BasicBlock(4, 4),
        nn.GroupNorm(2, 4), nn.SiLU(), nn.Upsample(scale_factor=2), nn.InstanceNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return prepared(nn.Sequential(*layers)).eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_jacrev(mode: str, layout: torch.memory_format) -> None:
    # A backward under torch.vmap; of the parameters as well.
    plain = model().to(memory_format=layout)
    x, found = images(2, 3, 6, 7).contiguous(memory_format=layout), []
    for m in (copy.deepcopy(plain), convert(plain, mode=mode)):

        def run(parameters: dict[str, Tensor], x: Tensor, m: nn.Module = m) -> Tensor:
            return torch.func.functional_call(m, parameters, (x,))

        parameters = {k: p.detach() for k, p in m.named_parameters()}
        for chunk in (None, 3):
            rows = torch.func.jacrev(run, argnums=(0, 1), chunk_size=chunk)(parameters, x)
            found.append([*rows[0].values(), rows[1]])
    for other in found[1:]:
        assert_same(other, found[0])
    assert not any(m in fit.notes for m in plain.modules())  # by the kernels


@pytest.mark.parametrize("name", ONCE)
def test_jacrev_of_each_op(name: str) -> None:
    # Row by row, autograd says what is right.
    small, x = made(name, torch.float64).eval(), SMALL[name].inputs(2, 0, torch.float64)

    def run(*inputs: Tensor) -> Tensor:
        return small(*inputs).flatten(1)[:, :3].sum(0)

    found = torch.func.jacrev(run, argnums=tuple(range(len(x))))(*(t.detach() for t in x))
    y = run(*x)
    rows = [torch.autograd.grad(y[i], x, retain_graph=True) for i in range(3)]
    assert_same(list(found), [torch.stack(column) for column in zip(*rows, strict=True)])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ONCE)
def test_batched_gradients_of_each_op(name: str, layout: torch.memory_format) -> None:
    # PyTorch's older vmap: of its own layers GroupNorm in channels_last alone raises.
    small, inputs = made(name, torch.float64), SMALL[name].inputs(2, 0, torch.float64)
    x = [t.detach().contiguous(memory_format=layout).requires_grad_() for t in inputs]
    wanted, y = [*x, *small.parameters()], small(*x)
    dys = torch.stack([images(*y.shape) * k for k in (1, -2, 3)])
    rows = [torch.autograd.grad(y, wanted, dy, retain_graph=True) for dy in dys]
    found = torch.autograd.grad(y, wanted, dys, is_grads_batched=True)
    assert_same(list(found), [torch.stack(column) for column in zip(*rows, strict=True)])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.func.jvp's own
def test_vmap_over_vjp_and_forward_over_reverse() -> None:
    plain = model()
    x, found = images(1, 3, 6, 7), []
    for m in (copy.deepcopy(plain), convert(plain)):
        y, pull = torch.func.vjp(m, x)
        rows = torch.func.vmap(pull)(images(5, *y.shape))[0]
        hessian = torch.func.jacfwd(torch.func.jacrev(lambda x, m=m: m(x).square().sum()))(x)
        found.append([rows, hessian])
    assert_same(found[1], found[0])


def test_jacrev_of_jacrev_says_what_is_so() -> None:
    m = convert(model())
    twice = torch.func.jacrev(torch.func.jacrev(lambda x: m(x).square().sum()))
    with pytest.raises(RuntimeError, match=r"differentiated once.*fastcnn\.revert"):
        twice(images(1, 3, 6, 7))
