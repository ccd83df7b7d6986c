"""What a converted module says of its class and its forward is what it said before."""

import copy
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from support.conversion_cases import Branch, bn, cbr, net
from support.conversions import images, patterns, prepared, results
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert, revert


class Base(nn.Module):
    """Runs its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cbr(nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Old(Base):
    """Calls its parent's forward as Python 2 did."""

    def forward(self, x: Tensor, doubles: bool = False) -> Any:
        y = super(self.__class__, self).forward(x)
        return 2 * y if doubles else y


@pytest.fixture
def x() -> Tensor:
    return images(2, 4, 5, 5)


def test_a_forward_may_ask_for_its_object_s_class(x: Tensor) -> None:
    model, eager = prepared(Old()).eval(), prepared(Old()).eval()
    convert(model)
    assert patterns(model) == ["conv-bn-relu"]
    for options in ({}, {"doubles": True}):  # which runs as written
        assert_same(model(x, **options), eager(x, **options))


def test_a_class_stands_for_the_original() -> None:
    model: Any = convert(cbr(nn.ReLU()))
    assert model.__class__ is nn.Sequential
    made = type(model)(nn.Linear(2, 3))
    assert type(made) is nn.Sequential
    assert made[0].in_features == 2
    assert isinstance(made, type(model))
    assert not isinstance(nn.Linear(2, 3), type(model))

    class Derived(type(model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return 2 * super().forward(x)

    derived = Derived(nn.Identity())
    assert type(derived) is Derived
    assert Derived.__bases__ == (nn.Sequential,)
    assert derived(images(1)).equal(2 * images(1))


def test_another_class_is_converted_too(x: Tensor) -> None:
    """As FSDP's fully_shard derives one."""

    class Doubled(Base):
        def forward(self, x: Tensor) -> Any:
            return 2 * super().forward(x)

    model, eager = prepared(Base()), prepared(Base())
    for m in (convert(model), eager):
        m.__class__ = type("Sharded", (m.__class__,), {})
    assert_same(results(model, x), results(eager, x))
    assert patterns(model) == ["conv-bn-relu"]
    assert type(model).__name__ == model.__class__.__name__ == "Sharded"
    for m in (model, eager):
        m.__class__ = Doubled
    assert_same(results(model, x), results(eager, x))
    assert patterns(model) == ["conv-bn-relu"]
    assert type(revert(model)) is Doubled


def _scaled() -> Any:
    model = net(lambda m, x: m.relu(m.bn(m.conv(x))) * m.scale)
    model.scale = nn.Parameter(images(1))
    return model


class _Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


PARAMETRIZED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "the model": (_scaled, "", "scale"),
    "a norm": (bn, "", "weight"),
    "a layer of a trace": (lambda: cbr(nn.ReLU()), "0", "weight"),
    "a layer by itself": (lambda: Branch(body=cbr(nn.ReLU()), norm=bn()), "norm", "weight"),
}


@pytest.mark.filterwarnings("ignore:fastcnn.convert")  # "has changed", "nothing runs fused"
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_copies_of_parametrized_models(name: str, first: bool, x: Tensor) -> None:
    make, path, tensor = PARAMETRIZED[name]
    model, eager = prepared(make()), prepared(make())
    for m in (model, eager):
        if m is model and not first:
            convert(m)
        parametrize.register_parametrization(m.get_submodule(path), tensor, _Twice())
        if m is model and first:
            convert(m)
    copied = copy.deepcopy(model)
    assert_same(results(copied, x), results(eager, x))
    for m in (copied, eager):
        parametrize.remove_parametrizations(m.get_submodule(path), tensor)
    assert_same(results(copied, x), results(eager, x))
    classes = [type(m) for m in revert(copied).modules()]
    assert classes == [type(m) for m in eager.modules()]


@pytest.mark.parametrize("path", ["", "0", "0.0", "0.1"])
@pytest.mark.parametrize("first", [True, False])
def test_a_forward_bound_to_its_own_instance_is_no_other(path: str, first: bool, x: Tensor) -> None:
    """As accelerate's unwrap_model sets one."""

    def bind(model: nn.Module) -> None:
        part: Any = model.get_submodule(path)
        part.forward = MethodType(part.__class__.forward, part)

    model: Any = prepared(nn.Sequential(cbr(nn.ReLU()), cbr()))
    want = results(copy.deepcopy(model), x)
    if first:
        bind(model)
    convert(model)
    if not first:
        bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(results(model, x), want)
    assert patterns(model) == ["conv-bn-relu > conv-bn"]
    assert "forward" not in vars(model)
    part: Any = model.get_submodule(path)
    part.forward = part.forward
    del part.forward
    assert patterns(model) == ["conv-bn-relu > conv-bn"]
    part.forward = MethodType(nn.Identity.forward, part)
    if path:
        with pytest.warns(UserWarning, match=r"\.forward was not there"):
            model(x)


@pytest.mark.filterwarnings("ignore")  # in torch.compile's own code
def test_compiled_forwards_may_set_attributes(x: Tensor) -> None:
    class Keeping(Base):
        kept: Any = None

        def forward(self, x: Tensor, doubles: bool = False) -> Any:
            self.kept = x
            return super().forward(x)

    model = convert(prepared(Base()))
    model.__class__ = Keeping
    assert isinstance(model, Keeping)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x, doubles=True)  # as written
    assert torch.equal(model.kept, x)
