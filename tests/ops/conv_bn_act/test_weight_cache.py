"""FoldedConv2d keeps weights while nothing changes, and no longer."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from support.conv2d_folded_cases import Pair, kept, operators, pair
from support.roundings import Expected
from support.shapes import LAYOUTS
from torch import nn
from torch.nn.utils import parametrizations

from fastcnn.ops.conv_bn_act import folded as conv2d_folded, inference_candidates

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN"
)


def changes() -> dict[str, Callable[[Pair], object]]:
    def step(model: Pair) -> None:
        model.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with torch.enable_grad():
            model.plain(torch.randn(2, 4, 9, 8)).sum().backward()
        optimizer.step()

    def load(model: Pair, assign: bool) -> None:
        other = {k: 1.5 * v for k, v in model.state_dict().items()}
        model.load_state_dict(other, assign=assign)

    def there_and_back(model: Pair) -> None:
        model.to(torch.bfloat16).to(torch.float32)  # rounded, perhaps at the old address

    return {
        "weight": lambda m: m.conv.weight.mul_(1.5),
        "bias": lambda m: m.conv.bias.add_(1),
        "mean": lambda m: m.norm.running_mean.add_(1),
        "var": lambda m: m.norm.running_var.mul_(2),
        "gamma": lambda m: m.norm.weight.mul_(2),
        "beta": lambda m: m.norm.bias.add_(1),
        "eps": lambda m: setattr(m.norm, "eps", 0.5),
        "optimizer": step,
        "load_state_dict": lambda m: load(m, False),
        "assigned": lambda m: load(m, True),
        ".data": lambda m: setattr(m.conv.weight, "data", 2 * m.conv.weight.data),
        ".to": there_and_back,
        "another module's": lambda m: setattr(
            m.conv, "weight", nn.Parameter(2 * m.conv.weight.detach())
        ),
        "parametrized": lambda m: parametrizations.weight_norm(m.conv),
        "stride": lambda m: setattr(m.conv, "stride", (2, 2)),
    }


@pytest.mark.parametrize("name", changes())
def test_changes_are_noticed(name: str) -> None:
    for layout, mode in itertools.product(LAYOUTS.values(), (torch.no_grad, torch.inference_mode)):
        model = pair()
        x = torch.randn(2, 4, 9, 8).contiguous(memory_format=layout)
        with mode():
            before = model(x)
        with torch.no_grad():
            changes()[name](model)
        with mode():
            after = model(x)
            # weight_norm's weight is the same number by number.
            assert name == "parametrized" or not torch.equal(after, before)
            assert torch.equal(after, model.step(x))


def test_writes_without_a_counter_are_noticed_by_three_numbers() -> None:
    model, x = pair(), torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        before = model(x)
        model.conv.weight.data.mul_(1.5)
        changed = model(x)
        assert torch.equal(changed, model.step(x))
        assert not torch.equal(changed, before)
        model.conv.weight.data.view(-1)[1] += 1.5  # none of the three
        assert torch.equal(model(x), changed)
        model.folded.refresh()
        assert torch.equal(model(x), model.step(x))
        assert not torch.equal(model(x), changed)


def test_tensors_of_inference_mode_are_folded_at_every_call() -> None:
    with torch.inference_mode():
        model, x = pair(), torch.randn(2, 4, 9, 8)
        before = model(x)
        assert not kept(lambda: model(x))
        model.conv.weight.mul_(1.5)
        assert not torch.equal(model(x), before)
        assert torch.equal(model(x), model.step(x))


def test_cuda_s_folded_plan_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU, by the fallback of cuDNN's operator there.
    monkeypatch.setattr(conv2d_folded, "is_planned", lambda x: True)
    monkeypatch.setattr(inference_candidates, "choose", lambda problem: "cudnn_fused")
    model, x = pair(), torch.randn(2, 4, 9, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        residual = torch.randn_like(model(x))
        for _ in range(2):
            y, exact = model(x, residual), copy.deepcopy(model).double()
            expected = Expected(
                lambda m=exact: {"y": m.plain(x.double(), residual.double())},
                torch.float32,
                autocast=True,  # weights are rounded after they are folded
            )
            expected.check({"y": y})
            names = operators(lambda: model(x, residual))
            assert not any("rsqrt" in name for name in names)
            model.norm.weight.mul_(2)
