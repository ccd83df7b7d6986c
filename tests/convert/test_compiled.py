"""Converted models under torch.compile and torch.jit.trace: what changes later takes effect."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from support.conversion_cases import Decoder, bn, cbr, net
from support.conversions import assert_inferred, images, patterns, prepared, results
from support.tolerance import assert_same
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from fastcnn import convert, revert

pytestmark = pytest.mark.filterwarnings("ignore")  # in torch.compile's own code, and "has changed"


def _scaled(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x))) * m.scale


def _rescale(m: Any) -> None:
    m.scale = 3.0


def _replace(m: Any) -> None:
    m.relu = nn.Sigmoid()


def _slope(m: Any) -> None:
    m.relu.negative_slope = 0.5


@pytest.mark.parametrize("change", [_rescale, _replace, _slope])
def test_changes_of_a_compiled_model_take_effect(change: Callable[[Any], None]) -> None:
    """torch.compile keeps the guard's answer, and so has to see what it was made of."""
    model = net(_scaled)
    model.relu, model.scale = nn.LeakyReLU(), 2.0
    unconverted = copy.deepcopy(prepared(model))
    convert(model)
    compiled = torch.compile(model, backend="eager")
    x = images(2, 4, 5, 5)
    for m in (model, unconverted):
        m.eval()
    assert_same(compiled(x), unconverted(x))
    for m in (model, unconverted):
        change(m)
    assert_same(compiled(x), unconverted(x))


def test_many_compiled_models_do_not_count_as_one() -> None:
    """torch.compile gives up on code that it has compiled anew 8 times; here, once."""
    x = images(2, 4, 5, 5)
    for c in range(3):
        model = prepared(nn.Sequential(nn.Conv2d(4, 4 + c, 1), bn(4 + c), nn.ReLU())).eval()
        want = model(x)
        compiled = torch.compile(convert(model), backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=1):
            assert_same(compiled(x), want)


def test_traced_by_jit() -> None:
    model = prepared(nn.Sequential(cbr(nn.ReLU()), nn.Upsample(scale_factor=2))).eval()
    x = images(2, 4, 5, 5)
    want = model(x)
    traced = torch.jit.trace(convert(model), x)
    assert_same(traced(x), want)


class _Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def test_parametrizations_come_and_go() -> None:
    x = images(2, 4, 5, 5)
    before, after = prepared(bn()), prepared(bn())
    for layer in (before, after):  # of a layer that has one, and of one that gets it later
        plain = copy.deepcopy(layer)
        if layer is before:
            parametrize.register_parametrization(layer, "weight", _Twice())
            convert(layer)
        else:
            convert(layer)
            parametrize.register_parametrization(layer, "weight", _Twice())
        parametrize.register_parametrization(plain, "weight", _Twice())
        assert_same(results(layer, x), results(plain, x))
        revert(layer)
        assert_same(results(layer, x), results(plain, x))
        for one in (layer, plain):
            parametrize.remove_parametrizations(one, "weight", leave_parametrized=False)
        assert_same(results(layer, x), results(plain, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_written_past_the_counters_is_seen(dtype: torch.dtype) -> None:
    """As exponential averages by hand are: p.data.mul_(0.9).add_(q.data, alpha=0.1)."""
    model = prepared(nn.Sequential(cbr(nn.ReLU()), cbr())).to(dtype).eval()
    model.to(memory_format=torch.channels_last)
    plain, x = copy.deepcopy(model), images(2, 4, 8, 8).to(dtype)
    convert(model, mode="infer")
    with torch.no_grad():
        for _ in range(2):
            y = model(x)
            for m in (model, plain):
                for p in m.parameters():
                    p.data.mul_(0.5)
            assert not torch.equal(model(x), y)
        assert_inferred(model(x), plain.double(), x, dtype)


def test_nchw_images_beside_channels_last_weights() -> None:
    """PyTorch's first convolution goes on in channels_last, and so does ours."""
    model = prepared(nn.Sequential(cbr(nn.ReLU()), cbr())).float().eval()
    model.to(memory_format=torch.channels_last)
    convert(model, mode="infer")
    with torch.no_grad():
        y = model(images(2, 4, 8, 8).float())
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_replicas_have_weights_of_their_own() -> None:
    """nn.DataParallel's: the folded weights are the original's."""
    model = prepared(cbr(nn.ReLU())).float().eval()
    convert(model, mode="infer")
    replica = model._replicate_for_data_parallel()
    parts = [m._replicate_for_data_parallel() for m in model]
    replica._modules = dict(zip(model._modules, parts, strict=True))
    for part, m in zip(parts, model, strict=True):
        for name, p in m.named_parameters():
            setattr(part, name, p.detach())
    parts[0].weight = 2 * model[0].weight.detach()
    x = images(2, 4, 6, 6).float()
    with torch.no_grad():
        model(x)
        y = replica(x)
        revert(model)[0].weight.mul_(2)
    assert_inferred(y, model.double(), x)


def test_arguments_at_their_defaults_are_fused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = cbr(nn.ReLU())

        def forward(self, x: Tensor, doubles: bool = False) -> Tensor:
            return self.part(x) * (2 if doubles else 1)

    model = prepared(Scaled()).eval()
    convert(model)
    x = images(2, 4, 5, 5)
    y = model(x)
    assert patterns(model) == ["conv-bn-relu"]
    for same in (model(x, False), model(x, doubles=False), model(x=x)):
        assert torch.equal(same, y)
    assert torch.equal(model(x, doubles=True), 2 * y)


def test_an_upsample_beside_a_skip_stays_one_call() -> None:
    # The Upsample module is converted by itself, too, where it is called alone.
    model = convert(Decoder(nn.Upsample(scale_factor=2), True))
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, skip = images(1, 32, 4, 4).float(), images(1, 4, 8, 8).float()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=backend))(x, skip)
    assert any("upsample" in target for target in targets)
    assert not any("aten.cat" in target for target in targets)
