"""Converted models elsewhere: copies, files, processes, compilers, exports."""

import copy
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.chains import LEVELS
from support.conversion_cases import cbr, net
from support.conversions import images, patterns, prepared, results
from support.oracles import torchvision
from support.tolerance import assert_same
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastcnn import convert, models, revert
from fastcnn.convert.converted import Converted


class Small(nn.Module):
    """A block with a projection, a part that does not trace, a resizing, a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(nn.ReLU(inplace=True))
        self.block = torchvision.models.resnet.BasicBlock(
            4, 8, 2, nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.BatchNorm2d(8))
        )
        self.odd = _Odd()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        y = torch.cat([skip, self.up(self.odd(self.block(skip)))], 1)
        return self.fc(self.drop(y.mean((2, 3))))


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) if x.shape[0] > 1 else x


def small() -> Any:
    return prepared(Small())


@pytest.fixture
def x() -> Tensor:
    return images(2, 4, 8, 8)


def converted_parts(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, Converted)]


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": through_file,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_converted_and_their_own(how: str, x: Tensor) -> None:
    model = convert(small())
    eager = COPIES[how](model)
    assert converted_parts(eager) == converted_parts(model)
    assert patterns(eager) == patterns(model)
    assert not {id(p) for p in eager.parameters()} & {id(p) for p in model.parameters()}
    want = results(COPIES[how](model), x)
    assert_same(results(eager, x), want)
    assert_same(results(model, x), want)  # its statistics did not move with its copies'
    nn.init.zeros_(eager.fc.weight)
    assert not torch.equal(eager(x), model(x))


class Auxiliary(nn.Module):
    """Of which training runs another part."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = cbr(nn.ReLU()), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.aux(self.body(x)) if self.training else self.body(x)


@pytest.mark.parametrize("make", [Auxiliary, nn.BatchNorm2d])
def test_a_copy_does_not_run_the_forward_that_its_original_was_given(make: Any, x: Tensor) -> None:
    """A bound forward, patched as by accelerate's prepare, is bound to the copy by deepcopy."""

    def use(model: Any) -> Tensor:
        written = type(model).forward
        model.forward = types.MethodType(lambda self, x: 2 * written(self, x), model)
        copied = copy.deepcopy(model).eval()
        model.train()
        return copied(x)

    model = prepared(make(*[4] if make is nn.BatchNorm2d else []))
    assert_same(use(convert(copy.deepcopy(model))), use(model))


def test_copies_of_copies_and_of_parts(x: Tensor) -> None:
    model = convert(small())
    eager = copy.deepcopy(copy.deepcopy(model.block))
    assert_same(results(eager, x), results(copy.deepcopy(model.block), x))
    assert isinstance(eager, Converted)


def test_a_copy_of_an_unconverted_model_stays_one() -> None:
    model = small()
    convert(copy.deepcopy(model))
    assert converted_parts(model) == []


def test_revert_gives_back_the_model_to_the_bit(x: Tensor) -> None:
    model, eager = small(), small()
    everything = {name: dict(m.__dict__) for name, m in model.named_modules()}
    classes = [type(m) for m in model.modules()]
    convert(model)
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert revert(model) is model
    assert repr(model) == repr(eager)
    assert [type(m) for m in model.modules()] == classes
    for name, module in model.named_modules():
        assert module.__dict__.keys() == everything[name].keys()
        assert all(value is everything[name][key] for key, value in module.__dict__.items())
    assert all(
        torch.equal(a, b)
        for a, b in zip(results(model, x).values(), results(eager, x).values(), strict=True)
    )
    revert(revert(model))
    assert [type(m) for m in model.modules()] == classes


def test_state_dict_and_optimizer_are_the_models(x: Tensor) -> None:
    model, eager = small(), small()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, eager)]
    convert(model)
    for _ in range(2):
        for m, optimizer in zip((model, eager), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    assert_same(dict(model.state_dict()), dict(eager.state_dict()))
    fresh = convert(small())
    fresh.load_state_dict(eager.state_dict())
    assert_same(results(fresh.eval(), x), results(eager.eval(), x))


def test_exponential_moving_average(x: Tensor) -> None:
    model = convert(small())
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    assert patterns(average.module) == patterns(model)
    before = copy.deepcopy(average.module.fc.weight)
    nn.init.zeros_(model.fc.weight)
    average.update_parameters(model)  # the first takes the model's
    nn.init.ones_(model.fc.weight)
    average.update_parameters(model)
    assert torch.equal(average.module.fc.weight, torch.full_like(before, 0.5))
    assert average(x).shape == (2, 5)


@pytest.mark.filterwarnings("ignore")  # in torch.compile's own code
@pytest.mark.parametrize("mode", ["infer", pytest.param("train", marks=pytest.mark.slow)])
def test_compiled_whole(mode: Any, x: Tensor) -> None:
    model, eager = net(_block).double(), net(_block).double()
    eager.load_state_dict(model.state_dict())
    convert(model, mode=mode)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, x), _prefixed(results(eager, x)))
    model.eval(), eager.eval()
    assert_same(results(compiled, x), _prefixed(results(eager, x)))
    with torch.no_grad():
        assert_same(compiled(x), eager(x))


def _block(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(m.conv(x)))
    return m.relu(m.bn2(m.conv2(y)) + x)


def _prefixed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name parameters and buffers as torch.compile's wrapper does."""
    plain = ("output", "dx")
    return {
        k
        if k.startswith(plain)
        else f"d _orig_mod.{k[2:]}"
        if k[:2] == "d "
        else f"_orig_mod.{k}": v
        for k, v in found.items()
    }


def test_reverted_models_export_plain_graphs(x: Tensor) -> None:
    model = convert(small()).eval()
    revert(model)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets
    assert all(t.startswith("aten.") for t in targets), targets


def small_resnet(memory: str) -> models.ResNet:
    """Bottlenecks, one and then two in a stage, with every projection."""
    model = models.ResNet(models.Bottleneck, [1, 2, 1, 1], num_classes=3)
    return convert(model, memory=memory)


@pytest.mark.parametrize("memory", LEVELS)
def test_models_are_pickled_and_copied_with_their_level(memory: str) -> None:
    model = small_resnet(memory)
    x = torch.randn(2, 3, 33, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for part in (other, other.layer2[0]):
            assert part._fastcnn_conversion.options.memory == memory
        assert torch.equal(other(x), copy.deepcopy(model)(x))
